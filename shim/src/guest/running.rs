//! The running guest: its virtual machine with the helpers, the agent in it, and what it has of the
//! host. Its size follows what its containers may use; its end is whichever part ends first.

use std::collections::HashMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use guest_protocol::protocols::agent::{
    CreateContainerRequest, ExecProcessRequest, OnlineCPUMemRequest, PauseContainerRequest,
    RemoveContainerRequest, ResumeContainerRequest, SignalProcessRequest, StartContainerRequest,
    StatsContainerRequest, TtyWinResizeRequest, UpdateContainerRequest, WaitProcessRequest,
};
use guest_protocol::{ALL_PROCESSES, Transport};
use launcher::UidLease;
use oci_spec::runtime::{LinuxResources, Process};
use sys::point::{Point, reach};
use tokio::sync::{Mutex, MutexGuard, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::Code;
use vmm::{Attached, Block, Device, Machine};

use crate::deadlines::{
    AGENT_CALL, AGENT_LAST_WORDS, CHANGE_CONTAINER, CONTAINER_REMOVE_AGAIN, CREATE_CONTAINER,
    HOST_MOUNTS, MACHINE_RESIZE, ONLINE_CPU_MEM, START_PROCESS, STATS,
};
use crate::error::{Error, IoContext, Result};
use crate::from_guest::{Agent, Fault, Features, Stats, needs_own_agent, watch_oom};
use crate::guest::boot::set_sizes;
use crate::guest::calls::{Ended, GuestCalls};
use crate::guest::disks::Disks;
use crate::guest::guest_spec;
use crate::guest::host_sockets::HostSockets;
use crate::guest::machine_size::{MachineSize, WantedSize};
use crate::guest::memory;
use crate::guest::nics::{self, Nics};
use crate::guest::place::{self, HostCgroup};
use crate::guest::preconnect::PreconnectedStdio;
use crate::guest::task_process::TaskPlace;
use crate::host::ledger::Ledger;
use crate::model::{Freezer, ProcessId, SignalScope, Stdio};
use crate::network::Forwarder;
use crate::network::Others;
use crate::stdio::{GuestIo, PolledOutput};

/// Execs that the agent is asked for at a time: each begins as a copy of the agent. The deadline of
/// one begins with its turn.
pub(super) const STARTING_EXECS: usize = 64;

/// A guest with an agent that answers.
pub struct RunningGuest {
    pub(super) machine: Machine,
    pub(super) agent: Agent,
    pub(super) transport: Transport,
    pub(super) features: Features,
    /// [`STARTING_EXECS`].
    pub(super) starting_execs: Semaphore,
    /// Output that has to be read before an exit is asked for: that of polled processes.
    pub(super) polled: std::sync::Mutex<HashMap<ProcessId, PolledOutput>>,
    pub(super) host_sockets: Option<HostSockets>,
    pub(super) _forwarder: Option<Forwarder>,
    /// Keeps the guest's time of day; ends with this.
    pub(super) _clock: JoinSet<()>,
    pub(super) nics: Arc<Nics>,
    pub(super) disks: Disks,
    pub(super) size: Size,
    /// Where its processes are on the host.
    pub(super) place: Arc<HostCgroup>,
    pub(super) task_place: TaskPlace,
    /// The user id of its processes, which nobody else gets while they live.
    pub(super) _uid: Option<UidLease>,
}

/// How large the machine is.
pub(super) struct Size {
    /// What it was last asked to have of memory, and what it has of CPUs. Held while that changes.
    asked: Mutex<MachineSize>,
    /// MiB of memory that the guest has, which may be more than it should.
    pub(super) has_mib: watch::Sender<u64>,
    /// A size was asked of the guest and not waited for: it has to be asked again.
    unsettled: AtomicBool,
    /// How many wait for their turn: a guest that is slow to give memory back gets no more time
    /// for it then.
    waiting: watch::Sender<u32>,
}

impl Size {
    pub(super) fn new(size: MachineSize) -> Size {
        Size {
            asked: Mutex::new(size),
            has_mib: watch::channel(size.memory_mib).0,
            unsettled: AtomicBool::new(false),
            waiting: watch::channel(0).0,
        }
    }

    async fn turn(&self) -> MutexGuard<'_, MachineSize> {
        let _waiting = Waiting::new(&self.waiting);
        self.asked.lock().await
    }

    async fn somebody_waits(&self) {
        let mut waiting = self.waiting.subscribe();
        // `self` holds the sender.
        let _ = waiting.wait_for(|waiting| *waiting > 0).await;
    }
}

/// One that waits for its turn, until it has it or gives up.
struct Waiting<'a>(&'a watch::Sender<u32>);

impl Waiting<'_> {
    fn new(waiting: &watch::Sender<u32>) -> Waiting<'_> {
        waiting.send_modify(|waiting| *waiting += 1);
        Waiting(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

impl std::fmt::Debug for RunningGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RunningGuest({})", self.pid())
    }
}

#[async_trait]
impl GuestCalls for RunningGuest {
    fn pid(&self) -> u32 {
        self.machine.qemu().pid.cast_unsigned()
    }

    fn task_place(&self) -> Option<TaskPlace> {
        Some(self.task_place.clone())
    }

    fn features(&self) -> &Features {
        &self.features
    }

    fn host_sockets(&self) -> Option<&HostSockets> {
        self.host_sockets.as_ref()
    }

    async fn create_container(
        &self,
        request: &CreateContainerRequest,
        io: &Stdio,
    ) -> Result<GuestIo> {
        let process = ProcessId::init(&request.container_id);
        self.check_own_fields(guest_spec::own_fields(&request.OCI))?;
        let streams = if self.features.raw_stdio {
            Some(GuestIo::raw(&self.agent, &self.transport, &process, io).await?)
        } else {
            None
        };
        reach(Point::StdioDialled).doing(|| format!("use the stdio of {process}"))?;
        reach(Point::ContainerCreating).doing(|| format!("ask the guest for {process}"))?;
        self.agent
            .create_container(request, CREATE_CONTAINER)
            .await?;
        if !self.features.pod
            && let Err(error) = set_sizes(&self.agent, &request.storages).await
        {
            let request = RemoveContainerRequest {
                container_id: request.container_id.clone(),
                ..Default::default()
            };
            let _ = self
                .agent
                .remove_container(&request, CHANGE_CONTAINER)
                .await;
            return Err(error);
        }
        Ok(streams.unwrap_or_else(|| self.poll(&process, io)))
    }

    async fn remove_container(&self, id: &str, by: Instant) -> Result<()> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let asking = async {
            loop {
                let left = by
                    .saturating_duration_since(Instant::now())
                    .max(CONTAINER_REMOVE_AGAIN);
                let asked = reach(Point::ContainerRemoving)
                    .doing(|| format!("ask the guest to remove {id}"));
                let asking = async {
                    asked?;
                    self.agent.remove_container(&request, left).await
                };
                match asking.await {
                    Err(error) if error.code() == Code::NOT_FOUND => return Ok(()),
                    Err(error) if Instant::now() + CONTAINER_REMOVE_AGAIN < by => {
                        tracing::debug!(%error, id, "the guest is asked again to remove it");
                        sleep(CONTAINER_REMOVE_AGAIN).await;
                    }
                    result => return result,
                }
            }
        };
        tokio::select! {
            result = asking => result,
            _ = self.agent.failed() => Ok(()),
        }
    }

    async fn attach_disk(&self, path: &Path, number: Option<u64>, ro: bool) -> Result<Attached> {
        let disk = Block {
            path: path.to_owned(),
            number,
            read_only: ro,
        };
        let attached = self.machine.attach(Device::Block(disk)).await?;
        if !ro {
            self.disks.add(&attached.id, path);
        }
        Ok(attached)
    }

    async fn detach_disk(&self, id: &str, deadline: Duration) -> Result<()> {
        let detached = self.machine.detach(id, deadline).await;
        match detached {
            Ok(()) => self.disks.removed(id),
            Err(_) => self.disks.kept(id),
        }
        Ok(detached?)
    }

    async fn allow_writes(&self, volume: &Path) -> Result<()> {
        Ok(self.machine.allow_writes(volume, HOST_MOUNTS).await?)
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        reach(Point::ContainerStarting).doing(|| format!("ask the guest to start {id}"))?;
        self.agent.start_container(&request, START_PROCESS).await
    }

    fn preconnect(&self, process: &ProcessId, io: &Stdio) -> Option<PreconnectedStdio> {
        let begin = || PreconnectedStdio::begin(&self.agent, &self.transport, process, io);
        self.features.raw_stdio.then(begin)
    }

    async fn exec(
        &self,
        process: &ProcessId,
        spec: &Process,
        io: &Stdio,
        preconnected: Option<PreconnectedStdio>,
    ) -> Result<GuestIo> {
        let spec = guest_spec::process(spec);
        self.check_own_fields(guest_spec::own_fields_of_process(&spec))?;
        // It is never closed. The streams come after it: the agent does not hold them for ever.
        let _turn = self.starting_execs.acquire().await;
        let streams = match preconnected {
            Some(preconnected) => preconnected.take().await,
            None => None,
        };
        let streams = if self.features.raw_stdio && streams.is_none() {
            Some(GuestIo::raw(&self.agent, &self.transport, process, io).await?)
        } else {
            streams
        };
        let request = ExecProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec_id().to_owned(),
            process: Some(spec).into(),
            ..Default::default()
        };
        reach(Point::ExecStarting).doing(|| format!("ask the guest to start {process}"))?;
        let started = self.agent.exec_process(&request, START_PROCESS).await;
        if started
            .as_ref()
            .is_err_and(|error| error.code() == Code::DEADLINE_EXCEEDED)
        {
            // It may run all the same by now, and nobody would know.
            let sigkill = libc::SIGKILL.cast_unsigned();
            let _ = self
                .signal(process, sigkill, SignalScope::Process, AGENT_CALL)
                .await;
        }
        started?;
        Ok(streams.unwrap_or_else(|| self.poll(process, io)))
    }

    async fn wait(&self, process: &ProcessId) -> Option<u32> {
        let polled = sys::lock(&self.polled).remove(process);
        if let Some(output) = polled {
            output.read().await;
        }
        let request = WaitProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec_id().to_owned(),
            ..Default::default()
        };
        self.agent.wait_process(&request).await
    }

    async fn signal(
        &self,
        process: &ProcessId,
        signal: u32,
        scope: SignalScope,
        deadline: Duration,
    ) -> Result<()> {
        let all = scope == SignalScope::Container && self.features.signal_all;
        // A SIGKILL of the first process ends the others with it.
        let is_sigkill = signal == libc::SIGKILL.cast_unsigned();
        if scope == SignalScope::Container && !all && !is_sigkill {
            return Err(needs_own_agent("a signal to all processes of a container"));
        }
        let exec_id = if all {
            ALL_PROCESSES
        } else {
            process.exec_id()
        };
        let request = SignalProcessRequest {
            container_id: process.container.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            ..Default::default()
        };
        reach(Point::SignalSending).doing(|| format!("send a signal to {process}"))?;
        self.agent.signal_process(&request, deadline).await
    }

    async fn resize_terminal(&self, process: &ProcessId, columns: u32, rows: u32) -> Result<()> {
        let request = TtyWinResizeRequest {
            container_id: process.container.clone(),
            exec_id: process.exec_id().to_owned(),
            row: rows,
            column: columns,
            ..Default::default()
        };
        match self.agent.tty_win_resize(&request, AGENT_CALL).await {
            // There is no terminal, or nobody before it any more.
            Err(error) if matches!(error.code(), Code::UNAVAILABLE | Code::NOT_FOUND) => Ok(()),
            other => other,
        }
    }

    async fn set_freezer(&self, id: &str, to: Freezer) -> Result<()> {
        let container_id = id.to_owned();
        match to {
            Freezer::Frozen => {
                let request = PauseContainerRequest {
                    container_id,
                    ..Default::default()
                };
                self.agent.pause_container(&request, CHANGE_CONTAINER).await
            }
            Freezer::Thawed => {
                let request = ResumeContainerRequest {
                    container_id,
                    ..Default::default()
                };
                self.agent
                    .resume_container(&request, CHANGE_CONTAINER)
                    .await
            }
        }
    }

    async fn stats(&self, id: &str) -> Result<Stats> {
        let request = StatsContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.agent.stats(&request, STATS).await
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        let resources = guest_spec::resources(resources);
        self.check_own_fields(guest_spec::own_fields_of_resources(&resources))?;
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.agent
            .update_container(&request, CHANGE_CONTAINER)
            .await
    }

    async fn add_links(&self, ledger: &Ledger) -> Result<()> {
        self.nics
            .catch_up(self.for_nics(), Others::Refused, ledger)
            .await
            .map(drop)
    }

    async fn grow(&self, wanted: &WantedSize) -> Result<()> {
        let asked = self.size.turn().await;
        let to = asked.max(wanted.get());
        self.resize(asked, to).await
    }

    async fn fit(&self, wanted: &WantedSize) -> Result<()> {
        let asked = self.size.turn().await;
        let to = wanted.get();
        self.resize(asked, to).await
    }

    async fn watch_oom(&self, tell: &(dyn Fn(String) + Send + Sync)) {
        watch_oom(&self.agent, tell).await;
    }

    async fn follow_host(&self, wanted: &WantedSize, ledger: &Ledger) {
        let memory = async {
            if self.features.memory {
                memory::follow(self, wanted).await;
            }
            self.agent.failed().await
        };
        tokio::select! {
            _ = memory => {}
            () = self.disks.follow(&self.machine) => {}
            () = self.nics.follow(self.for_nics(), ledger) => {}
        }
    }

    async fn ping(&self) -> Result<()> {
        self.agent.ping(AGENT_CALL).await
    }

    async fn died(&self) -> Ended {
        let reason = self.end().await;
        match self.place.out_of_memory() {
            Some(why) => Ended {
                reason: format!("{reason}: {why}"),
                out_of_memory: true,
            },
            None => Ended {
                reason,
                out_of_memory: false,
            },
        }
    }

    async fn stop(&self) {
        self.machine.stop().await;
    }
}

impl RunningGuest {
    fn for_nics(&self) -> nics::Guest<'_> {
        nics::Guest {
            machine: &self.machine,
            agent: &self.agent,
            is_own: self.features.network,
            sockets: self.host_sockets.as_ref(),
        }
    }

    /// Refuses what the agent would ignore.
    fn check_own_fields(&self, used: Option<&'static str>) -> Result<()> {
        match used {
            Some(field) if !self.features.own_fields => Err(needs_own_agent(field)),
            _ => Ok(()),
        }
    }

    async fn end(&self) -> String {
        let mut death = pin!(self.machine.died());
        let fault = tokio::select! {
            why = &mut death => return why,
            why = self.nics.lost() => return why,
            fault = self.agent.failed() => fault,
        };
        match fault {
            Fault::Garbled(why) => why,
            // Usually because the machine has ended, and QEMU's own death is the better reason to
            // give.
            Fault::Lost(why) => timeout(AGENT_LAST_WORDS, death).await.unwrap_or(why),
        }
    }

    async fn resize(&self, mut size: MutexGuard<'_, MachineSize>, to: MachineSize) -> Result<()> {
        self.place.raise(to).await?;
        let resized = self.resize_machine(&mut size, to).await;
        if let Ok(has_mib) = resized {
            // What the guest did not give back it may still use.
            self.place
                .lower(MachineSize {
                    memory_mib: has_mib.max(to.memory_mib),
                    ..to
                })
                .await;
        }
        place::set_oom_score(&self.machine.identities(), to.oom_score_adj);
        resized.map(drop)
    }

    /// Gives the guest so many MiB more or less, as far as it may have them. No CPUs come or go:
    /// containers wait for this.
    ///
    /// # Errors
    /// More was to come, and nothing came.
    pub(super) async fn change_memory(&self, wanted: &WantedSize, mib: i64) -> Result<()> {
        let asked = self.size.turn().await;
        let vcpus = asked.vcpus;
        let to = || MachineSize {
            vcpus,
            ..wanted.get()
        };
        let before = self.machine.memory_mib().await?;
        let by = wanted.grow_by(mib, before);
        if by == 0 {
            return Ok(());
        }
        let resized = self.resize(asked, to()).await;
        let now = *self.size.has_mib.borrow();
        tracing::info!(
            from_mib = before,
            to_mib = now,
            "memory of the virtual machine"
        );
        if by < 0 || now > before {
            return Ok(());
        }
        // What others ask for must not fail of it.
        wanted.grow_by(-by, before);
        let _ = self.resize(self.size.turn().await, to()).await;
        resized.and_then(|()| {
            let taken = "the guest does not take the memory that it is given";
            Err(Error::internal(taken.to_owned()))
        })
    }

    fn poll(&self, process: &ProcessId, io: &Stdio) -> GuestIo {
        let (streams, output) = GuestIo::polled(&self.agent, process, io);
        sys::lock(&self.polled).insert(process.clone(), output);
        streams
    }

    /// Returns the MiB of memory that the guest has.
    async fn resize_machine(&self, size: &mut MachineSize, to: MachineSize) -> Result<u64> {
        let is_settled = !self.size.unsettled.swap(true, Ordering::Relaxed);
        if to.memory_mib != size.memory_mib || !is_settled {
            let shrinks = to.memory_mib < size.memory_mib;
            let got = tokio::select! {
                biased;
                got = self.machine.resize_memory(to.memory_mib, MACHINE_RESIZE) => got?,
                // What the guest was asked for, and how far it got, is not known: it counts as
                // having all of it, until whoever waits asks again.
                () = self.size.somebody_waits(), if shrinks => {
                    return Ok(*self.size.has_mib.borrow());
                }
            };
            if got < to.memory_mib {
                tracing::warn!(
                    got,
                    wanted = to.memory_mib,
                    "the guest has less memory than its containers may use"
                );
            }
            size.memory_mib = to.memory_mib;
            self.size.has_mib.send_replace(got);
            // It may come later: then it is asked for again, and seen.
            self.size
                .unsettled
                .store(got < to.memory_mib, Ordering::Relaxed);
        } else {
            self.size.unsettled.store(false, Ordering::Relaxed);
        }
        if to.vcpus != size.vcpus {
            let got = self.machine.resize_vcpus(to.vcpus, MACHINE_RESIZE).await?;
            let grew = got > size.vcpus;
            size.vcpus = got;
            if grew {
                // How many shall be online, not how many more (Kata since 2023).
                let request = OnlineCPUMemRequest {
                    nb_cpus: got,
                    ..Default::default()
                };
                self.agent.online_cpu_mem(&request, ONLINE_CPU_MEM).await?;
            }
        }
        Ok(*self.size.has_mib.borrow())
    }
}
