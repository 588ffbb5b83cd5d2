//! Why a request is refused as things are: the rules of a task's life, by name. Nothing was begun
//! for a request that is refused.

use ttrpc::Code;

use crate::model::ProcessId;

/// A rule that a request breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such process, or none any more.
    #[error("{0} is not there")]
    NotThere(ProcessId),
    /// The id is taken.
    #[error("{0} already exists")]
    Exists(ProcessId),
    /// An exec without an id.
    #[error("exec in task {0} has no id")]
    NoExecId(String),
    /// A signal for what has ended.
    #[error("{0}: process already finished")]
    Finished(ProcessId),
    /// A process that somebody waited for was deleted.
    #[error("{0} is deleted")]
    Deleted(ProcessId),
    /// The guest is still at it.
    #[error("{0} is still being created")]
    BeingCreated(ProcessId),
    /// Somebody else deletes it.
    #[error("{0} is already being deleted")]
    BeingDeleted(ProcessId),
    #[error("{0} is already started")]
    Started(ProcessId),
    /// A signal for an exec that does not run yet.
    #[error("{0} is not started")]
    NotStarted(ProcessId),
    /// An exec in a container that does not run yet.
    #[error("the container is not started")]
    ContainerNotStarted,
    /// An exec or a pause in a container that runs no more.
    #[error("the container has ended")]
    ContainerEnded,
    /// A start of what has run.
    #[error("{0} has ended: it cannot be started again")]
    Ended(ProcessId),
    /// The end came while it was being started.
    #[error("{0} has ended before it was started")]
    EndedBeforeStart(ProcessId),
    /// A deletion of what runs.
    #[error("{0} is still running: kill it first")]
    Running(ProcessId),
    /// A start in a paused container.
    #[error("task {0} is paused: resume it first")]
    Paused(String),
    #[error("task {0} is already paused")]
    AlreadyPaused(String),
    /// A resume of what runs.
    #[error("task {0} is not paused")]
    NotPaused(String),
    /// An exec or a pause of the sandbox itself.
    #[error(
        "task {0} is a pod's sandbox, which has no processes of its own: use one of the pod's \
         containers"
    )]
    SandboxHasNoProcesses(String),
    /// New limits for a sandbox that is a container in the guest.
    #[error("{0} is a pod's sandbox: change the limits of its containers instead")]
    SandboxHasNoLimits(String),
    /// A guest names a container that is not in it.
    #[error("task {0} is not in the guest")]
    NotInGuest(String),
    /// A call before the machine is up.
    #[error("the sandbox has no virtual machine yet")]
    NoMachineYet,
    /// A call after the machine's end.
    #[error("the sandbox's virtual machine has ended: {0}")]
    MachineEnded(String),
    /// A call after the sandbox's end.
    #[error("the sandbox has ended")]
    SandboxEnded,
}

impl Refusal {
    /// The code that containerd acts on: `NOT_FOUND` is "already gone" to it.
    pub fn code(&self) -> Code {
        match self {
            Refusal::NotThere(_)
            | Refusal::Finished(_)
            | Refusal::Deleted(_)
            | Refusal::NotInGuest(_) => Code::NOT_FOUND,
            Refusal::Exists(_) => Code::ALREADY_EXISTS,
            Refusal::NoExecId(_) => Code::INVALID_ARGUMENT,
            Refusal::NoMachineYet | Refusal::SandboxEnded => Code::UNAVAILABLE,
            _ => Code::FAILED_PRECONDITION,
        }
    }
}
