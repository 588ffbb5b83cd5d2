//! What a process needs before and at exec(2), checked: arguments, user, capabilities, limits,
//! scheduling.

use std::ffi::CString;
use std::sync::Arc;

use guest_protocol::protocols::oci::{self, LinuxCapabilities};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::super::seccomp::Filter;
use super::c_string;
use super::schedule::{self, SchedulerPlan};
use crate::error::{Error, Result};
use crate::log::log;

/// The mask of permissions for new files, where a spec says none.
const UMASK: libc::mode_t = 0o022;

/// How a process presents itself once it runs: everything that exec(2) and the calls before it
/// need.
#[derive(Clone, Debug)]
pub struct ProcessPlan {
    pub args: Vec<CString>,
    pub env: Vec<CString>,
    pub cwd: CString,
    pub uid: libc::uid_t,
    pub gid: libc::gid_t,
    pub groups: Vec<libc::gid_t>,
    pub umask: libc::mode_t,
    /// None for an exec that takes over the container's.
    pub capabilities: Option<Capabilities>,
    pub rlimits: Vec<(libc::__rlimit_resource_t, libc::rlimit)>,
    pub no_new_privileges: bool,
    pub oom_score_adj: i64,
    pub scheduler: Option<SchedulerPlan>,
    /// As ioprio_set(2) takes it.
    pub io_priority: Option<libc::c_int>,
    /// As personality(2) takes it. It is the container's, also for an exec.
    pub personality: Option<libc::c_ulong>,
    pub seccomp: Option<Arc<Filter>>,
    pub terminal: bool,
    /// Of the terminal at the start.
    pub size: Option<TerminalSize>,
}

/// Characters of a terminal.
#[derive(Clone, Copy, Debug)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

/// The five capability sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub bounding: CapabilitySet,
    pub own: CapabilitySets,
    pub ambient: CapabilitySet,
}

impl Capabilities {
    /// No capability at all.
    pub const NONE: Capabilities = Capabilities {
        bounding: CapabilitySet::empty(),
        own: CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        },
        ambient: CapabilitySet::empty(),
    };
}

impl ProcessPlan {
    /// Checks a process.
    ///
    /// # Errors
    /// What is wrong, in one line for the user.
    pub fn new(process: &oci::Process, seccomp: Option<Arc<Filter>>) -> Result<ProcessPlan> {
        if process.Args.is_empty() {
            return Err(Error::Invalid(
                "the process has no args: the image names no command and none was given".into(),
            ));
        }
        let cwd = if process.Cwd.is_empty() {
            "/"
        } else {
            &process.Cwd
        };
        if !cwd.starts_with('/') {
            return Err(Error::Invalid(format!(
                "working directory {cwd:?} is not absolute"
            )));
        }
        let user = process.User.get_or_default();
        let own = process.Own.get_or_default();
        let umask = own.umask.unwrap_or(UMASK);
        if umask > 0o777 {
            return Err(Error::Invalid(format!(
                "umask {umask:#o} is more than 0777"
            )));
        }
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = process.ConsoleSize.as_ref().map(|size| TerminalSize {
            rows: cells(size.Height),
            columns: cells(size.Width),
        });
        Ok(ProcessPlan {
            args: process
                .Args
                .iter()
                .map(|arg| c_string(arg))
                .collect::<Result<_>>()?,
            env: process
                .Env
                .iter()
                .map(|variable| c_string(variable))
                .collect::<Result<_>>()?,
            cwd: c_string(cwd)?,
            uid: user.UID,
            gid: user.GID,
            groups: user.AdditionalGids.clone(),
            umask,
            capabilities: process
                .Capabilities
                .as_ref()
                .map(capabilities)
                .transpose()?,
            rlimits: rlimits(&process.Rlimits),
            no_new_privileges: process.NoNewPrivileges,
            oom_score_adj: process.OOMScoreAdj.clamp(-1000, 1000),
            scheduler: own
                .scheduler
                .as_ref()
                .map(schedule::scheduler)
                .transpose()?,
            io_priority: own
                .io_priority
                .as_ref()
                .map(schedule::io_priority)
                .transpose()?,
            personality: None,
            seccomp,
            terminal: process.Terminal,
            // Zero is unknown.
            size: size.filter(|size| size.rows != 0 && size.columns != 0),
        })
    }
}

/// Capability sets. Kata's clients in Rust leave out the `CAP_` of the names.
fn capabilities(sets: &LinuxCapabilities) -> Result<Capabilities> {
    let mask = |names: &[String]| {
        let mut mask = CapabilitySet::empty();
        for name in names {
            let known = CapabilitySet::from_name(name.strip_prefix("CAP_").unwrap_or(name));
            mask |= known.ok_or_else(|| Error::Invalid(format!("unknown capability {name:?}")))?;
        }
        Ok(mask)
    };
    Ok(Capabilities {
        bounding: mask(&sets.Bounding)?,
        own: CapabilitySets {
            effective: mask(&sets.Effective)?,
            permitted: mask(&sets.Permitted)?,
            inheritable: mask(&sets.Inheritable)?,
        },
        ambient: mask(&sets.Ambient)?,
    })
}

fn rlimits(limits: &[oci::POSIXRlimit]) -> Vec<(libc::__rlimit_resource_t, libc::rlimit)> {
    let resource = |name: &str| {
        Some(match name {
            "RLIMIT_AS" => libc::RLIMIT_AS,
            "RLIMIT_CORE" => libc::RLIMIT_CORE,
            "RLIMIT_CPU" => libc::RLIMIT_CPU,
            "RLIMIT_DATA" => libc::RLIMIT_DATA,
            "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
            "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
            "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
            "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
            "RLIMIT_NICE" => libc::RLIMIT_NICE,
            "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
            "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
            "RLIMIT_RSS" => libc::RLIMIT_RSS,
            "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
            "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
            "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
            "RLIMIT_STACK" => libc::RLIMIT_STACK,
            _ => return None,
        })
    };
    let mut out = Vec::with_capacity(limits.len());
    for limit in limits {
        match resource(&limit.Type) {
            Some(resource) => out.push((
                resource,
                libc::rlimit {
                    rlim_cur: limit.Soft,
                    rlim_max: limit.Hard,
                },
            )),
            None => log!("unknown rlimit {:?} left out", limit.Type),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_their_names_with_and_without_cap() {
        let sets = |names: &[&str]| LinuxCapabilities {
            Bounding: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        };
        assert_eq!(
            capabilities(&sets(&["CAP_CHOWN", "KILL"]))
                .unwrap()
                .bounding,
            CapabilitySet::CHOWN | CapabilitySet::KILL
        );
        let error = capabilities(&sets(&["CAP_CHOWN", "CAP_FLY"])).unwrap_err();
        assert_eq!(error.to_string(), "unknown capability \"CAP_FLY\"");
    }

    #[test]
    fn unknown_rlimits_are_left_out() {
        let limit = |name: &str| oci::POSIXRlimit {
            Type: name.into(),
            Hard: 2,
            Soft: 1,
            ..Default::default()
        };
        assert_eq!(
            rlimits(&[limit("RLIMIT_NOFILE"), limit("RLIMIT_WISHES")]).len(),
            1
        );
    }
}
