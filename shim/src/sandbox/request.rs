//! What the owner of a sandbox is asked by containerd, and what it hears of work that it began:
//! every message by its name, so that each can be logged, matched and found.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::config::Config;
use crate::container::create::Container;
use crate::error::{Error, Result};
use crate::from_guest::Stats;
use crate::guest::calls::{Ended, GuestCalls};
use crate::guest::machine_size::ResourceLimits;
use crate::model::{Exit, Freezer, ProcessId, SignalScope};
use crate::refusal::Refusal;
use crate::sandbox::state::{Process, Status};
use crate::stdio::Pumps;

/// A part of a message that is not for a log, with what is shown of it.
pub struct Quiet<T> {
    pub value: T,
    shown: String,
}

impl<T> Quiet<T> {
    /// Shows itself as `shown`.
    pub fn new(value: T, shown: &str) -> Box<Quiet<T>> {
        let shown = shown.to_owned();
        Box::new(Quiet { value, shown })
    }
}

impl<T> fmt::Debug for Quiet<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Where the answer to a request goes.
pub struct Reply<T>(oneshot::Sender<Result<T>>);

impl<T> Reply<T> {
    /// A place for an answer, and where it arrives.
    pub fn new() -> (Reply<T>, oneshot::Receiver<Result<T>>) {
        let (sender, receiver) = oneshot::channel();
        (Reply(sender), receiver)
    }

    /// Whether the client still waits.
    pub fn is_awaited(&self) -> bool {
        !self.0.is_closed()
    }

    /// Answers with an error.
    pub fn refuse(self, error: impl Into<Error>) {
        self.send(Err(error.into()));
    }

    /// Answers. A client that has gone away needs no answer.
    pub fn send(self, answer: Result<T>) {
        if let Err(error) = &answer {
            tracing::debug!(%error, "refused");
        }
        let _ = self.0.send(answer);
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

/// What containerd asks, through the task API and the sandbox API. Its `Debug` has ids and small
/// values only: a process's environment may be a secret.
#[derive(Debug)]
pub enum Request {
    /// `Create`.
    Create {
        request: Box<Quiet<CreateTaskRequest>>,
        config: Box<Quiet<Result<Config>>>,
        reply: Reply<u32>,
    },
    /// `Start`.
    Start {
        process: ProcessId,
        reply: Reply<u32>,
    },
    /// `State`.
    State {
        process: ProcessId,
        reply: Reply<ProcessState>,
    },
    /// `Exec`.
    Exec {
        request: Box<Quiet<ExecProcessRequest>>,
        spec: Box<Quiet<ProcessSpec>>,
        reply: Reply<()>,
    },
    /// `Delete`.
    Delete {
        process: ProcessId,
        reply: Reply<Exit>,
    },
    /// `Kill`, and `StopSandbox`.
    Kill {
        process: ProcessId,
        signal: u32,
        scope: SignalScope,
        reply: Reply<()>,
    },
    /// `Wait`, and `WaitSandbox`.
    Wait {
        process: ProcessId,
        reply: Reply<Exit>,
    },
    /// `Pids`.
    Pids {
        container: String,
        reply: Reply<Vec<(u32, Option<String>)>>,
    },
    /// `Pause` and `Resume`.
    SetFreezer {
        container: String,
        to: Freezer,
        reply: Reply<()>,
    },
    /// `ResizePty`.
    ResizeTerminal {
        process: ProcessId,
        width: u32,
        height: u32,
        reply: Reply<()>,
    },
    /// `CloseIO` of stdin.
    CloseStdin {
        process: ProcessId,
        reply: Reply<()>,
    },
    /// `Update`.
    Update {
        container: String,
        resources: Box<LinuxResources>,
        reply: Reply<()>,
    },
    /// `Stats`.
    Stats {
        container: String,
        reply: Reply<Stats>,
    },
    /// `Connect`: the pid of a task.
    Connect {
        container: String,
        reply: Reply<u32>,
    },
    /// `Shutdown`, and `ShutdownSandbox`: whether the sandbox ends.
    Shutdown { now: bool, reply: Reply<bool> },
    /// `CreateSandbox`.
    CreateSandbox {
        request: Box<Quiet<CreateSandboxRequest>>,
        config: Box<Quiet<Result<Config>>>,
        reply: Reply<()>,
    },
    /// `SandboxStatus`.
    SandboxStatus {
        sandbox: String,
        reply: Reply<SandboxStatus>,
    },
    /// `PingSandbox`.
    PingSandbox { sandbox: String, reply: Reply<()> },
    /// `SandboxMetrics`.
    SandboxStats { reply: Reply<Stats> },
    /// Not containerd's: the guest says that a container ran out of memory.
    OutOfMemory { container: String },
}

/// What `State` answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessState {
    /// Directory of the container's bundle.
    pub bundle: String,
    /// The process as the owner knows it.
    pub process: Process,
    /// Where in its life containerd sees it.
    pub status: Status,
}

/// What `SandboxStatus` answers.
#[derive(Clone, Debug)]
pub struct SandboxStatus {
    pub pid: u32,
    /// That of the task that stands for it.
    pub status: Status,
    /// When its server began.
    pub created_at: SystemTime,
    /// How the virtual machine is.
    pub machine: String,
}

/// A guest, and the container that was made in it if one was.
pub type Created = (Arc<dyn GuestCalls>, Option<(Container, Pumps)>);

/// What has become of work that the owner began.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing that the owner has to know: the answer was sent, or nobody waits for one.
    Done,
    /// The sandbox may have had no task and no request for a while.
    Idle,
    /// The virtual machine came up, or did not.
    Launched(Result<Arc<dyn GuestCalls>>),
    /// The virtual machine, or what it cannot live without, has ended.
    MachineEnded(Ended),
    /// The guest made a container, or did not.
    Created {
        request: Box<Quiet<CreateTaskRequest>>,
        result: Box<Result<Created>>,
        reply: Reply<u32>,
    },
    /// The machine of a pod's sandbox came up, or did not.
    SandboxCreated {
        sandbox: String,
        result: Result<Arc<dyn GuestCalls>>,
        reply: Reply<()>,
    },
    /// The guest started a process, or did not.
    Started {
        guest: Arc<dyn GuestCalls>,
        process: ProcessId,
        result: Result<Option<Pumps>>,
        reply: Reply<u32>,
    },
    /// A process ended. Without a status the agent has failed, and with it the machine.
    Exited {
        process: ProcessId,
        status: Option<u32>,
    },
    /// Execs of an init that has ended were not heard of in time.
    ExecsOverdue { container: String },
    /// A container should have ended by now that got a SIGKILL then.
    KillOverdue { container: String, killed: Instant },
    /// An exec with this pid should have ended by now that got a SIGKILL.
    ExecKillOverdue { process: ProcessId, pid: u32 },
    /// A process's output is read and everything of it is undone, or the guest keeps something.
    Deleted {
        process: ProcessId,
        exit: Exit,
        result: Result<()>,
        reply: Reply<Exit>,
    },
    /// The guest took a signal, or did not. As a last resort the machine is what can be killed.
    Signalled {
        last_resort: bool,
        result: Result<()>,
        reply: Reply<()>,
    },
    /// The guest froze (or thawed) a container, or did not.
    FreezerSet {
        container: String,
        to: Freezer,
        result: Result<()>,
        reply: Reply<()>,
    },
    /// The guest took new limits, or did not: then the old ones count, if there are no newer ones.
    Updated {
        container: String,
        old: ResourceLimits,
        /// Which update it was.
        number: u64,
        result: Result<()>,
        reply: Reply<()>,
    },
}

/// Sends requests to the owner.
#[derive(Clone)]
pub struct SandboxHandle(tokio::sync::mpsc::UnboundedSender<Request>);

/// Where the owner gets its requests from.
pub type Requests = tokio::sync::mpsc::UnboundedReceiver<Request>;

impl SandboxHandle {
    /// A handle, and where its requests arrive.
    pub fn new() -> (SandboxHandle, Requests) {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        (SandboxHandle(sender), receiver)
    }

    /// Hands the owner a request and waits for its answer.
    ///
    /// # Errors
    /// The request's own; `UNAVAILABLE` once the sandbox has ended.
    pub async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = Reply::new();
        self.tell(request(reply));
        answer
            .await
            .unwrap_or_else(|_| Err(Refusal::SandboxEnded.into()))
    }

    /// Hands the owner something that nobody waits for.
    pub fn tell(&self, request: Request) {
        // Without an owner the sandbox has ended and there is nothing to do.
        let _ = self.0.send(request);
    }
}
