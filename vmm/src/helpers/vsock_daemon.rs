//! vhost-device-vsock: vsock for hosts whose kernel has none. The host side is a unix socket (`CONNECT <port>`), and for
//! connections from the guest one more for each port (`<path>_<port>`).

use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

use super::Helper;
use crate::error::{Doing, Error, Result};
use crate::process::{Child, Spawn};

/// Between two looks for the socket. A look costs 10 µs.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What to start.
#[derive(Clone, Debug)]
pub struct VsockDaemonConfig {
    /// The binary; an absolute path.
    pub binary: PathBuf,
    /// Where it takes QEMU's connection: a free path in a directory that only root can enter.
    pub socket: PathBuf,
    /// The host's side.
    pub uds_path: PathBuf,
    /// Address of the guest; each daemon has its own numbers, 3 and up.
    pub guest_cid: u32,
    /// `cgroup.procs` files that it enters before it runs.
    pub cgroup_procs: Vec<PathBuf>,
}

/// A running vhost-device-vsock. Dropping it kills it.
#[derive(Debug)]
pub struct VsockDaemon {
    helper: Helper,
    socket: PathBuf,
}

impl Deref for VsockDaemon {
    type Target = Helper;

    fn deref(&self) -> &Helper {
        &self.helper
    }
}

impl VsockDaemon {
    /// Starts it.
    ///
    /// # Errors
    /// The binary cannot be executed.
    pub fn spawn(config: &VsockDaemonConfig) -> Result<VsockDaemon> {
        let arguments = vec![
            "--guest-cid".into(),
            config.guest_cid.to_string().into(),
            "--socket".into(),
            config.socket.clone().into(),
            "--uds-path".into(),
            config.uds_path.clone().into(),
        ];
        let cgroup_procs = config.cgroup_procs.clone();
        let child = Child::spawn(Spawn { cgroup_procs, ..Spawn::new(&config.binary, arguments) })?;
        Ok(VsockDaemon { helper: Helper { child }, socket: config.socket.clone() })
    }

    /// Waits until it takes a connection, and returns that for [`crate::VsockDevice::User`]. It serves one at a time:
    /// call this once.
    ///
    /// # Errors
    /// It ended, or the deadline passed.
    pub async fn connect(&self, timeout: Duration) -> Result<OwnedFd> {
        let until = Instant::now() + timeout;
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(connection) => return Ok(connection.into()),
                Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    return Err(error).doing(|| format!("connect to {}", self.socket.display()));
                }
                Err(_) => {}
            }
            if let Some(death) = self.helper.death() {
                return Err(death);
            }
            if Instant::now() >= until {
                return Err(Error::Deadline { doing: format!("the socket {}", self.socket.display()), timeout });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}
