//! The one owner of a sandbox's state. Requests and the outcomes of what was begun arrive as
//! closures on one channel and run one after the other; what takes time runs beside them and
//! reports back the same way. So there is no lock, and no request waits for another's guest.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use crate::config::Config;
use crate::container::create::{self, Container};
use crate::container::hooks::HostHooks;
use crate::container::shared_volumes::SharedVolumes;
use crate::container::volumes::Pinned;
use crate::error::{Error, Result};
use crate::events::Publisher;
use crate::from_guest::{Bucket, text, watch_oom};
use crate::guest::agent_calls::{self, PendingExec};
use crate::guest::boot::{BootConfig, Guest, ROOTFS, SHARE, launch, served};
use crate::guest::ending;
use crate::guest::machine_size::{MachineSize, ResourceLimits};
use crate::host::dir::Dir;
use crate::host::exit_record;
use crate::host::identity::SandboxIdentity;
use crate::host::ledger::Ledger;
use crate::host::mounts;
use crate::model::Exit;
use crate::model::ProcessId;
use crate::sandbox::state::State;
use crate::stdio::Pumps;

/// After init's death its execs are killed by the kernel; one that is not heard of by then is taken
/// for dead.
const HELD_DEADLINE: Duration = Duration::from_secs(2);

/// containerd may be away when the last events are made; `delete` makes up for what it misses.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// How often a guest's talk of containers that are not there comes into the log, and how much of
/// their names.
const STRANGERS: (u32, Duration) = (5, Duration::from_secs(60));
const STRANGERS_NAME: usize = 80;

type Job = Box<dyn FnOnce(&mut SandboxOwner) + Send>;
type Launching = Shared<BoxFuture<'static, Result<Arc<Guest>>>>;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// Sends requests to the owner.
#[derive(Clone)]
pub struct SandboxHandle(mpsc::UnboundedSender<Job>);

impl SandboxHandle {
    /// Hands the owner a request and waits for its answer.
    ///
    /// # Errors
    /// The request's own; `UNAVAILABLE` once the sandbox has ended.
    pub async fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut SandboxOwner, Reply<T>) + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(move |owner| request(owner, reply));
        answer
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the sandbox has ended")))
    }

    /// Hands the owner something to do.
    pub fn tell(&self, job: impl FnOnce(&mut SandboxOwner) + Send + 'static) {
        // Without an owner the sandbox has ended and there is nothing to do.
        let _ = self.0.send(Box::new(job));
    }
}

/// The /dev/shm of a pod.
#[derive(Debug)]
pub struct Shm {
    /// Source of the mounts that stand for it.
    pub source: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// What a pod's sandbox says for all of its containers.
#[derive(Debug, Default)]
pub struct Pod {
    /// Sysctls of the namespaces that they share.
    pub sysctls: HashMap<String, String>,
    /// Their /dev/shm.
    pub shm: Option<Shm>,
    /// What they may use together.
    pub need: ResourceLimits,
    /// Where the files of the pod are that nobody else makes for its containers.
    pub files: Option<PathBuf>,
    /// containerd knows of no task for it, so it gets no events of one.
    pub hidden_from_containerd: bool,
}

/// What a virtual machine is made for, beside its configuration.
#[derive(Debug)]
pub struct SandboxSpec {
    /// The guest's name; without one it has the host's, as in a new uts namespace.
    pub hostname: Option<String>,
    /// Where QEMU and the helpers are accounted, as `linux.cgroupsPath` has it.
    pub cgroups_path: String,
    /// The network namespace that was made for it.
    pub netns: Option<PathBuf>,
}

impl SandboxSpec {
    /// By the spec of a sandbox or of its first container.
    pub fn of(spec: &Spec) -> SandboxSpec {
        let linux = spec.linux().as_ref();
        let namespaces = linux
            .and_then(|linux| linux.namespaces().as_deref())
            .unwrap_or_default();
        let network = namespaces
            .iter()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_ref());
        SandboxSpec {
            hostname: spec.hostname().clone(),
            cgroups_path: cgroups_path
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
            netns: network.and_then(|network| network.path().clone()),
        }
    }
}

impl Pod {
    /// By the sandbox's spec.
    pub fn of(spec: &Spec) -> Pod {
        // The last one is what a container would see: containerd 1.6 has a default below it.
        let shm = spec
            .mounts()
            .iter()
            .flatten()
            .rfind(|mount| mount.destination() == Path::new("/dev/shm"));
        Pod {
            sysctls: spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.sysctl().clone())
                .unwrap_or_default(),
            need: ResourceLimits::of_pod(spec),
            files: None,
            hidden_from_containerd: false,
            shm: shm.and_then(|mount| {
                let source = mount.source().clone()?;
                Pinned::open(&source)
                    .ok()?
                    .tmpfs_size()
                    .map(|bytes| Shm { source, bytes })
            }),
        }
    }
}

/// The owner.
pub struct SandboxOwner {
    /// What may happen.
    pub state: State,
    pub(super) identity: SandboxIdentity,
    pub(super) ledger: Arc<Ledger>,
    pub(super) events: Publisher,
    shares: Option<Arc<SharedVolumes>>,
    pub(super) pod: Pod,
    pub(super) limits: BTreeMap<String, ResourceLimits>,
    pub(super) config: Config,
    pub(super) created_at: SystemTime,
    pub(super) hooks: HashMap<String, HostHooks>,
    pub(super) handle: SandboxHandle,
    pub(super) launching: Option<Launching>,
    pub(super) guest: Option<Arc<Guest>>,
    pub(super) containers: HashMap<String, Container>,
    pub(super) pumps: HashMap<ProcessId, Pumps>,
    pub(super) announced: HashMap<ProcessId, PendingExec>,
    pub(super) pending_terminal_sizes: HashMap<ProcessId, (u32, u32)>,
    pub(super) stdin_closed: Vec<ProcessId>,
    pub(super) waiters: HashMap<ProcessId, Vec<Reply<Exit>>>,
    /// When each container got its first SIGKILL.
    pub(super) killed: HashMap<String, Instant>,
    strangers: Bucket,
    pub(super) ended: bool,
}

impl SandboxOwner {
    /// Makes an owner and the handle to it.
    pub fn new(
        identity: SandboxIdentity,
        ledger: Ledger,
        events: Publisher,
    ) -> (SandboxOwner, SandboxHandle, mpsc::UnboundedReceiver<Job>) {
        let (sender, jobs) = mpsc::unbounded_channel();
        let handle = SandboxHandle(sender);
        let owner = SandboxOwner {
            state: State::default(),
            identity,
            ledger: Arc::new(ledger),
            events,
            shares: None,
            pod: Pod::default(),
            limits: BTreeMap::new(),
            config: Config::default(),
            created_at: SystemTime::now(),
            hooks: HashMap::new(),
            handle: handle.clone(),
            launching: None,
            guest: None,
            containers: HashMap::new(),
            pumps: HashMap::new(),
            announced: HashMap::new(),
            pending_terminal_sizes: HashMap::new(),
            stdin_closed: Vec::new(),
            waiters: HashMap::new(),
            killed: HashMap::new(),
            strangers: Bucket::new(STRANGERS.0, STRANGERS.1),
            ended: false,
        };
        (owner, handle, jobs)
    }

    /// Works until the sandbox is shut down, then ends what it started.
    pub async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        while !self.ended {
            match jobs.recv().await {
                Some(job) => job(&mut self),
                None => break,
            }
        }
        self.pumps.clear();
        self.launching = None;
        if let Some(guest) = self.guest.take() {
            guest.stop().await;
        }
        create::release(self.containers.into_values().collect()).await;
        self.events.flush(FLUSH_DEADLINE).await;
    }

    /// Begins something that takes time; its outcome is handled by the owner.
    pub(super) fn spawn_then<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
        then: impl FnOnce(&mut SandboxOwner, T) + Send + 'static,
    ) {
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let outcome = work.await;
            handle.tell(move |owner| then(owner, outcome));
        });
    }

    /// Begins a call to the guest whose outcome is the whole answer.
    pub(super) fn forward_to_guest<T, F>(&self, reply: Reply<T>, call: impl FnOnce(Arc<Guest>) -> F)
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match self.living_guest() {
            Ok(guest) => {
                let call = call(guest);
                tokio::spawn(async move { reply.send(call.await) });
            }
            Err(error) => answer(reply, Err(error)),
        }
    }

    pub(super) fn living_guest(&self) -> Result<Arc<Guest>> {
        self.state.alive()?;
        self.guest
            .clone()
            .ok_or_else(|| Error::unavailable("the sandbox has no virtual machine yet"))
    }

    /// The guest, which begins to come up with the first call.
    ///
    /// # Errors
    /// A directory that it sees cannot be made.
    pub(super) fn guest_for(
        &mut self,
        config: Config,
        sandbox_spec: SandboxSpec,
    ) -> Result<Launching> {
        if let Some(launching) = &self.launching {
            return Ok(launching.clone());
        }
        self.shares()?;
        self.config = config;
        let plan = BootConfig {
            sizing: self.machine_size(),
            config: self.config.clone(),
            id: self.identity.id.clone(),
            hostname: sandbox_spec.hostname.or_else(host_name).unwrap_or_default(),
            cgroups_path: sandbox_spec.cgroups_path,
            shm_bytes: self.pod.shm.as_ref().map(|shm| shm.bytes),
            netns: sandbox_spec.netns,
        };
        let ledger = self.ledger.clone();
        let launching: Launching = async move { launch(&plan, &ledger).await.map(Arc::new) }
            .boxed()
            .shared();
        self.launching = Some(launching.clone());
        self.spawn_then(launching.clone(), SandboxOwner::launched);
        Ok(launching)
    }

    /// What the guest sees of the host, with the directories for that.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub(super) fn shares(&mut self) -> Result<Arc<SharedVolumes>> {
        if let Some(shares) = &self.shares {
            return Ok(shares.clone());
        }
        let state = Dir::open(self.ledger.dir())?;
        let make = |name: &str| {
            // An attempt before this one may have got half-way.
            state
                .unmount(name)
                .and_then(|()| state.unmount(&served(name)))?;
            mounts::make_served(&state, name, &served(name))
        };
        let shares = Arc::new(SharedVolumes::new(make(SHARE)?, make(ROOTFS)?));
        self.shares = Some(shares.clone());
        Ok(shares)
    }

    /// How large the machine should be for what is in it.
    pub(super) fn machine_size(&self) -> MachineSize {
        MachineSize::of(&self.config, self.pod.need, &self.limits)
    }

    fn launched(&mut self, result: Result<Arc<Guest>>) {
        match result {
            Ok(guest) => {
                self.guest = Some(guest.clone());
                let handle = self.handle.clone();
                let tell = move |container: String| {
                    handle.tell(move |owner| owner.out_of_memory(&container))
                };
                tokio::spawn(watch_oom(guest.agent.clone(), tell));
                self.spawn_then(async move { guest.died().await }, |owner, ended| {
                    if ended.out_of_memory {
                        let ids: Vec<String> = owner.limits.keys().cloned().collect();
                        for id in ids
                            .into_iter()
                            .filter(|id| owner.state.is_unfinished(id))
                            .collect::<Vec<_>>()
                        {
                            owner.out_of_memory(&id);
                        }
                    }
                    owner.vm_died(&ended.reason);
                });
            }
            Err(error) => {
                tracing::error!(%error, "the virtual machine did not come up");
                self.launching = None;
            }
        }
    }

    /// A container ran out of memory, as somebody says who may be wrong.
    fn out_of_memory(&mut self, container: &str) {
        match self.state.out_of_memory(container) {
            Ok(true) if self.is_unannounced(container) => {}
            Ok(true) => {
                self.events.publish(&TaskOOM {
                    container_id: container.to_owned(),
                    ..Default::default()
                });
            }
            Ok(false) => {}
            Err(_) if self.strangers.take() => {
                let container = text(container, STRANGERS_NAME);
                tracing::warn!(
                    container,
                    "the guest says that a container ran out of memory which it does not have"
                );
            }
            Err(_) => {}
        }
    }

    /// A SIGKILL is sent to all of a container's processes. From the first one on they have a
    /// certain time to end.
    pub(super) fn begin_to_end(&mut self, id: &str) {
        if self.killed.contains_key(id) {
            return;
        }
        let (id, at) = (id.to_owned(), Instant::now());
        self.killed.insert(id.clone(), at);
        self.spawn_then(sleep(self.config.kill_timeout()), move |owner, ()| {
            // Another one may have the name by now.
            if owner.killed.get(&id) == Some(&at) && owner.state.is_unfinished(&id) {
                owner.vm_died(&ending::overdue(&id, owner.config.kill_timeout()));
            }
        });
    }

    /// A SIGKILL is sent to an exec. One that has not ended after a certain time hangs in the
    /// guest's kernel, or the guest does not obey: nobody waits for it any longer, and it goes with
    /// its container.
    pub(super) fn begin_to_give_up(&mut self, key: &ProcessId) {
        let Ok(pid) = self.state.process(key).map(|process| process.pid) else {
            return;
        };
        let key = key.clone();
        self.spawn_then(sleep(self.config.kill_timeout()), move |owner, ()| {
            // Another one may have the name by now.
            if owner
                .state
                .process(&key)
                .is_ok_and(|process| process.pid == pid && process.is_live())
            {
                tracing::warn!(%key, "an exec did not end after a SIGKILL, and is taken for ended");
                owner.exited(&key, 128 + libc::SIGKILL.cast_unsigned());
            }
        });
    }

    pub(super) fn vm_died(&mut self, reason: &str) {
        if self.state.alive().is_ok() && !self.ended {
            tracing::error!(reason, "the virtual machine has ended");
        }
        // Whatever is left of QEMU and its helpers: connections through a helper only end with it.
        if let Some(guest) = self.guest.clone() {
            tokio::spawn(async move { guest.stop().await });
        }
        let exits = self.state.vm_died(reason, SystemTime::now());
        self.announce(exits);
    }

    pub(super) fn watch_exit(&self, guest: Arc<Guest>, key: ProcessId) {
        let watched = key.clone();
        self.spawn_then(
            async move { agent_calls::wait(&guest, &watched).await },
            move |owner, status| {
                // Without a status the agent has failed, and with it the machine: `vm_died` comes.
                if let Some(status) = status {
                    owner.exited(&key, status);
                }
            },
        );
    }

    pub(super) fn exited(&mut self, key: &ProcessId, status: u32) {
        let exits = self.state.exited(
            key,
            Exit {
                pid: 0,
                status,
                at: SystemTime::now(),
            },
        );
        self.announce(exits);
        if self.state.is_held(&key.container) {
            let id = key.container.clone();
            self.spawn_then(sleep(HELD_DEADLINE), move |owner, ()| {
                let exits = owner.state.release_held(&id, SystemTime::now());
                owner.announce(exits);
            });
        }
    }

    /// Whether events of this task would be about something that containerd does not know.
    pub(super) fn is_unannounced(&self, id: &str) -> bool {
        self.pod.hidden_from_containerd && id == self.identity.id
    }

    /// Tells the world of exits: events, the bundle's record, everybody who waits.
    pub(super) fn announce(&mut self, exits: Vec<(ProcessId, Exit)>) {
        for (key, exit) in exits {
            if key.is_init()
                && let Ok(task) = self.state.task(&key.container)
            {
                exit_record::write(Path::new(&task.bundle), exit);
            }
            if self.is_unannounced(&key.container) {
                continue;
            }
            self.events.publish(&TaskExit {
                id: if key.is_init() {
                    key.container.clone()
                } else {
                    key.exec.clone()
                },
                container_id: key.container.clone(),
                pid: exit.pid,
                exit_status: exit.status,
                exited_at: Some(exit.at.into()).into(),
                ..Default::default()
            });
        }
        let state = &self.state;
        self.waiters.retain(|key, waiters| match state.exit(key) {
            Ok(None) => true,
            Ok(Some(exit)) => {
                waiters
                    .drain(..)
                    .for_each(|waiter| answer(waiter, Ok(exit)));
                false
            }
            Err(error) => {
                waiters
                    .drain(..)
                    .for_each(|waiter| answer(waiter, Err(error.clone())));
                false
            }
        });
    }

    pub(super) fn take_pumps(&mut self, container: &str) -> Vec<Pumps> {
        let (of_container, others): (HashMap<_, _>, _) = self
            .pumps
            .drain()
            .partition(|(key, _)| key.container == container);
        self.pumps = others;
        of_container.into_values().collect()
    }

    /// Drops everything that is kept for a process; for init, for its whole container.
    pub(super) fn forget(&mut self, key: &ProcessId) {
        self.state.deleted(key);
        let gone =
            |other: &ProcessId| other == key || (key.is_init() && other.container == key.container);
        self.announced.retain(|other, _| !gone(other));
        self.pending_terminal_sizes.retain(|other, _| !gone(other));
        self.stdin_closed.retain(|other| !gone(other));
        if key.is_init() {
            self.killed.remove(&key.container);
        }
        self.announce(Vec::new());
    }
}

fn host_name() -> Option<String> {
    nix::unistd::gethostname().ok()?.into_string().ok()
}

/// A client that has gone away needs no answer.
pub fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}

#[cfg(test)]
#[path = "owner_tests.rs"]
mod tests;
