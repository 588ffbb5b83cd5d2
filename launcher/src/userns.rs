//! A user namespace in which every id is itself: root in it may act on files as root does, and is
//! nobody elsewhere.

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Every id but the last, which means none, is itself.
const ALL_IDS: &str = "0 0 4294967295";

/// Makes one. It lives as long as its descriptor, or a process in it.
///
/// # Errors
/// User namespaces are forbidden or used up on this host (`user.max_user_namespaces`).
pub fn user_namespace() -> io::Result<OwnedFd> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all zero is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from((libc::CLONE_NEWUSER | libc::CLONE_PIDFD).cast_unsigned());
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: as fork(2); the child makes only system calls. The kernel writes the pidfd into the
    // local variable.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    if pid == 0 {
        // It only keeps the namespace until that has a descriptor. A parent that dies takes it
        // along. SAFETY: integers only; the process never returns to its parent's code.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::alarm(10);
            loop {
                libc::pause();
            }
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
    let _pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let opened = map_and_open(pid);
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: our own child, which nobody else reaps; a null status is allowed.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
    opened
}

fn map_and_open(pid: libc::c_long) -> io::Result<OwnedFd> {
    fs::write(format!("/proc/{pid}/uid_map"), ALL_IDS)?;
    fs::write(format!("/proc/{pid}/gid_map"), ALL_IDS)?;
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}
