//! Child processes: how they are started, watched through a pidfd, killed, and known again by
//! another process.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use launcher::{Jail, Started};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};
use sys::process::{pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::error::{Doing, Error, Result};

/// How many lines of a child's stderr are kept, and how much of each.
const TAIL_LINES: usize = 20;
const TAIL_LINE_BYTES: usize = 512;

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id in the caller's pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks since boot.
    pub start_time: u64,
}

impl Identity {
    /// The process that has this number now, alive or a zombie.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn of(pid: i32) -> io::Result<Identity> {
        Ok(Identity {
            pid,
            start_time: read_stat(pid)?.1,
        })
    }

    /// Whether it runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        matches!(read_stat(self.pid), Ok((state,
            start)) if start == self.start_time && !matches!(state, 'Z' | 'X'))
    }

    /// SIGKILL, then blocks until it is dead (a zombie is dead). Any process may do this, any
    /// number of times; one that is gone already, or whose number another process has now, is a
    /// success.
    ///
    /// # Errors
    /// No permission, or it did not die in time (it hangs in the kernel).
    pub fn kill_and_wait(&self, timeout: Duration) -> Result<()> {
        let doing = || format!("kill process {}", self.pid);
        if self.pid <= 1 {
            return Err(Error::Unsupported(format!(
                "process {} is not one of ours",
                self.pid
            )));
        }
        let pidfd = match pidfd_open(self.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error).doing(doing),
        };
        // The descriptor holds whoever has the number now; only then is it worth asking who that
        // is.
        if !self.is_alive() {
            return Ok(());
        }
        match pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL) {
            Err(error) if !is_gone(&error) => return Err(error).doing(doing),
            _ => {}
        }
        let until = Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let millis = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], millis) {
                Ok(0) if left.is_zero() => {
                    return Err(Error::Deadline {
                        doing: doing(),
                        timeout,
                    });
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno).doing(doing),
            }
        }
    }
}

/// State letter and start time.
fn read_stat(pid: i32) -> io::Result<(char, u64)> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    // The name in parentheses may hold anything, parentheses and spaces too.
    let mut fields = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_ascii_whitespace();
    let state = fields.next().and_then(|state| state.chars().next());
    let start = fields.nth(18).and_then(|field| field.parse().ok());
    state
        .zip(start)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH))
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Exited with this status.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Somebody else reaped it.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exited with status {code}"),
            Exit::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "was killed by signal {number} ({signal})"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
            Exit::Unknown => write!(f, "ended"),
        }
    }
}

/// What to start. Environment and working directory are not the caller's: none, and `/`.
#[derive(Debug)]
pub struct Spawn {
    /// Path of the program; not looked up in PATH.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors it inherits, under the numbers they have here; all others are closed. Closed
    /// here afterwards.
    pub fds: Vec<OwnedFd>,
    /// Where its stdout goes; `/dev/null` if nowhere.
    pub stdout: Option<OwnedFd>,
    /// `cgroup.procs` files it is written to before it runs (one for cgroup v2, several for v1).
    pub cgroup_procs: Vec<PathBuf>,
    /// The network namespace that it runs in; without one the caller's, or with a jail an empty
    /// one.
    pub netns: Option<Arc<OwnedFd>>,
    /// How gladly the kernel kills it when memory runs out; the caller's own score if none.
    pub oom_score_adj: Option<i32>,
    /// What it is confined to.
    pub jail: Option<Jail>,
}

impl Spawn {
    /// A program that inherits nothing and is not confined.
    pub fn new(program: impl Into<PathBuf>, args: Vec<OsString>) -> Spawn {
        Spawn {
            program: program.into(),
            args,
            fds: Vec::new(),
            stdout: None,
            cgroup_procs: Vec::new(),
            netns: None,
            oom_score_adj: None,
            jail: None,
        }
    }
}

/// A running child. Dropping it kills it; a task of the runtime reaps it.
#[derive(Debug)]
pub struct Child(Arc<Process>);

/// What is known of a child, for all who watch it.
#[derive(Debug)]
pub(crate) struct Process {
    identity: Identity,
    program: PathBuf,
    pidfd: AsyncFd<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    tail: Mutex<Tail>,
}

impl Child {
    /// Starts a process with `/dev/null` for stdin, stderr kept ([`Child::stderr_tail`]), that dies
    /// when the calling thread does. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// A cgroup or program that is not there. What else keeps it from running is in its last words.
    pub fn spawn(spawn: Spawn) -> Result<Child> {
        let program = spawn.program.clone();
        let doing = || format!("start {}", program.display());
        let (stderr, theirs) = io::pipe().doing(doing)?;
        let started = launcher::spawn(launcher::Launch {
            program: spawn.program,
            args: spawn.args,
            fds: spawn.fds,
            stdout: spawn.stdout,
            stderr: theirs.into(),
            cgroup_procs: spawn.cgroup_procs,
            netns: spawn.netns,
            oom_score_adj: spawn.oom_score_adj,
            jail: spawn.jail,
        });
        let Started { pid, pidfd } = started.doing(doing)?;
        let watched = pidfd.try_clone().and_then(|pidfd| {
            let stderr = pipe::Receiver::from_owned_fd(stderr.into())?;
            // SAFETY: an OwnedFd always gives the same descriptor, which stays open until it is
            // dropped with the AsyncFd.
            let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
            Ok((pidfd, stderr, Identity::of(pid)?))
        });
        let (pidfd, stderr, identity) = match watched {
            Ok(watched) => watched,
            Err(error) => {
                // Nobody would watch it, so it must not live.
                let _ = pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
                let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
                return Err(error).doing(doing);
            }
        };
        let (sender, exit) = watch::channel(None);
        let process = Arc::new(Process {
            identity,
            program,
            pidfd,
            exit,
            tail: Mutex::default(),
        });
        tokio::spawn(watch_over(process.clone(), stderr, sender));
        Ok(Child(process))
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.0.identity()
    }

    /// Waits for its end; any number of callers may, at any time.
    pub async fn exited(&self) -> Exit {
        self.0.exited().await
    }

    /// How it ended, if it did.
    pub fn exit(&self) -> Option<Exit> {
        *self.0.exit.borrow()
    }

    /// SIGKILL. A dead one is left alone.
    pub fn kill(&self) {
        self.0.kill();
    }

    /// Its last lines on stderr, at most 20; complete once it has exited.
    pub fn stderr_tail(&self) -> Vec<String> {
        self.0.stderr_tail()
    }

    /// SIGKILL, and waits until it is dead.
    ///
    /// # Errors
    /// It did not die in time.
    pub async fn kill_and_wait(&self, timeout: Duration) -> Result<Exit> {
        self.kill();
        tokio::time::timeout(timeout, self.exited())
            .await
            .map_err(|_| Error::Deadline {
                doing: format!(
                    "the end of {} (process {}) after SIGKILL",
                    self.0.program.display(),
                    self.0.identity.pid
                ),
                timeout,
            })
    }

    pub(crate) fn process(&self) -> &Arc<Process> {
        &self.0
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.0.kill();
    }
}

impl Process {
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let seen = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        // The watching task only ends early with the runtime itself.
        seen.ok().flatten().unwrap_or(Exit::Unknown)
    }

    pub(crate) fn kill(&self) {
        if self.exit.borrow().is_none() {
            let _ = pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        }
    }

    pub(crate) fn stderr_tail(&self) -> Vec<String> {
        let tail = sys::lock(&self.tail);
        let rest = (!tail.line.is_empty()).then(|| printable(&tail.line));
        tail.lines.iter().cloned().chain(rest).collect()
    }

    /// `exited with status 1: its last words`.
    pub(crate) fn last_words(&self, exit: Exit) -> String {
        match last_words(&self.stderr_tail()) {
            Some(line) => format!("{exit}: {line}"),
            None => exit.to_string(),
        }
    }

    pub(crate) fn died(&self, exit: Exit) -> Error {
        Error::Died {
            what: self.program.display().to_string(),
            why: self.last_words(exit),
        }
    }
}

/// The last line that may say why a process ended: QEMU's warnings do not.
pub(crate) fn last_words(stderr: &[String]) -> Option<&str> {
    stderr
        .iter()
        .map(String::as_str)
        .rfind(|line| !line.contains(": warning: "))
}

/// What a program prints on stdout, at most as much as a pipe holds (64 KiB); for asking programs
/// what they are.
pub(crate) async fn stdout_of(program: &Path, args: &[&str], timeout: Duration) -> Result<String> {
    let doing = || format!("run {} {}", program.display(), args.join(" "));
    let (output, pipe) = io::pipe().doing(doing)?;
    let spawn = Spawn {
        stdout: Some(pipe.into()),
        ..Spawn::new(program, args.iter().map(Into::into).collect())
    };
    let child = Child::spawn(spawn)?;
    if tokio::time::timeout(timeout, child.exited()).await.is_err() {
        return Err(Error::Deadline {
            doing: doing(),
            timeout,
        });
    }
    let mut text = vec![0; 64 << 10];
    let count = nix::unistd::read(&output, &mut text).doing(doing)?;
    Ok(String::from_utf8_lossy(&text[..count]).into_owned())
}

/// Reads stderr while the process lives, reaps it, and tells how it ended.
async fn watch_over(
    process: Arc<Process>,
    mut stderr: pipe::Receiver,
    sender: watch::Sender<Option<Exit>>,
) {
    let mut buffer = [0; 4096];
    let mut open = true;
    let exit = loop {
        tokio::select! {
            read = stderr.read(&mut buffer), if open => match read {
                Ok(0) | Err(_) => open = false,
                Ok(count) => sys::lock(&process.tail).push(&buffer[..count]),
            },
            exit = reaped(&process.pidfd) => break exit,
        }
    };
    // What it still wrote lies in the pipe. A grandchild may hold the other end, so never wait for
    // the end of file.
    while let Ok(count @ 1..) = nix::unistd::read(&stderr, &mut buffer) {
        sys::lock(&process.tail).push(&buffer[..count]);
    }
    sender.send_replace(Some(exit));
}

async fn reaped(pidfd: &AsyncFd<OwnedFd>) -> Exit {
    loop {
        let Ok(mut ready) = pidfd.readable().await else {
            return Exit::Unknown;
        };
        match waitid(
            Id::PIDFd(pidfd.as_fd()),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::Exited(_, code)) => return Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Exit::Signal(signal as i32),
            Ok(_) | Err(Errno::EINTR) => ready.clear_ready(),
            Err(_) => return Exit::Unknown,
        }
    }
}

/// The last lines of a stream.
#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<String>,
    /// The line that has no end yet.
    line: Vec<u8>,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < TAIL_LINE_BYTES {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = printable(&self.line);
            self.line.clear();
            if line.is_empty() {
                continue;
            }
            tracing::debug!(line, "stderr of a child");
            if self.lines.len() == TAIL_LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(line);
        }
    }
}

fn printable(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    line.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests;
