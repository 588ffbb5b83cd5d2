//! What the agent keeps of a running or finished process.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::error::{Context, Error, Result};
use crate::stdio::Io;

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    exit: watch::Sender<Option<i32>>,
    io: Arc<Io>,
    /// Whether the exit was reported to the host.
    reported: AtomicBool,
}

impl Process {
    pub fn new(pid: libc::pid_t, pidfd: OwnedFd, io: Io) -> Arc<Process> {
        Arc::new(Process {
            pid,
            pidfd,
            exit: watch::Sender::new(None),
            io: Arc::new(io),
            reported: AtomicBool::new(false),
        })
    }

    /// In the agent's pid namespace.
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// A handle that stays valid for this process only.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub fn io(&self) -> &Arc<Io> {
        &self.io
    }

    /// Its status, if it has exited.
    pub fn exited(&self) -> Option<i32> {
        *self.exit.borrow()
    }

    /// Notes that the exit was reported to the host.
    pub fn mark_reported(&self) {
        self.reported.store(true, Ordering::Relaxed);
    }

    /// Whether the exit was reported to the host.
    pub fn is_reported(&self) -> bool {
        self.reported.load(Ordering::Relaxed)
    }

    /// Makes the exit known to everybody who waits.
    pub fn publish(&self, status: i32) {
        self.io.process_exited();
        self.exit.send_replace(Some(status));
    }

    /// The exit status, once there is one.
    pub async fn wait(&self) -> i32 {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            // The sender lives as long as self.
            Err(_) => 255,
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` for a process that is gone.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if self.exited().is_some() {
            return Err(Error::NotFound("the process has exited".into()));
        }
        match sys::process::pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Ok(()) => Ok(()),
            // It is just being collected: to the sender that is no failure.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Err(error) => Err(error).context(|| format!("send signal {signal}")),
        }
    }

    /// True if the process would notice a signal: it has a handler, or takes it by sigwait or
    /// signalfd, or chose to ignore it. The first process of a pid namespace ignores what it has no
    /// handler for.
    pub fn would_notice(&self, signal: i32) -> bool {
        fs::read_to_string(format!("/proc/{}/status", self.pid))
            .is_ok_and(|status| would_notice(&status, signal))
    }
}

fn would_notice(status: &str, signal: i32) -> bool {
    ["SigBlk:", "SigIgn:", "SigCgt:"].iter().any(|field| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_a_block_and_an_ignore_count_as_noticing() {
        let status = |block: u64, ignore: u64, catch: u64| {
            format!(
                "Name:\tx\nSigPnd:\t0\nSigBlk:\t{block:016x}\nSigIgn:\t{ignore:016x}\nSigCgt:\t{catch:016x}\n"
            )
        };
        let term = 1 << (libc::SIGTERM - 1);
        assert!(!would_notice(&status(0, 0, 0), libc::SIGTERM));
        assert!(!would_notice(
            &status(0, 0, 1 << (libc::SIGINT - 1)),
            libc::SIGTERM
        ));
        assert!(would_notice(&status(term, 0, 0), libc::SIGTERM));
        assert!(would_notice(&status(0, term, 0), libc::SIGTERM));
        assert!(would_notice(&status(0, 0, term), libc::SIGTERM));
        assert!(!would_notice("", libc::SIGTERM));
    }
}
