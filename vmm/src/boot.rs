//! How a virtual machine comes up, in phases that are types: [`spawn`] gives a [`Spawned`], whose
//! devices make it a [`Built`], which runs as a [`Machine`]. Each takes the one before, so no step
//! can be left out or taken twice, and each owns the processes: a drop kills them all.
//!
//! What waits for something else runs beside the rest: QEMU makes its base machine while the
//! helpers start, and the devices are on their way to QEMU together.

use std::path::PathBuf;

use crate::deadlines::{HELPER_LAST_WORDS, QEMU_MONITOR, VSOCK_DAEMON_SOCKET};
use crate::devices::net::Net;
use crate::devices::virtiofs::VirtioFs;
use crate::devices::vsock::{KernelVsock, VsockDevice};
use crate::devices::{Attached, Device};
use crate::error::{Error, Result};
use crate::helpers::{FsCache, Virtiofsd, VirtiofsdConfig, VsockDaemon, VsockDaemonConfig};
use crate::machine::Machine;
use crate::process::Identity;
use crate::qemu::MachineConfig;
use crate::qemu::capabilities::{VHOST_USER_VSOCK, VHOST_VSOCK};
use crate::vm::Vm;

/// Root ports for the vsock and the two shared directories.
const OWN_PORTS: u8 = 3;

/// Requests that the guest may have under way to a shared directory.
const FS_QUEUE_SIZE: u16 = 1024;

/// Context id of a guest behind vhost-device-vsock: each has a daemon, and so a number space, of
/// its own.
const DAEMON_CID: u32 = 3;

/// A machine and what stands beside it.
#[derive(Debug)]
pub struct Config {
    /// QEMU's part. Its root ports are those for network cards, and for what comes later; the boot
    /// adds those of its own devices. The helpers have its cgroups, OOM score and confinement.
    pub machine: MachineConfig,
    /// The binary of virtiofsd; an absolute path.
    pub virtiofsd: PathBuf,
    /// What the guest may mount.
    pub shares: [Share; 2],
    /// The way to the guest.
    pub vsock: Vsock,
}

/// A directory of the host that the guest mounts by a tag.
#[derive(Clone, Debug)]
pub struct Share {
    /// At most 36 bytes.
    pub tag: String,
    /// The directory; mounts that come below it later are seen if it is a mount point with shared
    /// propagation.
    pub dir: PathBuf,
    /// A free path in a directory that only root can enter, for as long as virtiofsd starts.
    pub socket: PathBuf,
    /// What the guest keeps of it.
    pub cache: FsCache,
}

/// The way to the guest.
#[derive(Debug)]
pub enum Vsock {
    /// The host kernel's ([`crate::vsock::open_kernel`]).
    Kernel(KernelVsock),
    /// vhost-device-vsock.
    Daemon {
        /// The binary; an absolute path.
        binary: PathBuf,
        /// Directory of its sockets, which only root can enter.
        dir: PathBuf,
        /// Name of the host's side in that directory.
        name: String,
    },
}

/// QEMU and the helpers run, QEMU with the base machine and its CPUs stopped.
#[derive(Debug)]
pub struct Spawned {
    vm: Vm,
    file_servers: [Virtiofsd; 2],
    vsock_daemon: Option<VsockDaemon>,
    shares: [VirtioFs; 2],
    vsock: VsockDevice,
}

/// Every device is there, and the CPUs are stopped.
#[derive(Debug)]
pub struct Built(Machine);

/// Starts QEMU and the helpers. `started` is told of each process as soon as there is one, and
/// before it is used.
///
/// # Errors
/// That of `started`; a binary that cannot be used, or that ended; a monitor or a socket that was
/// not there in time. Nothing that was started is left.
pub async fn spawn<E: From<Error>>(
    config: Config,
    started: impl Fn(Identity) -> Result<(), E>,
) -> Result<Spawned, E> {
    let Config {
        mut machine,
        virtiofsd,
        shares,
        vsock,
    } = config;
    check_vsock(&machine, &vsock)?;
    machine.root_ports = machine.root_ports.saturating_add(OWN_PORTS);
    let starting = Vm::spawn(&machine).await?;
    started(starting.process.identity())?;
    let serve = async |share: Share| {
        let (server, connection) = Virtiofsd::spawn(&VirtiofsdConfig {
            binary: virtiofsd.clone(),
            cache_dir: machine.cache_dir.clone(),
            socket: share.socket,
            shared_dir: share.dir,
            cache: share.cache,
            cgroup_procs: machine.cgroup_procs.clone(),
            oom_score_adj: machine.oom_score_adj,
            confinement: machine.confinement.clone(),
        })
        .await?;
        started(server.process.identity())?;
        let device = VirtioFs {
            tag: share.tag,
            connection,
            queue_size: FS_QUEUE_SIZE,
        };
        Ok::<_, E>((server, device))
    };
    let vsock = async {
        match vsock {
            Vsock::Kernel(kernel) => Ok((None, VsockDevice::Kernel(kernel))),
            Vsock::Daemon { binary, dir, name } => {
                let daemon = VsockDaemon::spawn(&VsockDaemonConfig {
                    binary,
                    cache_dir: machine.cache_dir.clone(),
                    dir,
                    name,
                    guest_cid: DAEMON_CID,
                    cgroup_procs: machine.cgroup_procs.clone(),
                    oom_score_adj: machine.oom_score_adj,
                    confinement: machine.confinement.clone(),
                })
                .await?;
                started(daemon.process.identity())?;
                let connection = daemon.connect(VSOCK_DAEMON_SOCKET).await?;
                Ok((Some(daemon), VsockDevice::User { connection }))
            }
        }
    };
    let monitor = async { Ok(starting.connect(QEMU_MONITOR).await?) };
    let [first, second] = shares.map(serve);
    let ((vsock_daemon, vsock), first, second, vm) =
        tokio::try_join!(vsock, first, second, monitor)?;
    Ok(Spawned {
        vm,
        file_servers: [first.0, second.0],
        vsock_daemon,
        shares: [first.1, second.1],
        vsock,
    })
}

/// Whether QEMU has the device that the way to the guest takes.
fn check_vsock(machine: &MachineConfig, vsock: &Vsock) -> Result<()> {
    let (device, instead) = match vsock {
        Vsock::Kernel(_) => (VHOST_VSOCK, "vsock = \"vhost-user\""),
        Vsock::Daemon { .. } => (VHOST_USER_VSOCK, "vsock = \"vhost\""),
    };
    let capabilities = &machine.capabilities;
    if capabilities.has(device) {
        return Ok(());
    }
    Err(capabilities.lack(&machine.qemu, device, Some(instead)))
}

impl Spawned {
    /// Attaches the vsock, the shared directories and these network cards. Returns how the guest
    /// finds the cards, in their order.
    ///
    /// # Errors
    /// QEMU refuses a device, by the words of its helper if that has ended.
    pub async fn attach(self, cards: Vec<Net>) -> Result<(Built, Vec<Attached>)> {
        let Spawned {
            vm,
            file_servers,
            vsock_daemon,
            shares: [first, second],
            vsock,
        } = self;
        let cards = async {
            let mut attached = Vec::new();
            for card in cards {
                attached.push(vm.attach(Device::Net(card)).await?);
            }
            Ok::<_, Error>(attached)
        };
        let (vsock, first, second, cards) = tokio::join!(
            vm.attach(Device::Vsock(vsock)),
            vm.attach(Device::VirtioFs(first)),
            vm.attach(Device::VirtioFs(second)),
            cards
        );
        // QEMU only says that it refuses a device; why, its helper knows.
        for (attached, server) in [first, second].into_iter().zip(&file_servers) {
            if let Err(error) = attached {
                let helper = &server.process;
                return Err(helper.explain_failure(error, HELPER_LAST_WORDS).await);
            }
        }
        let vsock_id = match (vsock, &vsock_daemon) {
            (Err(error), Some(daemon)) => {
                let helper = &daemon.process;
                return Err(helper.explain_failure(error, HELPER_LAST_WORDS).await);
            }
            (vsock, _) => vsock?.id,
        };
        let machine = Machine {
            vm,
            file_servers,
            vsock_daemon,
            vsock_id,
        };
        Ok((Built(machine), cards?))
    }
}

impl Built {
    /// Processes that the file servers have forked: one of them that is stopped, or waits for a
    /// disk, does not end with its parent.
    pub fn file_server_children(&self) -> Vec<Identity> {
        let servers = self.0.file_servers.iter();
        servers.flat_map(Virtiofsd::children).collect()
    }

    /// Lets the CPUs run.
    ///
    /// # Errors
    /// QEMU's own, or its death.
    pub async fn run(self) -> Result<Machine> {
        self.0.vm.cont().await?;
        Ok(self.0)
    }
}
