//! The OCI spec in the agent's protobuf, field by field, with what must differ inside the guest.
//! `docs/oci-fields.md` is the table of all fields. Those that Kata's messages do not have go in
//! messages of ours (`guest-protocol/protos/cofferdam.proto`), which only our agent reads.

use std::collections::HashMap;

use guest_protocol::protocols::cofferdam as own;
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

/// Sysctl that sets the name of the NIS domain, which the messages have no field for.
const DOMAINNAME: &str = "kernel.domainname";

/// The mask that an agent sets by itself.
const UMASK: u32 = 0o022;

/// The whole spec.
///
/// Left out, because the guest has its own: hooks (they run on the host), network and time
/// namespaces (the guest's network is the container's), namespace paths, labels of the host's
/// security modules, host CPU and memory node numbers.
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
        Linux: spec
            .linux()
            .as_ref()
            .map(|from| linux(from, &place, spec.domainname()))
            .into(),
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
        Own: own_process(from).into(),
        ..Default::default()
    }
}

/// A flag by the name that the runtime specification has for it.
fn flag(flag: &oci::LinuxSchedulerFlag) -> String {
    match flag {
        oci::LinuxSchedulerFlag::SchedResetOnFork => "SCHED_FLAG_RESET_ON_FORK".to_owned(),
        oci::LinuxSchedulerFlag::SchedFlagDLOverrun => "SCHED_FLAG_DL_OVERRUN".to_owned(),
        other => name(other),
    }
}

/// None if there is nothing in it, so that an agent without it is not asked for it.
fn own_process(from: &oci::Process) -> Option<own::ProcessFields> {
    let scheduler = |from: &oci::Scheduler| own::Scheduler {
        policy: name(from.policy()),
        nice: from.nice().unwrap_or_default(),
        // A negative one is none, and the agent says so.
        priority: from.priority().unwrap_or_default().cast_unsigned(),
        flags: from.flags().iter().flatten().map(flag).collect(),
        runtime: from.runtime().unwrap_or_default(),
        deadline: from.deadline().unwrap_or_default(),
        period: from.period().unwrap_or_default(),
        ..Default::default()
    };
    let io_priority = |from: &oci::LinuxIOPriority| own::IOPriority {
        class: name(&from.class()),
        priority: u32::try_from(from.priority()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let fields = own::ProcessFields {
        umask: from.user().umask(),
        scheduler: from.scheduler().as_ref().map(scheduler).into(),
        io_priority: from.io_priority().as_ref().map(io_priority).into(),
        ..Default::default()
    };
    Some(fields).filter(|fields| *fields != own::ProcessFields::default())
}

/// What of a process only our own agent does.
pub fn own_fields_of_process(process: &proto::Process) -> Option<&'static str> {
    let own = process.Own.as_ref()?;
    let used = [
        (
            own.umask.is_some_and(|umask| umask != UMASK),
            "process.user.umask",
        ),
        (own.scheduler.is_some(), "process.scheduler"),
        (own.io_priority.is_some(), "process.ioPriority"),
    ];
    first_used(&used)
}

fn first_used(fields: &[(bool, &'static str)]) -> Option<&'static str> {
    fields.iter().find(|(used, _)| *used).map(|(_, name)| *name)
}

/// What of resources only our own agent does.
pub fn own_fields_of_resources(resources: &proto::LinuxResources) -> Option<&'static str> {
    let own = resources.Own.as_ref()?;
    let used = [
        (!own.unified.is_empty(), "linux.resources.unified"),
        (
            own.cpu_burst.unwrap_or_default() != 0,
            "linux.resources.cpu.burst",
        ),
        (
            own.cpu_idle.unwrap_or_default() != 0,
            "linux.resources.cpu.idle",
        ),
        (
            own.check_before_update,
            "linux.resources.memory.checkBeforeUpdate",
        ),
    ];
    first_used(&used)
}

/// What of a whole spec only our own agent does.
pub fn own_fields(spec: &proto::Spec) -> Option<&'static str> {
    let linux = spec.Linux.get_or_default();
    own_fields_of_process(spec.Process.get_or_default())
        .or_else(|| own_fields_of_resources(linux.Resources.get_or_default()))
        .or_else(|| linux.Own.is_some().then_some("linux.personality"))
        .or_else(|| {
            let errno = linux.Seccomp.get_or_default().Own.is_some();
            errno.then_some("linux.seccomp.defaultErrnoRet")
        })
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

fn linux(from: &oci::Linux, place: &GuestView, domainname: &Option<String>) -> proto::Linux {
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
            .chain(
                domainname
                    .iter()
                    .filter(|name| !name.is_empty())
                    .map(|name| (DOMAINNAME.to_owned(), name.clone())),
            )
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
        // A process has the standard one by itself.
        Own: from
            .personality()
            .as_ref()
            .filter(|personality| personality.domain() != oci::LinuxPersonalityDomain::PerLinux)
            .map(|personality| own::LinuxFields {
                personality: name(&personality.domain()),
                ..Default::default()
            })
            .into(),
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
    let block_io = |from: &oci::LinuxBlockIo| proto::LinuxBlockIO {
        Weight: from.weight().unwrap_or_default().into(),
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
        BlockIO: from.block_io().as_ref().map(block_io).into(),
        Own: own_resources(from).into(),
        ..Default::default()
    }
}

/// None if there is nothing in it.
fn own_resources(from: &oci::LinuxResources) -> Option<own::ResourceFields> {
    let cpu = from.cpu().as_ref();
    let memory = from.memory().as_ref();
    let fields = own::ResourceFields {
        unified: from.unified().clone().unwrap_or_default(),
        cpu_burst: cpu.and_then(|cpu| cpu.burst()),
        cpu_idle: cpu.and_then(|cpu| cpu.idle()),
        check_before_update: memory
            .and_then(|memory| memory.check_before_update())
            .unwrap_or_default(),
        ..Default::default()
    };
    Some(fields).filter(|fields| *fields != own::ResourceFields::default())
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
        // An agent takes EPERM by itself.
        Own: from
            .default_errno_ret()
            .filter(|errno| *errno != libc::EPERM.cast_unsigned())
            .map(|errno| own::SeccompFields {
                default_errno: Some(errno),
                ..Default::default()
            })
            .into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
