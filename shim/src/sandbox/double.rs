//! A host and a guest that do what a test wants, when it wants it: every call waits
//! until the test answers. A machine that has ended answers nothing, as a real one.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use guest_protocol::protocols::agent::CreateContainerRequest;
use oci_spec::runtime::{LinuxResources, Process};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use vmm::Attached;

use crate::container::create::{CreateContainer, HostSide};
use crate::container::shared_volumes::SharedVolumes;
use crate::error::{Error, Result};
use crate::from_guest::{Features, Stats};
use crate::guest::boot::BootConfig;
use crate::guest::calls::{Ended, GuestCalls};
use crate::guest::host_sockets::HostSockets;
use crate::guest::machine_size::WantedSize;
use crate::guest::preconnect::PreconnectedStdio;
use crate::guest::task_process::TaskPlace;
use crate::host::dir::Dir;
use crate::host::ledger::Ledger;
use crate::model::{Freezer, ProcessId, SignalScope, Stdio};
use crate::sandbox::host_calls::HostCalls;
use crate::stdio::GuestIo;

/// Pid of the machine that is none.
pub const VM_PID: u32 = 77;

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Prepare(String),
    Launch,
    Create(String),
    Remove(String),
    AttachDisk,
    DetachDisk,
    Start(String),
    Exec(ProcessId),
    Wait(ProcessId),
    Signal(ProcessId, u32, SignalScope),
    ResizeTerminal(ProcessId),
    SetFreezer(String, Freezer),
    Stats(String),
    Update(String),
    AddLinks,
    Grow,
    Fit,
    Ping,
}

struct Pending {
    call: Call,
    answer: oneshot::Sender<Result<u32>>,
}

/// What is asked of the double, shared with the test.
pub struct Script {
    pending: Mutex<Vec<Pending>>,
    /// Calls that are answered at once.
    prompt: fn(&Call) -> bool,
    died: watch::Sender<Option<Ended>>,
}

impl Script {
    pub fn new(prompt: fn(&Call) -> bool) -> Arc<Script> {
        Arc::new(Script {
            pending: Mutex::default(),
            prompt,
            died: watch::channel(None).0,
        })
    }

    fn pending(&self) -> MutexGuard<'_, Vec<Pending>> {
        let mut pending = self.pending.lock().unwrap();
        pending.retain(|pending| !pending.answer.is_closed());
        pending
    }

    /// What waits for an answer.
    pub fn waiting(&self) -> Vec<Call> {
        self.pending()
            .iter()
            .map(|pending| pending.call.clone())
            .collect()
    }

    /// Answers one of the waiting calls.
    pub fn answer_one(&self, index: usize, answer: Result<u32>) {
        let _ = self.pending().remove(index).answer.send(answer);
    }

    /// Answers the first waiting call of this kind.
    pub fn answer(&self, call: &Call, answer: Result<u32>) {
        let mut pending = self.pending();
        let index = pending.iter().position(|pending| pending.call == *call);
        let index = index.unwrap_or_else(|| panic!("{call:?} is not waiting"));
        let _ = pending.remove(index).answer.send(answer);
    }

    pub fn die(&self, reason: &str) {
        self.died.send_if_modified(|died| {
            let first = died.is_none();
            died.get_or_insert_with(|| Ended {
                reason: reason.to_owned(),
                out_of_memory: false,
            });
            first
        });
    }

    async fn ended(&self) -> Ended {
        let mut died = self.died.subscribe();
        let ended = died.wait_for(Option::is_some).await.unwrap().clone();
        ended.unwrap()
    }

    async fn ask(&self, call: Call) -> Result<u32> {
        if self.died.borrow().is_some() {
            return Err(Error::unavailable("the machine has ended"));
        }
        if (self.prompt)(&call) {
            return Ok(0);
        }
        let (answer, answered) = oneshot::channel();
        self.pending().push(Pending { call, answer });
        tokio::select! {
            biased;
            answer = answered => answer.unwrap(),
            _ = self.ended() => Err(Error::unavailable("the machine has ended")),
        }
    }
}

pub struct HostDouble {
    pub script: Arc<Script>,
}

#[async_trait]
impl HostCalls for HostDouble {
    fn share(&self, ledger: &Ledger) -> Result<SharedVolumes> {
        let dir = Dir::open(ledger.dir())?;
        Ok(SharedVolumes::new(dir.make("share")?, dir.make("rootfs")?))
    }

    async fn launch(&self, config: BootConfig, _: Arc<Ledger>) -> Result<Arc<dyn GuestCalls>> {
        self.script.ask(Call::Launch).await?;
        Ok(Arc::new(GuestDouble {
            script: self.script.clone(),
            features: Features {
                pod: true,
                signal_all: true,
                seccomp: true,
                version: config.id,
                ..Features::default()
            },
        }))
    }

    async fn prepare(
        &self,
        create: CreateContainer,
        shares: Arc<SharedVolumes>,
    ) -> Result<(CreateContainer, HostSide)> {
        self.script.ask(Call::Prepare(create.id.clone())).await?;
        let host = HostSide::prepare(&create, &shares)?;
        Ok((create, host))
    }
}

struct GuestDouble {
    script: Arc<Script>,
    features: Features,
}

impl std::fmt::Debug for GuestDouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GuestDouble")
    }
}

impl GuestDouble {
    async fn ask(&self, call: Call) -> Result<()> {
        self.script.ask(call).await.map(drop)
    }
}

#[async_trait]
impl GuestCalls for GuestDouble {
    fn pid(&self) -> u32 {
        VM_PID
    }

    fn task_place(&self) -> Option<TaskPlace> {
        None
    }

    fn features(&self) -> &Features {
        &self.features
    }

    fn host_sockets(&self) -> Option<&HostSockets> {
        None
    }

    async fn create_container(
        &self,
        request: &CreateContainerRequest,
        _: &Stdio,
    ) -> Result<GuestIo> {
        self.ask(Call::Create(request.container_id.clone())).await?;
        Ok(GuestIo::default())
    }

    async fn remove_container(&self, id: &str, _: Instant) -> Result<()> {
        let removed = self.ask(Call::Remove(id.to_owned())).await;
        // By the contract of the call.
        if self.script.died.borrow().is_some() {
            Ok(())
        } else {
            removed
        }
    }

    async fn attach_disk(&self, _: &Path, _: Option<u64>, _: bool) -> Result<Attached> {
        self.ask(Call::AttachDisk).await?;
        Ok(Attached {
            id: "disk0".to_owned(),
            pci_path: "04/00".to_owned(),
        })
    }

    async fn detach_disk(&self, _: &str, _: Duration) -> Result<()> {
        self.ask(Call::DetachDisk).await
    }

    async fn allow_writes(&self, _: &Path) -> Result<()> {
        Ok(())
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        self.ask(Call::Start(id.to_owned())).await
    }

    fn preconnect(&self, _: &ProcessId, _: &Stdio) -> Option<PreconnectedStdio> {
        None
    }

    async fn exec(
        &self,
        process: &ProcessId,
        _: &Process,
        _: &Stdio,
        _: Option<PreconnectedStdio>,
    ) -> Result<GuestIo> {
        self.ask(Call::Exec(process.clone())).await?;
        Ok(GuestIo::default())
    }

    async fn wait(&self, process: &ProcessId) -> Option<u32> {
        self.script.ask(Call::Wait(process.clone())).await.ok()
    }

    async fn signal(
        &self,
        process: &ProcessId,
        signal: u32,
        scope: SignalScope,
        _: Duration,
    ) -> Result<()> {
        self.ask(Call::Signal(process.clone(), signal, scope)).await
    }

    async fn resize_terminal(&self, process: &ProcessId, _: u32, _: u32) -> Result<()> {
        self.ask(Call::ResizeTerminal(process.clone())).await
    }

    async fn set_freezer(&self, id: &str, to: Freezer) -> Result<()> {
        self.ask(Call::SetFreezer(id.to_owned(), to)).await
    }

    async fn stats(&self, id: &str) -> Result<Stats> {
        self.ask(Call::Stats(id.to_owned())).await?;
        Ok(Stats::default())
    }

    async fn update(&self, id: &str, _: &LinuxResources) -> Result<()> {
        self.ask(Call::Update(id.to_owned())).await
    }

    async fn add_links(&self, _: &Ledger) -> Result<()> {
        self.ask(Call::AddLinks).await
    }

    async fn grow(&self, _: &WantedSize) -> Result<()> {
        self.ask(Call::Grow).await
    }

    async fn fit(&self, _: &WantedSize) -> Result<()> {
        self.ask(Call::Fit).await
    }

    async fn watch_oom(&self, _: &(dyn Fn(String) + Send + Sync)) {
        self.script.ended().await;
    }

    async fn follow_host(&self, _: &WantedSize, _: &Ledger) {
        self.script.ended().await;
    }

    async fn ping(&self) -> Result<()> {
        self.ask(Call::Ping).await
    }

    async fn died(&self) -> Ended {
        self.script.ended().await
    }

    async fn stop(&self) {
        self.script.die("it was stopped");
    }
}
