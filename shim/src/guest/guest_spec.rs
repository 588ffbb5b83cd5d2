//! The OCI spec in the agent's protobuf, field by field, with what must differ inside the guest.

use std::collections::HashMap;

use guest_protocol::protocols::oci as proto;
use oci_spec::runtime as oci;
use serde::Serialize;

/// How an OCI enum is written in JSON, which is how the agent's protocol carries it.
fn name<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// What of a container's place in the guest the spec does not say itself.
pub struct GuestView {
    /// Root file system in the guest.
    pub rootfs: String,
    /// Mounts with their sources in the guest.
    pub mounts: Vec<proto::Mount>,
    /// Devices with a node in the container.
    pub devices: Vec<oci::LinuxDevice>,
    /// Who may use which devices.
    pub device_rules: Vec<oci::LinuxDeviceCgroup>,
    /// Path of the pid namespace to join, empty for one of its own.
    pub pid_namespace: String,
    /// Sysctls of the pod, which has no container of its own to set them.
    pub sysctls: HashMap<String, String>,
    /// cgroup in the guest.
    pub cgroup: String,
    /// Whether the agent can apply seccomp profiles.
    pub seccomp: bool,
}

/// The whole spec.
///
/// Left out, because the guest has its own: hooks (they would run on the host), network and time
/// namespaces (the guest's network is the container's), namespace paths, labels of the host's
/// security modules, host CPU and memory node numbers, and block and network classes of host
/// devices.
pub fn spec(spec: &oci::Spec, place: GuestView) -> proto::Spec {
    let root = spec.root().as_ref();
    proto::Spec {
        Version: spec.version().clone(),
        Process: spec.process().as_ref().map(process).into(),
        Root: Some(proto::Root {
            Path: place.rootfs.clone(),
            Readonly: root.and_then(|root| root.readonly()).unwrap_or_default(),
            ..Default::default()
        })
        .into(),
        Hostname: spec.hostname().clone().unwrap_or_default(),
        Annotations: spec.annotations().clone().unwrap_or_default(),
        Linux: spec.linux().as_ref().map(|from| linux(from, &place)).into(),
        Mounts: place.mounts,
        ..Default::default()
    }
}

/// A process: a container's first or an exec.
pub fn process(from: &oci::Process) -> proto::Process {
    let user = from.user();
    let rlimit = |from: &oci::PosixRlimit| proto::POSIXRlimit {
        Type: name(&from.typ()),
        Hard: from.hard(),
        Soft: from.soft(),
        ..Default::default()
    };
    let size = |from: &oci::Box| proto::Box {
        Height: u32::try_from(from.height()).unwrap_or(u32::MAX),
        Width: u32::try_from(from.width()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    proto::Process {
        Terminal: from.terminal().unwrap_or_default(),
        ConsoleSize: from.console_size().as_ref().map(size).into(),
        User: Some(proto::User {
            UID: user.uid(),
            GID: user.gid(),
            AdditionalGids: user.additional_gids().clone().unwrap_or_default(),
            Username: user.username().clone().unwrap_or_default(),
            ..Default::default()
        })
        .into(),
        Args: from.args().clone().unwrap_or_default(),
        Env: from.env().clone().unwrap_or_default(),
        Cwd: text(from.cwd()),
        Capabilities: from.capabilities().as_ref().map(capabilities).into(),
        Rlimits: from.rlimits().iter().flatten().map(rlimit).collect(),
        NoNewPrivileges: from.no_new_privileges().unwrap_or_default(),
        OOMScoreAdj: from.oom_score_adj().unwrap_or_default().into(),
        ..Default::default()
    }
}

fn capabilities(from: &oci::LinuxCapabilities) -> proto::LinuxCapabilities {
    let set = |from: &Option<oci::Capabilities>| {
        let mut names: Vec<String> = from.iter().flatten().map(name).collect();
        names.sort();
        names
    };
    proto::LinuxCapabilities {
        Bounding: set(from.bounding()),
        Effective: set(from.effective()),
        Inheritable: set(from.inheritable()),
        Permitted: set(from.permitted()),
        Ambient: set(from.ambient()),
        ..Default::default()
    }
}

fn linux(from: &oci::Linux, place: &GuestView) -> proto::Linux {
    let mapping = |from: &oci::LinuxIdMapping| proto::LinuxIDMapping {
        HostID: from.host_id(),
        ContainerID: from.container_id(),
        Size: from.size(),
        ..Default::default()
    };
    let kept = |from: &&oci::LinuxNamespace| match from.typ() {
        oci::LinuxNamespaceType::Network | oci::LinuxNamespaceType::Time => false,
        // An agent makes one of its own accord. Kata's adds an entry for it, and with two of them
        // it can start no exec.
        oci::LinuxNamespaceType::Pid => !place.pid_namespace.is_empty(),
        _ => true,
    };
    let namespace = |from: &oci::LinuxNamespace| proto::LinuxNamespace {
        Type: name(&from.typ()),
        Path: if from.typ() == oci::LinuxNamespaceType::Pid {
            place.pid_namespace.clone()
        } else {
            String::new()
        },
        ..Default::default()
    };
    let device = |from: &oci::LinuxDevice| proto::LinuxDevice {
        Path: text(from.path()),
        Type: name(&from.typ()),
        Major: from.major(),
        Minor: from.minor(),
        FileMode: from.file_mode().unwrap_or_default(),
        UID: from.uid().unwrap_or_default(),
        GID: from.gid().unwrap_or_default(),
        ..Default::default()
    };
    let limits = |from: &oci::LinuxResources| proto::LinuxResources {
        Devices: place.device_rules.iter().map(device_rule).collect(),
        ..resources(from)
    };
    proto::Linux {
        UIDMappings: from.uid_mappings().iter().flatten().map(mapping).collect(),
        GIDMappings: from.gid_mappings().iter().flatten().map(mapping).collect(),
        Sysctl: place
            .sysctls
            .clone()
            .into_iter()
            .chain(from.sysctl().clone().unwrap_or_default())
            .collect(),
        Resources: from.resources().as_ref().map(limits).into(),
        CgroupsPath: place.cgroup.clone(),
        Namespaces: from
            .namespaces()
            .iter()
            .flatten()
            .filter(kept)
            .map(namespace)
            .collect(),
        Devices: place.devices.iter().map(device).collect(),
        Seccomp: from
            .seccomp()
            .as_ref()
            .filter(|_| place.seccomp)
            .map(seccomp)
            .into(),
        RootfsPropagation: from.rootfs_propagation().clone().unwrap_or_default(),
        MaskedPaths: from.masked_paths().clone().unwrap_or_default(),
        ReadonlyPaths: from.readonly_paths().clone().unwrap_or_default(),
        ..Default::default()
    }
}

/// Limits, for a new container or an update. Zero means "as it is" on the wire.
pub fn resources(from: &oci::LinuxResources) -> proto::LinuxResources {
    let memory = |from: &oci::LinuxMemory| proto::LinuxMemory {
        Limit: from.limit().unwrap_or_default(),
        Reservation: from.reservation().unwrap_or_default(),
        Swap: from.swap().unwrap_or_default(),
        Swappiness: from.swappiness().unwrap_or_default(),
        DisableOOMKiller: from.disable_oom_killer().unwrap_or_default(),
        ..Default::default()
    };
    let cpu = |from: &oci::LinuxCpu| proto::LinuxCPU {
        Shares: from.shares().unwrap_or_default(),
        Quota: from.quota().unwrap_or_default(),
        Period: from.period().unwrap_or_default(),
        ..Default::default()
    };
    let hugepages = |from: &oci::LinuxHugepageLimit| proto::LinuxHugepageLimit {
        Pagesize: from.page_size().clone(),
        Limit: from.limit().cast_unsigned(),
        ..Default::default()
    };
    proto::LinuxResources {
        Memory: from.memory().as_ref().map(memory).into(),
        CPU: from.cpu().as_ref().map(cpu).into(),
        Pids: from
            .pids()
            .map(|pids| proto::LinuxPids {
                Limit: pids.limit(),
                ..Default::default()
            })
            .into(),
        HugepageLimits: from
            .hugepage_limits()
            .iter()
            .flatten()
            .map(hugepages)
            .collect(),
        ..Default::default()
    }
}

fn device_rule(from: &oci::LinuxDeviceCgroup) -> proto::LinuxDeviceCgroup {
    proto::LinuxDeviceCgroup {
        Allow: from.allow(),
        Type: from.typ().as_ref().map(name).unwrap_or_default(),
        // Absent means every number; -1 says so where 0 would be one of them.
        Major: from.major().unwrap_or(-1),
        Minor: from.minor().unwrap_or(-1),
        Access: from.access().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn seccomp(from: &oci::LinuxSeccomp) -> proto::LinuxSeccomp {
    let arg = |from: &oci::LinuxSeccompArg| proto::LinuxSeccompArg {
        Index: from.index() as u64,
        Value: from.value(),
        ValueTwo: from.value_two().unwrap_or_default(),
        Op: name(&from.op()),
        ..Default::default()
    };
    let rule = |from: &oci::LinuxSyscall| {
        let mut rule = proto::LinuxSyscall {
            Names: from.names().clone(),
            Action: name(&from.action()),
            Args: from.args().iter().flatten().map(arg).collect(),
            ..Default::default()
        };
        let fails = from.action() == oci::LinuxSeccompAction::ScmpActErrno;
        match from.errno_ret() {
            // An agent takes 0 for "not said". Of this number the kernel has the 16 low bits.
            Some(0) if fails => rule.set_errnoret(1 << 16),
            Some(errno) => rule.set_errnoret(errno),
            // Kata's agent takes a missing number for 0, which is success.
            None if fails => rule.set_errnoret(libc::EPERM.cast_unsigned()),
            None => {}
        }
        rule
    };
    proto::LinuxSeccomp {
        DefaultAction: name(&from.default_action()),
        Architectures: from.architectures().iter().flatten().map(name).collect(),
        Flags: from.flags().iter().flatten().map(name).collect(),
        Syscalls: from.syscalls().iter().flatten().map(rule).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn convert(json: serde_json::Value) -> proto::Spec {
        let from: oci::Spec = serde_json::from_value(json).unwrap();
        let place = GuestView {
            rootfs: "/guest/rootfs".into(),
            mounts: Vec::new(),
            devices: from.linux().as_ref().unwrap().devices().clone().unwrap(),
            device_rules: from
                .linux()
                .as_ref()
                .unwrap()
                .resources()
                .as_ref()
                .unwrap()
                .devices()
                .clone()
                .unwrap(),
            pid_namespace: String::new(),
            sysctls: [("net.core.somaxconn", "1"), ("net.ipv4.ip_forward", "1")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            cgroup: "/cofferdam/web".into(),
            seccomp: true,
        };
        spec(&from, place)
    }

    #[test]
    fn the_guest_gets_what_the_client_asked_for() {
        let spec = convert(json!({
            "ociVersion": "1.1.0", "hostname": "web", "root": {"path": "rootfs", "readonly": true},
            "process": {
                "terminal": true, "consoleSize": {"height": 24, "width": 80},
                "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6]}, "args": ["sh", "-c",
                    "id"],
                "env": ["A=b"], "cwd": "/tmp", "noNewPrivileges": true, "oomScoreAdj": -5,
                "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"], "ambient": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}]
            },
            "linux": {
                "namespaces": [
                    {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "network"},
                        {"type": "time"}, {"type": "mount"}
                ],
                "cgroupsPath": "/default/web", "sysctl": {"net.core.somaxconn": "7"},
                "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
                "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
                    "fileMode": 438}],
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c",
                        "major": 1, "minor": 0}],
                    "memory": {"limit": 64}, "cpu": {"shares": 2, "quota": 5, "period": 6,
                        "cpus": "0-3"},
                    "pids": {"limit": 9}
                },
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                    "syscalls": [{
                        "names": ["personality"], "action": "SCMP_ACT_ALLOW", "errnoRet": 0,
                        "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]
                    },
                    {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"},
                    {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
                    {"names": ["link"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
                }
            }
        }));
        let process = &spec.Process;
        assert!(process.Terminal && process.NoNewPrivileges && spec.Root.Readonly);
        assert_eq!(
            (
                process.ConsoleSize.Height,
                process.ConsoleSize.Width,
                process.OOMScoreAdj
            ),
            (24, 80, -5)
        );
        assert_eq!(
            (
                process.User.UID,
                process.User.GID,
                process.User.AdditionalGids.as_slice()
            ),
            (1000, 100, &[5, 6][..])
        );
        assert_eq!(process.Capabilities.Bounding, ["CAP_CHOWN", "CAP_KILL"]);
        assert_eq!(
            (process.Rlimits[0].Type.as_str(), process.Rlimits[0].Hard),
            ("RLIMIT_NOFILE", 2)
        );
        assert_eq!(
            (spec.Root.Path.as_str(), spec.Hostname.as_str()),
            ("/guest/rootfs", "web")
        );
        let linux = &spec.Linux;
        let namespaces: Vec<_> = linux
            .Namespaces
            .iter()
            .map(|ns| (ns.Type.as_str(), ns.Path.as_str()))
            .collect();
        assert_eq!(namespaces, [("mount", "")]);
        assert_eq!(linux.CgroupsPath, "/cofferdam/web");
        assert_eq!(
            (
                linux.Sysctl["net.core.somaxconn"].as_str(),
                linux.Sysctl["net.ipv4.ip_forward"].as_str()
            ),
            ("7", "1")
        );
        assert_eq!(
            (linux.Devices[0].Type.as_str(), linux.Devices[0].FileMode),
            ("c", 438)
        );
        let resources = &linux.Resources;
        assert_eq!(
            (resources.Devices[0].Major, resources.Devices[1].Minor),
            (-1, 0)
        );
        assert_eq!(
            (
                resources.Memory.Limit,
                resources.CPU.Quota,
                resources.Pids.Limit
            ),
            (64, 5, 9)
        );
        assert_eq!(
            resources.CPU.Cpus, "",
            "host CPU numbers mean nothing in the guest"
        );
        let rule = &linux.Seccomp.Syscalls[0];
        assert!(rule.has_errnoret());
        assert_eq!(
            (rule.Action.as_str(), rule.Args[0].Op.as_str()),
            ("SCMP_ACT_ALLOW", "SCMP_CMP_EQ")
        );
        let errors = linux.Seccomp.Syscalls[1..].iter();
        let errors: Vec<u32> = errors.map(|rule| rule.errnoret()).collect();
        assert_eq!(errors, [1, 1 << 16, 38], "EPERM is said, and a 0 is not 0");
        assert_eq!(linux.Seccomp.Flags, ["SECCOMP_FILTER_FLAG_LOG"]);
    }
}
