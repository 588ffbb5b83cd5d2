//! A process by its number and the time of its start, so that a later one with the same number is
//! never taken for it. Any process may ask and kill by it: the ledger of a shim that is gone holds
//! nothing else.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use sys::process::{pidfd_open, pidfd_send_signal};

use crate::error::{Doing, Error, Result};

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
