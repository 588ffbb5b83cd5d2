//! vhost-device-vsock: vsock for hosts whose kernel has none. The host side is a unix socket
//! (`CONNECT <port>`), and for connections from the guest one more for each port (`<path>_<port>`).

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sys::point::{Point, reach};
use tokio::time::Instant;

use crate::confine::{Confinement, SOCKETS};
use crate::deadlines::VSOCK_DAEMON_LOOK_AGAIN;
use crate::error::{Doing, Error, Result};
use crate::process::{Child, Spawn};

/// Where the daemon takes QEMU's connection, in its directory.
const SOCKET: &str = "device";

/// What to start.
#[derive(Clone, Debug)]
pub struct VsockDaemonConfig {
    /// The binary; an absolute path.
    pub binary: PathBuf,
    /// Where it is kept which files the binary needs.
    pub cache_dir: PathBuf,
    /// Directory of its sockets, which only root can enter. A confined daemon gets it for as long
    /// as it needs to make them.
    pub dir: PathBuf,
    /// Name of the host's side in that directory.
    pub name: String,
    /// Address of the guest; each daemon has its own numbers, 3 and up.
    pub guest_cid: u32,
    /// `cgroup.procs` files that it enters before it runs.
    pub cgroup_procs: Vec<PathBuf>,
    /// How gladly the kernel kills it when memory runs out (proc(5)); the caller's own score if
    /// none.
    pub oom_score_adj: Option<i32>,
    /// What it is confined to; nothing if none.
    pub confinement: Option<Confinement>,
}

/// A running vhost-device-vsock. Dropping it kills it.
#[derive(Debug)]
pub struct VsockDaemon {
    /// The process, which ends with its connection to QEMU.
    pub process: Child,
    dir: PathBuf,
}

impl VsockDaemon {
    /// Starts it.
    ///
    /// # Errors
    /// The binary cannot be executed.
    pub async fn spawn(config: &VsockDaemonConfig) -> Result<VsockDaemon> {
        let (dir, jail) = match &config.confinement {
            Some(confinement) => {
                let jail = confinement
                    .vsock_daemon(&config.binary, &config.cache_dir, &config.dir)
                    .await?;
                let owner = Some(confinement.uid);
                chown(&config.dir, owner, owner)
                    .doing(|| format!("hand over {}", config.dir.display()))?;
                (Path::new(SOCKETS), Some(jail))
            }
            None => (config.dir.as_path(), None),
        };
        let arguments = vec![
            "--guest-cid".into(),
            config.guest_cid.to_string().into(),
            "--socket".into(),
            dir.join(SOCKET).into(),
            "--uds-path".into(),
            dir.join(&config.name).into(),
        ];
        let cgroup_procs = config.cgroup_procs.clone();
        let process = Child::spawn(Spawn {
            cgroup_procs,
            oom_score_adj: config.oom_score_adj,
            jail,
            ..Spawn::new(&config.binary, arguments)
        })?;
        reach(Point::VsockDaemonForked).doing(|| format!("start {}", config.binary.display()))?;
        Ok(VsockDaemon {
            process,
            dir: config.dir.clone(),
        })
    }

    /// Waits until it takes a connection, and returns that for the device. It serves one at a time:
    /// call this once, before the guest runs. From then on the directory is root's again: a daemon
    /// that is taken over later can neither replace a socket nor fill the file system.
    ///
    /// # Errors
    /// It ended, or the deadline passed.
    pub async fn connect(&self, timeout: Duration) -> Result<OwnedFd> {
        let until = Instant::now() + timeout;
        let socket = self.dir.join(SOCKET);
        loop {
            match UnixStream::connect(&socket) {
                Ok(connection) => {
                    let doing = || format!("take back {}", self.dir.display());
                    chown(&self.dir, Some(0), Some(0)).doing(doing)?;
                    // The daemon still has to reach the sockets that are made for it there.
                    fs::set_permissions(&self.dir, Permissions::from_mode(0o711)).doing(doing)?;
                    return Ok(connection.into());
                }
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
                {
                    return Err(error).doing(|| format!("connect to {}", socket.display()));
                }
                Err(_) => {}
            }
            if let Some(death) = self.process.death() {
                return Err(death);
            }
            if Instant::now() >= until {
                return Err(Error::Deadline {
                    doing: format!("the socket {}", socket.display()),
                    timeout,
                });
            }
            tokio::time::sleep(VSOCK_DAEMON_LOOK_AGAIN).await;
        }
    }
}
