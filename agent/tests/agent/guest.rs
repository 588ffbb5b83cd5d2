//! Where the agent under test runs: as a process of this machine, or as PID 1 of a virtual machine.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest_protocol::Transport;
use tempfile::TempDir;

/// Port on the host's end to which the guest sends its ready notice.
const READY_PORT: u32 = guest_protocol::READY_PORT;

const BOOT: Duration = Duration::from_secs(60);

/// A running agent.
pub struct Guest {
    pub transport: Transport,
    /// A busybox tree, as the agent sees it.
    pub rootfs: PathBuf,
    pub is_vm: bool,
    children: Vec<Child>,
    dir: TempDir,
}

impl Guest {
    /// An ordinary root process, with a network of its own.
    pub fn process() -> Guest {
        let dir = TempDir::new().unwrap();
        let rootfs = dir.path().join("rootfs");
        busybox_tree(&rootfs);
        let socket = dir.path().join("agent.sock");
        let child = Command::new("unshare")
            .args([
                "--net",
                "sh",
                "-c",
                "ip link set lo up && exec \"$@\"",
                "sh",
            ])
            .arg(env!("CARGO_BIN_EXE_cofferdam-agent"))
            .args(["--listen", &format!("unix:{}", socket.display())])
            .spawn()
            .unwrap();
        let mut guest = Guest {
            transport: Transport::Unix {
                path: socket.clone(),
            },
            rootfs,
            is_vm: false,
            children: vec![child],
            dir,
        };
        guest.wait_for(&socket);
        guest
    }

    /// PID 1 of a virtual machine with the installed kernel and initramfs, under emulation.
    pub fn vm() -> Guest {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        let tree = path("tree");
        busybox_tree(&tree.join("rootfs"));
        // A second archive behind the first is unpacked over it.
        let mut archive = fs::read(installed("share/cofferdam/initramfs.cpio")).unwrap();
        let extra = Command::new("sh")
            .args(["-c", "find . | cpio --quiet -o -H newc -R 0:0"])
            .current_dir(&tree)
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(extra.status.success(), "cpio failed: is it installed?");
        archive.resize(archive.len().next_multiple_of(512), 0);
        archive.extend(extra.stdout);
        fs::write(path("initramfs"), archive).unwrap();

        let disk = File::create(path("disk")).unwrap();
        disk.set_len(16 << 20).unwrap();
        let made = Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4"])
            .arg(path("disk"))
            .status()
            .unwrap();
        assert!(made.success(), "mke2fs failed");
        let ready = UnixListener::bind(path(&format!("vm.sock_{READY_PORT}"))).unwrap();
        let vsock = Command::new(vsock_device())
            .arg("--guest-cid=4")
            .arg(format!("--socket={}", path("vhost.sock").display()))
            .arg(format!("--uds-path={}", path("vm.sock").display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("vhost-device-vsock");
        let mut guest = Guest {
            transport: Transport::Hybrid {
                path: path("vm.sock"),
            },
            rootfs: "/rootfs".into(),
            is_vm: true,
            children: vec![vsock],
            dir,
        };
        // Its other socket takes one connection only.
        let uds = guest.path("vm.sock");
        while !uds.exists() || !guest.path("vhost.sock").exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let begun = Instant::now();
        guest
            .children
            .push(guest.qemu().spawn().expect("qemu-system-x86_64"));
        guest.wait_ready(&ready);
        eprintln!(
            "the guest was ready after {} ms",
            begun.elapsed().as_millis()
        );
        guest
    }

    fn qemu(&self) -> Command {
        let khz = tsc_khz()
            .map(|khz| format!("tsc_early_khz={khz} "))
            .unwrap_or_default();
        let append = format!(
            "quiet panic=-1 reboot=t {khz}no_timer_check tsc=reliable noreplace-smp \
             mitigations=off \
             lapic_timer_hz=1000000000 pcie_ports=compat rcupdate.rcu_expedited=1 agent.log=debug \
             console=ttyS0 {}={READY_PORT}",
            guest_protocol::READY_PARAMETER
        );
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-smp", "1",
            "-m", "512"])
            .args([
                "-machine",
                "q35,accel=tcg,memory-backend=mem,usb=off,graphics=off,hpet=off,smbus=off,sata=off,vmport=off,smm=off",
            ])
            .args(["-cpu", "max,-erms,-fsrm"])
            .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
            .arg("-kernel")
            .arg(installed("share/cofferdam/vmlinux"))
            .arg("-initrd")
            .arg(self.path("initramfs"))
            .args(["-append", &append])
            .args(["-chardev", &format!("socket,id=vsock,path={}",
                self.path("vhost.sock").display())])
            .args(["-device", "vhost-user-vsock-pci,chardev=vsock,romfile="])
            .args(["-device", "virtio-rng-pci,romfile="])
            // A disk at PCI path 05/00, as a shim plugs them.
            .args(["-device", "pcie-root-port,id=slot5,chassis=1,slot=1,addr=05.0"])
            .args(["-drive", &format!("file={},if=none,id=disk,format=raw",
                self.path("disk").display())])
            .args(["-device", "virtio-blk-pci,drive=disk,bus=slot5,romfile="])
            .args(["-serial", &format!("file:{}", self.path("console").display())])
            .stdin(Stdio::null());
        if Path::new("/usr/share/qemu/qboot.rom").exists() {
            qemu.args(["-bios", "qboot.rom"]);
        }
        qemu
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until a child listens.
    fn wait_for(&mut self, path: &Path) {
        let end = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(path).is_err() {
            for child in &mut self.children {
                assert!(
                    child.try_wait().unwrap().is_none(),
                    "a helper died before it made {}",
                    path.display()
                );
            }
            assert!(Instant::now() < end, "{} did not appear", path.display());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_ready(&mut self, listener: &UnixListener) {
        listener.set_nonblocking(true).unwrap();
        let end = Instant::now() + BOOT;
        loop {
            if let Ok((mut stream, _)) = listener.accept() {
                let mut line = String::new();
                stream.set_read_timeout(Some(BOOT)).unwrap();
                stream.read_to_string(&mut line).unwrap();
                assert_eq!(line, "ready\n");
                return;
            }
            let dead = self
                .children
                .iter_mut()
                .any(|child| child.try_wait().unwrap().is_some());
            assert!(
                !dead && Instant::now() < end,
                "the guest did not get ready:\n{}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the guest has printed.
    pub fn console(&self) -> String {
        fs::read(self.path("console"))
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }

    /// What the agent process holds: open descriptors, mounts, cgroups of containers.
    pub fn holdings(&self) -> [usize; 3] {
        let pid = self.children[0].id();
        let entries = |path: String| fs::read_dir(path).unwrap().count();
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))
            .unwrap()
            .lines()
            .count();
        // In the agent's own view of the file system.
        let cgroups = format!("/proc/{pid}/root/sys/fs/cgroup/cofferdam-agent-{pid}");
        let cgroups = fs::read_dir(cgroups)
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .count();
        [entries(format!("/proc/{pid}/fd")), mounts, cgroups]
    }

    /// True once the agent (or its machine) has ended by itself, within ten seconds.
    pub fn ends(&mut self) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        let last = self.children.last_mut().unwrap();
        while Instant::now() < end {
            if last.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

/// Ends what a killed agent has left in its cgroup.
fn clear_cgroup(pid: u32) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let cgroup2 = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let Some(root) = cgroup2.and_then(|line| line.split(' ').nth(1)) else {
        return;
    };
    let group = Path::new(root).join(format!("cofferdam-agent-{pid}"));
    let _ = fs::write(group.join("cgroup.kill"), "1");
    let end = Instant::now() + Duration::from_secs(5);
    while group.exists() && Instant::now() < end {
        for entry in fs::read_dir(&group).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&group);
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.console());
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
            if !self.is_vm {
                clear_cgroup(child.id());
            }
        }
    }
}

fn installed(relative: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let prefix = std::env::var_os("COFFERDAM_PREFIX")
        .map_or_else(|| root.join("target/prefix"), PathBuf::from);
    let path = prefix.join(relative);
    assert!(
        path.exists(),
        "{} is not there: run `make install PREFIX={}`",
        path.display(),
        prefix.display()
    );
    path
}

fn vsock_device() -> PathBuf {
    let system = PathBuf::from("/usr/bin/vhost-device-vsock");
    if system.exists() {
        system
    } else {
        installed("libexec/cofferdam/vhost-device-vsock")
    }
}

/// The host's time stamp frequency: with it an emulated guest need not measure its own, which at
/// times hangs.
fn tsc_khz() -> Option<u64> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let mhz: f64 = text
        .lines()
        .find(|line| line.starts_with("cpu MHz"))?
        .split(':')
        .nth(1)?
        .trim()
        .parse()
        .ok()?;
    // Whole kHz; the fraction does not matter.
    format!("{:.0}", mhz * 1000.0).parse().ok()
}

fn busybox_tree(root: &Path) {
    let script = r#"set -e; mkdir -p bin dev etc home/web proc root run sys tmp var
        cp "$(command -v busybox)" bin/busybox
        bin/busybox --install bin
        printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/home/web:/bin/sh\n' >etc/passwd
        printf 'root:x:0:\n' >etc/group; echo not a program >etc/plain; chmod 644 etc/plain
        printf '#!/no/such/interpreter\n' >bin/orphan; chmod 755 bin/orphan
        ln -s /../../../../../../tmp outside; ln -s /nowhere/yet dangling
        mkdir -p seed; echo seeded >seed/file; ln -s file seed/link; chmod 700 seed"#;
    fs::create_dir_all(root).unwrap();
    let status = Command::new("sh")
        .args(["-c", script])
        .current_dir(root)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(
        status.success(),
        "no tree of busybox: is busybox-static installed?"
    );
    drop(File::open(root.join("bin/busybox")).unwrap());
}
