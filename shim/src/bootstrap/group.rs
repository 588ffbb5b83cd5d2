//! Which sandbox a container belongs to: containers of one pod share one server and one virtual
//! machine.

use std::path::Path;

use serde_json::Value;

use crate::container::role::{SANDBOX_ID, is_from_containerd};

/// What runc's shim honours for clients that are no runtime of Kubernetes.
const GROUP: &str = "io.containerd.runc.v2.group";

/// The group id of the bundle's container; its own id where nothing says otherwise. A config.json
/// that is missing (as with the Sandbox API) or broken does not matter here: `Create` is where the
/// user learns of it.
pub fn group_id(bundle: &Path, id: &str) -> String {
    group_by(bundle, id, is_from_containerd())
}

fn group_by(bundle: &Path, id: &str, from_containerd: bool) -> String {
    let config = std::fs::read(bundle.join("config.json")).unwrap_or_default();
    let config: Value = serde_json::from_slice(&config).unwrap_or_default();
    let find = |key: &str| config["annotations"][key].as_str();
    let group = SANDBOX_ID
        .of(from_containerd, find)
        .or_else(|| find(GROUP).filter(|group| !group.is_empty()));
    group.unwrap_or(id).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(config: &str) -> String {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        group_by(bundle.path(), "self", true)
    }

    #[test]
    fn a_pods_containers_share_its_sandbox() {
        assert_eq!(
            group(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#),
            "pod"
        );
        assert_eq!(
            group(r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#),
            "g"
        );
    }

    #[test]
    fn a_tenants_annotation_chooses_no_sandbox() {
        let bundle = tempfile::tempdir().unwrap();
        let both = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"a","io.kubernetes.cri-o.SandboxID":"b",
            "io.containerd.runc.v2.group":"c"}}"#;
        std::fs::write(bundle.path().join("config.json"), both).unwrap();
        assert_eq!(
            group_by(bundle.path(), "self", true),
            "a",
            "containerd's own"
        );
        assert_eq!(group_by(bundle.path(), "self", false), "b", "CRI-O's own");
    }

    #[test]
    fn any_other_container_is_alone() {
        for config in [
            "",
            "{",
            "{}",
            r#"{"annotations":null}"#,
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":""}}"#,
        ] {
            assert_eq!(group(config), "self");
        }
        assert_eq!(group_id(Path::new("/nonexistent"), "self"), "self");
    }
}
