//! What a container is to its sandbox, and which namespaces of others it joins.
//!
//! Kubernetes' runtimes say it by annotations (what a container is) and by paths of the form
//! `/proc/<pid>/ns/<kind>` (what it shares), where the pid is one that this shim gave. A path is
//! therefore mapped back to the task whose pid it names; a path to anything else is a namespace of
//! the host or of another virtual machine, which nothing can join.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::error::{Error, Result};

/// An annotation that a runtime of Kubernetes sets: by containerd's name for it, and by CRI-O's.
#[derive(Clone, Copy, Debug)]
pub struct CriKey {
    containerd: &'static str,
    crio: &'static str,
}

/// What a container is.
const TYPE: CriKey = CriKey {
    containerd: "io.kubernetes.cri.container-type",
    crio: "io.kubernetes.cri-o.ContainerType",
};

/// The sandbox that a container belongs to.
pub const SANDBOX_ID: CriKey = CriKey {
    containerd: "io.kubernetes.cri.sandbox-id",
    crio: "io.kubernetes.cri-o.SandboxID",
};

/// The uid of the pod.
pub const UID: CriKey = CriKey {
    containerd: "io.kubernetes.cri.sandbox-uid",
    crio: "io.kubernetes.pod.uid",
};

/// Whether containerd runs this process: it gives every shim the address for events, which CRI-O
/// does not.
pub fn is_from_containerd() -> bool {
    std::env::var_os("TTRPC_ADDRESS").is_some_and(|address| !address.is_empty())
}

impl CriKey {
    /// The value that the calling runtime has set. CRI-O copies all annotations and labels of a
    /// pod, so the other runtime's key is the tenant's own and says nothing: it would choose the
    /// machine that the container enters.
    pub fn of<'a>(
        self,
        from_containerd: bool,
        find: impl Fn(&str) -> Option<&'a str>,
    ) -> Option<&'a str> {
        let find = |key| find(key).filter(|value| !value.is_empty());
        match find(self.crio) {
            Some(value) if !from_containerd => Some(value),
            _ => find(self.containerd),
        }
    }
}

/// What a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Alone in its sandbox (ctr, nerdctl, docker).
    Single,
    /// The pod's sandbox itself: a process that waits and holds namespaces.
    Sandbox,
    /// A container of a pod.
    Member,
}

/// The pid namespace of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    Own,
    /// The one of the pod.
    Pod,
    /// The one of another container.
    Of(String),
}

impl Role {
    /// By the spec's annotations.
    pub fn of(spec: &Spec) -> Role {
        Role::by(spec, is_from_containerd())
    }

    fn by(spec: &Spec, from_containerd: bool) -> Role {
        let annotations = spec.annotations().as_ref();
        match TYPE.of(from_containerd, |key| {
            annotations?.get(key).map(String::as_str)
        }) {
            Some("sandbox") => Role::Sandbox,
            Some("container") => Role::Member,
            _ => Role::Single,
        }
    }
}

/// What a host may allow instead of a namespace of its own.
fn advice(setting: &str) -> &'static str {
    if setting.starts_with("hostNetwork") {
        ", or set host_network = \"passt\" in Cofferdam's configuration"
    } else {
        ""
    }
}

/// Which pid namespace a container wants, and whether all others that it names can be had. `find`
/// tells whose pid it is; an empty name is the sandbox's own. With `host_network` the host's
/// network may be asked for. `pinned` are namespaces of its pod by other paths ([`pinned`]).
///
/// # Errors
/// `INVALID_ARGUMENT` that says what to use instead.
pub fn namespaces(
    spec: &Spec,
    role: Role,
    host_network: bool,
    pinned: &[PathBuf],
    find: impl Fn(u32) -> Option<String>,
) -> Result<PidNamespace> {
    let list = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default();
    let entry = |kind| list.iter().find(|namespace| namespace.typ() == kind);
    let needed = [
        (
            LinuxNamespaceType::Network,
            "network",
            "hostNetwork, --net-host",
        ),
        (LinuxNamespaceType::Pid, "process ids", "hostPID"),
        (LinuxNamespaceType::Ipc, "IPC", "hostIPC"),
    ];
    for (kind, what, setting) in needed {
        if kind == LinuxNamespaceType::Network && host_network {
            continue;
        }
        if entry(kind).is_none() {
            return Err(host_namespace(what, setting));
        }
    }
    let mut pid = PidNamespace::Own;
    for namespace in list {
        let Some(path) = namespace.path() else {
            continue;
        };
        let kind = namespace.typ();
        // A network namespace that is made for this sandbox has a path of any form.
        if kind == LinuxNamespaceType::Network && role != Role::Member {
            continue;
        }
        let owner = proc_pid(path).and_then(&find);
        match (kind, owner) {
            (LinuxNamespaceType::Pid, Some(owner)) if owner.is_empty() => pid = PidNamespace::Pod,
            (LinuxNamespaceType::Pid, Some(owner)) => pid = PidNamespace::Of(owner),
            (_, Some(_)) => {}
            (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, None) if pinned.contains(path) => {}
            // By its own path, as CRI-O names it: it is the sandbox's or not, which the network's
            // owner checks.
            (LinuxNamespaceType::Network, None) if proc_pid(path).is_none() => {}
            (kind, None) => {
                return Err(Error::invalid(format!(
                    "joins the {kind:?} namespace {}, which is not of this sandbox: a virtual \
                     machine shares namespaces \
                     among its own containers only",
                    path.display()
                )));
            }
        }
    }
    Ok(pid)
}

/// Paths by which CRI-O names the IPC and UTS namespaces of a pod, which it makes itself: in the
/// spec of the sandbox, and in those of the containers that join them. The machine's own stand for them.
///
/// # Errors
/// `INVALID_ARGUMENT`: one is the host's.
pub fn pinned(spec: &Spec, role: Role) -> Result<Vec<PathBuf>> {
    if role != Role::Sandbox || is_from_containerd() {
        return Ok(Vec::new());
    }
    let list = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default();
    let mut pinned = Vec::new();
    for namespace in list {
        let (own, setting) = match namespace.typ() {
            LinuxNamespaceType::Ipc => ("/proc/self/ns/ipc", "hostIPC"),
            LinuxNamespaceType::Uts => ("/proc/self/ns/uts", ""),
            _ => continue,
        };
        let Some(path) = namespace
            .path()
            .as_ref()
            .filter(|path| proc_pid(path).is_none())
        else {
            continue;
        };
        if is_same_file(path, Path::new(own)) && !setting.is_empty() {
            return Err(host_namespace("IPC", setting));
        }
        pinned.push(path.clone());
    }
    Ok(pinned)
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let id = |path| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
    matches!((id(one), id(other)), (Ok(one), Ok(other)) if one == other)
}

/// The refusal of a namespace of the host's: what it is, and by which setting it is asked for.
pub fn host_namespace(what: &str, setting: &str) -> Error {
    Error::invalid(format!(
        "asks for the host's {what} ({setting}), which a virtual machine cannot share: leave that \
         out, or run it with the runtime runc{}",
        advice(setting)
    ))
}

/// The pid in `/proc/<pid>/ns/<kind>`.
fn proc_pid(path: &Path) -> Option<u32> {
    let mut parts = path.strip_prefix("/proc").ok()?.iter();
    let pid = parts.next()?.to_str()?.parse().ok()?;
    (parts.next()? == "ns").then_some(pid)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(namespaces: Value, annotations: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0", "root": {"path": "r"}, "annotations": annotations,
            "linux": {"namespaces": namespaces}
        }))
        .unwrap()
    }

    fn wanted(namespaces: Value, role: Role) -> Result<PidNamespace> {
        let find = |pid| match pid {
            100 => Some(String::new()),
            200 => Some("web".to_owned()),
            _ => None,
        };
        super::namespaces(&spec(namespaces, json!({})), role, false, &[], find)
    }

    #[test]
    fn annotations_of_every_client_tell_what_a_container_is() {
        for (containerd, key, value, role) in [
            (
                true,
                "io.kubernetes.cri.container-type",
                "sandbox",
                Role::Sandbox,
            ),
            (
                true,
                "io.kubernetes.cri.container-type",
                "container",
                Role::Member,
            ),
            (
                true,
                "io.kubernetes.cri-o.ContainerType",
                "sandbox",
                Role::Single,
            ),
            (
                false,
                "io.kubernetes.cri-o.ContainerType",
                "sandbox",
                Role::Sandbox,
            ),
            (
                true,
                "io.kubernetes.cri.container-type",
                "galaxy",
                Role::Single,
            ),
            (true, "other", "sandbox", Role::Single),
        ] {
            assert_eq!(
                Role::by(&spec(json!([]), json!({key: value})), containerd),
                role,
                "{key} {value}"
            );
        }
    }

    #[test]
    fn paths_are_mapped_back_to_tasks() {
        let path = |pid: &str| {
            json!([
                {"type": "network", "path": "/proc/100/ns/net"}, {"type": "ipc",
                    "path": "/proc/100/ns/ipc"},
                {"type": "uts", "path": "/proc/100/ns/uts"}, {"type": "pid", "path": pid}
            ])
        };
        assert_eq!(
            wanted(path("/proc/100/ns/pid"), Role::Member).unwrap(),
            PidNamespace::Pod
        );
        assert_eq!(
            wanted(path("/proc/200/ns/pid"), Role::Member).unwrap(),
            PidNamespace::Of("web".into())
        );
        for other in ["/proc/1/ns/pid", "/run/pidns", "/proc/100x/ns/pid"] {
            let error = wanted(path(other), Role::Member).unwrap_err().to_string();
            assert!(error.contains(other) && error.contains("Pid"), "{error}");
        }
    }

    #[test]
    fn what_is_the_hosts_is_refused_by_name() {
        let all = [
            ("network", "hostNetwork"),
            ("pid", "hostPID"),
            ("ipc", "hostIPC"),
        ];
        for (missing, named) in all {
            let others: Vec<_> = all
                .iter()
                .filter(|(kind, _)| *kind != missing)
                .map(|(k, _)| json!({"type": k}))
                .collect();
            let error = wanted(json!(others), Role::Sandbox).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
            assert!(error.to_string().contains(named), "{error}");
        }
        let own = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "network",
            "path": "/run/netns/cni-1"}]);
        assert_eq!(wanted(own, Role::Sandbox).unwrap(), PidNamespace::Own);
    }

    #[test]
    fn namespaces_that_crio_made_are_the_machines() {
        let own = |ipc: &str| {
            let list = json!([{"type": "ipc", "path": ipc}, {"type": "uts", "path": "/run/utsns/1"},
                {"type": "network", "path": "/run/netns/1"}, {"type": "pid"}]);
            spec(list, json!({}))
        };
        // No runtime has set the address for events.
        assert!(!is_from_containerd());
        let pod = pinned(&own("/run/ipcns/1"), Role::Sandbox).unwrap();
        assert_eq!(pod, ["/run/ipcns/1", "/run/utsns/1"].map(PathBuf::from));
        let joins = |pinned: &[PathBuf]| {
            let member = own("/run/ipcns/1");
            super::namespaces(&member, Role::Member, false, pinned, |_| None)
        };
        assert_eq!(joins(&pod).unwrap(), PidNamespace::Own);
        assert!(joins(&[]).unwrap_err().to_string().contains("/run/ipcns/1"));
        // A bind mount of the host's own.
        let link = tempfile::tempdir().unwrap();
        let path = link.path().join("ipc");
        std::os::unix::fs::symlink("/proc/self/ns/ipc", &path).unwrap();
        let error = pinned(&own(path.to_str().unwrap()), Role::Sandbox).unwrap_err();
        assert!(error.to_string().contains("hostIPC"), "{error}");
    }

    #[test]
    fn another_sandboxs_network_cannot_be_joined() {
        let foreign = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "network",
            "path": "/proc/300/ns/net"}]);
        assert!(
            wanted(foreign, Role::Member)
                .unwrap_err()
                .to_string()
                .contains("/proc/300/ns/net")
        );
    }
}
