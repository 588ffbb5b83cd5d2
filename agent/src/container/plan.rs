//! An OCI spec, checked and turned into what a container's first process will do, step by step.
//!
//! Everything that can be wrong in a spec is found here, before anything exists; and the child that
//! follows the plan has nothing left to parse.

use std::ffi::CString;
use std::path::{Component, Path};
use std::str::FromStr;
use std::sync::Arc;

use guest_protocol::protocols::oci::{self, LinuxCapabilities, LinuxIDMapping, Spec};
use nix::mount::MsFlags;

use super::seccomp::Filter;
use crate::error::{Error, Result};
use crate::log::log;
use crate::mount_options::{Options, propagation};

/// How a process presents itself once it runs: everything that exec(2) and the calls before it
/// need.
#[derive(Clone, Debug)]
pub struct ProcessPlan {
    pub args: Vec<CString>,
    pub env: Vec<CString>,
    pub cwd: CString,
    pub uid: libc::uid_t,
    pub gid: libc::gid_t,
    pub groups: Vec<libc::gid_t>,
    /// `None` leaves it to the container.
    pub capabilities: Option<Capabilities>,
    pub rlimits: Vec<(libc::__rlimit_resource_t, libc::rlimit)>,
    pub no_new_privileges: bool,
    pub oom_score_adj: i64,
    pub seccomp: Option<Arc<Filter>>,
    pub terminal: bool,
    /// Rows and columns of the terminal at the start; zero is unknown.
    pub size: (u16, u16),
}

/// The five capability sets as bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

/// One mount of a container.
#[derive(Clone, Debug)]
pub struct MountPlan {
    pub target: String,
    pub source: CString,
    pub kind: MountKind,
    pub options: Options,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    Bind { recursive: bool },
    Cgroup,
    New { fstype: CString },
}

/// A device node of a container.
#[derive(Clone, Debug)]
pub struct DevicePlan {
    pub path: String,
    /// File type bits and permissions.
    pub mode: libc::mode_t,
    pub number: libc::dev_t,
    pub uid: libc::uid_t,
    pub gid: libc::gid_t,
}

/// Namespaces that are joined by path.
#[derive(Clone, Debug)]
pub struct Join {
    pub kind: &'static str,
    pub flag: libc::c_int,
    pub path: String,
}

/// A container's first process.
#[derive(Clone, Debug)]
pub struct Plan {
    pub process: ProcessPlan,
    pub root: CString,
    pub root_readonly: bool,
    pub root_propagation: Option<MsFlags>,
    pub mounts: Vec<MountPlan>,
    pub devices: Vec<DevicePlan>,
    /// False when /dev itself is brought along by a bind.
    pub make_dev: bool,
    pub masked: Vec<String>,
    pub readonly: Vec<String>,
    /// Below /proc/sys, with the value.
    pub sysctls: Vec<(String, String)>,
    pub hostname: Option<String>,
    pub join: Vec<Join>,
    /// uid_map and gid_map of a new user namespace.
    pub user_maps: Option<(String, String)>,
}

/// A C string; a NUL inside is an error that names the value.
pub fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Invalid(format!("{text:?} has a NUL byte inside")))
}

impl ProcessPlan {
    /// Checks a process.
    ///
    /// # Errors
    /// What is wrong, for the caller's eyes.
    pub fn new(process: &oci::Process, seccomp: Option<Arc<Filter>>) -> Result<ProcessPlan> {
        if process.Args.is_empty() {
            return Err(Error::Invalid(
                "the process has no args: the image names no command and none was given".into(),
            ));
        }
        let cwd = if process.Cwd.is_empty() {
            "/"
        } else {
            &process.Cwd
        };
        if !cwd.starts_with('/') {
            return Err(Error::Invalid(format!(
                "working directory {cwd:?} is not absolute"
            )));
        }
        let user = process.User.get_or_default();
        let size = process.ConsoleSize.get_or_default();
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        Ok(ProcessPlan {
            args: process
                .Args
                .iter()
                .map(|arg| c_string(arg))
                .collect::<Result<_>>()?,
            env: process
                .Env
                .iter()
                .map(|variable| c_string(variable))
                .collect::<Result<_>>()?,
            cwd: c_string(cwd)?,
            uid: user.UID,
            gid: user.GID,
            groups: user.AdditionalGids.clone(),
            capabilities: process.Capabilities.as_ref().map(capabilities),
            rlimits: rlimits(&process.Rlimits),
            no_new_privileges: process.NoNewPrivileges,
            oom_score_adj: process.OOMScoreAdj.clamp(-1000, 1000),
            seccomp,
            terminal: process.Terminal,
            size: (cells(size.Height), cells(size.Width)),
        })
    }
}

impl Plan {
    /// Checks a whole spec.
    ///
    /// # Errors
    /// What is wrong, for the caller's eyes.
    pub fn new(spec: &Spec, seccomp: Option<Arc<Filter>>) -> Result<Plan> {
        let process = spec
            .Process
            .as_ref()
            .ok_or_else(|| Error::Invalid("the spec has no process".into()))?;
        let root = spec
            .Root
            .as_ref()
            .ok_or_else(|| Error::Invalid("the spec has no root".into()))?;
        let linux = spec
            .Linux
            .as_ref()
            .ok_or_else(|| Error::Invalid("the spec has no linux section".into()))?;
        if !root.Path.starts_with('/') {
            return Err(Error::Invalid(format!(
                "root path {:?} is not absolute",
                root.Path
            )));
        }
        let root_propagation = match linux.RootfsPropagation.as_str() {
            "" => None,
            name => Some(propagation(name).ok_or_else(|| {
                Error::Invalid(format!(
                    "rootfsPropagation {name:?} is not a propagation type"
                ))
            })?),
        };
        let (join, new_user) = namespaces(&linux.Namespaces)?;
        let has_uts = linux
            .Namespaces
            .iter()
            .any(|namespace| namespace.Type == "uts");
        let hostname = Some(spec.Hostname.clone()).filter(|name| !name.is_empty() && has_uts);
        if spec.Hooks.is_some() {
            log!("hooks are not run in the guest");
        }
        let user_maps = new_user.then(|| (id_map(&linux.UIDMappings), id_map(&linux.GIDMappings)));
        if user_maps
            .as_ref()
            .is_some_and(|(users, groups)| users.is_empty() || groups.is_empty())
        {
            return Err(Error::Invalid(
                "a user namespace needs uidMappings and gidMappings".into(),
            ));
        }
        Ok(Plan {
            process: ProcessPlan::new(process, seccomp)?,
            root: c_string(&root.Path)?,
            root_readonly: root.Readonly,
            root_propagation,
            mounts: spec.Mounts.iter().map(mount).collect::<Result<_>>()?,
            devices: devices(&linux.Devices)?,
            make_dev: !spec.Mounts.iter().any(|mount| {
                mount.destination.trim_end_matches('/') == "/dev"
                    && Options::parse(&mount.options).bind.is_some()
            }),
            masked: linux.MaskedPaths.clone(),
            readonly: linux.ReadonlyPaths.clone(),
            sysctls: linux
                .Sysctl
                .iter()
                .map(|(key, value)| sysctl(key, value))
                .collect::<Result<_>>()?,
            hostname,
            join,
            user_maps,
        })
    }
}

/// Capability masks; names that no kernel knows are left out.
pub fn capabilities(sets: &LinuxCapabilities) -> Capabilities {
    let mask = |names: &[String]| {
        names
            .iter()
            .fold(0, |mask, name| match caps::Capability::from_str(name) {
                Ok(capability) => mask | capability.bitmask(),
                Err(_) => {
                    log!("unknown capability {name:?} left out");
                    mask
                }
            })
    };
    Capabilities {
        bounding: mask(&sets.Bounding),
        effective: mask(&sets.Effective),
        inheritable: mask(&sets.Inheritable),
        permitted: mask(&sets.Permitted),
        ambient: mask(&sets.Ambient),
    }
}

fn rlimits(limits: &[oci::POSIXRlimit]) -> Vec<(libc::__rlimit_resource_t, libc::rlimit)> {
    let resource = |name: &str| {
        Some(match name {
            "RLIMIT_AS" => libc::RLIMIT_AS,
            "RLIMIT_CORE" => libc::RLIMIT_CORE,
            "RLIMIT_CPU" => libc::RLIMIT_CPU,
            "RLIMIT_DATA" => libc::RLIMIT_DATA,
            "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
            "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
            "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
            "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
            "RLIMIT_NICE" => libc::RLIMIT_NICE,
            "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
            "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
            "RLIMIT_RSS" => libc::RLIMIT_RSS,
            "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
            "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
            "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
            "RLIMIT_STACK" => libc::RLIMIT_STACK,
            _ => return None,
        })
    };
    let mut out = Vec::with_capacity(limits.len());
    for limit in limits {
        match resource(&limit.Type) {
            Some(resource) => out.push((
                resource,
                libc::rlimit {
                    rlim_cur: limit.Soft,
                    rlim_max: limit.Hard,
                },
            )),
            None => log!("unknown rlimit {:?} left out", limit.Type),
        }
    }
    out
}

/// What is joined by path, and whether a new user namespace is wanted. Mount, pid and cgroup
/// namespaces are always the container's own; network, ipc and uts are the sandbox's, which are the
/// guest's.
fn namespaces(entries: &[oci::LinuxNamespace]) -> Result<(Vec<Join>, bool)> {
    if entries.is_empty() {
        return Err(Error::Invalid("linux.namespaces is empty".into()));
    }
    let mut join = Vec::new();
    let mut new_user = false;
    for entry in entries {
        let (kind, flag) = match entry.Type.as_str() {
            "user" => ("user", libc::CLONE_NEWUSER),
            "ipc" => ("ipc", libc::CLONE_NEWIPC),
            "uts" => ("uts", libc::CLONE_NEWUTS),
            "pid" => ("pid", libc::CLONE_NEWPID),
            "cgroup" => ("cgroup", libc::CLONE_NEWCGROUP),
            "mount" if entry.Path.is_empty() => continue,
            "network" => continue,
            other => {
                return Err(Error::Invalid(format!(
                    "unknown namespace {other:?} {:?}",
                    entry.Path
                )));
            }
        };
        if entry.Path.is_empty() {
            new_user |= kind == "user";
        } else {
            join.push(Join {
                kind,
                flag,
                path: entry.Path.clone(),
            });
        }
    }
    Ok((join, new_user))
}

fn id_map(mappings: &[LinuxIDMapping]) -> String {
    mappings
        .iter()
        .map(|map| format!("{} {} {}\n", map.ContainerID, map.HostID, map.Size))
        .collect()
}

fn mount(mount: &oci::Mount) -> Result<MountPlan> {
    if !mount.destination.starts_with('/') {
        return Err(Error::Invalid(format!(
            "mount destination {:?} is not absolute",
            mount.destination
        )));
    }
    let options = Options::parse(&mount.options);
    let kind = match (mount.type_.as_str(), options.bind) {
        (_, Some(recursive)) => MountKind::Bind { recursive },
        ("bind", None) => MountKind::Bind { recursive: false },
        ("cgroup" | "cgroup2", None) => MountKind::Cgroup,
        ("", None) => {
            return Err(Error::Invalid(format!(
                "mount on {} has no type",
                mount.destination
            )));
        }
        (fstype, None) => MountKind::New {
            fstype: c_string(fstype)?,
        },
    };
    if matches!(kind, MountKind::Bind { .. }) && !mount.source.starts_with('/') {
        return Err(Error::Invalid(format!(
            "source {:?} of the bind mount on {} is not absolute",
            mount.source, mount.destination
        )));
    }
    Ok(MountPlan {
        target: mount.destination.clone(),
        source: c_string(&mount.source)?,
        kind,
        options,
    })
}

/// The devices of every container, then its own, which may replace them.
fn devices(own: &[oci::LinuxDevice]) -> Result<Vec<DevicePlan>> {
    let default = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ];
    let mut out: Vec<DevicePlan> = Vec::with_capacity(default.len() + own.len());
    for (name, major, minor) in default {
        let path = format!("/dev/{name}");
        if own.iter().all(|device| device.Path != path) {
            let number = libc::makedev(major, minor);
            out.push(DevicePlan {
                path,
                mode: libc::S_IFCHR | 0o666,
                number,
                uid: 0,
                gid: 0,
            });
        }
    }
    for device in own {
        if !device.Path.starts_with('/') {
            return Err(Error::Invalid(format!(
                "device path {:?} is not absolute",
                device.Path
            )));
        }
        let kind = match device.Type.as_str() {
            "c" | "u" => libc::S_IFCHR,
            "b" => libc::S_IFBLK,
            "p" => libc::S_IFIFO,
            other => {
                return Err(Error::Invalid(format!(
                    "device {} has unknown type {other:?}",
                    device.Path
                )));
            }
        };
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| {
                Error::Invalid(format!(
                    "device {} has impossible number {value}",
                    device.Path
                ))
            })
        };
        let permissions = if device.FileMode == 0 {
            0o666
        } else {
            device.FileMode & 0o7777
        };
        out.push(DevicePlan {
            path: device.Path.clone(),
            mode: kind | permissions,
            number: libc::makedev(number(device.Major)?, number(device.Minor)?),
            uid: device.UID,
            gid: device.GID,
        });
    }
    Ok(out)
}

/// Only what belongs to a namespace of the container or of its sandbox may be set.
fn sysctl(key: &str, value: &str) -> Result<(String, String)> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    // Slashes and dots may be swapped, as in sysctl(8): net/ipv4/conf/eth0.1/forwarding.
    let separator = key.chars().find(|c| matches!(c, '.' | '/')).unwrap_or('.');
    let path: String = if separator == '.' {
        key.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect()
    } else {
        key.to_owned()
    };
    let dotted = path.replace('/', ".");
    let allowed = IPC.contains(&dotted.as_str())
        || path.starts_with("fs/mqueue/")
        || path.starts_with("net/")
        || dotted == "kernel.domainname";
    let plain = Path::new(&path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !allowed || !plain {
        return Err(Error::Invalid(format!(
            "sysctl {key:?} is not in a separate kernel namespace"
        )));
    }
    Ok((path, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use guest_protocol::protocols::oci::{
        Linux, LinuxDevice, LinuxNamespace, Mount, Process, Root,
    };

    use super::*;

    fn spec() -> Spec {
        let namespace = LinuxNamespace {
            Type: "mount".into(),
            ..Default::default()
        };
        Spec {
            Process: Some(Process {
                Args: vec!["true".into()],
                Cwd: "/".into(),
                ..Default::default()
            })
            .into(),
            Root: Some(Root {
                Path: "/rootfs".into(),
                ..Default::default()
            })
            .into(),
            Linux: Some(Linux {
                Namespaces: vec![namespace],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut Spec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        Plan::new(&spec, None).unwrap_err().to_string()
    }

    fn linux(spec: &mut Spec) -> &mut Linux {
        spec.Linux.mut_or_insert_default()
    }

    #[test]
    fn a_small_spec_is_enough() {
        let plan = Plan::new(&spec(), None).unwrap();
        assert_eq!(plan.devices.len(), 6);
        assert!(plan.make_dev && plan.process.capabilities.is_none() && plan.hostname.is_none());
    }

    #[test]
    fn what_is_wrong_in_a_spec_is_said() {
        assert!(
            refusal(|spec| spec.Process.mut_or_insert_default().Args.clear()).contains("no args")
        );
        assert!(refusal(|spec| spec.Process = None.into()).contains("no process"));
        assert!(refusal(|spec| spec.Root = None.into()).contains("no root"));
        assert!(
            refusal(|spec| spec.Root.mut_or_insert_default().Path = "rootfs".into())
                .contains("absolute")
        );
        assert!(refusal(|spec| linux(spec).Namespaces.clear()).contains("namespaces"));
        assert!(
            refusal(|spec| linux(spec).Namespaces[0].Type = "time".into())
                .contains("unknown namespace \"time\"")
        );
        assert!(
            refusal(|spec| linux(spec).RootfsPropagation = "up".into())
                .contains("rootfsPropagation")
        );
        assert!(
            refusal(|spec| spec.Process.mut_or_insert_default().Args[0] = "a\0b".into())
                .contains("NUL")
        );
        assert!(
            refusal(|spec| spec.Mounts.push(Mount {
                destination: "x".into(),
                ..Default::default()
            }))
            .contains("not absolute")
        );
        let device = LinuxDevice {
            Path: "/dev/x".into(),
            Type: "q".into(),
            ..Default::default()
        };
        assert!(refusal(|spec| linux(spec).Devices.push(device)).contains("unknown type"));
        let user = LinuxNamespace {
            Type: "user".into(),
            ..Default::default()
        };
        assert!(refusal(|spec| linux(spec).Namespaces.push(user)).contains("uidMappings"));
    }

    #[test]
    fn only_namespaced_sysctls_are_taken() {
        let good = |key| sysctl(key, "1").unwrap().0;
        assert_eq!(good("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            good("net/ipv4/conf/eth0.1/forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            good("net.ipv4.conf.eth0/1.forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(good("kernel.shmmax"), "kernel/shmmax");
        for bad in [
            "kernel.panic",
            "vm.swappiness",
            "net/../kernel/panic",
            "fs.file-max",
            "kernel.shm",
            "",
        ] {
            assert!(sysctl(bad, "1").is_err(), "{bad:?}");
        }
    }

    #[test]
    fn unknown_capabilities_and_rlimits_are_left_out() {
        let sets = LinuxCapabilities {
            Bounding: vec!["CAP_CHOWN".into(), "CAP_FLY".into(), "CAP_KILL".into()],
            ..Default::default()
        };
        assert_eq!(capabilities(&sets).bounding, 1 | 1 << 5);
        let limit = |name: &str| oci::POSIXRlimit {
            Type: name.into(),
            Hard: 2,
            Soft: 1,
            ..Default::default()
        };
        assert_eq!(
            rlimits(&[limit("RLIMIT_NOFILE"), limit("RLIMIT_WISHES")]).len(),
            1
        );
    }

    #[test]
    fn a_devices_own_entry_replaces_the_default() {
        let tty = LinuxDevice {
            Path: "/dev/tty".into(),
            Type: "c".into(),
            Major: 9,
            Minor: 9,
            ..Default::default()
        };
        let list = devices(&[tty]).unwrap();
        assert_eq!(list.len(), 6);
        assert_eq!(list.last().unwrap().number, libc::makedev(9, 9));
    }

    #[test]
    fn a_bound_dev_is_left_alone() {
        let mut spec = spec();
        let bind = Mount {
            destination: "/dev/".into(),
            source: "/dev".into(),
            options: vec!["rbind".into()],
            ..Default::default()
        };
        spec.Mounts.push(bind);
        assert!(!Plan::new(&spec, None).unwrap().make_dev);
    }
}
