//! The first moments of PID 1: mounts, root, loopback, a few sysctls; and its last: power off.
//!
//! Time to the ready notice is what a user waits for at every start, so what can wait until after
//! it does.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::deadlines::DEVICE_HOTPLUG;
use crate::error::{Context, Error, Result};
use crate::gate::Admission;
use crate::log::{self, log};

/// What the agent runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// PID 1 of a virtual machine.
    Init,
    /// An ordinary root process, for tests and development.
    Process,
}

/// Where the cgroup v2 tree is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Below it are the containers of PID 1: one cgroup, so that all of them together can be slowed
/// down while the machine gets more memory.
pub const CONTAINERS: &str = "/sys/fs/cgroup/containers";

/// What the kernel command line asks of the agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Host port to which the ready notice goes.
    pub ready_port: Option<u32>,
    /// What connections to the agent need.
    pub admission: Admission,
    /// `agent.log=debug`.
    pub debug: bool,
    /// How long a hot-plugged device may take to appear.
    pub hotplug_timeout: Duration,
}

impl Parameters {
    /// Reads the parameters of a kernel command line. Unknown and malformed ones are left alone.
    pub fn parse(line: &str) -> Parameters {
        let mut parameters = Parameters {
            ready_port: None,
            admission: Admission::Anybody,
            debug: false,
            hotplug_timeout: DEVICE_HOTPLUG,
        };
        for (key, value) in line
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            match key {
                guest_protocol::READY_PARAMETER => parameters.ready_port = value.parse().ok(),
                guest_protocol::KEY_PARAMETER => {
                    parameters.admission = if value == "1" {
                        Admission::Key
                    } else {
                        Admission::Anybody
                    };
                }
                "agent.log" => parameters.debug = matches!(value, "debug" | "trace"),
                "agent.hotplug_timeout" => {
                    if let Ok(seconds) = value.parse() {
                        parameters.hotplug_timeout = Duration::from_secs(seconds);
                    }
                }
                _ => {}
            }
        }
        parameters
    }
}

/// Open files of a process whose spec sets no limit: as many as the kernel lets a process have by
/// itself.
const MAX_FILES: libc::rlim_t = 1 << 20;

/// Queued signals and timers of a user: what a host of 16 GiB has. The kernel's own is by the memory
/// of the guest.
const MAX_SIGNALS: libc::rlim_t = 1 << 16;

struct Mount {
    source: &'static str,
    target: &'static str,
    fstype: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NOSUID_NOEXEC_NODEV: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::MS_NODEV);
const NOSUID_NODEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const MOUNTS: &[Mount] = &[
    Mount {
        source: "proc",
        target: "/proc",
        fstype: "proc",
        flags: NOSUID_NOEXEC_NODEV,
        data: "",
    },
    Mount {
        source: "sysfs",
        target: "/sys",
        fstype: "sysfs",
        flags: NOSUID_NOEXEC_NODEV,
        data: "",
    },
    Mount {
        source: "dev",
        target: "/dev",
        fstype: "devtmpfs",
        flags: MsFlags::MS_NOSUID,
        data: "mode=0755",
    },
    Mount {
        source: "devpts",
        target: "/dev/pts",
        fstype: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,ptmxmode=0666",
    },
    Mount {
        source: "shm",
        target: "/dev/shm",
        fstype: "tmpfs",
        flags: NOSUID_NODEV,
        data: "mode=1777",
    },
    Mount {
        source: "run",
        target: "/run",
        fstype: "tmpfs",
        flags: NOSUID_NODEV,
        data: "mode=0755",
    },
    Mount {
        source: "cgroup2",
        target: CGROUP_ROOT,
        fstype: "cgroup2",
        flags: NOSUID_NOEXEC_NODEV,
        data: "nsdelegate,memory_recursiveprot",
    },
];

/// Sysctls of the guest. Each is tried; a kernel without one works as well.
const SYSCTLS: &[(&str, &str)] = &[
    // A guest out of memory kills a process, not the sandbox.
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "1"),
    // What a spec may ask for as RLIMIT_NOFILE; the kernel's own highest.
    ("fs/nr_open", "2147483584"),
];

/// Limits that a host sets for all of its containers, and the kernel by the memory of the machine:
/// one sandbox must not meet them first. They are raised to this, if they are lower; the host's own
/// may have come on the kernel command line.
const AT_LEAST: &[(&str, u64)] = &[
    ("fs/file-max", i64::MAX as u64),
    ("fs/inotify/max_user_instances", 8192),
    ("fs/inotify/max_user_watches", 524_288),
    ("fs/epoll/max_user_watches", 524_288),
    ("kernel/keys/maxkeys", 10_000),
    ("kernel/threads-max", 65_536),
];

/// Makes the guest a place where containers can run, and returns what the command line asks for.
///
/// # Errors
/// The mount that failed; without it no container can run.
pub fn boot() -> Result<Parameters> {
    move_root()?;
    for Mount {
        source,
        target,
        fstype,
        flags,
        data,
    } in MOUNTS
    {
        let _ = fs::create_dir(target);
        mount(Some(*source), *target, Some(*fstype), *flags, Some(*data))
            .context(|| format!("mount {fstype} on {target}"))?;
    }
    let parameters = Parameters::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    if parameters.debug
        && let Ok(kmsg) = fs::OpenOptions::new().write(true).open("/dev/kmsg")
    {
        log::to(kmsg);
    }
    // As on hosts where containerd has no limit: a process of a container takes over what its spec
    // does not set. Not so for core dumps: a host that keeps them does so in its own place.
    for (resource, most) in [
        (libc::RLIMIT_NOFILE, MAX_FILES),
        (libc::RLIMIT_NPROC, libc::RLIM_INFINITY),
        (libc::RLIMIT_SIGPENDING, MAX_SIGNALS),
    ] {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: most,
        };
        // SAFETY: the limit lives over the call.
        unsafe { libc::setrlimit(resource, &raw const limit) };
    }
    Ok(parameters)
}

/// Does the part of a boot that only containers need. It comes after the ready notice: the host
/// needs some time to answer, and this fits into it.
pub fn finish_boot() {
    enable_controllers(Path::new(CGROUP_ROOT));
    match fs::create_dir(CONTAINERS) {
        Ok(()) => enable_controllers(Path::new(CONTAINERS)),
        Err(error) => log!("create {CONTAINERS}: {error}"),
    }
    for (key, value) in SYSCTLS {
        let _ = fs::write(Path::new("/proc/sys").join(key), value);
    }
    for (key, least) in AT_LEAST {
        let path = Path::new("/proc/sys").join(key);
        let now = fs::read_to_string(&path).unwrap_or_default();
        if now.trim().parse().is_ok_and(|now: u64| now < *least) {
            let _ = fs::write(&path, least.to_string());
        }
    }
    // The kernel's "(none)" is not a valid name. CreateSandbox sets the sandbox's own.
    let _ = nix::unistd::sethostname("localhost");
    if let Err(error) = loopback_up() {
        log!("{error}");
    }
}

/// Puts a bind mount of the initramfs over the initramfs, because pivot_root(2) refuses a root that
/// has no parent mount, and every container does one.
fn move_root() -> Result<()> {
    const STAGE: &str = "/run";
    let _ = fs::create_dir(STAGE);
    mount(
        Some("/"),
        STAGE,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .context(|| "bind the root".into())?;
    std::env::set_current_dir(STAGE).context(|| "enter the new root".into())?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context(|| "move the new root".into())?;
    nix::unistd::chroot(".").context(|| "chroot to the new root".into())?;
    std::env::set_current_dir("/").context(|| "enter /".into())
}

/// Lets children of `group` use every controller there is. One write each, so that a missing one
/// stops no other.
fn enable_controllers(group: &Path) {
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let control = group.join("cgroup.subtree_control");
    if fs::write(&control, all.join(" ")).is_err() {
        for one in all {
            let _ = fs::write(&control, one);
        }
    }
}

fn loopback_up() -> Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context(|| "open a socket for lo".into())?;
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or(i16::MAX);
    // SAFETY: the request is a valid ifreq that lives over the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 {
        Err(io::Error::last_os_error()).context(|| "bring lo up".into())
    } else {
        Ok(())
    }
}

/// An ordinary root process gets mounts, hostname, IPC and a cgroup v2 tree of its own, so that it
/// can do what PID 1 does without touching the host. Returns the cgroup below which containers
/// live.
///
/// # Errors
/// The step that failed, for example without root.
pub fn isolate() -> Result<String> {
    use nix::sched::{CloneFlags, unshare};
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
        .context(|| "unshare mounts, hostname and IPC (root is needed)".into())?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context(|| "make mounts private".into())?;
    mount(
        Some("run"),
        "/run",
        Some("tmpfs"),
        NOSUID_NODEV,
        Some("mode=0755"),
    )
    .context(|| "mount tmpfs on /run".into())?;
    mount(
        Some("cgroup2"),
        CGROUP_ROOT,
        Some("cgroup2"),
        NOSUID_NOEXEC_NODEV,
        None::<&str>,
    )
    .context(|| format!("mount cgroup2 on {CGROUP_ROOT}"))?;
    let group = format!("{CGROUP_ROOT}/cofferdam-agent-{}", std::process::id());
    fs::create_dir(&group).context(|| format!("create cgroup {group}"))?;
    enable_controllers(Path::new(&group));
    Ok(group)
}

/// Powers the machine off. Returns only if the kernel refuses.
pub fn power_off() -> Error {
    // SAFETY: sync has no preconditions.
    unsafe { libc::sync() };
    let error = match nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    Error::Io {
        context: "power off".into(),
        source: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_by_key() {
        let parameters = Parameters::parse(
            "quiet panic=1 cofferdam.ready_port=1029 cofferdam.key=1 agent.log=debug \
             agent.hotplug_timeout=7 x",
        );
        assert_eq!(
            parameters,
            Parameters {
                ready_port: Some(1029),
                admission: Admission::Key,
                debug: true,
                hotplug_timeout: Duration::from_secs(7)
            }
        );
        let parameters = Parameters::parse("agent.log=info cofferdam.ready_port=nonsense");
        let defaults = Parameters {
            ready_port: None,
            admission: Admission::Anybody,
            debug: false,
            hotplug_timeout: DEVICE_HOTPLUG,
        };
        assert_eq!(parameters, defaults);
    }
}
