//! Seccomp profiles: compiled once per profile by libseccomp in the agent, loaded by the child with
//! one system call.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::str::FromStr;
use std::sync::Arc;

use guest_protocol::protocols::oci::{LinuxSeccomp, LinuxSyscall};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use protobuf::Message;

use crate::error::{Context, Error, Result};
use crate::log::log;
use crate::stock::STOCK;

/// How many compiled profiles are kept. A pod's containers mostly share one.
const CACHE: usize = 8;

/// A program for seccomp(2).
#[derive(Debug)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Puts the filter in force on the calling process. Needs no_new_privs or `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn load(&self) -> std::io::Result<()> {
        sys::process::set_seccomp_filter(&self.program, self.flags)
    }
}

/// Compiled profiles by their encoded bytes.
#[derive(Debug, Default)]
pub struct Cache(HashMap<Vec<u8>, Arc<Filter>>);

impl Cache {
    /// The filter of a profile, compiled on first use.
    ///
    /// # Errors
    /// A default action that nobody knows, or libseccomp's refusal. Unknown system calls,
    /// architectures and actions of single rules are skipped: profiles are written for more kernels
    /// than one.
    pub fn filter(&mut self, profile: &LinuxSeccomp) -> Result<Arc<Filter>> {
        let key = profile
            .write_to_bytes()
            .map_err(|error| Error::Invalid(format!("seccomp profile: {error}")))?;
        if let Some(filter) = self.0.get(&key) {
            return Ok(filter.clone());
        }
        let filter = Arc::new(compile(profile)?);
        if self.0.len() == CACHE {
            self.0.clear();
        }
        self.0.insert(key, filter.clone());
        Ok(filter)
    }
}

fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    let refused = |error: libseccomp::error::SeccompError| {
        Error::Invalid(format!("seccomp profile: {error}"))
    };
    let default = action(&profile.DefaultAction, libc::EPERM).ok_or_else(|| {
        Error::Invalid(format!(
            "seccomp profile has unknown default action {:?}",
            profile.DefaultAction
        ))
    })?;
    let mut context = ScmpFilterContext::new(default).map_err(refused)?;
    // no_new_privs is the process's own business.
    context.set_ctl_nnp(false).map_err(refused)?;
    for name in &profile.Architectures {
        match ScmpArch::from_str(name) {
            Ok(arch) => {
                context.add_arch(arch).map_err(refused)?;
            }
            Err(_) => log!("seccomp architecture {name:?} left out"),
        }
    }
    for rule in &profile.Syscalls {
        add(&mut context, rule, default)?;
    }
    let mut flags = 0;
    for flag in &profile.Flags {
        flags |= match flag.as_str() {
            // For a process with one thread it changes nothing.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            other => {
                log!("seccomp flag {other:?} left out");
                0
            }
        };
    }
    Ok(Filter {
        program: export(&context)?,
        flags,
    })
}

fn add(context: &mut ScmpFilterContext, rule: &LinuxSyscall, default: ScmpAction) -> Result<()> {
    // Kata's clients send 0 where a rule has no number. Ours sends a number above the 16 bits that
    // the kernel takes for a rule that says 0.
    let errno = match rule.errnoret() {
        0 if STOCK => 0,
        0 => libc::EPERM,
        errno => i32::from(errno as u16),
    };
    let Some(action) = action(&rule.Action, errno) else {
        log!("seccomp action {:?} left out", rule.Action);
        return Ok(());
    };
    if action == default {
        return Ok(());
    }
    let mut comparisons = Vec::with_capacity(rule.Args.len());
    for arg in &rule.Args {
        let op = match arg.Op.as_str() {
            "SCMP_CMP_NE" => ScmpCompareOp::NotEqual,
            "SCMP_CMP_LT" => ScmpCompareOp::Less,
            "SCMP_CMP_LE" => ScmpCompareOp::LessOrEqual,
            "SCMP_CMP_EQ" => ScmpCompareOp::Equal,
            "SCMP_CMP_GE" => ScmpCompareOp::GreaterEqual,
            "SCMP_CMP_GT" => ScmpCompareOp::Greater,
            "SCMP_CMP_MASKED_EQ" => ScmpCompareOp::MaskedEqual(arg.Value),
            other => {
                return Err(Error::Invalid(format!(
                    "seccomp profile has unknown comparison {other:?}"
                )));
            }
        };
        let datum = if arg.Op == "SCMP_CMP_MASKED_EQ" {
            arg.ValueTwo
        } else {
            arg.Value
        };
        comparisons.push(ScmpArgCompare::new(
            u32::try_from(arg.Index).unwrap_or(u32::MAX),
            op,
            datum,
        ));
    }
    // Several comparisons of one argument cannot be one rule: then any of them is enough, as with
    // runc.
    let mut indices: Vec<u64> = rule.Args.iter().map(|arg| arg.Index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
    for name in &rule.Names {
        let Ok(call) = ScmpSyscall::from_name(name) else {
            log!("seccomp: unknown system call {name:?} left out");
            continue;
        };
        let added = if comparisons.is_empty() {
            context.add_rule(action, call).map(|_| ())
        } else if repeated {
            comparisons.iter().try_for_each(|one| {
                context
                    .add_rule_conditional(action, call, &[*one])
                    .map(|_| ())
            })
        } else {
            context
                .add_rule_conditional(action, call, &comparisons)
                .map(|_| ())
        };
        if let Err(error) = added {
            return Err(Error::Invalid(format!("seccomp rule for {name}: {error}")));
        }
    }
    Ok(())
}

fn action(name: &str, errno: i32) -> Option<ScmpAction> {
    Some(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => ScmpAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => ScmpAction::KillProcess,
        "SCMP_ACT_TRAP" => ScmpAction::Trap,
        "SCMP_ACT_ERRNO" => ScmpAction::Errno(errno),
        "SCMP_ACT_TRACE" => ScmpAction::Trace(u16::try_from(errno).unwrap_or(0)),
        "SCMP_ACT_ALLOW" => ScmpAction::Allow,
        "SCMP_ACT_LOG" => ScmpAction::Log,
        _ => return None,
    })
}

/// libseccomp writes programs to a file only.
fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    let memory = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC)
        .context(|| "create a memory file".into())?;
    context
        .export_bpf(&memory)
        .map_err(|error| Error::Failed(format!("compile seccomp profile: {error}")))?;
    let mut file = File::from(memory);
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .context(|| "read the seccomp program".into())?;
    let word = |bytes: &[u8]| u16::from_ne_bytes([bytes[0], bytes[1]]);
    let instruction = |bytes: &[u8]| libc::sock_filter {
        code: word(bytes),
        jt: bytes[2],
        jf: bytes[3],
        k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    };
    Ok(bytes
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(instruction)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(default: &str, names: &[&str]) -> LinuxSeccomp {
        let rule = LinuxSyscall {
            Names: names.iter().map(|name| (*name).to_owned()).collect(),
            Action: "SCMP_ACT_ALLOW".into(),
            ..Default::default()
        };
        LinuxSeccomp {
            DefaultAction: default.into(),
            Architectures: vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_PDP11".into()],
            Syscalls: vec![rule],
            ..Default::default()
        }
    }

    #[test]
    fn a_profile_compiles_once_and_skips_what_it_does_not_know() {
        let mut cache = Cache::default();
        let one = cache
            .filter(&profile("SCMP_ACT_ERRNO", &["read", "write", "levitate"]))
            .unwrap();
        let two = cache
            .filter(&profile("SCMP_ACT_ERRNO", &["read", "write", "levitate"]))
            .unwrap();
        assert!(one.program.len() > 4 && Arc::ptr_eq(&one, &two));
        let other = cache.filter(&profile("SCMP_ACT_ERRNO", &["read"])).unwrap();
        assert!(!Arc::ptr_eq(&one, &other));
    }

    #[test]
    fn a_default_action_nobody_knows_is_refused() {
        let error = Cache::default()
            .filter(&profile("SCMP_ACT_HOPE", &[]))
            .unwrap_err();
        assert!(error.to_string().contains("SCMP_ACT_HOPE"));
    }
}
