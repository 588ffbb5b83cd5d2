//! A new process: clone3(2) from the single-threaded agent, a pipe on which the child says how far
//! it got, and one on which it is told to go on.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::timeout;

use crate::error::{Error, Result, What, errno_text};
use crate::sys::check;

/// How long a child may take from clone to its report, or from go to exec.
const DEADLINE: Duration = Duration::from_secs(60);

/// Longest report of a child, in bytes.
const MAX_REPORT: u64 = 4096;

// linux/sched.h; libc has the second one in too narrow a type.
const CLONE_PIDFD: u64 = 0x1000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The agent's side of a new process.
#[derive(Debug)]
pub struct Child {
    /// Process id in the guest.
    pub pid: libc::pid_t,
    /// Refers to the process even after it was reaped.
    pub pidfd: OwnedFd,
    report: Receiver,
    go: File,
}

/// What a child has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// It waits to be told to go on; with a terminal, under this number it holds the terminal's
    /// master.
    Ready(Option<RawFd>),
    /// It runs its program, or died without a word.
    Gone,
}

/// The child's side.
#[derive(Debug)]
pub struct Handle {
    report: File,
    go: File,
}

/// A child's failure: what did not work.
#[derive(Debug)]
pub struct Failure(pub String);

pub type Step<T> = std::result::Result<T, Failure>;

/// Says what a child tried when a system call fails.
pub trait Tried<T> {
    /// Adds the words to an error.
    fn tried(self, what: impl Display) -> Step<T>;
}

impl<T, E: Into<io::Error>> Tried<T> for std::result::Result<T, E> {
    fn tried(self, what: impl Display) -> Step<T> {
        self.map_err(|error| Failure(format!("{what}: {}", errno_text(&error.into()))))
    }
}

/// Starts a process that runs `body` with a copy of the agent's memory, and never comes back from
/// it.
///
/// `flags` are `CLONE_NEW*`; `cgroup` is where the process lives from its first instruction.
///
/// # Errors
/// A failed system call, or an agent that has more than one thread: the copy would have locks held
/// by nobody.
pub fn spawn(
    flags: libc::c_int,
    cgroup: BorrowedFd<'_>,
    body: impl FnOnce(&mut Handle) -> Step<std::convert::Infallible>,
) -> Result<Child> {
    // Every thread is a directory in there.
    let threads = fs::metadata("/proc/self/task").map_or(0, |task| task.nlink().saturating_sub(2));
    if threads != 1 {
        return Err(Error::Failed(format!(
            "the agent has {threads} threads and cannot fork"
        )));
    }
    let (report, child_report) = pipe2(OFlag::O_CLOEXEC).what(|| "create a pipe".into())?;
    let (child_go, go) = pipe2(OFlag::O_CLOEXEC).what(|| "create a pipe".into())?;
    let report = Receiver::from_owned_fd(report).what(|| "watch a pipe".into())?;
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data, for which zero is valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.cast_unsigned()) | CLONE_PIDFD | CLONE_INTO_CGROUP;
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    // SAFETY: without CLONE_VM this is fork(2): the child goes on with a copy of this stack. The
    // agent has one thread, so no lock in the copy is held by anybody else.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    if pid == 0 {
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
    }
    check(pid).what(|| "clone a process".into())?;
    // SAFETY: clone3 succeeded, so it has stored a descriptor that is ours.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child {
        pid: libc::pid_t::try_from(pid).unwrap_or(-1),
        pidfd,
        report,
        go: go.into(),
    })
}

impl Child {
    /// Tells the child to go on. A child that is gone is noticed at its report.
    pub fn go(&mut self) {
        let _ = self.go.write_all(b"g");
    }

    /// Waits for the child's next words.
    ///
    /// # Errors
    /// The child's own failure, in its words; or a child that says nothing for a minute.
    pub async fn report(&mut self) -> Result<Report> {
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
        timeout(DEADLINE, line)
            .await
            .map_err(|_| {
                Error::Failed(format!(
                    "the new process did not get ready within {DEADLINE:?}"
                ))
            })?
            .what(|| "read a process's report".into())?;
        let text = String::from_utf8_lossy(&text);
        match text.chars().next() {
            Some('E') => Err(Error::Failed(text[1..].to_owned())),
            Some(_) => Ok(Report::Ready(text[1..].parse().ok())),
            None => Ok(Report::Gone),
        }
    }

    /// Takes a copy of a descriptor that the child holds.
    ///
    /// # Errors
    /// The failed system call.
    pub fn take_fd(&self, number: RawFd) -> Result<OwnedFd> {
        // SAFETY: pidfd_getfd takes plain numbers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), number, 0) };
        let fd = check(fd).what(|| "take the terminal from the new process".into())?;
        // SAFETY: the kernel just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).unwrap_or(-1)) })
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

    /// Says "ready" and waits to be told to go on.
    ///
    /// # Errors
    /// Never returns if the agent is gone: nobody is left to report to.
    pub fn ready(&mut self, terminal: Option<RawFd>) {
        let number = terminal.map(|fd| fd.to_string()).unwrap_or_default();
        let _ = self.report.write_all(format!("R{number}\n").as_bytes());
        self.wait();
    }

    /// Says "ready" and goes on by itself.
    pub fn say_ready(&mut self) {
        let _ = self.report.write_all(b"R\n");
    }

    /// Waits for one go.
    pub fn wait(&mut self) {
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
