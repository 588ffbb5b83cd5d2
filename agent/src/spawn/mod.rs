//! A new process. Owns the clone, and what parent and child say to each other until the child has
//! become a program.
//!
//! A child begins as a copy of the agent, in the cgroup and the namespaces where it is to live, and
//! runs a function that ends in execve(2) or in _exit(2). Two pipes connect the two:
//!
//! ```text
//!  agent: Child                                   child: Handle
//!   next_report()  <── "R<fd>\n" ready, waits ──   report_ready(), wait_for_go()
//!   take_fd(fd)    ─── pidfd_getfd ──────────────> (the terminal's master)
//!   go()           ─── "g" ──────────────────────> goes on
//!   next_report()  <── end of file: execve closed   exec
//!                  <── "E<text>" failed ─────────   Err(Failure)
//! ```
//!
//! Rules that a change must not break:
//!
//! * The agent has one thread. A copy of a threaded process may hold locks that nobody will ever
//!   release, so [`spawn`] refuses if there is a second thread.
//! * A child never returns into the agent's frames and runs no destructor of the agent's state,
//!   which shares its epoll set with the agent: it ends by execve or `_exit`.
//! * A child that waits holds copies of the agent's descriptors. It closes them first
//!   ([`Handle::close_others`]), or streams of others never end.
//! * Between clone and [`Reaper::watch`](crate::guest::reaper::Reaper::watch) nothing is awaited,
//!   so that no exit is missed.
//! * A child that a container of the pod could look into forgets the key first
//!   ([`crate::gate::forget`]).

pub mod step;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use rustix::process::PidfdGetfdFlags;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::{Instant, timeout_at};

use crate::error::{Context, Error, Result};

use step::{Failure, Step};

/// Longest report of a child, in bytes.
const MAX_REPORT: u64 = 4096;

/// Makes a system call that may block for long in a child, because it would block all of the agent.
/// A call that is not over at `by` gets a SIGKILL, which ends it as soon as it can be interrupted.
///
/// # Errors
/// The call's failure; a call that is not over in time.
pub async fn in_child(by: Instant, call: impl FnOnce() -> Step<()>) -> Result<()> {
    let mut child = spawn(0, None, |handle| {
        handle.close_others(&[]);
        crate::gate::forget();
        call()?;
        handle.report_ready(None);
        // SAFETY: _exit ends the process without any handler.
        unsafe { libc::_exit(0) }
    })?;
    let report = child.next_report(by).await;
    if report.is_err() {
        child.kill();
    }
    match report? {
        Report::Ready(_) => Ok(()),
        Report::Closed => Err(Error::Failed("the process for a system call died".into())),
    }
}

/// The agent's side of a new process.
#[derive(Debug)]
pub struct Child {
    /// In the agent's pid namespace.
    pub pid: libc::pid_t,
    /// Refers to the process even after it was reaped.
    pub pidfd: OwnedFd,
    report: Receiver,
    go: File,
}

/// What a child has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// It waits for [`Child::go`], and has the master of its terminal, if any, under this number.
    Ready(Option<RawFd>),
    /// The pipe is closed: it runs its program, or died without a word.
    Closed,
}

/// The child's side.
#[derive(Debug)]
pub struct Handle {
    report: File,
    go: File,
}

/// Starts a process that runs `body` with a copy of the agent's memory, and never comes back from
/// it.
///
/// `flags` are `CLONE_NEW*`; `cgroup` is where the process lives from its first instruction, if not
/// in the agent's own.
///
/// # Errors
/// A failed system call, or an agent that has more than one thread: the copy would have locks held
/// by nobody.
pub fn spawn(
    flags: libc::c_int,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce(&mut Handle) -> Step<std::convert::Infallible>,
) -> Result<Child> {
    // Every thread is a directory in there.
    let threads = fs::metadata("/proc/self/task").map_or(0, |task| task.nlink().saturating_sub(2));
    if threads != 1 {
        return Err(Error::Failed(format!(
            "the agent has {threads} threads and cannot fork"
        )));
    }
    let (report, child_report) = pipe2(OFlag::O_CLOEXEC).context(|| "create a pipe".into())?;
    let (child_go, go) = pipe2(OFlag::O_CLOEXEC).context(|| "create a pipe".into())?;
    let report = Receiver::from_owned_fd(report).context(|| "watch a pipe".into())?;
    // SAFETY: the agent has one thread, so no lock in the copy is held by anybody else.
    let Some(started) =
        unsafe { sys::process::fork(flags, cgroup) }.context(|| "clone a process".into())?
    else {
        let mut handle = Handle {
            report: child_report.into(),
            go: child_go.into(),
        };
        // Nothing may unwind into the agent's own frames, nor run destructors of the agent's state,
        // which would touch what is shared with it (its epoll set).
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&mut handle)));
        if let Ok(Err(failure)) = outcome {
            handle.fail(&failure);
        }
        // SAFETY: _exit ends the process without any handler.
        unsafe { libc::_exit(127) }
    };
    Ok(Child {
        pid: started.pid,
        pidfd: started.pidfd,
        report,
        go: go.into(),
    })
}

impl Child {
    /// Lets the child go on. If the child has died, its next report says so.
    pub fn go(&mut self) {
        let _ = self.go.write_all(b"g");
    }

    /// Waits for the child's next report until `by`.
    ///
    /// # Errors
    /// The child's own failure, in its words; a child that reports nothing in time.
    pub async fn next_report(&mut self, by: Instant) -> Result<Report> {
        let mut text = Vec::new();
        let line = async {
            loop {
                let mut byte = [0];
                if self.report.read(&mut byte).await? == 0 || byte[0] == b'\n' {
                    return io::Result::Ok(());
                }
                text.push(byte[0]);
                if text[0] == b'E' {
                    let report = &mut self.report;
                    return report
                        .take(MAX_REPORT)
                        .read_to_end(&mut text)
                        .await
                        .map(|_| ());
                }
            }
        };
        let begun = Instant::now();
        timeout_at(by, line)
            .await
            .map_err(|_| {
                Error::Failed(format!(
                    "the new process did not get ready within {:?}",
                    by - begun
                ))
            })?
            .context(|| "read a process's report".into())?;
        let text = String::from_utf8_lossy(&text);
        match text.chars().next() {
            Some('E') => Err(Error::Failed(text[1..].to_owned())),
            Some(_) => Ok(Report::Ready(text[1..].parse().ok())),
            None => Ok(Report::Closed),
        }
    }

    /// Kills the child, which is to be heard of no more.
    pub fn kill(&self) {
        let _ = sys::process::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Takes a copy of a descriptor that the child holds.
    ///
    /// # Errors
    /// The failed system call.
    pub fn take_fd(&self, number: RawFd) -> Result<OwnedFd> {
        rustix::process::pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())
            .context(|| "take the terminal from the new process".into())
    }
}

impl Handle {
    /// Closes all descriptors above 2 but for this handle's and `keep`: a child that waits must not
    /// hold what belongs to others, or their streams never end.
    pub fn close_others(&self, keep: &[RawFd]) {
        let mut keep: Vec<RawFd> = keep
            .iter()
            .copied()
            .chain([self.report.as_raw_fd(), self.go.as_raw_fd()])
            .filter(|fd| *fd > 2)
            .collect();
        keep.sort_unstable();
        let mut first = 3;
        for fd in keep {
            close_range(first, fd - 1);
            first = fd + 1;
        }
        close_range(first, RawFd::MAX);
    }

    /// Reports that the child is ready, and under which number it holds a terminal's master.
    pub fn report_ready(&mut self, terminal: Option<RawFd>) {
        let number = terminal.map(|fd| fd.to_string()).unwrap_or_default();
        let _ = self.report.write_all(format!("R{number}\n").as_bytes());
    }

    /// Waits for one [`Child::go`]. Ends the child if the agent is gone: nobody is left to report
    /// to.
    pub fn wait_for_go(&mut self) {
        if self.go.read_exact(&mut [0]).is_err() {
            // SAFETY: _exit ends the process without any handler.
            unsafe { libc::_exit(127) }
        }
    }

    fn fail(&mut self, failure: &Failure) {
        let _ = self.report.write_all(format!("E{}", failure.0).as_bytes());
    }
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: the caller, a forked child, gives up these descriptors; nothing drops their
        // owners, as it ends by exec or _exit.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}
