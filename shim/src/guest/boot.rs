//! How a sandbox's guest comes up: what its machine is made of and shares with the host, power on,
//! the agent's answer. In which order QEMU, the helpers and the devices come is [`vmm::boot`]'s.
//!
//! Every process is in the ledger before it is used, and all of them are killed when the future
//! that builds them is dropped or fails, so there is nothing to roll back by hand. QEMU and the
//! helpers also die with the shim (PR_SET_PDEATHSIG), because nobody else could take them over.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest_protocol::protocols::agent::{
    CreateSandboxRequest, Storage, UpdateEphemeralMountsRequest,
};
use guest_protocol::{
    GUEST_ROOTFS, GUEST_SHARE, GUEST_SHM, KEY_PARAMETER, Listener, READY_PARAMETER, ROOTFS_TAG,
    SHARE_TAG, Transport, UDS_PORT,
};
use launcher::UidLease;
use sys::point::{Point, reach};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use vmm::boot::{self, Share};
use vmm::deadlines::MACHINE_LAST_WORDS;
use vmm::{Confinement, FsCache, Machine, MachineConfig};

use crate::config::{Config, ConfinementLevel, HostNetwork, find_file, find_program};
use crate::deadlines::{AGENT_CALL, CREATE_SANDBOX};
use crate::error::{Error, IoContext, Result};
use crate::from_guest::{Agent, Features};
use crate::guest::clock::GuestClock;
use crate::guest::disks::Disks;
use crate::guest::host_sockets::HostSockets;
use crate::guest::machine_size::{MachineSize, host_cpus, host_memory_mib};
use crate::guest::nics::{self, Nics};
use crate::guest::place::HostCgroup;
use crate::guest::reach_agent::{self, Address};
use crate::guest::running::{RunningGuest, STARTING_EXECS, Size};
use crate::guest::sockets_below::SocketsBelow;
use crate::guest::task_process::TaskPlace;
use crate::host::dir::Dir;
use crate::host::identity::STATE_ROOT;
use crate::host::ledger::{Ledger, Resource};
use crate::host::node_sysctls;
use crate::network::{self, Netns, UserMode};

/// How often a boot is tried, if the agent does not answer within `boot_timeout_seconds`.
pub const ATTEMPTS: u32 = 2;

/// Places for the devices that come first, beside those of every machine.
const PORTS: u8 = 2;

/// With the 31 slots behind each, a container can have 33 network cards and disks, or one less once
/// its memory has grown.
const BRIDGES: u8 = 1;

/// The same for a pod, with 64.
const POD_BRIDGES: u8 = 2;

/// Without confinement there is no user id of the sandbox's own.
const NOBODY: u32 = 65534;

/// What a launch needs to know.
pub struct BootConfig {
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
    /// The guest's connections are to be the host's own.
    pub host_network: bool,
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
    let accel = config.accelerator.resolve()?;
    tracing::info!(kvm = accel.kvm, reason = %accel.reason, "accelerator");
    // No limit of CPU time before there is a container: what boots is ours.
    let size = MachineSize {
        milli_cpus: None,
        ..plan.sizing
    };
    let place = HostCgroup::join(&plan.cgroups_path, accel.kvm, size, ledger).await?;
    let (lease, confinement) = confinement(config, ledger.dir())?;
    let uid = lease.as_ref().map_or(NOBODY, |lease| lease.uid);
    let (netns, user_mode) = netns(plan, uid, &place, ledger).await?;
    let nics = Arc::new(Nics::new(netns, config.netns_rules, user_mode)?);
    reach(Point::NetnsOpened).doing(|| "use the network namespace".into())?;
    let capabilities = vmm::capabilities::query(&qemu, &cache_dir).await?;
    let machine = MachineConfig {
        bridges: match plan.shm_bytes {
            _ if !capabilities.bridges() => 0,
            Some(_) => POD_BRIDGES,
            None => BRIDGES,
        },
        capabilities,
        qemu,
        accel,
        name: plan.id.clone(),
        kernel: config.kernel.clone(),
        initramfs: Some(config.initramfs.clone()),
        // The administrator's own come later and win.
        kernel_params: [node_sysctls::kernel_params(), config.kernel_params.clone()].concat(),
        memory_mib: plan.sizing.memory_mib,
        max_memory_mib: host_memory_mib().max(plan.sizing.memory_mib),
        vcpus: plan.sizing.vcpus,
        max_vcpus: host_cpus().max(plan.sizing.vcpus),
        root_ports: PORTS,
        console: config.debug.then(|| ledger.dir().join("console.log")),
        cgroup_procs: place.procs(),
        netns: Some(nics.netns()),
        oom_score_adj: Some(plan.sizing.oom_score_adj),
        confinement,
        cache_dir,
    };
    let attempt = Attempt {
        plan,
        machine,
        virtiofsd,
        nics,
        place,
        ledger,
    };
    for number in 1..=ATTEMPTS {
        match timeout(config.boot_deadline(), attempt.boot()).await {
            Ok(result) => {
                return result.map(|guest| RunningGuest {
                    _uid: lease,
                    ..guest
                });
            }
            Err(_) => {
                let console = last_lines(attempt.machine.console.as_deref());
                tracing::warn!(attempt = number, deadline = ?config.boot_deadline(), console,
                    "the guest did not answer");
                if attempt.nics.are_handed_over().await {
                    break;
                }
            }
        }
    }
    Err(Error::deadline(format!(
        "the guest agent did not answer within {} s: is the initramfs {} the one of this \
         installation? \
         with debug = true in the configuration the guest's last words are in containerd's log",
        config.boot_timeout_seconds,
        config.initramfs.display()
    )))
}

/// The sandbox's network namespace: what was made for it, one whose traffic is the host's own, or
/// an empty one.
async fn netns(
    plan: &BootConfig,
    uid: u32,
    place: &HostCgroup,
    ledger: &Ledger,
) -> Result<(Netns, Option<UserMode>)> {
    if let Some(path) = &plan.netns {
        return Ok((Netns::open(path)?, None));
    }
    if !plan.host_network || plan.config.host_network != HostNetwork::Passt {
        return Ok((Netns::create().await?, None));
    }
    let program = find_program(&plan.config.pasta, "pasta")?;
    let pasta = network::Plan {
        program: &program,
        uid,
        cgroup_procs: place.procs(),
    };
    let record = |process| ledger.record(&Resource::Process(process));
    let (user_mode, netns) = UserMode::start(pasta, record).await?;
    tracing::info!(
        "the host's network by pasta: the host's own addresses cannot be reached, nor the guest's \
         servers of UDP, and its servers of TCP see the guest's loopback as their clients"
    );
    Ok((netns, Some(user_mode)))
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
    let seccomp = level.has_seccomp();
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

/// What each attempt to boot begins with.
struct Attempt<'a> {
    plan: &'a BootConfig,
    machine: MachineConfig,
    virtiofsd: PathBuf,
    nics: Arc<Nics>,
    place: Arc<HostCgroup>,
    ledger: &'a Ledger,
}

impl Attempt<'_> {
    async fn boot(&self) -> Result<RunningGuest> {
        let Attempt {
            plan, nics, ledger, ..
        } = self;
        let Address {
            transport,
            ready,
            port,
            vsock,
        } = reach_agent::address(&plan.config, ledger.dir())?;
        reach(Point::VsockAddressTaken).doing(|| "listen for the guest's ready notice".into())?;
        let config = boot::Config {
            machine: self.machine(port),
            virtiofsd: self.virtiofsd.clone(),
            shares: [
                self.share(SHARE, SHARE_TAG, FsCache::Auto),
                self.share(ROOTFS, ROOTFS_TAG, FsCache::Always),
            ],
            vsock,
        };
        let record = |process| ledger.record(&Resource::Process(process));
        let wired = nics.wire(plan.sizing.vcpus, ledger);
        let (spawned, ()) = tokio::try_join!(boot::spawn(config, record), wired)?;
        let (built, cards) = spawned.attach(nics.cards().await?).await?;
        nics.plugged(cards).await;
        for process in built.file_server_children() {
            record(process)?;
        }
        let machine = built.run().await?;
        let (agent, transport) = agent_of(&machine, &transport, &ready).await?;
        let features = create_sandbox(&agent, plan).await?;
        let host_sockets = if features.uds {
            let doing = || "listen for the guest's connections to unix sockets".to_owned();
            let listener = reach_agent::listen(&transport, UDS_PORT).doing(doing)?;
            let port = listener.port(UDS_PORT).doing(doing)?;
            let mut host = HostSockets::serve(listener, port);
            let below = || SocketsBelow::new(agent.clone(), host.sockets.clone(), port);
            host.below = features.uds_below.then(below);
            Some(host)
        } else {
            None
        };
        let guest = nics::Guest {
            machine: &machine,
            agent: &agent,
            is_own: features.network,
            sockets: host_sockets.as_ref(),
        };
        nics.set_up(guest).await?;
        let is_reached = plan.netns.is_some() || plan.host_network;
        let forwarder = if features.port_forward && is_reached {
            nics.forward(&transport).await
        } else {
            None
        };
        reach(Point::RelaysMade).doing(|| "relay the guest's connections".into())?;
        tracing::info!(
            version = features.version,
            raw_stdio = features.raw_stdio,
            "guest agent"
        );
        if !features.pod {
            tracing::warn!(
                "a guest agent without Cofferdam's extensions: no port-forward, no guest devices \
                 in privileged containers, no inotify events of ConfigMaps, no fifo or unix \
                 socket between containers; refused are signals to all processes, unix sockets of \
                 the host, the pid namespace of another container and the Sandbox API \
                 (docs/interoperability.md)"
            );
        }
        let clock = GuestClock::new(agent.clone(), features.clock);
        clock.set_first().await;
        let mut keeps_time = JoinSet::new();
        keeps_time.spawn(clock.follow());
        Ok(RunningGuest {
            machine,
            agent,
            transport,
            features,
            starting_execs: Semaphore::new(STARTING_EXECS),
            polled: std::sync::Mutex::default(),
            host_sockets,
            _forwarder: forwarder,
            _clock: keeps_time,
            nics: nics.clone(),
            disks: Disks::default(),
            size: Size::new(plan.sizing),
            place: self.place.clone(),
            task_place: TaskPlace {
                cgroup_procs: self.place.procs(),
                netns: nics.netns(),
                seccomp: plan.config.confinement.has_seccomp(),
            },
            _uid: None,
        })
    }

    /// The machine whose agent dials this port when it is ready.
    fn machine(&self, ready_port: u32) -> MachineConfig {
        let mut machine = self.machine.clone();
        let params = &mut machine.kernel_params;
        params.push(format!("{READY_PARAMETER}={ready_port}"));
        params.push(format!("{KEY_PARAMETER}=1"));
        if self.plan.config.debug {
            params.push("agent.log=debug".to_owned());
        }
        machine
    }

    /// A directory in the sandbox's own.
    fn share(&self, name: &str, tag: &str, cache: FsCache) -> Share {
        let dir = self.ledger.dir();
        Share {
            tag: tag.to_owned(),
            dir: dir.join(served(name)),
            socket: dir.join(format!("{name}.sock")),
            cache,
        }
    }
}

/// Reaches the agent, unless the machine ends.
async fn agent_of(
    machine: &Machine,
    transport: &Transport,
    ready: &Listener,
) -> Result<(Agent, Transport)> {
    let ended = |why| Error::internal(format!("the guest ended while it booted: {why}"));
    let reached = tokio::select! {
        reached = reach_agent::agent(transport, ready, machine) => reached,
        why = machine.died() => return Err(ended(why)),
    };
    match reached {
        Ok(reached) => Ok(reached),
        // Whatever broke, an end of the machine is the better reason.
        Err(error) => match timeout(MACHINE_LAST_WORDS, machine.died()).await {
            Ok(why) => Err(ended(why)),
            Err(_) => Err(error),
        },
    }
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
        // Not the id of the first container: of a container with the sandbox's id Kata's agent
        // tells no OOM kill.
        sandbox_id: format!("sandbox-{}", plan.id),
        storages: shared.into_iter().chain(shm).collect(),
        ..Default::default()
    };
    reach(Point::SandboxCreating).doing(|| "ask the guest agent for the sandbox".into())?;
    let (created, features) = tokio::join!(
        agent.create_sandbox(&sandbox, CREATE_SANDBOX),
        agent.features(AGENT_CALL)
    );
    created.map_err(|error| error.context("the guest agent cannot set up the sandbox"))?;
    let features =
        features.map_err(|error| error.context("the guest agent does not say what it can do"))?;
    if !features.pod {
        set_sizes(agent, &sandbox.storages).await?;
    }
    Ok(features)
}

/// Kata's agent makes file systems in memory without their options: it is asked again for sizes.
///
/// # Errors
/// The agent's own.
pub(super) async fn set_sizes(agent: &Agent, storages: &[Storage]) -> Result<()> {
    let mut request = UpdateEphemeralMountsRequest::new();
    for storage in storages.iter().filter(|one| one.driver == "ephemeral") {
        let size = storage.options.iter().find(|one| one.starts_with("size="));
        request.storages.extend(size.map(|size| Storage {
            options: vec!["remount".to_owned(), size.clone()],
            ..storage.clone()
        }));
    }
    if request.storages.is_empty() {
        return Ok(());
    }
    agent.update_ephemeral_mounts(&request, AGENT_CALL).await
}
