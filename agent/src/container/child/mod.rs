//! What runs in a child between clone and exec: the only code that enters a container.
//!
//! ```text
//!  init (a container's first process)          exec (one that joins)
//!    join namespaces, hostname, sysctls          setns to those of the first process
//!    rootfs: mounts, devices, pivot_root         ·
//!      └─ copy_up: a tmpfs begins with the image's files
//!    ┌───────────────── this file, for both ─────────────────┐
//!    detach              session, signals, not dumpable
//!    take_stdio or open_console
//!    take_identity       limits, scheduling, user, working directory, the program's path
//!    report "ready", wait to go on               exec: with a terminal only
//!    exec_program        no_new_privs, seccomp, capabilities, execve
//! ```
//!
//! A step that fails ends the child with one line, which the user reads in the words of runc.
//!
//! Rules that a change must not break:
//!
//! * The child is a copy of the agent, so until exec it must be no open door: it is not dumpable,
//!   has forgotten the key, and holds no descriptor of the agent's when it waits.
//! * Paths of the image are resolved with the container's root as the boundary; before the new root
//!   is entered, a path means one of the agent's.
//! * The order of privileges: the bounding set before the user, the user before the working
//!   directory (which may be the user's alone). With no_new_privs the seccomp filter is loaded last
//!   of all; without it, before the capabilities that the loading needs are given up.
//! * Nothing here waits, but for the agent's go and for the image's file system.

mod copy_up;
pub mod exec;
pub mod init;
mod rootfs;
mod schedule;

use std::convert::Infallible;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::sys::stat::Mode;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use sys::check;

use super::plan::{Capabilities, ProcessPlan};
use crate::error::errno_text;
use crate::spawn::step::{Failure, Step, StepContext};
use crate::stdio::ChildStdio;

/// Longest /etc/passwd that is searched for a home directory, in bytes.
const MAX_PASSWD: u64 = 1 << 20;

/// A terminal made in the container's own devpts.
pub struct Console {
    /// For the agent.
    pub master: OwnedFd,
    /// Path of the other end, in the container.
    pub name: String,
}

/// A program to run, found, and its environment.
pub struct Program {
    path: CString,
    env: Vec<CString>,
}

/// Cuts what a forked child has from the agent: session, signals, visibility to others.
pub fn detach() -> Step<()> {
    // SAFETY: plain system calls on this process's own state; the set lives on the stack.
    unsafe {
        libc::setsid();
        // Until exec this is the agent's memory: no process of the container may look into it.
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        // Rust ignores SIGPIPE, nohup SIGHUP, a shell SIGINT and SIGQUIT of what it runs in the
        // background, and what is ignored stays ignored over exec. Two of them cannot be set, which
        // does no harm.
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
    Ok(())
}

/// In a new user namespace: be its root.
pub fn become_root() -> Step<()> {
    set_thread_groups(&[]).context("set groups in the user namespace")?;
    let (root, group) = (Uid::ROOT, Gid::ROOT);
    set_thread_res_gid(group, group, group).context("set group in the user namespace")?;
    set_thread_res_uid(root, root, root).context("set user in the user namespace")
}

/// Sets who is killed first when memory runs out; written through the agent's /proc.
pub fn set_oom_score(score: i64) -> Step<()> {
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .context(format_args!("set oom_score_adj {score}"))
}

/// Sets the mask of permissions for new files.
pub fn set_umask(mask: libc::mode_t) {
    nix::sys::stat::umask(Mode::from_bits_truncate(mask));
}

/// Puts the pipes where a program expects them. The user owns them, so that /dev/stdout can be
/// opened again.
pub fn take_stdio(stdio: &ChildStdio, uid: libc::uid_t) -> Step<()> {
    // The three may be among the numbers they go to: lift them above first.
    let mut lifted: [RawFd; 3] = [-1; 3];
    for (lifted, fd) in lifted.iter_mut().zip(stdio) {
        // SAFETY: an open descriptor and plain numbers.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
        *lifted = i32::try_from(check(result.into()).context("copy stdio")?).unwrap_or(-1);
    }
    for (number, fd) in (0..).zip(lifted) {
        if uid != 0 && !is_null(fd) {
            // SAFETY: an open descriptor; a pipe that cannot be given away is the user's loss only.
            unsafe { libc::fchown(fd, uid, libc::gid_t::MAX) };
        }
        // SAFETY: open descriptors; the old one closes at exec.
        check(unsafe { libc::dup2(fd, number) }.into()).context("place stdio")?;
    }
    Ok(())
}

/// Whether it is the null device, whose owner must stay.
fn is_null(fd: RawFd) -> bool {
    // SAFETY: the stat buffer is plain data and lives over the call.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        libc::fstat(fd, &raw mut stat) == 0 && stat.st_rdev == libc::makedev(1, 3)
    }
}

/// Makes a terminal in the container's /dev/pts, makes it this process's stdio and controlling
/// terminal.
pub fn open_console(plan: &ProcessPlan) -> Step<Console> {
    let master: OwnedFd = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NOFOLLOW)
        .open("/dev/pts/ptmx")
        .context("open /dev/pts/ptmx (a terminal needs a devpts mount)")?
        .into();
    let fd = master.as_raw_fd();
    let mut number: libc::c_uint = 0;
    let unlocked: libc::c_int = 0;
    // SAFETY: ioctls of a pty master with arguments of their types that live over the calls.
    let slave = unsafe {
        check(libc::ioctl(fd, libc::TIOCGPTN, &raw mut number).into())
            .context("number of the terminal")?;
        check(libc::ioctl(fd, libc::TIOCSPTLCK, &raw const unlocked).into())
            .context("unlock the terminal")?;
        check(
            libc::ioctl(
                fd,
                libc::TIOCGPTPEER,
                libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
            )
            .into(),
        )
        .context("open the terminal")?
    };
    // SAFETY: the kernel just made this descriptor for us.
    let slave = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(slave).unwrap_or(-1)) };
    if let Some(size) = plan.size {
        let size = libc::winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the size lives over the call.
        unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size) };
    }
    // SAFETY: open descriptors and plain numbers.
    unsafe {
        libc::fchown(slave.as_raw_fd(), plan.uid, libc::gid_t::MAX);
        for number in 0..3 {
            check(libc::dup2(slave.as_raw_fd(), number).into()).context("place the terminal")?;
        }
        check(libc::ioctl(0, libc::TIOCSCTTY, 0).into()).context("take the terminal")?;
    }
    Ok(Console {
        master,
        name: format!("/dev/pts/{number}"),
    })
}

/// Takes on limits, working directory, user and groups, and finds the program. What is left needs
/// no file system.
pub fn take_identity(plan: &ProcessPlan) -> Step<Program> {
    for (resource, limit) in &plan.rlimits {
        // SAFETY: the limit lives over the call.
        check(unsafe { libc::setrlimit(*resource, std::ptr::from_ref(limit)) }.into()).context(
            format_args!(
                "set rlimit {resource} to {} {}",
                limit.rlim_cur, limit.rlim_max
            ),
        )?;
    }
    schedule::take_on(plan)?;
    let env = environment(plan);
    let cwd = OsStr::from_bytes(plan.cwd.as_bytes());
    let capabilities = plan.capabilities.unwrap_or(Capabilities::NONE);
    drop_bounding(capabilities.bounding)?;
    set_user(plan)?;
    nix::unistd::chdir(plan.cwd.as_c_str())
        .context(format_args!("chdir to working directory {}", cwd.display()))?;
    // A directory from outside (through an inherited descriptor) has no path in here.
    if !std::env::current_dir().is_ok_and(|path| path.is_absolute()) {
        return Err(Failure(format!(
            "working directory {} is outside of the container",
            cwd.display()
        )));
    }
    let path = look_up(plan, &env)?;
    // Whatever an agent that is not PID 1 was started with.
    let _ = sys::process::close_on_exec_from(3);
    Ok(Program { path, env })
}

/// Gives up the rest of the privileges and becomes the program.
pub fn exec_program(plan: &ProcessPlan, program: &Program) -> Step<Infallible> {
    let capabilities = plan.capabilities.unwrap_or(Capabilities::NONE);
    if plan.no_new_privileges {
        set_no_new_privs(true).context("set no_new_privs")?;
        set_capabilities(&capabilities)?;
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which goes with the next step.
        load_filter(plan)?;
        set_capabilities(&capabilities)?;
    }
    let argv = pointers(&plan.args);
    let envp = pointers(&program.env);
    if plan.no_new_privileges {
        load_filter(plan)?;
    }
    // SAFETY: the path and both arrays are C strings, the arrays end with null, and all live over
    // the call.
    unsafe { libc::execve(program.path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    Err(io::Error::last_os_error()).context(format_args!("exec {}", program.path.to_string_lossy()))
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

fn load_filter(plan: &ProcessPlan) -> Step<()> {
    plan.seccomp.as_ref().map_or(Ok(()), |filter| {
        filter.load().context("load seccomp profile")
    })
}

/// The environment, with HOME from /etc/passwd where it is not set.
fn environment(plan: &ProcessPlan) -> Vec<CString> {
    let mut env = plan.env.clone();
    if !env
        .iter()
        .any(|variable| variable.as_bytes().starts_with(b"HOME="))
    {
        let home =
            home_of(&read_passwd().unwrap_or_default(), plan.uid).unwrap_or_else(|| "/".into());
        env.extend(CString::new(format!("HOME={home}")));
    }
    env
}

fn read_passwd() -> io::Result<String> {
    // The image may have put anything there: nothing that blocks, nothing without end.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd")?;
    let kind = file.metadata()?.file_type();
    if kind.is_char_device() || kind.is_fifo() || kind.is_dir() {
        return Ok(String::new());
    }
    let mut text = Vec::new();
    file.take(MAX_PASSWD).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The home directory of a user id.
fn home_of(passwd: &str, uid: libc::uid_t) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.nth(2)?.trim().parse() == Ok(uid))
            .then(|| fields.nth(2))
            .flatten()
            .map(str::to_owned)
    })
}

/// Every capability that there may ever be, one at a time.
fn each_capability() -> impl Iterator<Item = CapabilitySet> {
    (0..64).map(|number| CapabilitySet::from_bits_retain(1 << number))
}

fn drop_bounding(keep: CapabilitySet) -> Step<()> {
    for capability in each_capability().filter(|one| !keep.contains(*one)) {
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no further ones.
            Err(Errno::INVAL) => break,
            result => return result.context("drop capabilities from the bounding set"),
        }
    }
    Ok(())
}

/// Becomes the user and keeps the capabilities for the steps that follow.
fn set_user(plan: &ProcessPlan) -> Step<()> {
    let ProcessPlan {
        uid, gid, groups, ..
    } = plan;
    let list: Vec<Gid> = groups
        .iter()
        .copied()
        .map(Gid::from_raw_unchecked)
        .collect();
    let user = Uid::from_raw_unchecked(*uid);
    let group = Gid::from_raw_unchecked(*gid);
    // Of this thread, the only one: glibc's wrappers signal all threads.
    set_keep_capabilities(true).context("keep capabilities")?;
    set_thread_groups(&list).context("set supplementary groups")?;
    set_thread_res_gid(group, group, group).context(format_args!("become group {gid}"))?;
    set_thread_res_uid(user, user, user).context(format_args!("become user {uid}"))?;
    set_keep_capabilities(false).context("keep capabilities")?;
    // A change of user clears it anyway; a fork of root keeps it as it was set.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    // The effective set went with root; seccomp and the working directory want it once more.
    if *uid != 0 {
        let all = CapabilitySet::from_bits_retain(u64::MAX);
        capset(CapabilitySets {
            effective: all,
            permitted: all,
            inheritable: CapabilitySet::empty(),
        })
        .context("raise capabilities")?;
    }
    Ok(())
}

fn set_capabilities(sets: &Capabilities) -> Step<()> {
    capset(sets.own).context("set capabilities")?;
    let _ = clear_ambient_capability_set();
    for capability in each_capability().filter(|one| sets.ambient.contains(*one)) {
        // One that is not permitted and inheritable cannot be ambient; runc only warns too.
        let _ = configure_capability_in_ambient_set(capability, true);
    }
    Ok(())
}

/// capset(2), cut to what this process may have: the kernel refuses more.
fn capset(wanted: CapabilitySets) -> rustix::io::Result<()> {
    let now = capabilities(None)?;
    let permitted = wanted.permitted & now.permitted;
    let sets = CapabilitySets {
        effective: wanted.effective & permitted,
        permitted,
        inheritable: wanted.inheritable & (now.inheritable | now.permitted),
    };
    rustix::thread::set_capabilities(None, sets)
}

/// Finds the program as a shell would, with the container's PATH and as its user.
fn look_up(plan: &ProcessPlan, env: &[CString]) -> Step<CString> {
    let name = &plan.args[0];
    let shown = name.to_string_lossy();
    if name.as_bytes().contains(&b'/') {
        return match runnable(name) {
            Ok(()) => Ok(name.clone()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(error).context(format_args!("exec: {shown:?}"))
            }
            Err(error) => Err(Failure(format!(
                "exec: {shown:?}: stat {shown}: {}",
                errno_text(&error)
            ))),
        };
    }
    let path = env
        .iter()
        .find_map(|variable| variable.as_bytes().strip_prefix(b"PATH="))
        .unwrap_or_default();
    for dir in path
        .split(|byte| *byte == b':')
        .filter(|_| !name.is_empty())
    {
        let dir = if dir.is_empty() { b".".as_slice() } else { dir };
        let candidate = [dir, b"/", name.as_bytes()].concat();
        if let Ok(candidate) = CString::new(candidate)
            && runnable(&candidate).is_ok()
        {
            return Ok(candidate);
        }
    }
    Err(Failure(format!(
        "exec: {shown:?}: executable file not found in $PATH"
    )))
}

fn runnable(path: &CStr) -> io::Result<()> {
    let file = fs::metadata(OsStr::from_bytes(path.to_bytes()))?;
    // SAFETY: the path is a C string.
    if file.is_dir() || unsafe { libc::access(path.as_ptr(), libc::X_OK) } != 0 {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_the_users_line_of_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\n";
        assert_eq!(home_of(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_of(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_of(passwd, 1000), None);
        assert_eq!(home_of("x:y:not a number\n", 0), None);
    }
}
