//! Collects every child that exits: the processes of containers, and the orphans that PID 1
//! inherits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use sys::lock;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{Context, Result};

/// Who waits for which child.
#[derive(Clone, Debug, Default)]
pub struct Reaper(Arc<Mutex<HashMap<libc::pid_t, oneshot::Sender<i32>>>>);

impl Reaper {
    /// Starts collecting. Must come before the first child.
    ///
    /// # Errors
    /// If the signal handler cannot be set.
    pub fn start() -> Result<Reaper> {
        let reaper = Reaper::default();
        let signals = signal(SignalKind::child()).context(|| "watch for exits".into())?;
        tokio::spawn(reaper.clone().run(signals));
        Ok(reaper)
    }

    /// Will carry the exit status of a child: its code, or 128 plus the signal that killed it. To
    /// be called before anything is awaited after the child was made, so that no exit is missed.
    pub fn watch(&self, pid: libc::pid_t) -> oneshot::Receiver<i32> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.0).insert(pid, sender);
        receiver
    }

    async fn run(self, mut signals: Signal) {
        // Signals merge: one may stand for many exits.
        while signals.recv().await.is_some() {
            let mut status = 0;
            loop {
                // SAFETY: the status lives over the call.
                let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
                if pid <= 0 {
                    break;
                }
                if let Some(waiter) = lock(&self.0).remove(&pid) {
                    let _ = waiter.send(code(status));
                }
            }
        }
    }
}

fn code(status: libc::c_int) -> i32 {
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    }
}
