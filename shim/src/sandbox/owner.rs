//! The one owner of a sandbox's state. Requests arrive on one channel, outcomes of the work that
//! was begun for them from that work itself; they are handled one after the other, so there is no
//! lock, and what takes time runs beside, so no request waits for another's guest.
//!
//! ```text
//! containerd ─▶ service ─▶ Request ─▶┌───────────────┐─▶ State: may it be, and what is told
//!                                    │ SandboxOwner  │─▶ Publisher, Reply: events and answers
//!            ┌──────────── Outcome ─▶└───────────────┘─┐
//!            └─────────── work: guest, host, hooks ◀───┘
//! ```
//!
//! `handle` and `finish` list all there is; each request is begun in `create_task`, `task_requests`
//! or `sandbox_requests`, and its outcome is finished beside it. Ends (exits, kills, the machine's
//! death) are in `ends`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use sys::point::{Point, reach};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use crate::config::Config;
use crate::container::create;
use crate::container::shared_volumes::SharedVolumes;
use crate::deadlines::{EVENTS_FLUSH, FIRST_REQUEST, IDLE_AFTER_ANSWER, IDLE_SANDBOX, WORK_AT_END};
use crate::error::{Error, IoContext, Result};
use crate::events::Publisher;
use crate::from_guest::Bucket;
use crate::guest::boot::BootConfig;
use crate::guest::calls::GuestCalls;
use crate::guest::machine_size::{self, MachineSize, ResourceLimits, WantedSize};
use crate::host::identity::SandboxIdentity;
use crate::host::ledger::Ledger;
use crate::refusal::Refusal;
use crate::sandbox::host_calls::HostCalls;
use crate::sandbox::pod::{Pod, SandboxSpec};
use crate::sandbox::request::{Outcome, Reply, Request, Requests, SandboxHandle};
use crate::sandbox::runtime::Runtimes;
use crate::sandbox::state::{Stage, State};

/// How often a guest's talk of containers that are not there comes into the log.
const STRANGERS: (u32, Duration) = (5, Duration::from_secs(60));

pub(super) type Launching = Shared<BoxFuture<'static, Result<Arc<dyn GuestCalls>>>>;

pub struct SandboxOwner {
    /// What may happen.
    pub(super) state: State,
    /// What is kept of containers and processes.
    pub(super) runtimes: Runtimes,
    pub(super) identity: SandboxIdentity,
    pub(super) ledger: Arc<Ledger>,
    pub(super) events: Publisher,
    pub(super) config: Config,
    pub(super) pod: Pod,
    pub(super) created_at: SystemTime,
    pub(super) launching: Option<Launching>,
    pub(super) guest: Option<Arc<dyn GuestCalls>>,
    /// How large the machine should be.
    pub(super) wanted: WantedSize,
    pub(super) strangers: Bucket,
    pub(super) ended: bool,
    /// What asks after containers that are being made or deleted.
    deferred: Vec<Request>,
    last_request: Instant,
    /// [`FIRST_REQUEST`], then [`IDLE_SANDBOX`].
    idle_deadline: Duration,
    /// The sandbox's own task has been deleted. containerd 2.2 and 2.3 say nothing more when a
    /// pod's last container goes after it.
    pub(super) sandbox_task_deleted: bool,
    shares: Option<Arc<SharedVolumes>>,
    /// Turns true at the sandbox's end, for a machine that is still coming up.
    ending: watch::Sender<bool>,
    pub(super) handle: SandboxHandle,
    /// What it has of the host.
    pub(super) host: Arc<dyn HostCalls>,
    /// What the sandbox's end waits for.
    work: JoinSet<Outcome>,
    /// What it does not wait for.
    clocks: JoinSet<Outcome>,
}

impl SandboxOwner {
    /// Makes an owner and the handle to it.
    pub fn new(
        identity: SandboxIdentity,
        ledger: Ledger,
        events: Publisher,
        host: Arc<dyn HostCalls>,
    ) -> (SandboxOwner, SandboxHandle, Requests) {
        let (handle, requests) = SandboxHandle::new();
        let owner = SandboxOwner {
            state: State::default(),
            runtimes: Runtimes::default(),
            identity,
            ledger: Arc::new(ledger),
            events,
            config: Config::default(),
            pod: Pod::default(),
            created_at: SystemTime::now(),
            launching: None,
            guest: None,
            wanted: WantedSize::new(MachineSize::of(
                &Config::default(),
                ResourceLimits::default(),
                &[],
            )),
            strangers: Bucket::new(STRANGERS.0, STRANGERS.1),
            ended: false,
            deferred: Vec::new(),
            last_request: Instant::now(),
            idle_deadline: FIRST_REQUEST,
            sandbox_task_deleted: false,
            shares: None,
            ending: watch::channel(false).0,
            handle: handle.clone(),
            host,
            work: JoinSet::new(),
            clocks: JoinSet::new(),
        };
        (owner, handle, requests)
    }

    /// Works until the sandbox is shut down, then ends what it started.
    pub async fn run(mut self, mut requests: Requests) {
        self.watch_idle();
        while !self.ended {
            self.step(&mut requests).await;
        }
        // Who asks from now on is told at once that there is nobody.
        drop(requests);
        self.deferred.clear();
        let containers = self.runtimes.clear();
        self.ending.send_replace(true);
        self.launching = None;
        if let Some(guest) = self.guest.take() {
            guest.stop().await;
        }
        create::release(containers).await;
        // Here too containerd gives time, and events matter more than what is late.
        self.events.flush(EVENTS_FLUSH).await;
        let finish = async { while self.work.join_next().await.is_some() {} };
        if timeout(WORK_AT_END, finish).await.is_err() {
            tracing::warn!(
                "work of the sandbox is given up at its end: a hook, or a storage that hangs"
            );
        }
    }

    /// Handles what comes next. Requests first: what the guest says of memory comes that way, and
    /// has to be told before the exit that follows from it.
    pub(super) async fn step(&mut self, requests: &mut Requests) {
        tokio::select! {
            biased;
            Some(request) = requests.recv() => {
                tracing::debug!(?request, "asked");
                if !matches!(request, Request::OutOfMemory { .. }) {
                    self.last_request = Instant::now();
                    self.idle_deadline = match self.sandbox_task_deleted {
                        true => IDLE_AFTER_ANSWER,
                        false => IDLE_SANDBOX,
                    };
                }
                self.handle(request);
            }
            Some(outcome) = self.work.join_next() => self.joined(outcome),
            Some(outcome) = self.clocks.join_next() => self.joined(outcome),
        }
    }

    fn joined(&mut self, outcome: std::result::Result<Outcome, JoinError>) {
        match outcome {
            Ok(outcome) => {
                tracing::debug!(?outcome, "done");
                self.finish(outcome);
                let deferred = std::mem::take(&mut self.deferred);
                deferred
                    .into_iter()
                    .for_each(|request| self.handle(request));
            }
            // Nobody knows how far it got, so what it was for can neither go on nor be deleted:
            // containerd sees the end of the connection, and its `delete` undoes the rest.
            Err(error) => {
                self.vm_died(&format!("the shim has failed: {error}"));
                self.ended = true;
            }
        }
    }

    /// Whether it asks after a container that is being made, or whose pids nobody will know in a
    /// moment: it waits then. containerd asks when it comes back, and removes a shim that has no
    /// container.
    fn must_wait(&self, request: &Request) -> bool {
        let (container, deleted_too) = match request {
            Request::State { process, .. } => (&process.container, false),
            Request::Pids { container, .. } => (container, true),
            _ => return false,
        };
        match self.state.task(container).map(|task| task.init.stage) {
            Ok(Stage::Creating) => true,
            Ok(Stage::Deleting(_)) => deleted_too,
            _ => false,
        }
    }

    fn handle(&mut self, request: Request) {
        match request {
            request if self.must_wait(&request) => self.deferred.push(request),
            Request::Create {
                request,
                config,
                reply,
            } => self.create(request, config.value, reply),
            Request::Start { process, reply } => self.start(process, reply),
            Request::State { process, reply } => reply.send(self.process_state(&process)),
            Request::Exec {
                request,
                spec,
                reply,
            } => self.exec(request.value, spec.value, reply),
            Request::Delete { process, reply } => self.delete(process, reply),
            Request::Kill {
                process,
                signal,
                scope,
                reply,
            } => {
                self.kill(process, signal, scope, reply);
            }
            Request::Wait { process, reply } => self.wait(&process, reply),
            Request::Pids { container, reply } => {
                reply.send(self.state.pids(&container).map_err(Error::from))
            }
            Request::SetFreezer {
                container,
                to,
                reply,
            } => self.set_freezer(container, to, reply),
            Request::ResizeTerminal {
                process,
                width,
                height,
                reply,
            } => {
                self.resize_terminal(process, width, height, reply);
            }
            Request::CloseStdin { process, reply } => reply.send(self.close_stdin(&process)),
            Request::Update {
                container,
                resources,
                reply,
            } => {
                self.update(container, *resources, reply);
            }
            Request::Stats { container, reply } => self.stats(container, reply),
            Request::Connect { container, reply } => reply.send(Ok(self.task_pid(&container))),
            Request::Shutdown { now, reply } => reply.send(Ok(self.shutdown(now))),
            Request::CreateSandbox {
                request,
                config,
                reply,
            } => {
                self.create_sandbox(&request.value, config.value, reply);
            }
            Request::SandboxStatus { sandbox, reply } => reply.send(self.sandbox_status(&sandbox)),
            Request::PingSandbox { sandbox, reply } => self.ping_sandbox(&sandbox, reply),
            Request::SandboxStats { reply } => self.sandbox_stats(reply),
            Request::OutOfMemory { container } => self.out_of_memory(&container),
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Done => {}
            Outcome::Idle => self.idle(),
            Outcome::Launched(result) => self.launched(result),
            Outcome::MachineEnded(ended) => self.machine_ended(&ended),
            Outcome::Created {
                request,
                result,
                reply,
            } => self.created(request.value, *result, reply),
            Outcome::SandboxCreated {
                sandbox,
                result,
                reply,
            } => {
                reply.send(self.sandbox_created(&sandbox, result));
            }
            Outcome::Started {
                guest,
                process,
                result,
                reply,
            } => {
                self.started(guest, process, result, reply);
            }
            // Without a status the machine's death comes too, and tells all exits.
            Outcome::Exited { process, status } => {
                if let Some(status) = status {
                    self.exited(&process, status);
                }
            }
            Outcome::ExecsOverdue { container } => self.release_held(&container),
            Outcome::KillOverdue { container, killed } => self.kill_overdue(&container, killed),
            Outcome::ExecKillOverdue { process, pid } => self.exec_kill_overdue(&process, pid),
            Outcome::Deleted {
                process,
                exit,
                result,
                reply,
            } => {
                self.deleted(&process, exit, result);
                reply.send(Ok(exit));
            }
            Outcome::Signalled {
                last_resort,
                result,
                reply,
            } => {
                reply.send(self.signalled(last_resort, result));
            }
            Outcome::FreezerSet {
                container,
                to,
                result,
                reply,
            } => {
                if result.is_ok() {
                    self.freezer_set(container, to);
                }
                reply.send(result);
            }
            Outcome::Updated {
                container,
                old,
                number,
                result,
                reply,
            } => self.updated(&container, (old, number), result, reply),
        }
    }

    /// Begins something that takes time.
    pub(super) fn begin(&mut self, work: impl Future<Output = Outcome> + Send + 'static) {
        self.work.spawn(work);
    }

    /// Looks in a while whether a sandbox without a task still hears nothing.
    pub(super) fn watch_idle(&mut self) {
        if self.state.is_empty() {
            let left = self
                .idle_deadline
                .saturating_sub(self.last_request.elapsed());
            self.after(left.max(IDLE_AFTER_ANSWER), Outcome::Idle);
        }
    }

    fn idle(&mut self) {
        if self.state.is_empty() && self.last_request.elapsed() >= self.idle_deadline {
            tracing::info!("nobody wants anything of this sandbox: it ends");
            self.ended = true;
        } else {
            self.watch_idle();
        }
    }

    /// Looks after something once a time is over.
    pub(super) fn after(&mut self, time: Duration, outcome: Outcome) {
        self.clocks.spawn(async move {
            sleep(time).await;
            outcome
        });
    }

    /// Begins a call to the guest whose outcome is the whole answer.
    pub(super) fn forward_to_guest<T, F>(
        &mut self,
        reply: Reply<T>,
        call: impl FnOnce(Arc<dyn GuestCalls>) -> F,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match self.living_guest() {
            Ok(guest) => {
                let call = call(guest);
                self.begin(async move {
                    reply.send(call.await);
                    Outcome::Done
                });
            }
            Err(error) => reply.refuse(error),
        }
    }

    pub(super) fn living_guest(&self) -> Result<Arc<dyn GuestCalls>, Refusal> {
        self.state.alive()?;
        self.guest.clone().ok_or(Refusal::NoMachineYet)
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
        let accelerator = self.config.accelerator;
        self.config.vcpus_without_limit = machine_size::vcpus_without_limit(accelerator);
        self.limits_changed();
        let boot = BootConfig {
            sizing: self.wanted.get(),
            config: self.config.clone(),
            id: self.identity.id.clone(),
            hostname: sandbox_spec.hostname.or_else(host_name).unwrap_or_default(),
            cgroups_path: sandbox_spec.cgroups_path,
            shm_bytes: self.pod.shm.as_ref().map(|shm| shm.bytes),
            netns: sandbox_spec.netns,
            host_network: sandbox_spec.host_network,
        };
        let (host, ledger) = (self.host.clone(), self.ledger.clone());
        let mut ending = self.ending.subscribe();
        let launching = async move {
            tokio::select! {
                launched = host.launch(boot, ledger) => launched,
                // What was started goes with the launch.
                _ = ending.wait_for(|ending| *ending) => {
                    Err(Refusal::SandboxEnded.into())
                }
            }
        };
        let launching: Launching = launching.boxed().shared();
        self.launching = Some(launching.clone());
        self.begin(launching.clone().map(Outcome::Launched));
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
        reach(Point::CreateNoShare).doing(|| "make the shared directories".into())?;
        let shares = Arc::new(self.host.share(&self.ledger)?);
        reach(Point::SharesMounted).doing(|| "mount the shared directories".into())?;
        self.shares = Some(shares.clone());
        Ok(shares)
    }

    /// What the containers may use has changed. Whether the machine should have another size now.
    pub(super) fn limits_changed(&mut self) -> bool {
        let limits: Vec<_> = self.runtimes.limits().map(|(_, limits)| limits).collect();
        let size = MachineSize::of(&self.config, self.pod.need, &limits);
        self.wanted.set(size)
    }

    fn launched(&mut self, result: Result<Arc<dyn GuestCalls>>) {
        match result {
            Ok(guest) => {
                self.guest = Some(guest.clone());
                let handle = self.handle.clone();
                let tell = move |container| handle.tell(Request::OutOfMemory { container });
                let watched = guest.clone();
                let (follows, wanted) = (guest.clone(), self.wanted.clone());
                let ledger = self.ledger.clone();
                // Both end with the agent's connection.
                tokio::spawn(async move { watched.watch_oom(&tell).await });
                tokio::spawn(async move { follows.follow_host(&wanted, &ledger).await });
                self.begin(async move { Outcome::MachineEnded(guest.died().await) });
            }
            Err(error) => {
                tracing::error!(%error, "the virtual machine did not come up");
                self.launching = None;
            }
        }
    }

    /// The directory of the sandbox's own files on the host.
    pub(super) fn state_dir(&self) -> PathBuf {
        self.ledger.dir().to_owned()
    }

    /// `Shutdown`: ends the sandbox if nothing needs it, or if `now`. Says whether it did.
    fn shutdown(&mut self, now: bool) -> bool {
        self.ended |= now || self.state.is_empty();
        if self.ended && !self.state.is_empty() {
            self.vm_died("the sandbox was told to stop");
        }
        self.ended
    }
}

fn host_name() -> Option<String> {
    nix::unistd::gethostname().ok()?.into_string().ok()
}

#[cfg(test)]
#[path = "owner_tests.rs"]
pub(super) mod tests;

#[cfg(test)]
#[path = "owner_orders.rs"]
mod orders;
