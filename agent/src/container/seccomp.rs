//! Seccomp profiles: compiled once per profile by libseccomp in the agent, loaded by the child with
//! one system call.
//!
//! A profile lists what its author knew. A program that tries a newer system call falls back to an
//! older one if the kernel says that there is none (ENOSYS), and fails if it says that it may not
//! (EPERM). So, as with runc, a call with a number above all that the profile names is answered
//! ENOSYS by a few instructions before libseccomp's.

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
    let default_errno = profile.Own.get_or_default().default_errno;
    // Of this number the kernel has the 16 low bits.
    let errno = default_errno.map_or(libc::EPERM, |errno| i32::from(errno as u16));
    let default = action(&profile.DefaultAction, errno).ok_or_else(|| {
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
    let mut program = Vec::new();
    let allows = matches!(default, ScmpAction::Allow | ScmpAction::Log);
    if !STOCK && !allows && default != ScmpAction::Errno(libc::ENOSYS) {
        answer_newer_calls(profile, &mut program);
    }
    program.extend(export(&context)?);
    Ok(Filter { program, flags })
}

/// The architectures that a guest can run programs of, with the kernel's numbers for them
/// (linux/audit.h).
const ARCHITECTURES: [(ScmpArch, u32); 4] = [
    (ScmpArch::X8664, 0xc000_003e),
    (ScmpArch::X86, 0x4000_0003),
    (ScmpArch::Aarch64, 0xc000_00b7),
    (ScmpArch::Arm, 0x4000_0028),
];

/// From this number on a call is another ABI's (x32), or none at all (-1).
const OTHER_ABI: u32 = 0x4000_0000;

/// Instructions that answer ENOSYS to calls that are newer than the profile's newest one. All others
/// fall through to what comes behind.
fn answer_newer_calls(profile: &LinuxSeccomp, program: &mut Vec<libc::sock_filter>) {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const JUMP_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const JUMP_GREATER: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const NUMBER: u32 = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    const ARCHITECTURE: u32 = std::mem::offset_of!(libc::seccomp_data, arch) as u32;
    let op = |code: u32, k, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let listed = |arch| {
        let names = profile.Architectures.iter();
        arch == ScmpArch::native()
            || names
                .filter_map(|name| ScmpArch::from_str(name).ok())
                .any(|listed| listed == arch)
    };
    let newest = ARCHITECTURES
        .into_iter()
        .filter(|(arch, _)| listed(*arch))
        .filter_map(|(arch, audit)| Some((audit, newest_call(profile, arch)?)));
    for (audit, newest) in newest {
        // The next architecture is six instructions on.
        program.extend([
            op(LOAD, ARCHITECTURE, 0, 0),
            op(JUMP_EQUAL, audit, 0, 4),
            op(LOAD, NUMBER, 0, 0),
            op(JUMP_GREATER, newest, 0, 2),
            op(JUMP_GREATER, OTHER_ABI - 1, 1, 0),
            op(
                RETURN,
                libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(),
                0,
                0,
            ),
        ]);
    }
}

/// The highest number that a call of the profile has on an architecture.
fn newest_call(profile: &LinuxSeccomp, arch: ScmpArch) -> Option<u32> {
    let names = profile.Syscalls.iter().flat_map(|rule| &rule.Names);
    // Calls that the architecture does not have are negative.
    names
        .filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok())
        .filter_map(|call| u32::try_from(i32::from(call)).ok())
        .max()
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

    /// What a program returns for a call, by the rules of linux/filter.h for the few instructions
    /// that are used here.
    fn answer(program: &[libc::sock_filter], arch: u32, number: u32) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let op = &program[at];
            let jump = |holds| 1 + usize::from(if holds { op.jt } else { op.jf });
            at += match u32::from(op.code) {
                0x20 => {
                    value = if op.k == 4 { arch } else { number };
                    1
                }
                0x15 => jump(value == op.k),
                0x25 => jump(value > op.k),
                0x35 => jump(value >= op.k),
                0x05 => 1 + op.k as usize,
                0x06 => return op.k,
                other => panic!("instruction {other:#x}"),
            };
        }
    }

    #[test]
    fn calls_that_are_newer_than_the_profile_do_not_exist() {
        let (x86_64, x86) = (ARCHITECTURES[0].1, ARCHITECTURES[1].1);
        let mut profile = profile("SCMP_ACT_ERRNO", &["read", "execveat"]);
        profile.Architectures.push("SCMP_ARCH_X86".into());
        let filter = compile(&profile).unwrap();
        let said = |arch, number| answer(&filter.program, arch, number);
        let errno = |number: i32| libc::SECCOMP_RET_ERRNO | number.cast_unsigned();
        // execveat is 322, and 358 of 32 bits.
        assert_eq!(said(x86_64, 0), libc::SECCOMP_RET_ALLOW);
        assert_eq!(said(x86_64, 1), errno(libc::EPERM));
        assert_eq!(said(x86_64, 322), libc::SECCOMP_RET_ALLOW);
        assert_eq!(said(x86_64, 323), errno(libc::ENOSYS));
        assert_eq!(said(x86, 358), libc::SECCOMP_RET_ALLOW);
        assert_eq!(said(x86, 359), errno(libc::ENOSYS));
        assert_eq!(said(x86, 357), errno(libc::EPERM));
        // x32, and what a tracer has cancelled: libseccomp decides.
        for other in [OTHER_ABI, u32::MAX] {
            assert_ne!(said(x86_64, other), errno(libc::ENOSYS));
        }
        // Another architecture, which the profile does not have.
        assert_ne!(said(ARCHITECTURES[2].1, 9999), errno(libc::ENOSYS));
    }

    #[test]
    fn a_profile_that_allows_what_it_does_not_list_allows_what_is_new() {
        let filter = compile(&profile("SCMP_ACT_ALLOW", &["read"])).unwrap();
        let said = answer(&filter.program, ARCHITECTURES[0].1, 9999);
        assert_eq!(said, libc::SECCOMP_RET_ALLOW);
    }

    #[test]
    fn the_default_error_is_the_profiles() {
        let mut profile = profile("SCMP_ACT_ERRNO", &["read"]);
        profile.Own.mut_or_insert_default().default_errno = Some(libc::ENOTTY.cast_unsigned());
        let filter = compile(&profile).unwrap();
        let write = answer(&filter.program, ARCHITECTURES[0].1, 1);
        let errno = |number: i32| libc::SECCOMP_RET_ERRNO | number.cast_unsigned();
        assert_eq!(
            write,
            errno(libc::ENOSYS),
            "newer than the only call that is listed"
        );
        profile.Syscalls[0].Names.push("close".into());
        let filter = compile(&profile).unwrap();
        let write = answer(&filter.program, ARCHITECTURES[0].1, 1);
        assert_eq!(write, errno(libc::ENOTTY));
    }

    #[test]
    fn a_default_action_nobody_knows_is_refused() {
        let error = Cache::default()
            .filter(&profile("SCMP_ACT_HOPE", &[]))
            .unwrap_err();
        assert!(error.to_string().contains("SCMP_ACT_HOPE"));
    }
}
