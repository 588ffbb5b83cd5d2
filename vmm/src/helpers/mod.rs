//! The vhost-user back ends beside QEMU, as supervised children.
//!
//! We connect to a helper and hand QEMU the connected descriptor: QEMU never waits for a path, and
//! a helper that died is an error of ours, with its last words, before QEMU is asked.

mod virtiofsd;
mod vsock_daemon;

use std::time::Duration;

pub use virtiofsd::{FsCache, Virtiofsd, VirtiofsdConfig};
pub use vsock_daemon::{VsockDaemon, VsockDaemonConfig};

use crate::error::{Error, Result};
use crate::process::{Child, Identity};

/// How long the end of a helper may come after QEMU has noticed it.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A running helper. Dropping it kills it.
#[derive(Debug)]
pub struct Helper {
    child: Child,
}

impl Helper {
    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.child.identity()
    }

    /// Waits for its end and says in one line how it came; any number of callers may, at any time.
    pub async fn exited(&self) -> String {
        let exit = self.child.exited().await;
        self.child.process().died(exit).to_string()
    }

    /// Kills it, and waits until it is dead. It keeps nothing that would have to be written down.
    /// May be called again.
    ///
    /// # Errors
    /// The kernel does not let it die in time.
    pub async fn stop(&self, timeout: Duration) -> Result<()> {
        self.child.kill_and_wait(timeout).await.map(drop)
    }

    /// The better of two errors: how the helper ended, if it did, else what QEMU said of a device
    /// whose helper is gone.
    pub async fn explain(&self, error: Error) -> Error {
        let exited = tokio::time::timeout(LAST_WORDS, self.child.exited()).await;
        exited.map_or(error, |exit| self.child.process().died(exit))
    }

    /// The error of a helper that has ended, if it has.
    fn death(&self) -> Option<Error> {
        self.child
            .exit()
            .map(|exit| self.child.process().died(exit))
    }
}
