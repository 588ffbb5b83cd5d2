//! The process on the host by whose pid a container goes: its root is the container's, with the
//! volumes that host and guest share, its network is the sandbox's, and signals that it gets are
//! the container's. What runs in the container is in the guest; this is for those who have a pid
//! and look into `/proc/<pid>`: `nerdctl cp`, `nsenter --net`, `kill`.
//!
//! Nothing in its root can be executed or is a device, and the process itself can do nothing but
//! tell of signals. What only the guest has (/proc, /dev, file systems in memory, disks) is empty
//! and read-only there.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use launcher::{Entry, Filter, Jail, User};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use vmm::process::{Child, Process, Spawn};

use crate::deadlines::{PROCESS_GONE, TASK_PROCESS_GONE, TASK_PROCESS_READY};
use crate::error::{Error, IoContext, Result};
use crate::host::dir::Dir;
use crate::host::ledger::{Ledger, Resource};

/// What it is called in lists of processes, followed by the container's id.
const NAME: &str = "cofferdam-task";

/// What such a process sees of a container.
#[derive(Debug)]
pub struct TaskView {
    /// The container's id.
    pub id: String,
    /// The root file system, if the host has it.
    pub root: Option<OwnedFd>,
    /// Nothing can be written to the root.
    pub read_only: bool,
    /// How gladly the host's kernel kills it, and the container with it.
    pub oom_score_adj: i32,
    /// The container's mounts, in their order.
    pub mounts: Vec<TaskMount>,
}

/// A mount of a container.
#[derive(Debug)]
pub struct TaskMount {
    /// In the container.
    pub destination: PathBuf,
    /// What the host has of it; nothing, if only the guest has it.
    pub source: Option<OwnedFd>,
    /// Nothing can be written to it.
    pub read_only: bool,
}

/// Where such a process runs.
#[derive(Clone, Debug)]
pub struct TaskPlace {
    /// Files by which it enters the sandbox's cgroups.
    pub cgroup_procs: Vec<PathBuf>,
    /// The sandbox's network namespace.
    pub netns: Arc<OwnedFd>,
    /// Whether its system calls are filtered.
    pub seccomp: bool,
}

/// A running one. Dropping it kills it.
#[derive(Debug)]
pub struct TaskProcess {
    child: Child,
    signals: Option<pipe::Receiver>,
    watch: JoinSet<()>,
    watching: Option<AbortHandle>,
}

impl TaskProcess {
    /// Starts one, and waits until it is where it belongs: before that its root is the host's.
    ///
    /// # Errors
    /// One line: a host that does not let it be confined, or what is mounted hangs.
    pub async fn start(view: TaskView, place: &TaskPlace, ledger: &Ledger) -> Result<TaskProcess> {
        let id = view.id.clone();
        let doing = || format!("start a process for the pid of {id}");
        let empty = Dir::open(ledger.dir())?.make("jail")?;
        let (signals, theirs) = std::io::pipe().doing(doing)?;
        let signals = pipe::Receiver::from_owned_fd(signals.into()).doing(doing)?;
        let spawn = Spawn {
            image: Some(launcher::task_program().doing(doing)?),
            stdout: Some(theirs.into()),
            cgroup_procs: place.cgroup_procs.clone(),
            netns: Some(place.netns.clone()),
            oom_score_adj: Some(view.oom_score_adj),
            jail: Some(Jail {
                mount_point: empty.path(),
                user: User::Root {
                    capabilities: Vec::new(),
                    user_namespace: None,
                },
                filter: place.seccomp.then_some(Filter::TaskProgram),
                limits: Vec::new(),
                root: entries(view, OwnedFd::from(empty).into()),
            }),
            ..Spawn::new(NAME, vec![id.clone().into()])
        };
        let child = Child::spawn(spawn)?;
        ledger.record(&Resource::Process(child.identity()))?;
        let mut process = TaskProcess {
            child,
            signals: Some(signals),
            watch: JoinSet::new(),
            watching: None,
        };
        match timeout(TASK_PROCESS_READY, process.confined()).await {
            Ok(confined) => confined.map(|()| process),
            Err(_) => Err(Error::deadline(format!(
                "the process for the pid of {id} was not ready within {TASK_PROCESS_READY:?}: a \
                 storage of the container hangs"
            ))),
        }
    }

    /// The program's first word, which is a zero.
    async fn confined(&mut self) -> Result<()> {
        let mut word = [1];
        if let Some(signals) = &mut self.signals
            && matches!(signals.read(&mut word).await, Ok(1))
            && word == [0]
        {
            return Ok(());
        }
        Err(self.child.ended().await.into())
    }

    /// Its pid on the host.
    pub fn pid(&self) -> u32 {
        self.child.identity().pid.cast_unsigned()
    }

    /// Tells of each signal that it gets, and of its end by somebody else's SIGKILL, until
    /// [`Self::stop`].
    pub fn watch(&mut self, tell: impl Fn(u32) + Send + 'static) {
        let Some(mut signals) = self.signals.take() else {
            return;
        };
        let watching = self.watch.spawn(async move {
            let mut signal = [0];
            while matches!(signals.read(&mut signal).await, Ok(1)) {
                tell(u32::from(signal[0]));
            }
            tell(libc::SIGKILL.cast_unsigned());
        });
        self.watching = Some(watching);
    }

    /// Ends it, without waiting for that.
    pub fn stop(&mut self) {
        self.watch.abort_all();
        self.child.kill();
    }

    /// What ends it, for who does not have it.
    pub fn ending(&self) -> TaskEnding {
        TaskEnding {
            process: self.child.watched(),
            watch: self.watching.clone(),
        }
    }

    /// Ends it. Nothing that it has seen is in use by it then.
    pub async fn end(mut self) {
        self.stop();
        if let Err(error) = self.child.kill_and_wait(PROCESS_GONE).await {
            tracing::warn!(%error, "the process of a container's pid stays for now");
        }
    }
}

/// The end of such a process.
#[derive(Debug)]
pub struct TaskEnding {
    process: Arc<Process>,
    watch: Option<AbortHandle>,
}

impl TaskEnding {
    /// Ends it and waits for a moment: who hears of the container's end may look for its pid.
    pub async fn end(self) {
        if let Some(watch) = self.watch {
            watch.abort();
        }
        // One that a storage holds goes with the container.
        let _ = self.process.kill_and_wait(TASK_PROCESS_GONE).await;
    }
}

/// What it has for a root. `empty` is a directory with nothing in it.
fn entries(view: TaskView, empty: Arc<OwnedFd>) -> Vec<Entry> {
    let Some(root) = view.root else {
        return Vec::new();
    };
    let root = Entry::Root {
        directory: root.into(),
        read_only: view.read_only,
    };
    let mounts = view.mounts.into_iter().map(|mount| Entry::Within {
        read_only: mount.read_only || mount.source.is_none(),
        from: mount.source.map_or_else(|| empty.clone(), Arc::new),
        to: mount.destination,
    });
    std::iter::once(root).chain(mounts).collect()
}
