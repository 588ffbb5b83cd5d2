//! An OCI spec, checked and turned into what a container's first process will do, step by step.
//!
//! ```text
//!  oci::Spec ─┬─ Process ── process ──> ProcessPlan   args, user, capabilities, rlimits, scheduling
//!             ├─ Mounts  ── mounts ───> MountPlan     kind of mount, options
//!             ├─ Devices ── mounts ───> DevicePlan    the default devices and the container's
//!             ├─ Sysctl  ── sysctls ──> path, value   those with a namespace only
//!             └─ Namespaces, root, hostname, id maps: here
//! ```
//!
//! Rules that a change must not break:
//!
//! * Everything that can be wrong in a spec is found here, before anything exists, and the error
//!   names the value.
//! * The child that follows a plan has nothing left to parse, and no C string left to make.
//! * What runc ignores is left out with a line in the log: unknown capabilities and rlimits.

mod mounts;
mod process;
mod schedule;
mod sysctls;

use std::ffi::CString;
use std::sync::Arc;

use guest_protocol::protocols::oci::{self, LinuxIDMapping, Spec};
use nix::mount::MsFlags;

use super::seccomp::Filter;
use crate::error::{Error, Result};
use crate::log::log;
use crate::mount_options::{Options, propagation};

pub use mounts::{DevicePlan, MountKind, MountPlan};
pub use process::{Capabilities, ProcessPlan};

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
fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Invalid(format!("{text:?} has a NUL byte inside")))
}

impl Plan {
    /// Checks a whole spec.
    ///
    /// # Errors
    /// What is wrong, in one line for the user.
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
        let personality = &linux.Own.get_or_default().personality;
        Ok(Plan {
            process: ProcessPlan {
                personality: schedule::personality(personality)?,
                ..ProcessPlan::new(process, seccomp)?
            },
            root: c_string(&root.Path)?,
            root_readonly: root.Readonly,
            root_propagation,
            mounts: spec
                .Mounts
                .iter()
                .map(mounts::mount)
                .collect::<Result<_>>()?,
            devices: mounts::devices(&linux.Devices)?,
            make_dev: !spec.Mounts.iter().any(|mount| {
                mount.destination.trim_end_matches('/') == "/dev"
                    && Options::parse(&mount.options).bind.is_some()
            }),
            masked: linux.MaskedPaths.clone(),
            readonly: linux.ReadonlyPaths.clone(),
            sysctls: linux
                .Sysctl
                .iter()
                .map(|(key, value)| sysctls::sysctl(key, value))
                .collect::<Result<_>>()?,
            hostname,
            join,
            user_maps,
        })
    }
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
            // The short forms are those of Kata's clients in Rust.
            "mount" | "mnt" if entry.Path.is_empty() => continue,
            "network" | "net" => continue,
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
    fn namespaces_have_the_names_of_specs_and_of_katas_clients() {
        let mut spec = spec();
        linux(&mut spec).Namespaces = ["pid", "mount", "mnt", "network", "net"]
            .map(|kind| oci::LinuxNamespace {
                Type: kind.into(),
                ..Default::default()
            })
            .into();
        assert!(Plan::new(&spec, None).unwrap().join.is_empty());
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
