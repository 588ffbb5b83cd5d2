//! A user namespace in which every id is itself: root in it may act on files as root does, and is
//! nobody elsewhere.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use sys::process::{fork, pidfd_send_signal};

/// Every id but the last, which means none, is itself.
const ALL_IDS: &str = "0 0 4294967295";

/// Makes one. It lives as long as its descriptor, or a process in it.
///
/// # Errors
/// User namespaces are forbidden or used up on this host (`user.max_user_namespaces`).
pub fn user_namespace() -> io::Result<OwnedFd> {
    // SAFETY: the child only makes system calls, and never comes back.
    let Some(holder) = (unsafe { fork(libc::CLONE_NEWUSER, None) })? else {
        // It only keeps the namespace until that has a descriptor. A parent that dies takes it
        // along. SAFETY: integers only; the process never returns to its parent's code.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::alarm(10);
            loop {
                libc::pause();
            }
        }
    };
    let opened = map_and_open(holder.pid);
    let _ = pidfd_send_signal(holder.pidfd.as_fd(), libc::SIGKILL);
    let _ = waitid(Id::PIDFd(holder.pidfd.as_fd()), WaitPidFlag::WEXITED);
    opened
}

fn map_and_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    fs::write(format!("/proc/{pid}/uid_map"), ALL_IDS)?;
    fs::write(format!("/proc/{pid}/gid_map"), ALL_IDS)?;
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}
