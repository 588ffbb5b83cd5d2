//! One container: its cgroup, its first process, the processes that joined it.

mod child;
mod copy_up;
mod exec;
mod init;
pub mod oom;
mod plan;
mod pod_init;
pub mod privileged;
mod process;
mod rootfs;
mod seccomp;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest_protocol::protocols::oci;
use tokio::time::timeout;

use self::plan::{Plan, ProcessPlan};
use crate::cgroup::Cgroup;
use crate::error::{Error, Result, What};
use crate::guest::reaper::Reaper;
use crate::spawn::{self, Child, Report};
use crate::stdio::{self, Claimed, Io};
use crate::sys::check;
use crate::sys::lock;

pub use pod_init::PodInit;
pub use process::Process;
pub use seccomp::{Cache as SeccompCache, Filter};

/// How long killed processes may take to go.
const DEATH: Duration = Duration::from_secs(10);

/// A container from its creation to its removal.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// The first process before it was told to go on.
    waiting: tokio::sync::Mutex<Option<Child>>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    /// What an exec takes over where it says nothing of its own.
    defaults: ProcessPlan,
    user_namespace: bool,
    /// Mount points that it uses.
    storages: Vec<String>,
    /// Its root file system in the agent's namespace.
    root: String,
    oom_kills: AtomicU64,
    paused: AtomicBool,
    removed: AtomicBool,
}

/// What a container is made of.
pub struct Parts<'a> {
    pub id: &'a str,
    pub spec: &'a oci::Spec,
    pub seccomp: Option<Arc<Filter>>,
    /// The pid namespace to join instead of a new one.
    pub pid_namespace: Option<&'a OwnedFd>,
    pub storages: Vec<String>,
    /// Raw streams that wait for the first process.
    pub claimed: Claimed,
    pub reaper: &'a Reaper,
}

/// A process that must be watched for its exit.
pub struct Started {
    pub process: Arc<Process>,
    pub exit: tokio::sync::oneshot::Receiver<i32>,
}

impl Container {
    /// Makes the container in its cgroup; its first process waits to be started. On failure nothing
    /// is left but the cgroup, which is the caller's.
    ///
    /// # Errors
    /// A spec that cannot be, or the step that failed in the child, in its words.
    pub async fn create(
        parts: Parts<'_>,
        cgroup: Cgroup,
    ) -> std::result::Result<(Container, Started), (Error, Cgroup)> {
        match Self::create_init(&parts, &cgroup).await {
            Ok((child, io, exit, plan)) => {
                let Some(pidfd) = child.pidfd.try_clone().ok() else {
                    return Err((Error::Failed("out of descriptors".into()), cgroup));
                };
                let init = Process::new(child.pid, pidfd, io);
                init.io().attach_all(parts.claimed);
                let container = Container {
                    id: parts.id.to_owned(),
                    cgroup,
                    init: init.clone(),
                    waiting: tokio::sync::Mutex::new(Some(child)),
                    execs: Mutex::default(),
                    user_namespace: plan.user_maps.is_some(),
                    defaults: plan.process,
                    storages: parts.storages,
                    root: plan.root.to_string_lossy().into_owned(),
                    oom_kills: AtomicU64::new(0),
                    paused: AtomicBool::new(false),
                    removed: AtomicBool::new(false),
                };
                Ok((
                    container,
                    Started {
                        process: init,
                        exit,
                    },
                ))
            }
            Err(error) => Err((error, cgroup)),
        }
    }

    async fn create_init(
        parts: &Parts<'_>,
        cgroup: &Cgroup,
    ) -> Result<(Child, Io, tokio::sync::oneshot::Receiver<i32>, Plan)> {
        let plan = Plan::new(parts.spec, parts.seccomp.clone())?;
        let mut join = Vec::with_capacity(plan.join.len());
        let mut pid_namespace = parts
            .pid_namespace
            .map(OwnedFd::try_clone)
            .transpose()
            .what(|| "copy a descriptor".into())?;
        for entry in &plan.join {
            let file = File::open(&entry.path)
                .what(|| format!("open {} namespace {}", entry.kind, entry.path))?;
            if entry.flag == libc::CLONE_NEWPID {
                pid_namespace = Some(file.into());
            } else {
                join.push((OwnedFd::from(file), entry.flag, entry.kind));
            }
        }
        let terminal = plan.process.terminal;
        let (stdio, pipes) = if terminal {
            (None, None)
        } else {
            stdio::pipes(&parts.claimed).map(|(a, b)| (Some(a), Some(b)))?
        };
        let inherited = init::Inherited { stdio, join };
        let mut flags = libc::CLONE_NEWNS;
        if plan.user_maps.is_some() {
            flags |= libc::CLONE_NEWUSER | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        }
        let body = |handle: &mut spawn::Handle| init::run(&plan, &inherited, handle);
        let mut child = match &pid_namespace {
            Some(namespace) => {
                in_pid_namespace(namespace, || spawn::spawn(flags, cgroup.dir(), body))?
            }
            None => spawn::spawn(flags | libc::CLONE_NEWPID, cgroup.dir(), body)?,
        };
        let exit = parts.reaper.watch(child.pid);
        drop(inherited);
        if let Some((users, groups)) = &plan.user_maps {
            for (file, map) in [("uid_map", users), ("gid_map", groups)] {
                fs::write(format!("/proc/{}/{file}", child.pid), map)
                    .what(|| format!("set {file} of the user namespace"))?;
            }
            child.go();
        }
        let io = match (child.report().await?, pipes) {
            (Report::Ready(_), Some(io)) => io,
            (Report::Ready(Some(fd)), None) => stdio::terminal(child.take_fd(fd)?)?,
            _ => {
                return Err(Error::Failed(
                    "the container's first process died before it was ready".into(),
                ));
            }
        };
        Ok((child, io, exit, plan))
    }

    /// Lets the first process become the container's program.
    ///
    /// # Errors
    /// A container that was started before, or a program that cannot be executed.
    pub async fn start(&self) -> Result<()> {
        let mut child =
            self.waiting.lock().await.take().ok_or_else(|| {
                Error::Failed(format!("container {} was started already", self.id))
            })?;
        if self.init.exited().is_some() {
            return Err(Error::Failed(format!(
                "container {} has ended before it was started",
                self.id
            )));
        }
        child.go();
        child.report().await?;
        Ok(())
    }

    /// Runs one more process in the container.
    ///
    /// # Errors
    /// A container that does not run, an exec id in use, or the step that failed in the child, in
    /// its words.
    pub async fn exec(
        &self,
        exec_id: &str,
        process: &oci::Process,
        claimed: Claimed,
        reaper: &Reaper,
    ) -> Result<Started> {
        if self.init.exited().is_some() {
            return Err(Error::Failed(format!(
                "container {} is not running",
                self.id
            )));
        }
        if self.paused.load(Ordering::Relaxed) {
            return Err(Error::Failed(format!("container {} is paused", self.id)));
        }
        self.sweep();
        if lock(&self.execs)
            .get(exec_id)
            .is_some_and(|process| !process.is_reported())
        {
            return Err(Error::Invalid(format!(
                "exec {exec_id} exists already in container {}",
                self.id
            )));
        }
        let mut plan = ProcessPlan::new(process, self.defaults.seccomp.clone())?;
        plan.capabilities = plan.capabilities.or(self.defaults.capabilities);
        if plan.rlimits.is_empty() {
            plan.rlimits.clone_from(&self.defaults.rlimits);
        }
        if plan.oom_score_adj == 0 {
            plan.oom_score_adj = self.defaults.oom_score_adj;
        }
        let (stdio, pipes) = if plan.terminal {
            (None, None)
        } else {
            stdio::pipes(&claimed).map(|(a, b)| (Some(a), Some(b)))?
        };
        let target = self.init.pidfd();
        let body = |handle: &mut spawn::Handle| {
            exec::run(
                &plan,
                target.as_fd(),
                self.user_namespace,
                stdio.as_ref(),
                handle,
            )
        };
        let mut child = in_pid_namespace(target, || spawn::spawn(0, self.cgroup.dir(), body))?;
        let exit = reaper.watch(child.pid);
        drop(stdio);
        let io = match pipes {
            Some(io) => io,
            None => match child.report().await? {
                Report::Ready(Some(fd)) => {
                    let io = stdio::terminal(child.take_fd(fd)?)?;
                    child.go();
                    io
                }
                _ => return Err(Error::Failed("the process died before it was ready".into())),
            },
        };
        child.report().await?;
        let process = Process::new(child.pid, child.pidfd, io);
        process.io().attach_all(claimed);
        lock(&self.execs).insert(exec_id.to_owned(), process.clone());
        Ok(Started { process, exit })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// The mount points that it uses.
    pub fn storages(&self) -> &[String] {
        &self.storages
    }

    /// Its root file system in the agent's namespace.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// A process by its exec id; the first one answers to "" and to the container's id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() || exec_id == self.id {
            return Ok(self.init.clone());
        }
        lock(&self.execs).get(exec_id).cloned().ok_or_else(|| {
            Error::NotFound(format!("no process {exec_id} in container {}", self.id))
        })
    }

    /// Notes that the exit of a process was told: nobody can wait for it again. Its output stays
    /// until it was fetched or the container is removed.
    ///
    /// # Errors
    /// `NotFound` if somebody else was told before. The first process's exit is told to everybody.
    pub fn report(&self, process: &Arc<Process>, exec_id: &str) -> Result<()> {
        if Arc::ptr_eq(process, &self.init) {
            return Ok(());
        }
        if process.is_reported() {
            return Err(Error::NotFound(format!(
                "no process {exec_id} in container {}",
                self.id
            )));
        }
        process.mark_reported();
        self.sweep();
        Ok(())
    }

    /// Forgets the processes of which nothing is wanted any more.
    fn sweep(&self) {
        lock(&self.execs).retain(|_, process| !(process.is_reported() && process.io().drained()));
    }

    /// True once for each growth of the kernel's count of OOM kills.
    pub fn new_oom_kills(&self) -> bool {
        let kills = self.cgroup.memory_event("oom_kill");
        kills > self.oom_kills.fetch_max(kills, Ordering::Relaxed)
    }

    /// True when [`Container::remove`] was called.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Freezes or thaws all of its processes.
    ///
    /// # Errors
    /// When the kernel does not do it in time.
    pub async fn pause(&self, paused: bool) -> Result<()> {
        if paused && self.init.exited().is_some() {
            return Err(Error::Failed(format!(
                "container {} is not running",
                self.id
            )));
        }
        self.cgroup.freeze(paused).await?;
        self.paused.store(paused, Ordering::Relaxed);
        Ok(())
    }

    /// Kills everything, removes the cgroup, drops the streams.
    ///
    /// # Errors
    /// When a process does not die in time.
    pub async fn remove(&self) -> Result<()> {
        self.removed.store(true, Ordering::Relaxed);
        self.cgroup.remove().await?;
        let execs: Vec<Arc<Process>> = lock(&self.execs).values().cloned().collect();
        for process in std::iter::once(&self.init).chain(&execs) {
            // Dead by now; collected a moment later.
            if timeout(DEATH, process.wait()).await.is_err() {
                return Err(Error::Failed(format!(
                    "process {} of container {} does not die",
                    process.pid(),
                    self.id
                )));
            }
            process.io().abandon();
        }
        Ok(())
    }
}

/// Runs `make` so that the process it makes is in another pid namespace. The namespace counts for
/// children only, so the agent itself does not move.
fn in_pid_namespace<T>(namespace: &OwnedFd, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let own = File::open("/proc/self/ns/pid").what(|| "open the agent's pid namespace".into())?;
    let set = |fd: i32| {
        // SAFETY: an open descriptor and a plain number.
        check(unsafe { libc::setns(fd, libc::CLONE_NEWPID) }.into())
    };
    match set(namespace.as_raw_fd()) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
            return Err(Error::Failed("the container is not running".into()));
        }
        result => result.what(|| "join the container's pid namespace".into())?,
    };
    let made = make();
    set(own.as_raw_fd()).what(|| "return to the agent's pid namespace".into())?;
    made
}
