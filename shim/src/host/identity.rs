//! Which sandbox this is, and where its socket and its state are.
//!
//! All paths follow from what containerd gives `start` and `delete` alike, so that `delete` finds
//! everything when nothing but the bundle is left.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where the state of all sandboxes is; one directory each.
pub const STATE_ROOT: &str = "/run/cofferdam";

/// containerd's customary directory for shim sockets: short, because socket paths end at 107 bytes.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// One sandbox of one containerd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxIdentity {
    /// containerd's namespace.
    pub namespace: String,
    /// The group: the pod's sandbox id, or the container's own id.
    pub id: String,
    digest: String,
}

impl SandboxIdentity {
    /// Two daemons may use the same namespace and id, so the daemon's address belongs to the
    /// identity.
    pub fn new(daemon_address: &str, namespace: &str, id: &str) -> SandboxIdentity {
        let mut hasher = Sha256::new();
        for part in [daemon_address, namespace, id] {
            hasher.update(part);
            hasher.update([b'/']);
        }
        let digest = hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        SandboxIdentity {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            digest,
        }
    }

    pub fn socket(&self, dir: &Path) -> PathBuf {
        dir.join(&self.digest)
    }

    /// The sandbox's own directory: ledger, helper sockets, shared directory.
    pub fn state_dir(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.digest[..32])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_names_still_fit_a_socket_path() {
        let identity = SandboxIdentity::new(
            "/run/containerd/containerd.sock",
            &"n".repeat(76),
            &"i".repeat(64),
        );
        assert!(identity.socket(Path::new(SOCKET_DIR)).as_os_str().len() <= 106);
        assert!(
            identity
                .state_dir()
                .join("vsock.sock_1029")
                .as_os_str()
                .len()
                <= 106
        );
    }

    #[test]
    fn daemon_namespace_and_id_all_tell_sandboxes_apart() {
        let all = [
            ("/a", "n", "i"),
            ("/b", "n", "i"),
            ("/a", "m", "i"),
            ("/a", "n", "j"),
            ("/a", "ni", ""),
        ];
        for (index, one) in all.iter().enumerate() {
            for other in &all[index + 1..] {
                assert_ne!(
                    SandboxIdentity::new(one.0, one.1, one.2).state_dir(),
                    SandboxIdentity::new(other.0, other.1, other.2).state_dir()
                );
            }
        }
    }
}
