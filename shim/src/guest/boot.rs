//! How a sandbox's virtual machine comes up: helpers and QEMU side by side, devices, power on, the
//! agent's answer.
//!
//! Every process is in the ledger before it is used, and all of them are killed when the future
//! that builds them is dropped or fails, so there is nothing to roll back by hand. QEMU and the
//! helpers also die with the shim (PR_SET_PDEATHSIG), because nobody else could take them over.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guest_protocol::deadlines::CREATE_SANDBOX;
use guest_protocol::protocols::agent::{CreateSandboxRequest, Storage};
use guest_protocol::{
    AgentClient, GUEST_ROOTFS, GUEST_SHARE, GUEST_SHM, KEY_PARAMETER, READY_PARAMETER, ROOTFS_TAG,
    SHARE_TAG, UDS_PORT,
};
use launcher::UidLease;
use tokio::task::JoinSet;
use tokio::time::timeout;
use vmm::helpers::{FsCache, Virtiofsd, VirtiofsdConfig, VsockDaemon, VsockDaemonConfig};
use vmm::{Confinement, Device, MachineConfig, VirtioFs, Vm, VsockDevice};

use crate::config::{Accelerator, Config, ConfinementLevel, find_file, find_program};
use crate::error::{Error, IoContext, Result};
use crate::from_guest::{Agent, Features};
use crate::guest::clock;
use crate::guest::host_sockets::HostSockets;
use crate::guest::machine_size::{MachineSize, host_cpus, host_memory_mib};
use crate::guest::nics::Nics;
use crate::guest::place::HostCgroup;
use crate::guest::reach_agent;
use crate::guest::running::{QUIT_DEADLINE, RunningGuest, Size, death};
use crate::host::dir::Dir;
use crate::host::identity::STATE_ROOT;
use crate::host::ledger::{Ledger, Resource};

/// A helper or QEMU's monitor is there within this time, or not at all.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// A running agent answers a plain call within this time.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Device ports on the root complex: vsock and virtio-fs now, disks and NICs later.
const ROOT_PORTS: u8 = 9;

/// The same for a pod, whose containers may each have a disk for their root file system, and which
/// may grow.
const POD_ROOT_PORTS: u8 = 13;

/// Queue size of a virtio-fs device.
const FS_QUEUE_SIZE: u16 = 1024;

/// Context id of a guest behind a user space vsock device: each has a device, and so a number
/// space, of its own.
const HYBRID_CID: u32 = 3;

/// What a launch needs to know.
pub struct BootConfig {
    /// The configuration.
    pub config: Config,
    /// Size of the machine.
    pub sizing: MachineSize,
    /// The sandbox's id, which becomes the guest's name.
    pub id: String,
    /// The guest's host name.
    pub hostname: String,
    /// `linux.cgroupsPath` of the first container.
    pub cgroups_path: String,
    /// Size of the /dev/shm that the containers of a pod share.
    pub shm_bytes: Option<u64>,
    /// Path of the network namespace that was made for the sandbox; without one it gets an empty
    /// one.
    pub netns: Option<PathBuf>,
}

/// Directory in the sandbox's own for volumes, and root file systems that others may change.
pub const SHARE: &str = "share";

/// Directory in the sandbox's own for what the guest keeps in its memory: root file systems that
/// are a container's own.
pub const ROOTFS: &str = "rootfs";

/// Name of what virtiofsd serves of a directory in which the shim makes mounts
/// ([`crate::host::mounts::make_served`]).
pub fn served(name: &str) -> String {
    format!("{name}.served")
}

/// Brings the guest up, with one more try if it does not answer in time.
///
/// # Errors
/// One line; nothing that was started is left.
pub async fn launch(plan: &BootConfig, ledger: &Ledger) -> Result<RunningGuest> {
    let config = &plan.config;
    let qemu = find_program(&config.qemu, "qemu")?;
    let virtiofsd = find_program(&config.virtiofsd, "virtiofsd")?;
    find_file(&config.kernel, "kernel")?;
    find_file(&config.initramfs, "initramfs")?;
    let cache_dir = Path::new(STATE_ROOT).join("cache");
    std::fs::create_dir_all(&cache_dir)
        .doing(|| format!("make directory {}", cache_dir.display()))?;
    let nics = Arc::new(Nics::new(plan.netns.as_deref(), config.netns_rules).await?);
    let accel = match config.accelerator {
        Accelerator::Auto => vmm::accel::Accel::Auto,
        Accelerator::Kvm => vmm::accel::Accel::Kvm,
        Accelerator::Tcg => vmm::accel::Accel::Tcg,
    };
    let accel = accel.resolve()?;
    tracing::info!(kvm = accel.kvm, reason = %accel.reason, "accelerator");
    // No limit of CPU time before there is a container: what boots is ours.
    let size = MachineSize {
        milli_cpus: None,
        ..plan.sizing
    };
    let place = HostCgroup::join(&plan.cgroups_path, accel.kvm, size, ledger).await?;
    let (lease, confinement) = confinement(config, ledger.dir())?;
    let mut machine = MachineConfig {
        capabilities: vmm::capabilities::query(&qemu, &cache_dir).await?,
        qemu,
        accel,
        name: plan.id.clone(),
        kernel: config.kernel.clone(),
        initramfs: Some(config.initramfs.clone()),
        kernel_params: Vec::new(),
        memory_mib: plan.sizing.memory_mib,
        max_memory_mib: host_memory_mib().max(plan.sizing.memory_mib),
        vcpus: plan.sizing.vcpus,
        max_vcpus: host_cpus().max(plan.sizing.vcpus),
        root_ports: if plan.shm_bytes.is_some() {
            POD_ROOT_PORTS
        } else {
            ROOT_PORTS
        },
        console: config.debug.then(|| ledger.dir().join("console.log")),
        cgroup_procs: place.procs(),
        netns: Some(nics.netns()),
        oom_score_adj: Some(plan.sizing.oom_score_adj),
        confinement,
        cache_dir: cache_dir.clone(),
    };
    let file_servers =
        [(SHARE, FsCache::Auto), (ROOTFS, FsCache::Always)].map(|(name, cache)| VirtiofsdConfig {
            binary: virtiofsd.clone(),
            cache_dir: cache_dir.clone(),
            socket: ledger.dir().join(format!("{name}.sock")),
            shared_dir: ledger.dir().join(served(name)),
            cache,
            cgroup_procs: machine.cgroup_procs.clone(),
            oom_score_adj: machine.oom_score_adj,
            confinement: machine.confinement.clone(),
        });
    for attempt in 1..=2 {
        let boot = boot(plan, &mut machine, &file_servers, &nics, &place, ledger);
        match timeout(config.boot_deadline(), boot).await {
            Ok(result) => {
                return result.map(|guest| RunningGuest {
                    _uid: lease,
                    ..guest
                });
            }
            Err(_) => {
                let console = last_lines(machine.console.as_deref());
                tracing::warn!(attempt, deadline = ?config.boot_deadline(), console,
                    "the guest did not answer");
            }
        }
    }
    Err(Error::deadline(format!(
        "the guest agent did not answer within {} s, twice: is the initramfs {} the one of this \
         installation? \
         with debug = true in the configuration the guest's last words are in containerd's log",
        config.boot_timeout_seconds,
        config.initramfs.display()
    )))
}

/// What the sandbox's processes are confined to, as configured; and the user id that is theirs.
fn confinement(
    config: &Config,
    state_dir: &Path,
) -> Result<(Option<UidLease>, Option<Confinement>)> {
    let level = config.confinement;
    if level != ConfinementLevel::Full {
        tracing::warn!(
            ?level,
            "QEMU and the helpers are confined less than they could be"
        );
    }
    if level == ConfinementLevel::None {
        return Ok((None, None));
    }
    let lease = config
        .uid_range
        .lease(&Path::new(STATE_ROOT).join("cache/uids"));
    let lease =
        lease.doing(|| "get a user id for the sandbox (uid_range in the configuration)".into())?;
    let mount_point = Dir::open(state_dir)?.make("jail")?.path();
    let user_namespace = match level {
        ConfinementLevel::NoUserNamespace => None,
        _ => Some(Arc::new(launcher::user_namespace().doing(|| {
            "make a user namespace for virtiofsd (allow them, sysctl user.max_user_namespaces, or \
             set confinement = \
             \"no-user-namespace\" in the configuration)"
                .into()
        })?)),
    };
    let seccomp = level != ConfinementLevel::NoSeccomp;
    tracing::info!(?level, uid = lease.uid, "confinement");
    let confinement = Confinement {
        mount_point,
        uid: lease.uid,
        user_namespace,
        seccomp,
    };
    Ok((Some(lease), Some(confinement)))
}

/// The end of the guest's console, as far as it fits a line of the log.
fn last_lines(console: Option<&Path>) -> String {
    const LENGTH: usize = 1000;
    let text = console
        .and_then(|path| std::fs::read(path).ok())
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(LENGTH)..]).into_owned();
    text.lines()
        .map(str::trim_end)
        .collect::<Vec<_>>()
        .join(" | ")
}

async fn boot(
    plan: &BootConfig,
    machine: &mut MachineConfig,
    [volumes, roots]: &[VirtiofsdConfig; 2],
    nics: &Arc<Nics>,
    place: &Arc<HostCgroup>,
    ledger: &Ledger,
) -> Result<RunningGuest> {
    let config = &plan.config;
    let dir = ledger.dir();
    let reach_agent::Address {
        transport,
        ready,
        port,
        kernel,
    } = reach_agent::address(config.vsock, dir)?;
    machine.kernel_params = config.kernel_params.clone();
    machine
        .kernel_params
        .push(format!("{READY_PARAMETER}={port}"));
    machine.kernel_params.push(format!("{KEY_PARAMETER}=1"));
    if config.debug {
        machine.kernel_params.push("agent.log=debug".to_owned());
    }
    let starting = Vm::spawn(machine).await?;
    ledger.record(&Resource::Process(starting.identity()))?;
    let daemon = match &kernel {
        Some(_) => None,
        None => {
            let daemon = VsockDaemon::spawn(&VsockDaemonConfig {
                binary: find_program(&config.vhost_device_vsock, "vhost_device_vsock")?,
                cache_dir: machine.cache_dir.clone(),
                dir: dir.join(reach_agent::SOCKETS),
                name: reach_agent::SOCKET_NAME.to_owned(),
                guest_cid: HYBRID_CID,
                cgroup_procs: machine.cgroup_procs.clone(),
                oom_score_adj: machine.oom_score_adj,
                confinement: machine.confinement.clone(),
            })
            .await?;
            ledger.record(&Resource::Process(daemon.identity()))?;
            Some(daemon)
        }
    };
    let serve = async |config, tag: &str| {
        let (server, connection) = Virtiofsd::spawn(config).await?;
        ledger.record(&Resource::Process(server.identity()))?;
        let device = VirtioFs {
            tag: tag.to_owned(),
            connection,
            queue_size: FS_QUEUE_SIZE,
        };
        Ok::<_, Error>((server, Device::VirtioFs(device)))
    };
    let vsock = async {
        match (kernel, &daemon) {
            (Some(kernel), _) => Ok(VsockDevice::Kernel(kernel)),
            (None, Some(daemon)) => Ok(VsockDevice::User {
                connection: daemon.connect(START_DEADLINE).await?,
            }),
            (None, None) => Err(Error::internal("no vsock device")),
        }
    };
    let monitor = async { Ok::<_, Error>(starting.connect(START_DEADLINE).await?) };
    let wired = nics.wire(plan.sizing.vcpus, ledger);
    let (volumes, roots) = (serve(volumes, SHARE_TAG), serve(roots, ROOTFS_TAG));
    let ((volumes, volumes_device), (roots, roots_device), vsock, vm, ()) =
        tokio::try_join!(volumes, roots, vsock, monitor, wired)?;
    let file_servers = [volumes, roots];
    let devices = tokio::join!(
        vm.attach(Device::Vsock(vsock)),
        vm.attach(volumes_device),
        vm.attach(roots_device),
        nics.plug(&vm)
    );
    let (vsock, volumes, roots, cards) = devices;
    // QEMU only says that it refuses a device; why, its helper knows.
    for (attached, server) in [volumes, roots].into_iter().zip(&file_servers) {
        if let Err(error) = attached {
            return Err(server.explain(error).await.into());
        }
    }
    let vsock = match (vsock, &daemon) {
        (Ok(vsock), _) => vsock,
        (Err(error), Some(daemon)) => return Err(daemon.explain(error).await.into()),
        (Err(error), None) => return Err(error.into()),
    };
    cards?;
    vm.cont().await?;
    let died = death(&vm, &file_servers, daemon.as_ref());
    let ended = |why| Error::internal(format!("the guest ended while it booted: {why}"));
    let reached = tokio::select! {
        reached = reach_agent::agent(&transport, &ready, &vm, &vsock.id) => reached,
        why = died => return Err(ended(why)),
    };
    let (stream, transport) = match reached {
        Ok(reached) => reached,
        // Whatever broke, an end of the machine is the better reason.
        Err(error) => {
            match timeout(QUIT_DEADLINE, death(&vm, &file_servers, daemon.as_ref())).await {
                Ok(why) => return Err(ended(why)),
                Err(_) => return Err(error),
            }
        }
    };
    let agent = Agent::new(AgentClient::new(stream));
    nics.set_up(&agent).await?;
    let features = create_sandbox(&agent, plan).await?;
    let host_sockets = if features.uds {
        let doing = || "listen for the guest's connections to unix sockets".to_owned();
        let listener = reach_agent::listen(&transport, UDS_PORT).doing(doing)?;
        let port = listener.port(UDS_PORT).doing(doing)?;
        Some(HostSockets::serve(listener, port))
    } else {
        None
    };
    let forwarder = if features.port_forward && plan.netns.is_some() {
        nics.forward(&transport).await
    } else {
        None
    };
    tracing::info!(
        version = features.version,
        raw_stdio = features.raw_stdio,
        "guest agent"
    );
    let mut keeps_time = JoinSet::new();
    keeps_time.spawn(clock::follow(agent.clone()));
    Ok(RunningGuest {
        vm,
        agent,
        transport,
        features,
        host_sockets,
        _forwarder: forwarder,
        _clock: keeps_time,
        nics: nics.clone(),
        size: Size::new(plan.sizing),
        place: place.clone(),
        file_servers,
        vsock_daemon: daemon,
        _uid: None,
    })
}

async fn create_sandbox(agent: &Agent, plan: &BootConfig) -> Result<Features> {
    let shared =
        [(SHARE_TAG, GUEST_SHARE), (ROOTFS_TAG, GUEST_ROOTFS)].map(|(tag, place)| Storage {
            driver: "virtio-fs".to_owned(),
            source: tag.to_owned(),
            fstype: "virtiofs".to_owned(),
            mount_point: place.to_owned(),
            ..Default::default()
        });
    let shm = plan.shm_bytes.map(|bytes| Storage {
        driver: "ephemeral".to_owned(),
        source: "shm".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: ["noexec", "nosuid", "nodev", "mode=1777"]
            .into_iter()
            .map(str::to_owned)
            .chain([format!("size={bytes}")])
            .collect(),
        mount_point: GUEST_SHM.to_owned(),
        ..Default::default()
    });
    let sandbox = CreateSandboxRequest {
        hostname: plan.hostname.clone(),
        sandbox_id: plan.id.clone(),
        storages: shared.into_iter().chain(shm).collect(),
        ..Default::default()
    };
    let (created, features) = tokio::join!(
        agent.create_sandbox(&sandbox, CREATE_SANDBOX),
        agent.features(CALL_DEADLINE)
    );
    created.map_err(|error| error.context("the guest agent cannot set up the sandbox"))?;
    features.map_err(|error| error.context("the guest agent does not say what it can do"))
}
