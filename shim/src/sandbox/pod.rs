//! What a sandbox's spec says for all of its containers, and what its machine is made for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::container::volumes::Pinned;
use crate::guest::machine_size::ResourceLimits;

/// The /dev/shm of a pod.
#[derive(Debug)]
pub struct Shm {
    /// Source of the mounts that stand for it.
    pub source: PathBuf,
    pub bytes: u64,
}

/// What a pod's sandbox says for all of its containers.
#[derive(Debug, Default)]
pub struct Pod {
    /// Sysctls of the namespaces that they share.
    pub sysctls: HashMap<String, String>,
    pub shm: Option<Shm>,
    /// What they may use together.
    pub need: ResourceLimits,
    /// Where the files of the pod are that nobody else makes for its containers.
    pub files: Option<PathBuf>,
    /// containerd knows of no task for it, so it gets no events of one.
    pub hidden_from_containerd: bool,
    /// See [`crate::container::role::pinned`].
    pub pinned: Vec<PathBuf>,
}

/// What a virtual machine is made for, beside its configuration.
#[derive(Debug)]
pub struct SandboxSpec {
    /// The guest's name; without one it has the host's, as in a new uts namespace.
    pub hostname: Option<String>,
    /// Where QEMU and the helpers are accounted, as `linux.cgroupsPath` has it.
    pub cgroups_path: String,
    /// The network namespace that was made for it.
    pub netns: Option<PathBuf>,
    /// It is to have the host's.
    pub host_network: bool,
}

impl SandboxSpec {
    /// By the spec of a sandbox or of its first container.
    pub fn of(spec: &Spec) -> SandboxSpec {
        let linux = spec.linux().as_ref();
        let namespaces = linux
            .and_then(|linux| linux.namespaces().as_deref())
            .unwrap_or_default();
        let network = namespaces
            .iter()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_ref());
        SandboxSpec {
            hostname: spec.hostname().clone(),
            cgroups_path: cgroups_path
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
            host_network: network.is_none(),
            netns: network.and_then(|network| network.path().clone()),
        }
    }
}

impl Pod {
    /// By the sandbox's spec.
    pub fn of(spec: &Spec) -> Pod {
        // The last one is what a container would see: containerd 1.6 has a default below it.
        let shm = spec
            .mounts()
            .iter()
            .flatten()
            .rfind(|mount| mount.destination() == Path::new("/dev/shm"));
        Pod {
            sysctls: spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.sysctl().clone())
                .unwrap_or_default(),
            need: ResourceLimits::of_pod(spec),
            files: None,
            pinned: Vec::new(),
            hidden_from_containerd: false,
            shm: shm.and_then(|mount| {
                let source = mount.source().clone()?;
                Pinned::open(&source)
                    .ok()?
                    .tmpfs_size()
                    .map(|bytes| Shm { source, bytes })
            }),
        }
    }
}
