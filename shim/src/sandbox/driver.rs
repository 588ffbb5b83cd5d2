//! The one owner of a sandbox's state. Requests and the outcomes of what was begun arrive as closures on one channel
//! and run one after the other; what takes time runs beside them and reports back the same way. So there is no lock,
//! and no request waits for another's guest.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use oci_spec::runtime::Process;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::launch::{Guest, Plan, Sizing, launch, share_dir};
use super::ledger::Ledger;
use super::state::{Io, Key, State};
use super::{mounts, process};
use crate::config::Config;
use crate::container::create::{Host, in_guest, remove_from_guest};
use crate::container::exit_file::{self, Exit};
use crate::container::spec;
use crate::error::{Error, Result};
use crate::events::Publisher;
use crate::identity::SandboxIdentity;
use crate::stdio::{HostIo, Pumps};

/// After init's death its execs are killed by the kernel; one that is not heard of by then is taken for dead.
const HELD_DEADLINE: Duration = Duration::from_secs(2);

/// containerd may be away when the last events are made; `delete` makes up for what it misses.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// How long the other notices of a machine's death may take to tell the better reason.
const AGENT_LOST_GRACE: Duration = Duration::from_secs(1);

type Job = Box<dyn FnOnce(&mut Driver) + Send>;
type Launching = Shared<BoxFuture<'static, Result<Arc<Guest>>>>;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// Sends requests to the owner.
#[derive(Clone)]
pub struct Handle(mpsc::UnboundedSender<Job>);

impl Handle {
    /// Hands the owner a request and waits for its answer.
    ///
    /// # Errors
    /// The request's own; `UNAVAILABLE` once the sandbox has ended.
    pub async fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut Driver, Reply<T>) + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(move |driver| request(driver, reply));
        answer.await.unwrap_or_else(|_| Err(Error::unavailable("the sandbox has ended")))
    }

    /// Hands the owner something to do.
    pub fn tell(&self, job: impl FnOnce(&mut Driver) + Send + 'static) {
        // Without an owner the sandbox has ended and there is nothing to do.
        let _ = self.0.send(Box::new(job));
    }
}

/// What the owner knows of a container besides its state.
struct Container {
    host: Host,
}

/// The owner.
pub struct Driver {
    /// What may happen.
    pub state: State,
    identity: SandboxIdentity,
    ledger: Arc<Ledger>,
    events: Publisher,
    handle: Handle,
    launching: Option<Launching>,
    guest: Option<Arc<Guest>>,
    containers: HashMap<String, Container>,
    pumps: HashMap<Key, Pumps>,
    exec_specs: HashMap<Key, Process>,
    sizes: HashMap<Key, (u32, u32)>,
    stdin_closed: Vec<Key>,
    waiters: HashMap<Key, Vec<Reply<Exit>>>,
    ended: bool,
}

impl Driver {
    /// Makes an owner and the handle to it.
    pub fn new(
        identity: SandboxIdentity,
        ledger: Ledger,
        events: Publisher,
    ) -> (Driver, Handle, mpsc::UnboundedReceiver<Job>) {
        let (sender, jobs) = mpsc::unbounded_channel();
        let handle = Handle(sender);
        let driver = Driver {
            state: State::default(),
            identity,
            ledger: Arc::new(ledger),
            events,
            handle: handle.clone(),
            launching: None,
            guest: None,
            containers: HashMap::new(),
            pumps: HashMap::new(),
            exec_specs: HashMap::new(),
            sizes: HashMap::new(),
            stdin_closed: Vec::new(),
            waiters: HashMap::new(),
            ended: false,
        };
        (driver, handle, jobs)
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
        self.containers.clear();
        self.events.flush(FLUSH_DEADLINE).await;
    }

    /// Begins something that takes time; its outcome is handled by the owner.
    fn begin<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
        then: impl FnOnce(&mut Driver, T) + Send + 'static,
    ) {
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let outcome = work.await;
            handle.tell(move |driver| then(driver, outcome));
        });
    }

    /// Begins a call to the guest whose outcome is the whole answer.
    fn relay<T, F>(&self, reply: Reply<T>, call: impl FnOnce(Arc<Guest>) -> F)
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

    fn living_guest(&self) -> Result<Arc<Guest>> {
        self.state.alive()?;
        self.guest.clone().ok_or_else(|| Error::unavailable("the sandbox has no virtual machine yet"))
    }

    /// The guest, which begins to come up with the first call.
    fn guest_for(&mut self, config: &Config, spec: &oci_spec::runtime::Spec) -> Launching {
        if let Some(launching) = &self.launching {
            return launching.clone();
        }
        let plan = Plan {
            sizing: Sizing::of(config, spec),
            config: config.clone(),
            id: self.identity.id.clone(),
            // Without a name of its own a container has the host's, as in a new uts namespace.
            hostname: spec.hostname().clone().or_else(host_name).unwrap_or_default(),
            cgroups_path: spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.cgroups_path().as_ref())
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
        };
        let ledger = self.ledger.clone();
        let launching: Launching = async move { launch(&plan, &ledger).await.map(Arc::new) }.boxed().shared();
        self.launching = Some(launching.clone());
        self.begin(launching.clone(), Driver::launched);
        launching
    }

    fn launched(&mut self, result: Result<Arc<Guest>>) {
        match result {
            Ok(guest) => {
                self.guest = Some(guest.clone());
                self.watch_oom(guest.clone());
                self.begin(async move { guest.died().await }, |driver, reason| driver.vm_died(&reason));
            }
            Err(error) => {
                tracing::error!(%error, "the virtual machine did not come up");
                self.launching = None;
            }
        }
    }

    fn watch_oom(&self, guest: Arc<Guest>) {
        let watched = guest.clone();
        self.begin(async move { process::oom(&watched).await }, move |driver, container| match container {
            Some(container_id) => {
                driver.events.publish(&TaskOOM { container_id, ..Default::default() });
                driver.watch_oom(guest);
            }
            None => {
                // The connection to the agent has ended. Usually because the machine has, and QEMU's own death is
                // the better reason to give.
                driver.begin(sleep(AGENT_LOST_GRACE), |driver, ()| {
                    driver.vm_died("the connection to the guest agent was lost");
                });
            }
        });
    }

    fn vm_died(&mut self, reason: &str) {
        if self.state.alive().is_ok() {
            tracing::error!(reason, "the virtual machine has ended");
        }
        // Whatever is left of QEMU and its helpers: connections through a helper only end with it.
        if let Some(guest) = self.guest.clone() {
            tokio::spawn(async move { guest.stop().await });
        }
        let exits = self.state.vm_died(reason, SystemTime::now());
        self.announce(exits);
    }

    /// `Create`: the host's part and the guest's boot side by side, then the container in the guest.
    pub fn create(&mut self, request: CreateTaskRequest, config: Result<Config>, reply: Reply<u32>) {
        let io = Io {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let bundle = PathBuf::from(&request.bundle);
        let prepared = config.and_then(|config| Ok((config, spec::load(&bundle)?)));
        let (config, spec) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return answer(reply, Err(error)),
        };
        if let Err(error) = self.state.create(&request.id, &request.bundle, io.clone()) {
            return answer(reply, Err(error));
        }
        let share = share_dir(self.ledger.dir());
        if !share.is_dir()
            && let Err(error) = mounts::make_shared(&share)
        {
            self.state.create_failed(&request.id);
            return answer(reply, Err(error));
        }
        let launching = self.guest_for(&config, &spec);
        let namespace = self.identity.namespace.clone();
        let id = request.id.clone();
        let rootfs = request.rootfs.clone();
        let work = async move {
            let host_io = HostIo::open(&io, &namespace, &id).await?;
            let (share_id, host_spec) = (id.clone(), spec.clone());
            // mount(2) may wait for a slow disk, which must not hold up other requests.
            let host =
                tokio::task::spawn_blocking(move || Host::prepare(&share, &share_id, &bundle, &rootfs, &host_spec));
            let mut host = host.await.map_err(|error| Error::internal(error.to_string()))??;
            let guest = launching.await?;
            let pumps = in_guest(&guest, &id, &mut host, &spec, &io, host_io).await?;
            Ok((guest, Container { host }, pumps))
        };
        self.begin(work, move |driver, result| driver.created(request, result, reply));
    }

    fn created(
        &mut self,
        request: CreateTaskRequest,
        result: Result<(Arc<Guest>, Container, Pumps)>,
        reply: Reply<u32>,
    ) {
        let (guest, container, pumps) = match result {
            Ok(created) => created,
            Err(error) => {
                self.state.create_failed(&request.id);
                return answer(reply, Err(error));
            }
        };
        let key = Key::new(&request.id, "");
        let pid = self.state.created(&request.id, guest.vm.identity().pid.cast_unsigned());
        self.containers.insert(request.id.clone(), container);
        self.pumps.insert(key.clone(), pumps);
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        self.events.publish(&TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io).into(),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        });
        self.watch_exit(guest, key);
        answer(reply, Ok(pid));
    }

    fn watch_exit(&self, guest: Arc<Guest>, key: Key) {
        let watched = key.clone();
        self.begin(async move { process::wait(&guest, &watched).await }, move |driver, status| {
            // Without a status the connection has ended, and with it the machine: `vm_died` comes.
            if let Some(status) = status {
                driver.exited(&key, status);
            }
        });
    }

    fn exited(&mut self, key: &Key, status: u32) {
        let exits = self.state.exited(key, Exit { pid: 0, status, at: SystemTime::now() });
        self.announce(exits);
        if self.state.is_held(&key.container) {
            let id = key.container.clone();
            self.begin(sleep(HELD_DEADLINE), move |driver, ()| {
                let exits = driver.state.release_held(&id, SystemTime::now());
                driver.announce(exits);
            });
        }
    }

    /// Tells the world of exits: events, the bundle's record, everybody who waits.
    fn announce(&mut self, exits: Vec<(Key, Exit)>) {
        for (key, exit) in exits {
            if key.is_init()
                && let Ok(task) = self.state.task(&key.container)
            {
                exit_file::write(Path::new(&task.bundle), exit);
            }
            self.events.publish(&TaskExit {
                id: if key.is_init() { key.container.clone() } else { key.exec.clone() },
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
                waiters.drain(..).for_each(|waiter| answer(waiter, Ok(exit)));
                false
            }
            Err(error) => {
                waiters.drain(..).for_each(|waiter| answer(waiter, Err(error.clone())));
                false
            }
        });
    }

    /// `Start`.
    pub fn start(&mut self, key: Key, reply: Reply<u32>) {
        let Some(guest) = self.guest.clone() else {
            let error = self.state.process(&key).err();
            let error = error.unwrap_or_else(|| Error::precondition(format!("{key} is still being created")));
            return answer(reply, Err(error));
        };
        let io = match self.state.start(&key).and_then(|()| Ok(self.state.process(&key)?.io.clone())) {
            Ok(io) => io,
            Err(error) => return answer(reply, Err(error)),
        };
        let spec = self.exec_specs.get(&key).cloned();
        let namespace = self.identity.namespace.clone();
        let target = key.clone();
        let starting = guest.clone();
        let work = async move {
            match spec {
                None => process::start_init(&starting, &target.container).await.map(|()| None),
                Some(spec) => process::start_exec(&starting, &target, &spec, &io, &namespace).await.map(Some),
            }
        };
        self.begin(work, move |driver, result| driver.started(guest, key, result, reply));
    }

    fn started(&mut self, guest: Arc<Guest>, key: Key, result: Result<Option<Pumps>>, reply: Reply<u32>) {
        let pumps = match result {
            Ok(pumps) => pumps,
            Err(error) => {
                if self.state.start_failed(&key).is_some() {
                    self.announce(Vec::new());
                }
                return answer(reply, Err(error));
            }
        };
        if let Some(mut pumps) = pumps {
            if self.stdin_closed.contains(&key) {
                pumps.close_stdin();
            }
            self.pumps.insert(key.clone(), pumps);
            self.watch_exit(guest.clone(), key.clone());
        }
        if let Some((width, height)) = self.sizes.remove(&key) {
            let resized = key.clone();
            tokio::spawn(async move { process::resize(&guest, &resized, width, height).await });
        }
        let (pid, early) = match self.state.started(&key) {
            Ok(started) => started,
            Err(error) => return answer(reply, Err(error)),
        };
        let container_id = key.container.clone();
        if key.is_init() {
            self.events.publish(&TaskStart { container_id, pid, ..Default::default() });
        } else {
            let exec_id = key.exec.clone();
            self.events.publish(&TaskExecStarted { container_id, exec_id, pid, ..Default::default() });
        }
        answer(reply, Ok(pid));
        if let Some(exit) = early {
            self.exited(&key, exit.status);
        }
    }

    /// `Exec`: only announces the process.
    pub fn exec(&mut self, request: ExecProcessRequest, process: Process, reply: Reply<()>) {
        let key = Key::new(&request.id, &request.exec_id);
        let io =
            Io { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        let result = self.state.exec(&key, io);
        if result.is_ok() {
            self.exec_specs.insert(key, process);
            let (container_id, exec_id) = (request.id, request.exec_id);
            self.events.publish(&TaskExecAdded { container_id, exec_id, ..Default::default() });
        }
        answer(reply, result);
    }

    /// `Delete`: the answer comes when the output is read and everything of the process is undone.
    pub fn delete(&mut self, key: Key, reply: Reply<Exit>) {
        let (pid, exit) = match self.state.delete(&key).and_then(|exit| Ok((self.state.process(&key)?.pid, exit))) {
            Ok(deleting) => deleting,
            Err(error) => return answer(reply, Err(error)),
        };
        let exit = exit.unwrap_or(Exit { pid, status: 0, at: SystemTime::UNIX_EPOCH });
        let pumps: Vec<Pumps> = match key.is_init() {
            true => self.take_pumps(&key.container),
            false => self.pumps.remove(&key).into_iter().collect(),
        };
        let guest = self.living_guest().ok().filter(|_| key.is_init());
        let container = if key.is_init() { self.containers.remove(&key.container) } else { None };
        let id = key.container.clone();
        let work = async move {
            futures::future::join_all(pumps.into_iter().map(Pumps::drain)).await;
            if let Some(guest) = guest {
                remove_from_guest(&guest, &id).await;
            }
            if let Some(container) = container {
                let _ = tokio::task::spawn_blocking(move || drop(container.host)).await;
            }
        };
        self.begin(work, move |driver, ()| {
            driver.forget(&key);
            if key.is_init() {
                driver.events.publish(&TaskDelete {
                    container_id: key.container.clone(),
                    pid: exit.pid,
                    exit_status: exit.status,
                    exited_at: Some(exit.at.into()).into(),
                    ..Default::default()
                });
            }
            answer(reply, Ok(exit));
        });
    }

    fn take_pumps(&mut self, container: &str) -> Vec<Pumps> {
        let (of_container, others): (HashMap<_, _>, _) =
            self.pumps.drain().partition(|(key, _)| key.container == container);
        self.pumps = others;
        of_container.into_values().collect()
    }

    /// Drops everything that is kept for a process; for init, for its whole container.
    fn forget(&mut self, key: &Key) {
        self.state.deleted(key);
        let gone = |other: &Key| other == key || (key.is_init() && other.container == key.container);
        self.exec_specs.retain(|other, _| !gone(other));
        self.sizes.retain(|other, _| !gone(other));
        self.stdin_closed.retain(|other| !gone(other));
        self.announce(Vec::new());
    }

    /// `Kill`.
    pub fn kill(&mut self, key: Key, signal: u32, all: bool, reply: Reply<()>) {
        if let Err(error) = self.state.kill(&key) {
            return answer(reply, Err(error));
        }
        self.relay(reply, |guest| async move { process::signal(&guest, &key, signal, all).await });
    }

    /// `Wait`.
    pub fn wait(&mut self, key: Key, reply: Reply<Exit>) {
        match self.state.exit(&key) {
            Ok(None) => self.waiters.entry(key).or_default().push(reply),
            Ok(Some(exit)) => answer(reply, Ok(exit)),
            Err(error) => answer(reply, Err(error)),
        }
    }

    /// `Pause` and `Resume`.
    pub fn set_paused(&mut self, id: String, paused: bool, reply: Reply<()>) {
        if let Err(error) = self.state.may_pause(&id, paused) {
            return answer(reply, Err(error));
        }
        let guest = match self.living_guest() {
            Ok(guest) => guest,
            Err(error) => return answer(reply, Err(error)),
        };
        let container_id = id.clone();
        self.begin(async move { process::set_paused(&guest, &id, paused).await }, move |driver, result| {
            if result.is_ok() {
                driver.state.set_paused(&container_id, paused);
                match paused {
                    true => driver.events.publish(&TaskPaused { container_id, ..Default::default() }),
                    false => driver.events.publish(&TaskResumed { container_id, ..Default::default() }),
                }
            }
            answer(reply, result);
        });
    }

    /// `ResizePty`: before the start it is remembered, without a terminal it is nothing.
    pub fn resize(&mut self, key: Key, width: u32, height: u32, reply: Reply<()>) {
        match self.state.process(&key) {
            Err(error) => answer(reply, Err(error)),
            Ok(process) if !process.io.terminal => answer(reply, Ok(())),
            Ok(_) if key.is_init() || self.pumps.contains_key(&key) => {
                self.relay(reply, |guest| async move { process::resize(&guest, &key, width, height).await });
            }
            Ok(_) => {
                self.sizes.insert(key, (width, height));
                answer(reply, Ok(()));
            }
        }
    }

    /// `CloseIO` of stdin; before the start it is remembered.
    pub fn close_stdin(&mut self, key: Key, reply: Reply<()>) {
        let result = self.state.process(&key).map(drop);
        if result.is_ok() {
            match self.pumps.get_mut(&key) {
                Some(pumps) => pumps.close_stdin(),
                None => self.stdin_closed.push(key),
            }
        }
        answer(reply, result);
    }

    /// `Update`.
    pub fn update(&mut self, id: String, resources: oci_spec::runtime::LinuxResources, reply: Reply<()>) {
        if let Err(error) = self.state.task(&id) {
            return answer(reply, Err(error));
        }
        self.relay(reply, |guest| async move { process::update(&guest, &id, &resources).await });
    }

    /// `Stats`: the agent keeps a container's numbers until it is removed, so also after its exit.
    pub fn stats(&mut self, id: String, reply: Reply<agent_client::protocols::agent::CgroupStats>) {
        if let Err(error) = self.state.task(&id) {
            return answer(reply, Err(error));
        }
        self.relay(reply, |guest| async move { process::stats(&guest, &id).await });
    }

    /// `Shutdown`: ends the sandbox if nothing needs it, or if `now`. Says whether it did.
    pub fn shutdown(&mut self, now: bool, reply: Reply<bool>) {
        self.ended |= now || self.state.is_empty();
        if self.ended && !self.state.is_empty() {
            self.vm_died("the sandbox was told to stop");
        }
        answer(reply, Ok(self.ended));
    }
}

fn host_name() -> Option<String> {
    nix::unistd::gethostname().ok()?.into_string().ok()
}

/// A client that has gone away needs no answer.
pub fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}
