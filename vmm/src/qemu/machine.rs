//! Our machine, as a command line. It holds what every sandbox has; all that differs is attached
//! over QMP.

use std::arch::x86_64::_rdtsc;
use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::accel::Resolved;
use super::args::{Arguments, Properties};
use super::capabilities::{BRIDGE, Capabilities, QBOOT, VIRTCONSOLE, VIRTIO_SERIAL, monitor};
use super::check::check;
use crate::confine::Confinement;
use crate::devices::memory::region_mib;
use crate::error::Result;

/// Slots of the root bus: 0 is the host bridge, 0x1f the chip set; the machine's own devices come
/// first, then the ports.
pub(crate) const FIRST_PORT_SLOT: u8 = 4;
pub(super) const LAST_PORT_SLOT: u8 = 0x1e;

/// MiB of translated code that QEMU keeps under emulation. Less than a boot needs makes it
/// translate all of it again.
const TCG_BUFFER_MIB: u64 = 128;

/// A virtual machine to start.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The QEMU binary; an absolute path.
    pub qemu: PathBuf,
    /// What that binary can do ([`super::capabilities::query`]).
    pub capabilities: Capabilities,
    /// The accelerator ([`super::accel::Accelerator::resolve`]).
    pub accel: Resolved,
    /// Shows in the process list.
    pub name: String,
    /// An uncompressed kernel with a PVH entry (a bzImage works, slower).
    pub kernel: PathBuf,
    /// Without one the kernel has to find its root by itself.
    pub initramfs: Option<PathBuf>,
    /// Added at the end of the kernel's command line.
    pub kernel_params: Vec<String>,
    /// MiB of guest memory.
    pub memory_mib: u64,
    /// The most that it can be given later ([`crate::Machine::resize_memory`]); if it is more, the
    /// first growth takes a port.
    pub max_memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The most that there can be later ([`crate::Machine::resize_vcpus`]), up to 240.
    pub max_vcpus: u32,
    /// Places for a device each, 1 to 27 with those of [`crate::boot`] and the bridges. One costs
    /// 3 ms of an emulated boot.
    pub root_ports: u8,
    /// Bridges to buses with [`BRIDGE_SLOTS`] places each, for when no root port is free. One costs
    /// 8 ms of an emulated boot. A guest's kernel has to keep room behind them
    /// (configs/kernel/patches/0010-bridge-windows.patch).
    pub bridges: u8,
    /// For debugging: the end of what the guest's console (hvc0) shows is kept in this file, and in
    /// one with the suffix `log.old`, 64 KiB each.
    pub console: Option<PathBuf>,
    /// `cgroup.procs` files that QEMU enters before it runs.
    pub cgroup_procs: Vec<PathBuf>,
    /// How gladly the kernel kills it when memory runs out (proc(5)); the caller's own score if
    /// none.
    pub oom_score_adj: Option<i32>,
    /// The network namespace that QEMU runs in; the caller's, or an empty one for a confined QEMU,
    /// if none.
    pub netns: Option<Arc<OwnedFd>>,
    /// What QEMU is confined to; nothing if none.
    pub confinement: Option<Confinement>,
    /// Where it is kept which files a program needs.
    pub cache_dir: PathBuf,
}

/// What QEMU inherits or reads by path, under the names that it has for them.
#[derive(Debug)]
pub(crate) struct Inherited<'a> {
    /// Number of the monitor's socket.
    pub monitor: RawFd,
    /// Number of the console's socket.
    pub console: Option<RawFd>,
    pub kernel: &'a Path,
    pub initramfs: Option<&'a Path>,
}

/// Places behind a bridge: a conventional bus has 32 slots, and the first is the bridge's own.
const BRIDGE_SLOTS: u8 = 31;

/// Where a device can be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The PCI bus, by QEMU's name.
    pub bus: String,
    /// The slot on it.
    pub slot: u8,
    /// Where the guest finds it.
    pub pci_path: String,
}

/// How many places there are: those behind root ports come first.
pub(crate) fn places(config: &MachineConfig) -> u8 {
    config.root_ports + config.bridges * BRIDGE_SLOTS
}

/// One of them, of a machine with so many root ports.
pub(crate) fn place(root_ports: u8, number: u8) -> Place {
    let (bus, on_root_bus, slot) = match number.checked_sub(root_ports) {
        None => (format!("port{number}"), number, 0),
        Some(number) => {
            let bridge = number / BRIDGE_SLOTS;
            let slot = number % BRIDGE_SLOTS + 1;
            (format!("bridge{bridge}"), root_ports + bridge, slot)
        }
    };
    Place {
        bus,
        slot,
        pci_path: format!("{:02x}/{slot:02x}", FIRST_PORT_SLOT + on_root_bus),
    }
}

/// The command line. The CPUs wait for `cont`.
///
/// # Errors
/// The configuration asks for what cannot be.
pub(crate) fn arguments(
    config: &MachineConfig,
    inherited: &Inherited<'_>,
) -> Result<Vec<OsString>> {
    check(config)?;
    let mut arguments = Arguments::default();
    for flag in [
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        // Under emulation also for the translations of code, which outlive a reset: the kernel's
        // marks do not (configs/kernel/patches/0004-emulated-code.patch).
        "-no-reboot",
        "-S",
    ] {
        arguments.flag(flag);
    }
    arguments.plain("-display", "none");
    arguments.list("-name", Properties::pairs().with("guest", &config.name));
    monitor(&mut arguments, inherited.monitor);
    let filtered = config
        .confinement
        .as_ref()
        .is_none_or(|confinement| confinement.seccomp);
    if config.capabilities.sandbox && filtered {
        let denied = ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"];
        let filter = denied
            .into_iter()
            .fold(Properties::new("on"), |filter, what| {
                filter.with(what, "deny")
            });
        arguments.list("-sandbox", filter);
    }
    machine(&mut arguments, config);
    boot(&mut arguments, config, inherited);
    devices(&mut arguments, config, inherited.console);
    Ok(arguments.into_vec())
}

fn machine(arguments: &mut Arguments, config: &MachineConfig) {
    let mut q35 = Properties::new("q35")
        .with("memory-backend", "mem")
        .off("dump-guest-core");
    // What no guest of ours has a driver for costs it time at boot and us attack surface.
    for unused in [
        "usb", "graphics", "vmport", "smbus", "sata", "i8042", "smm", "hpet",
    ] {
        if config.capabilities.machine_options.contains(unused) {
            q35 = q35.off(unused);
        }
    }
    arguments.list("-machine", q35);
    if config.accel.kvm {
        arguments.list("-accel", Properties::new("kvm"));
        arguments.plain("-cpu", "host");
    } else {
        arguments.list(
            "-accel",
            Properties::new("tcg").number("tb-size", TCG_BUFFER_MIB),
        );
        // `rep movsb` is emulated byte by byte: without these flags the guest moves words.
        arguments.list("-cpu", Properties::new("max").off("erms").off("fsrm"));
        // 0.15 s less than SeaBIOS. Not yet tested under KVM, where there is little to win.
        if config.capabilities.has_qboot() {
            arguments.plain("-bios", QBOOT);
        }
    }
    let mut smp = Properties::pairs().number("cpus", config.vcpus);
    if config.max_vcpus > config.vcpus {
        smp = smp.number("maxcpus", config.max_vcpus);
    }
    arguments.list("-smp", smp);
    let size = format!("{}M", config.memory_mib);
    let mut memory = Properties::pairs().with("size", &size);
    let region = region_mib(config.memory_mib, config.max_memory_mib);
    if region > 0 {
        memory = memory.with("maxmem", format!("{}M", config.memory_mib + region));
    }
    arguments.list("-m", memory);
    // Shared: vhost-user helpers map it too.
    arguments.list(
        "-object",
        Properties::new("memory-backend-memfd")
            .with("id", "mem")
            .with("size", &size)
            .on("share"),
    );
}

fn boot(arguments: &mut Arguments, config: &MachineConfig, inherited: &Inherited<'_>) {
    arguments.plain("-kernel", inherited.kernel);
    if let Some(initramfs) = inherited.initramfs {
        arguments.plain("-initrd", initramfs);
    }
    arguments.plain("-append", kernel_params(config).join(" "));
}

fn kernel_params(config: &MachineConfig) -> Vec<String> {
    // A guest that panics or reboots ends QEMU at once (-no-reboot); there is no keyboard
    // controller to ask.
    let mut params: Vec<String> = vec!["panic=-1".into(), "reboot=t".into()];
    if config.console.is_some() {
        params.extend(["console=hvc0".into(), "ignore_loglevel".into()]);
    } else {
        params.push("quiet".into());
    }
    if !config.accel.kvm {
        // Emulated timers cannot be trusted to calibrate each other: without these a boot now and
        // then hangs for ever.
        params.push(format!("tsc_early_khz={}", tsc_khz()));
        // The emulated APIC timer is exactly this fast; our kernel is told (a patch), others
        // measure for 0.1 s.
        params.push("lapic_timer_hz=1000000000".into());
        let fast = [
            "no_timer_check",
            "tsc=reliable",
            "noreplace-smp",
            "mitigations=off",
        ];
        params.extend(fast.map(String::from));
    }
    // ACPI does the hot-plug; the port services only cost time. A grace period of RCU is felt at
    // every unmount.
    params.extend(["pcie_ports=compat", "rcupdate.rcu_expedited=1"].map(String::from));
    if config.max_memory_mib > config.memory_mib {
        // Most of the added memory takes only what can be moved elsewhere, so that it can be given
        // back.
        params.push("memory_hotplug.online_policy=auto-movable".into());
    }
    params.extend(config.kernel_params.iter().cloned());
    params
}

/// Speed of the time stamp counter, which the emulator passes on to the guest as it is, in kHz.
/// Measured, because /proc/cpuinfo tells the present clock of a core, which is another thing. Takes
/// one millisecond.
fn tsc_khz() -> u64 {
    let (mut ticks, mut best) = (0, Duration::MAX);
    // A preempted measurement is a wrong one: the shortest of three is the one that was disturbed
    // least.
    for _ in 0..3 {
        let begin = Instant::now();
        // SAFETY: reads a counter that every x86-64 CPU has.
        let first = unsafe { _rdtsc() };
        while begin.elapsed() < Duration::from_micros(330) {
            std::hint::spin_loop();
        }
        // SAFETY: as above.
        let last = unsafe { _rdtsc() };
        let took = begin.elapsed();
        if took < best {
            (ticks, best) = (last.wrapping_sub(first), took);
        }
    }
    ticks.saturating_mul(1_000_000) / (best.as_nanos() as u64).max(1)
}

fn devices(arguments: &mut Arguments, config: &MachineConfig, console: Option<RawFd>) {
    let on_root_bus = |driver: &str, slot: u8| {
        Properties::new(driver)
            .with("bus", "pcie.0")
            .with("addr", format!("{slot:#x}"))
    };
    arguments.list(
        "-object",
        Properties::new("rng-builtin").with("id", "entropy"),
    );
    arguments.list(
        "-device",
        on_root_bus("virtio-rng-pci", 1)
            .with("id", "rng")
            .with("rng", "entropy")
            .on("disable-legacy"),
    );
    let balloon = on_root_bus("virtio-balloon-pci", 2)
        .with("id", "balloon")
        .on("disable-legacy");
    arguments.list("-device", balloon.on("free-page-reporting"));
    if let Some(console) = console {
        arguments.list(
            "-chardev",
            Properties::new("socket")
                .with("id", "console")
                .with("fd", console.to_string()),
        );
        let serial = on_root_bus(VIRTIO_SERIAL, 3)
            .with("id", "serial")
            .on("disable-legacy");
        arguments.list("-device", serial.number("max_ports", 1_u32));
        arguments.list(
            "-device",
            Properties::new(VIRTCONSOLE)
                .with("id", "hvc0")
                .with("chardev", "console"),
        );
    }
    for port in 0..config.root_ports {
        let device =
            on_root_bus("pcie-root-port", FIRST_PORT_SLOT + port).with("id", format!("port{port}"));
        // IO space is short, and nothing that is attached needs any.
        arguments.list(
            "-device",
            device
                .number("chassis", port + 1)
                .number("slot", port + 1)
                .with("io-reserve", "0"),
        );
    }
    for bridge in 0..config.bridges {
        let slot = FIRST_PORT_SLOT + config.root_ports + bridge;
        let device = on_root_bus(BRIDGE, slot);
        arguments.list("-device", device.with("id", format!("bridge{bridge}")));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::qemu) fn config() -> MachineConfig {
        MachineConfig {
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            capabilities: Capabilities::full(),
            accel: Resolved {
                kvm: false,
                reason: String::new(),
            },
            name: "pod,1".into(),
            kernel: "/k,1/vmlinux".into(),
            initramfs: Some("/i.cpio".into()),
            kernel_params: vec!["a=b,c".into()],
            memory_mib: 256,
            max_memory_mib: 256,
            vcpus: 2,
            max_vcpus: 2,
            root_ports: 2,
            bridges: 2,
            console: None,
            cgroup_procs: Vec::new(),
            oom_score_adj: None,
            netns: None,
            confinement: None,
            cache_dir: "/cache".into(),
        }
    }

    fn arguments(config: &MachineConfig) -> Result<Vec<OsString>> {
        let inherited = Inherited {
            monitor: 7,
            console: config.console.is_some().then_some(8),
            kernel: &config.kernel,
            initramfs: config.initramfs.as_deref(),
        };
        super::arguments(config, &inherited)
    }

    fn line(config: &MachineConfig) -> String {
        let words = arguments(config).unwrap();
        words
            .iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" | ")
    }

    #[test]
    fn the_base_machine_is_all_there_is() {
        let line = line(&config());
        for part in [
            "-S | ",
            "-name | guest=pod,,1",
            "-chardev | socket,id=qmp,fd=7 | -mon | chardev=qmp,mode=control",
            "-sandbox | on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-machine | q35,memory-backend=mem,dump-guest-core=off,usb=off,sata=off | ",
            "-accel | tcg,tb-size=",
            "-smp | cpus=2 | -m | size=256M | -object | \
             memory-backend-memfd,id=mem,size=256M,share=on",
            "-kernel | /k,1/vmlinux | -initrd | /i.cpio | -append | panic=-1 reboot=t quiet \
             tsc_early_khz=",
            " a=b,c | ",
            "virtio-balloon-pci,bus=pcie.0,addr=0x2,id=balloon,disable-legacy=on,free-page-reporting=on",
            "pcie-root-port,bus=pcie.0,addr=0x5,id=port1,chassis=2,slot=2,io-reserve=0",
            "pcie-pci-bridge,bus=pcie.0,addr=0x7,id=bridge1",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(
            !line.contains("virtconsole") && !line.contains("port2"),
            "{line}"
        );
    }

    #[test]
    fn root_ports_are_taken_first_and_each_place_is_another() {
        let all: Vec<Place> = (0..places(&config()))
            .map(|number| place(2, number))
            .collect();
        assert_eq!(all.len(), 64);
        let paths = |range: std::ops::Range<usize>| {
            let paths = all[range].iter().map(|place| place.pci_path.as_str());
            paths.collect::<Vec<_>>()
        };
        assert_eq!(paths(0..4), ["04/00", "05/00", "06/01", "06/02"]);
        assert_eq!(paths(32..34), ["06/1f", "07/01"]);
        assert_eq!((all[63].bus.as_str(), all[63].slot), ("bridge1", 31));
    }

    #[test]
    fn kvm_needs_no_timer_hints_and_debugging_has_a_console() {
        let accel = Resolved {
            kvm: true,
            reason: String::new(),
        };
        let line = line(&MachineConfig {
            accel,
            console: Some("/log,s/c".into()),
            ..config()
        });
        assert!(line.contains("-accel | kvm | -cpu | host"), "{line}");
        assert!(!line.contains("tsc") && !line.contains("quiet"), "{line}");
        assert!(
            line.contains("console=hvc0") && line.contains("socket,id=console,fd=8"),
            "{line}"
        );
    }

    #[test]
    fn room_to_grow_is_made_only_where_it_is_wanted() {
        let fixed = config();
        assert!(
            !["maxcpus", "maxmem", "memory_hotplug"]
                .iter()
                .any(|part| line(&fixed).contains(part))
        );
        let grows = MachineConfig {
            max_vcpus: 8,
            max_memory_mib: 1000,
            ..fixed.clone()
        };
        let line = line(&grows);
        // 744 MiB more, in whole sections of 128.
        assert!(
            line.contains("-smp | cpus=2,maxcpus=8 | -m | size=256M,maxmem=1024M | "),
            "{line}"
        );
        assert!(
            line.contains(" memory_hotplug.online_policy=auto-movable a=b,c"),
            "{line}"
        );
        for (wrong, wanted) in [
            (
                MachineConfig {
                    max_vcpus: 1,
                    ..fixed.clone()
                },
                "2 to 1 CPUs",
            ),
            (
                MachineConfig {
                    vcpus: 0,
                    ..fixed.clone()
                },
                "0 to 2 CPUs",
            ),
            (
                MachineConfig {
                    max_vcpus: 241,
                    ..fixed.clone()
                },
                "2 to 241 CPUs: there can be 1 to 240",
            ),
            (
                MachineConfig {
                    max_memory_mib: 255,
                    ..fixed.clone()
                },
                "256 MiB of memory",
            ),
        ] {
            let error = arguments(&wrong).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[test]
    fn an_unconfined_qemu_filters_its_calls_where_it_can() {
        let filtered = config();
        assert!(line(&filtered).contains("-sandbox"));
        let mut lesser = filtered;
        lesser.capabilities.sandbox = false;
        assert!(!line(&lesser).contains("-sandbox"));
    }

    #[test]
    fn the_counter_is_measured_the_same_twice() {
        let (first, second) = (tsc_khz(), tsc_khz());
        assert!(
            first.abs_diff(second) < first / 100,
            "{first} kHz, {second} kHz"
        );
    }
}
