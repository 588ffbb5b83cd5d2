//! Processes: how one is made, what is done to it through its pidfd, and what it does to itself.
//!
//! Errors are the kernel's number alone. To make one allocates nothing and takes no lock, so these
//! functions may be called in a child between its making and its exec.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use crate::check;

/// linux/sched.h; libc has it in too narrow a type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A process that was started. It still has to be reaped.
#[derive(Debug)]
pub struct Started {
    /// Its process id in the caller's pid namespace.
    pub pid: libc::pid_t,
    /// Refers to the process even after it was reaped (pidfd_open(2)); close-on-exec.
    pub pidfd: OwnedFd,
}

/// Makes a process that goes on from here with a copy of the caller's memory: in new namespaces
/// (`CLONE_NEW*` in `flags`), and in `cgroup` from its first instruction, or in the caller's.
/// Returns `None` in the child. The parent gets SIGCHLD when the child ends.
///
/// # Errors
/// No right to make such namespaces, no place in the cgroup, no more processes.
///
/// # Safety
/// `flags` are `CLONE_NEW*` only. The child has the calling thread alone: what another thread held
/// locked stays locked for ever. So until its exec or `_exit` the child of a caller with more
/// threads may only do what is async-signal-safe (signal-safety(7)), which no allocation is. It
/// must not return into code of the caller that takes itself for the parent.
pub unsafe fn fork(
    flags: libc::c_int,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Option<Started>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data, for which zero is valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from((flags | libc::CLONE_PIDFD).cast_unsigned());
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without CLONE_VM this is fork(2), with a stack of the child's own; what the child may
    // do is the caller's promise. The kernel writes the pidfd into the local variable.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match libc::pid_t::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Some(Started {
            pid,
            // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        })),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The process that has this number now, as a descriptor; close-on-exec.
///
/// # Errors
/// `ESRCH` if there is none.
pub fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    let known = if pid > 0 { Pid::from_raw(pid) } else { None };
    let opened = match known {
        Some(pid) => rustix::process::pidfd_open(pid, PidfdFlags::empty()),
        None => Err(Errno::SRCH),
    };
    opened.map_err(|errno| match errno {
        // Kernels such as Debian 12's 6.1 say so of a number that no process has any more while
        // something still holds it (a pidfd, a process group), or that a thread has.
        Errno::INVAL => Errno::SRCH.into(),
        errno => errno.into(),
    })
}

/// Sends a signal, which may be a real-time one, to a process and no later one of its number.
///
/// # Errors
/// `ESRCH` for a process that was reaped; no permission; a number that is no signal.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    let fd = pidfd.as_raw_fd();
    // Not rustix's, whose type has the named signals only.
    // SAFETY: integers, and a null siginfo, which the call allows.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) })?;
    Ok(())
}

/// Lets exec close all descriptors from `first` on.
///
/// # Errors
/// `EINVAL` from a kernel before 5.11.
pub fn close_on_exec_from(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: integers only; it marks descriptors and closes none.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(())
}

/// Puts a seccomp filter in force on the calling thread, with `flags` (`SECCOMP_FILTER_FLAG_*`).
///
/// # Errors
/// A program that the kernel finds wrong, or a thread without no_new_privs and `CAP_SYS_ADMIN`.
pub fn set_seccomp_filter(filter: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| Errno::INVAL)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: seccomp(2) only reads the program, which outlives the call and has the given length.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER),
            flags,
            &raw const program,
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::process::{WaitId, WaitIdOptions, waitid};

    use super::*;

    #[test]
    fn a_child_dies_of_a_real_time_signal_and_its_number_is_nobodys_then() {
        // SAFETY: the child makes two system calls and never comes back.
        let Some(child) = unsafe { fork(0, None) }.unwrap() else {
            // SAFETY: integers only.
            unsafe {
                libc::alarm(10);
                loop {
                    libc::pause();
                }
            }
        };
        let signal = libc::SIGRTMIN() + 1;
        pidfd_send_signal(child.pidfd.as_fd(), signal).unwrap();
        let end = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED);
        assert_eq!(end.unwrap().unwrap().terminating_signal(), Some(signal));
        for error in [
            pidfd_send_signal(child.pidfd.as_fd(), signal).unwrap_err(),
            pidfd_open(child.pid).unwrap_err(),
            pidfd_open(0).unwrap_err(),
        ] {
            assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
        }
    }
}
