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
//!    take_identity       limits, user, working directory, the program's path
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

use std::convert::Infallible;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::sys::stat::Mode;

use super::plan::{Capabilities, ProcessPlan};
use crate::error::errno_text;
use crate::spawn::step::{Failure, Step, StepContext};
use crate::stdio::ChildStdio;
use crate::sys::check;

/// linux/close_range.h
const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;

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
    let none: *const libc::gid_t = std::ptr::null();
    // SAFETY: plain numbers; an empty list of groups.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, none))
            .context("set groups in the user namespace")?;
        check(libc::syscall(libc::SYS_setresgid, 0, 0, 0))
            .context("set group in the user namespace")?;
        check(libc::syscall(libc::SYS_setresuid, 0, 0, 0))
            .context("set user in the user namespace")?;
    }
    Ok(())
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
    let env = environment(plan);
    let cwd = OsStr::from_bytes(plan.cwd.as_bytes());
    let capabilities = plan.capabilities.unwrap_or_default();
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
    // SAFETY: plain numbers; it changes a flag of descriptors that are ours.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    Ok(Program { path, env })
}

/// Gives up the rest of the privileges and becomes the program.
pub fn exec_program(plan: &ProcessPlan, program: &Program) -> Step<Infallible> {
    let capabilities = plan.capabilities.unwrap_or_default();
    if plan.no_new_privileges {
        // SAFETY: plain numbers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
            .context("set no_new_privs")?;
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

fn drop_bounding(keep: u64) -> Step<()> {
    for capability in 0..64 {
        if keep & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: plain numbers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            // The kernel knows no further ones.
            if error.raw_os_error() == Some(libc::EINVAL) {
                break;
            }
            return Err(error).context("drop capabilities from the bounding set");
        }
    }
    Ok(())
}

/// Becomes the user and keeps the capabilities for the steps that follow.
fn set_user(plan: &ProcessPlan) -> Step<()> {
    let ProcessPlan {
        uid, gid, groups, ..
    } = plan;
    // SAFETY: plain numbers, and a list that lives over the call. Raw calls: glibc's wrappers
    // signal all threads.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())
            .context("keep capabilities")?;
        check(libc::syscall(
            libc::SYS_setgroups,
            groups.len(),
            groups.as_ptr(),
        ))
        .context("set supplementary groups")?;
        check(libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid))
            .context(format_args!("become group {gid}"))?;
        check(libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid))
            .context(format_args!("become user {uid}"))?;
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0).into())
            .context("keep capabilities")?;
        // A change of user clears it anyway; a fork of root keeps it as it was set.
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
    }
    // The effective set went with root; seccomp and the working directory want it once more.
    let all = u64::MAX;
    if *uid != 0 {
        capset(all, all, 0).context("raise capabilities")?;
    }
    Ok(())
}

fn set_capabilities(sets: &Capabilities) -> Step<()> {
    capset(sets.effective, sets.permitted, sets.inheritable).context("set capabilities")?;
    // SAFETY: plain numbers.
    unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        );
        for capability in (0..64).filter(|bit| sets.ambient & (1 << bit) != 0) {
            // One that is not permitted and inheritable cannot be ambient; runc only warns too.
            libc::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_RAISE,
                capability,
                0,
                0,
            );
        }
    }
    Ok(())
}

/// capset(2), cut to what this process may have: the kernel refuses more.
fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: header and both halves of the data have the kernel's layout and live over the calls.
    unsafe {
        check(libc::syscall(
            libc::SYS_capget,
            &raw const header,
            data.as_mut_ptr(),
        ))?;
        for (half, data) in data.iter_mut().enumerate() {
            #[allow(clippy::cast_possible_truncation, reason = "this takes one half")]
            let part = |mask: u64| (mask >> (32 * half)) as u32;
            data.inheritable = part(inheritable) & (data.inheritable | data.permitted);
            data.permitted &= part(permitted);
            data.effective = data.permitted & part(effective);
        }
        check(libc::syscall(
            libc::SYS_capset,
            &raw const header,
            data.as_ptr(),
        ))
        .map(|_| ())
    }
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
