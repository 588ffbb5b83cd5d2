//! Child processes: how they are started, watched through a pidfd and killed.
//!
//! A [`Child`] owns a process: dropping it kills it. A [`Process`] is what anybody may know of one
//! and do to it; the task that reaps it holds one too, and tells all who wait how it ended.
//! Processes of others are told apart by [`Identity`].

mod identity;
mod stderr_tail;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use launcher::{Jail, Started};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use sys::process::pidfd_send_signal;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

pub use identity::Identity;
use stderr_tail::Tail;
pub(crate) use stderr_tail::last_words;

use crate::error::{Doing, Error, Result};

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
    /// The program itself, if it is in no directory; `program` is only its name then.
    pub image: Option<OwnedFd>,
    /// Without its own name.
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
            image: None,
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

/// A process that was started here, for all who watch it.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    program: PathBuf,
    pidfd: AsyncFd<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    tail: Mutex<Tail>,
}

impl Deref for Child {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl Child {
    /// Starts a process with `/dev/null` for stdin, stderr kept ([`Process::stderr_tail`]), that
    /// dies when the calling thread does. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// A cgroup or program that is not there. What else keeps it from running is in its last words.
    pub fn spawn(spawn: Spawn) -> Result<Child> {
        let program = spawn.program.clone();
        let doing = || format!("start {}", program.display());
        let (stderr, theirs) = io::pipe().doing(doing)?;
        let started = launcher::spawn(launcher::Launch {
            program: spawn.program,
            image: spawn.image,
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

    /// The process, for who watches it and must not keep it alive.
    pub fn watched(&self) -> Arc<Process> {
        self.0.clone()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    /// Number and time of its start.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Waits for its end; any number of callers may, at any time.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let seen = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        // The watching task only ends early with the runtime itself.
        seen.ok().flatten().unwrap_or(Exit::Unknown)
    }

    /// SIGKILL. A dead one is left alone.
    pub fn kill(&self) {
        if self.exit.borrow().is_none() {
            let _ = pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        }
    }

    /// SIGKILL, and waits until it is dead. May be called again.
    ///
    /// # Errors
    /// It did not die in time: it hangs in the kernel.
    pub async fn kill_and_wait(&self, within: Duration) -> Result<Exit> {
        self.kill();
        timeout(within, self.exited())
            .await
            .map_err(|_| Error::Deadline {
                doing: format!(
                    "the end of {} (process {}) after SIGKILL",
                    self.program.display(),
                    self.identity.pid
                ),
                timeout: within,
            })
    }

    /// Its last lines on stderr, at most 20; complete once it has exited.
    pub fn stderr_tail(&self) -> Vec<String> {
        sys::lock(&self.tail).lines()
    }

    /// Waits for its end, and says how it came: status and last words.
    pub async fn ended(&self) -> Error {
        self.died(self.exited().await)
    }

    /// How it ended, if it has.
    pub(crate) fn death(&self) -> Option<Error> {
        let exit = *self.exit.borrow();
        exit.map(|exit| self.died(exit))
    }

    /// The better of two errors: how it ended, if it does within this time, else what was noticed
    /// of a process that is gone.
    pub async fn explain(&self, error: Error, within: Duration) -> Error {
        timeout(within, self.ended()).await.unwrap_or(error)
    }

    /// As [`Self::explain`], but not by an end in order: a helper ends so when QEMU hangs up.
    pub(crate) async fn explain_failure(&self, error: Error, within: Duration) -> Error {
        match timeout(within, self.exited()).await {
            Ok(exit) if exit != Exit::Code(0) => self.died(exit),
            _ => error,
        }
    }

    fn died(&self, exit: Exit) -> Error {
        Error::Died {
            what: self.program.display().to_string(),
            why: match last_words(&self.stderr_tail()) {
                Some(line) => format!("{exit}: {line}"),
                None => exit.to_string(),
            },
        }
    }
}

/// What a program prints on stdout, at most as much as a pipe holds (64 KiB); for asking programs
/// what they are.
pub(crate) async fn stdout_of(program: &Path, args: &[&str], within: Duration) -> Result<String> {
    let doing = || format!("run {} {}", program.display(), args.join(" "));
    let (output, pipe) = io::pipe().doing(doing)?;
    let spawn = Spawn {
        stdout: Some(pipe.into()),
        ..Spawn::new(program, args.iter().map(Into::into).collect())
    };
    let child = Child::spawn(spawn)?;
    if timeout(within, child.exited()).await.is_err() {
        return Err(Error::Deadline {
            doing: doing(),
            timeout: within,
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

#[cfg(test)]
mod tests;
