//! `-info`: what this runtime is and can do, asked by containerd 2.0 and later. Needs no sandbox,
//! no KVM and no working directory.

use std::collections::HashMap;
use std::io::{IsTerminal, Read, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;

use crate::container::layers;
use crate::error::{Error, IoContext, Result};

/// Type URL under which containerd looks for the OCI features document.
const FEATURES_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Annotation that containerd 2.2 and 2.3 look at (core/runtime/v2).
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Prints a `RuntimeInfo`.
///
/// # Errors
/// stdout or stdin does not work.
pub fn print() -> Result<()> {
    if !std::io::stdin().is_terminal() {
        // The options are of no consequence for what we can do, but their writer should not see a
        // broken pipe.
        std::io::copy(&mut std::io::stdin().take(4 << 20), &mut std::io::sink())
            .doing(|| "read the options".into())?;
    }
    let bytes = info()
        .write_to_bytes()
        .map_err(|error| Error::internal(format!("cannot encode the answer: {error}")))?;
    let mut stdout = std::io::stdout();
    stdout
        .write_all(&bytes)
        .and_then(|()| stdout.flush())
        .doing(|| "print the answer".into())
}

/// The mounts of root file systems that are left to us, as a list with a star for each transform.
fn allowed_mounts() -> String {
    let transforms = layers::TRANSFORMS.map(|transform| format!("{transform}/*"));
    let types = layers::TYPES.map(str::to_owned);
    [&types[..], &transforms[..]].concat().join(",")
}

/// Prints the features alone, as JSON.
///
/// # Errors
/// stdout does not work.
pub fn print_features() -> Result<()> {
    writeln!(std::io::stdout(), "{}", features()).doing(|| "print the answer".into())
}

fn info() -> RuntimeInfo {
    let features = Any {
        type_url: FEATURES_URL.to_owned(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    };
    RuntimeInfo {
        name: "io.containerd.cofferdam.v2".to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        features: Some(features).into(),
        // Later versions look at the answer to `start`.
        annotations: HashMap::from([(ALLOWED_MOUNTS.to_owned(), allowed_mounts())]),
        ..Default::default()
    }
}

/// What holds inside the guest. `user` is not among the namespaces: CRI reads that as support for
/// pods with host id mappings, which is a matter of the host's share and not there yet.
fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand",
                "noatime", "nodev",
            "nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid",
                "nosymfollow", "private", "rbind",
            "relatime", "remount", "ro", "rprivate", "rro", "rshared", "rslave", "runbindable",
                "rw", "shared",
            "slave", "strictatime", "suid", "sync", "tmpcopyup", "unbindable"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false,
                "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_finds_the_features_it_looks_for() {
        let info = RuntimeInfo::parse_from_bytes(&info().write_to_bytes().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.cofferdam.v2");
        assert_eq!(info.features.type_url, FEATURES_URL);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert!(
            features["mountOptions"]
                .as_array()
                .unwrap()
                .iter()
                .any(|option| option == "rro")
        );
        assert_eq!(
            features["linux"]["mountExtensions"]["idmap"]["enabled"],
            false
        );
    }
}
