//! One container: its first process, the processes that joined it, its cgroup; from creation to
//! removal. The sandbox holds containers by their ids; nothing here knows of other containers.
//!
//! ```text
//!  OCI spec ── plan ──> Plan            checked, nothing left to parse
//!                        │
//!  create                │ spawn: clone3 into the cgroup and new namespaces
//!   agent: Container     └──> child: init ── rootfs ── terminal, user, limits ── waits
//!     ├─ waiting: Child ······················································│
//!  start ── go() ─────────────────────────────────────────────────> capabilities, seccomp, exec
//!     ├─ init: Process   pidfd, exit status, stdio
//!     ├─ execs           Process by exec id; child: exec joins the namespaces of init
//!     └─ cgroup          limits, freezing, the kill that reaches everybody
//! ```
//!
//! * `plan`: a spec, checked and turned into steps. What is wrong in a spec is refused here, before
//!   anything exists.
//! * `create`: the making of the first process, and its start. `execs`: those that join.
//! * `child`: what runs between clone and exec. It is the only code that enters a container.
//! * `process`: what the agent keeps of a process. `oom`: kills for want of memory.
//! * `pod_init`: PID 1 of a pid namespace that containers share. `privileged`: every device of the
//!   guest. `seccomp`: profiles, compiled.
//!
//! Rules that a change must not break:
//!
//! * The agent does not open a path inside a container. What a container's file system needs is
//!   done by the child, in the container's mount namespace, with its root as the boundary.
//! * A signal is sent as it came, and a process that has no handler for it is the kernel's business.
//! * The exit of a process is published even if nobody reads its output, and an OOM event before
//!   the exit that it caused.
//! * A process that the host hears failed does not run: whoever gives up on a child kills it.
//! * An exec id belongs to one process from the request on, so of two requests at a time one fails.
//! * A removal that fails leaves the container, and can be tried again.

mod child;
mod create;
mod execs;
pub mod oom;
mod plan;
mod pod_init;
pub mod privileged;
mod process;
mod seccomp;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_protocol::protocols::oci::LinuxResources;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use self::child::exec::UserNamespace;
use self::execs::Execs;
use self::plan::ProcessPlan;
use crate::cgroup::{Cgroup, Freezer};
use crate::deadlines;
use crate::error::{Error, Result};
use crate::spawn::Child;
use crate::stock::STOCK;

pub use create::Parts;
pub use pod_init::PodInit;
pub use process::Process;
pub use seccomp::{Cache as SeccompCache, Filter};

/// A container from its creation to its removal.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// The first process until [`Container::start`].
    waiting: tokio::sync::Mutex<Option<Child>>,
    execs: Execs,
    /// What an exec takes over where its request says nothing.
    defaults: ProcessPlan,
    user_namespace: UserNamespace,
    /// Mount points of the storages that it uses.
    storages: Vec<String>,
    /// Path of its root file system in the agent's mount namespace.
    root: String,
    /// OOM kills that have become events.
    oom_kills: AtomicU64,
    paused: AtomicBool,
    removed: AtomicBool,
}

/// A process that must be watched for its exit.
pub struct Started {
    pub process: Arc<Process>,
    pub exit: oneshot::Receiver<i32>,
}

/// Whom a signal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipient<'a> {
    /// Every process of the container.
    All,
    /// One process: the exec of this id, or the first process.
    Process(Option<&'a str>),
}

impl Container {
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Mount points of the storages that it uses.
    pub fn storages(&self) -> &[String] {
        &self.storages
    }

    /// Path of its root file system in the agent's mount namespace.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The process of an exec, or the first one.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec_id: Option<&str>) -> Result<Arc<Process>> {
        match exec_id {
            None => Ok(self.init.clone()),
            Some(exec_id) => self.execs.get(exec_id).ok_or_else(|| self.no_exec(exec_id)),
        }
    }

    fn no_exec(&self, exec_id: &str) -> Error {
        Error::NotFound(format!("no process {exec_id} in container {}", self.id))
    }

    /// Sends a signal. SIGKILL to the first process reaches all, also those that are in another pid
    /// namespace.
    ///
    /// # Errors
    /// `NotFound` for a process that is gone.
    pub fn signal(&self, recipient: Recipient<'_>, signal: i32) -> Result<()> {
        match recipient {
            Recipient::All if signal != libc::SIGKILL => self.cgroup.signal(signal),
            Recipient::All | Recipient::Process(None) => self.signal_init(signal),
            Recipient::Process(exec_id) => self.process(exec_id)?.signal(signal),
        }
    }

    /// The signal as it is: the kernel drops one that the first process of a pid namespace has no
    /// handler for. Kata's agent makes a SIGKILL of a SIGTERM then.
    fn signal_init(&self, signal: i32) -> Result<()> {
        let init = &self.init;
        let becomes_sigkill = STOCK
            && signal == libc::SIGTERM
            && init.exited().is_none()
            && !init.would_notice(libc::SIGTERM);
        init.signal(if becomes_sigkill {
            libc::SIGKILL
        } else {
            signal
        })?;
        if signal == libc::SIGKILL {
            self.cgroup.kill();
        }
        Ok(())
    }

    /// A process that may be waited for. The exit of an exec is reported to all who wait for it by
    /// then, and to nobody later; that of the first process to everybody who asks.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn unreported(&self, exec_id: Option<&str>) -> Result<Arc<Process>> {
        let process = self.process(exec_id)?;
        match exec_id {
            Some(exec_id) if process.is_reported() => Err(self.no_exec(exec_id)),
            _ => Ok(process),
        }
    }

    /// Notes that the exit of a process is reported to the host. Its output stays until it is
    /// fetched or the container is removed.
    pub fn mark_reported(&self, process: &Process) {
        process.mark_reported();
        self.execs.forget_finished();
    }

    /// True once for each growth of the kernel's count of OOM kills.
    pub fn new_oom_kills(&self) -> bool {
        let kills = self.cgroup.memory_event("oom_kill");
        kills > self.oom_kills.fetch_max(kills, Ordering::Relaxed)
    }

    /// Whether [`Container::remove`] was called.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Changes limits; those not set stay as they are.
    ///
    /// # Errors
    /// A limit that the kernel refuses, or cannot bring the container below in time.
    pub async fn update(&self, resources: &LinuxResources) -> Result<()> {
        self.cgroup.limit(resources).await
    }

    /// Freezes all of its processes.
    ///
    /// # Errors
    /// A container that has ended; a kernel that does not do it in time.
    pub async fn pause(&self) -> Result<()> {
        self.check_running()?;
        self.cgroup.freeze(Freezer::Frozen).await?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Thaws all of its processes.
    ///
    /// # Errors
    /// A kernel that does not do it in time.
    pub async fn resume(&self) -> Result<()> {
        self.cgroup.freeze(Freezer::Thawed).await?;
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn check_running(&self) -> Result<()> {
        if self.init.exited().is_some() {
            let id = &self.id;
            return Err(Error::Failed(format!("container {id} is not running")));
        }
        Ok(())
    }

    /// Kills every process, removes the cgroup, and drops the streams. One deadline is for all of
    /// it.
    ///
    /// # Errors
    /// A process that does not die in time, or whose exit is not told in time.
    pub async fn remove(&self) -> Result<()> {
        self.removed.store(true, Ordering::Relaxed);
        let by = Instant::now() + deadlines::CONTAINER_REMOVAL;
        self.cgroup.remove(by).await?;
        let by = by.max(Instant::now() + deadlines::PROCESS_COLLECTED);
        for process in std::iter::once(&self.init).chain(&self.execs.all()) {
            // Dead, because the cgroup is empty; the reaper collects it a moment later.
            if timeout_at(by, process.wait()).await.is_err() {
                return Err(Error::Failed(format!(
                    "process {} of container {} is dead and was not collected",
                    process.pid(),
                    self.id
                )));
            }
            process.io().close_after_removal();
        }
        Ok(())
    }
}
