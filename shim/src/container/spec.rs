//! A container's OCI spec as its client wrote it: read, freed of names that this runtime does not
//! know, and checked before anything is made for it.
//!
//! The runtime spec asks for a warning, not an error, on an unknown capability or seccomp action,
//! where the parser rejects the whole document. So the JSON is filtered first. What restricts is
//! never left out for that: it is replaced by something stricter, or refused.

use std::path::Path;

use oci_spec::runtime::{
    Arch, Capability, LinuxNamespaceType, LinuxResources, LinuxSeccompAction,
    LinuxSeccompFilterFlag, PosixRlimitType, Process, Spec,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::container::unsupported;
use crate::error::{Error, Result};

/// What an action of a seccomp profile becomes that cannot be kept: the strictest that lets the
/// container start.
const STRICT_ACTION: &str = "SCMP_ACT_ERRNO";

/// Actions that need a tracer or a listener on the host, which no process of a guest can have.
const OF_THE_HOST: [&str; 2] = ["SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE"];

/// AppArmor profiles that runtimes put every container in. A guest's kernel has no AppArmor; the
/// virtual machine stands in for what these keep a container from, which is the host.
const STOCK_APPARMOR: [&str; 6] = [
    "",
    "unconfined",
    "cri-containerd.apparmor.d",
    "docker-default",
    "crio-default",
    "nerdctl-default",
];

/// Types of SELinux labels that runtimes give to containers. The guest's kernel has no SELinux
/// either.
const STOCK_SELINUX: [&str; 5] = [
    "container_t",
    "container_init_t",
    "container_kvm_t",
    "spc_t",
    "svirt_lxc_net_t",
];

/// Reads the bundle's config.json.
///
/// # Errors
/// `INVALID_ARGUMENT`: missing, not JSON, not a spec, or not possible in a virtual machine.
pub fn load(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|error| {
        Error::invalid(format!(
            "cannot read the container's spec {}: {error}",
            path.display()
        ))
    })?;
    parse(&text).map_err(|error| error.context(format!("the container's spec {}", path.display())))
}

/// The spec in a config.json.
///
/// # Errors
/// As [`load`].
pub(crate) fn parse(text: &[u8]) -> Result<Spec> {
    let mut json: Value = serde_json::from_slice(text)
        .map_err(|error| Error::invalid(format!("is not valid JSON: {error}")))?;
    if let Some(process) = json.get_mut("process") {
        filter_process(process)?;
    }
    if let Some(seccomp) = json.pointer_mut("/linux/seccomp") {
        filter_seccomp(seccomp)?;
    }
    check_namespaces(&json["linux"]["namespaces"])?;
    let spec: Spec = serde_json::from_value(json)
        .map_err(|error| Error::invalid(format!("is not an OCI runtime spec: {error}")))?;
    check(&spec)?;
    Ok(spec)
}

/// Parses the process of an `Exec` request.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn parse_process(text: &[u8]) -> Result<Process> {
    let bad = |error| Error::invalid(format!("the exec's process is not an OCI process: {error}"));
    let mut json: Value = serde_json::from_slice(text).map_err(bad)?;
    filter_process(&mut json)?;
    let process: Process = serde_json::from_value(json).map_err(bad)?;
    check_process(&process)?;
    Ok(process)
}

/// Parses the resources of an `Update` request.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn parse_resources(text: &[u8]) -> Result<LinuxResources> {
    let resources = serde_json::from_slice(text).map_err(|error| {
        Error::invalid(format!(
            "the update's resources are not OCI linux resources: {error}"
        ))
    })?;
    unsupported::check_resources(&resources).map_err(|error| error.context("the update"))?;
    Ok(resources)
}

fn known<T: DeserializeOwned>(value: &Value) -> bool {
    serde_json::from_value::<T>(value.clone()).is_ok()
}

fn retain_known<T: DeserializeOwned>(list: &mut Value, what: &str) {
    if let Some(list) = list.as_array_mut() {
        list.retain(|value| {
            let keep = known::<T>(value);
            if !keep {
                tracing::warn!("unknown {what} {value} is ignored");
            }
            keep
        });
    }
}

fn filter_process(process: &mut Value) -> Result<()> {
    if let Some(sets) = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut)
    {
        sets.values_mut()
            .for_each(|set| retain_known::<Capability>(set, "capability"));
    }
    if let Some(flags) = process.pointer_mut("/scheduler/flags") {
        let flags = flags.as_array_mut().into_iter().flatten();
        flags.for_each(|flag| {
            // The parser has names of its own for two of them.
            let known = match flag.as_str() {
                Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
                Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
                _ => return,
            };
            *flag = known.into();
        });
    }
    let rlimits = process["rlimits"].as_array().into_iter().flatten();
    match rlimits
        .map(|rlimit| &rlimit["type"])
        .find(|kind| !known::<PosixRlimitType>(kind))
    {
        Some(kind) => Err(Error::invalid(format!(
            "sets the unknown resource limit {kind}: leave it out"
        ))),
        None => Ok(()),
    }
}

fn filter_seccomp(seccomp: &mut Value) -> Result<()> {
    if !seccomp.is_object() {
        return Ok(());
    }
    keep_or_restrict(&mut seccomp["defaultAction"]);
    if let Some(list) = seccomp.get_mut("architectures") {
        retain_known::<Arch>(list, "seccomp architecture");
    }
    let flags = seccomp["flags"].as_array().into_iter().flatten();
    if let Some(flag) = flags
        .into_iter()
        .find(|flag| !known::<LinuxSeccompFilterFlag>(flag))
    {
        return Err(Error::invalid(format!(
            "has a seccomp profile with the unknown flag {flag}: leave it out"
        )));
    }
    let rules = seccomp.get_mut("syscalls").and_then(Value::as_array_mut);
    let rules = rules.into_iter().flatten().filter(|rule| rule.is_object());
    rules.for_each(|rule| keep_or_restrict(&mut rule["action"]));
    Ok(())
}

fn keep_or_restrict(action: &mut Value) {
    let is_hosts = action
        .as_str()
        .is_some_and(|action| OF_THE_HOST.contains(&action));
    if is_hosts || !known::<LinuxSeccompAction>(action) {
        tracing::warn!("seccomp action {action} cannot be kept and becomes {STRICT_ACTION}");
        *action = STRICT_ACTION.into();
    }
}

/// A namespace that nobody knows is no warning: the container would share what it asked not to
/// share.
fn check_namespaces(namespaces: &Value) -> Result<()> {
    for namespace in namespaces.as_array().into_iter().flatten() {
        if !known::<LinuxNamespaceType>(&namespace["type"]) {
            return Err(Error::invalid(format!(
                "names the unknown namespace type {}: use cgroup, ipc, mount, network, pid, user \
                 or uts",
                namespace["type"]
            )));
        }
    }
    Ok(())
}

fn check(spec: &Spec) -> Result<()> {
    let Some(process) = spec.process() else {
        return Err(Error::invalid("has no process"));
    };
    check_process(process)?;
    if spec.root().is_none() {
        return Err(Error::invalid("has no root"));
    }
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let has =
        |kind| namespaces.is_some_and(|list| list.iter().any(|namespace| namespace.typ() == kind));
    if !has(LinuxNamespaceType::Mount) {
        return Err(Error::invalid(
            "has no mount namespace: a container needs one of its own",
        ));
    }
    unsupported::check_spec(spec)
}

fn check_process(process: &Process) -> Result<()> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::invalid("names no command (process.args is empty)"));
    }
    if let Some(profile) = process.apparmor_profile()
        && !STOCK_APPARMOR.contains(&profile.as_str())
    {
        return Err(Error::invalid(format!(
            "asks for the AppArmor profile {profile:?}, which the guest's kernel cannot apply: \
             use the runtime's default \
             or unconfined, or run it with the runtime runc"
        )));
    }
    let label = process.selinux_label().as_deref().unwrap_or_default();
    if let Some(kind) = label.split(':').nth(2)
        && !STOCK_SELINUX.contains(&kind)
    {
        return Err(Error::invalid(format!(
            "asks for the SELinux label {label:?}, which the guest's kernel cannot apply: use the \
             runtime's default, or run \
             it with the runtime runc"
        )));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::invalid(format!(
            "has the working directory {:?}, which is not absolute",
            process.cwd()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/",
                "capabilities": {"bounding": ["CAP_CHOWN", "CAP_FUTURE"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1, "soft": 1}]
            },
            "root": {"path": "rootfs"},
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "network"}],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_FUTURE",
                    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_Z80"],
                    "syscalls": [
                        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
                        {"names": ["write"], "action": "SCMP_ACT_PONDER"}
                    ]
                }
            }
        })
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut json = minimal();
        change(&mut json);
        let error = parse(json.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
        error.to_string()
    }

    #[test]
    fn what_this_runtime_does_not_know_is_left_out_or_stricter() {
        let spec = parse(minimal().to_string().as_bytes()).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(
            process
                .capabilities()
                .as_ref()
                .unwrap()
                .bounding()
                .as_ref()
                .unwrap()
                .len(),
            1
        );
        assert_eq!(process.rlimits().as_ref().unwrap().len(), 1);
        let seccomp = spec.linux().as_ref().unwrap().seccomp().as_ref().unwrap();
        assert_eq!(seccomp.default_action(), LinuxSeccompAction::ScmpActErrno);
        assert_eq!(seccomp.architectures().as_ref().unwrap().len(), 1);
        let actions: Vec<_> = seccomp
            .syscalls()
            .iter()
            .flatten()
            .map(|rule| rule.action())
            .collect();
        assert_eq!(
            actions,
            [
                LinuxSeccompAction::ScmpActAllow,
                LinuxSeccompAction::ScmpActErrno
            ]
        );
        for action in OF_THE_HOST {
            let mut json = minimal();
            json["linux"]["seccomp"]["syscalls"][0]["action"] = action.into();
            let spec = parse(json.to_string().as_bytes()).unwrap();
            let seccomp = spec.linux().as_ref().unwrap().seccomp().as_ref().unwrap();
            assert_eq!(
                seccomp.syscalls().as_ref().unwrap()[0].action(),
                LinuxSeccompAction::ScmpActErrno
            );
        }
    }

    #[test]
    fn a_restriction_that_cannot_be_kept_is_refused() {
        let new_limit = json!([{"type": "RLIMIT_NEW", "hard": 1, "soft": 1}]);
        assert!(refused(|json| json["process"]["rlimits"] = new_limit).contains("RLIMIT_NEW"));
        assert!(
            refused(|json| json["linux"]["seccomp"]["flags"] = json!(["SECCOMP_FILTER_FLAG_NEW"]))
                .contains("_NEW")
        );
        assert!(
            refused(|json| json["process"]["apparmorProfile"] = "mine".into()).contains("\"mine\"")
        );
        let label = "system_u:system_r:my_container.process:s0:c1,c2";
        assert!(refused(|json| json["process"]["selinuxLabel"] = label.into()).contains(label));
        for kind in STOCK_SELINUX {
            let mut json = minimal();
            json["process"]["selinuxLabel"] = format!("system_u:system_r:{kind}:s0:c1,c2").into();
            parse(json.to_string().as_bytes()).unwrap();
        }
        for profile in STOCK_APPARMOR {
            let mut json = minimal();
            json["process"]["apparmorProfile"] = profile.into();
            parse(json.to_string().as_bytes()).unwrap();
        }
    }

    #[test]
    fn an_unknown_namespace_is_named() {
        let message = refused(|json| json["linux"]["namespaces"][1]["type"] = "galaxy".into());
        assert!(message.contains("\"galaxy\""), "{message}");
    }

    #[test]
    fn what_cannot_run_is_refused_with_the_reason() {
        assert!(refused(|json| json["process"]["args"] = json!([])).contains("names no command"));
        assert!(refused(|json| json["process"]["cwd"] = "tmp".into()).contains("not absolute"));
        assert!(refused(|json| json["process"] = Value::Null).contains("no process"));
        assert!(
            refused(|json| json["linux"]["namespaces"] = json!([{"type": "network"}]))
                .contains("mount namespace")
        );
    }

    #[test]
    fn garbage_is_not_a_spec() {
        for text in [
            "",
            "{",
            "[]",
            "null",
            "3",
            "{\"ociVersion\":3}",
            "{\"linux\":[],\"process\":3}",
            "{\"linux\":{\"seccomp\":{\"syscalls\":[3]}}}",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(
            load(Path::new("/nonexistent"))
                .unwrap_err()
                .to_string()
                .contains("/nonexistent/config.json")
        );
    }
}
