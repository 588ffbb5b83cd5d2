//! Which sandbox a container belongs to: containers of one pod share one server and one virtual machine.

use std::path::Path;

use serde_json::Value;

/// Annotations that name a container's sandbox, in order of precedence: containerd's CRI, CRI-O, and what runc's
/// shim honours for other clients.
const KEYS: [&str; 3] =
    ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.containerd.runc.v2.group"];

/// The group id of the bundle's container; its own id where nothing says otherwise. A config.json that is missing (as
/// with the Sandbox API) or broken does not matter here: `Create` is where the user learns of it.
pub fn group_id(bundle: &Path, id: &str) -> String {
    let config = std::fs::read(bundle.join("config.json")).unwrap_or_default();
    let config: Value = serde_json::from_slice(&config).unwrap_or_default();
    KEYS.iter()
        .filter_map(|key| config["annotations"][key].as_str())
        .find(|group| !group.is_empty())
        .unwrap_or(id)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(config: &str) -> String {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        group_id(bundle.path(), "self")
    }

    #[test]
    fn a_pods_containers_share_its_sandbox() {
        assert_eq!(group(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#), "pod");
        assert_eq!(group(r#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"pod"}}"#), "pod");
        assert_eq!(group(r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#), "g");
    }

    #[test]
    fn any_other_container_is_alone() {
        for config in
            ["", "{", "{}", r#"{"annotations":null}"#, r#"{"annotations":{"io.kubernetes.cri.sandbox-id":""}}"#]
        {
            assert_eq!(group(config), "self");
        }
        assert_eq!(group_id(Path::new("/nonexistent"), "self"), "self");
    }
}
