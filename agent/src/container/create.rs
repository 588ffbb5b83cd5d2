//! The making of a container's first process, and its start.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use guest_protocol::protocols::oci;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::child::exec::UserNamespace;
use super::child::init;
use super::execs::Execs;
use super::plan::Plan;
use super::{Container, Filter, Process, Started};
use crate::cgroup::Cgroup;
use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::guest::reaper::Reaper;
use crate::spawn::{self, Child, Report};
use crate::stdio::{self, Claimed, Io};

/// What a container is made of; its cgroup comes beside it.
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

/// A first process that waits to be started.
struct Init {
    child: Child,
    io: Io,
    exit: oneshot::Receiver<i32>,
    plan: Plan,
}

impl Container {
    /// Makes the container in its cgroup; its first process waits to be started. On failure nothing
    /// is left but the cgroup, which is the caller's to remove; that also ends the child.
    ///
    /// # Errors
    /// A spec that is refused; the step that failed in the child, in its words.
    pub async fn create(
        parts: Parts<'_>,
        cgroup: Cgroup,
    ) -> std::result::Result<(Container, Started), (Error, Cgroup)> {
        let made = create_init(&parts, &cgroup).await.and_then(|init| {
            let pidfd = init.child.pidfd.try_clone();
            Ok((pidfd.context(|| "copy a descriptor".into())?, init))
        });
        let (pidfd, init) = match made {
            Ok(made) => made,
            Err(error) => return Err((error, cgroup)),
        };
        let Init {
            child,
            io,
            exit,
            plan,
        } = init;
        let process = Process::new(child.pid, pidfd, io);
        process.io().attach_all(parts.claimed);
        let container = Container {
            id: parts.id.to_owned(),
            cgroup,
            init: process.clone(),
            waiting: tokio::sync::Mutex::new(Some(child)),
            execs: Execs::default(),
            user_namespace: match plan.user_maps {
                Some(_) => UserNamespace::Own,
                None => UserNamespace::OfGuest,
            },
            defaults: plan.process,
            storages: parts.storages,
            root: plan.root.to_string_lossy().into_owned(),
            oom_kills: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            removed: AtomicBool::new(false),
        };
        Ok((container, Started { process, exit }))
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
        let by = Instant::now() + deadlines::PROCESS_SETUP;
        if let Err(error) = child.next_report(by).await {
            child.kill();
            return Err(error);
        }
        Ok(())
    }
}

async fn create_init(parts: &Parts<'_>, cgroup: &Cgroup) -> Result<Init> {
    let by = Instant::now() + deadlines::PROCESS_SETUP;
    let plan = Plan::new(parts.spec, parts.seccomp.clone())?;
    let mut join = Vec::with_capacity(plan.join.len());
    let mut pid_namespace = parts
        .pid_namespace
        .map(OwnedFd::try_clone)
        .transpose()
        .context(|| "copy a descriptor".into())?;
    for entry in &plan.join {
        let file = File::open(&entry.path)
            .context(|| format!("open {} namespace {}", entry.kind, entry.path))?;
        if entry.flag == libc::CLONE_NEWPID {
            pid_namespace = Some(file.into());
        } else {
            join.push((OwnedFd::from(file), entry.flag, entry.kind));
        }
    }
    let (stdio, pipes) = if plan.process.terminal {
        (None, None)
    } else {
        stdio::pipes(&parts.claimed).map(|(theirs, ours)| (Some(theirs), Some(ours)))?
    };
    let inherited = init::Inherited { stdio, join };
    let mut flags = libc::CLONE_NEWNS;
    if plan.user_maps.is_some() {
        flags |= libc::CLONE_NEWUSER | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    }
    let body = |handle: &mut spawn::Handle| init::run(&plan, &inherited, handle);
    let dir = Some(cgroup.dir());
    let mut child = match &pid_namespace {
        Some(namespace) => in_pid_namespace(namespace, || spawn::spawn(flags, dir, body))?,
        None => spawn::spawn(flags | libc::CLONE_NEWPID, dir, body)?,
    };
    let exit = parts.reaper.watch(child.pid);
    drop(inherited);
    if let Some((users, groups)) = &plan.user_maps {
        for (file, map) in [("uid_map", users), ("gid_map", groups)] {
            fs::write(format!("/proc/{}/{file}", child.pid), map)
                .context(|| format!("set {file} of the user namespace"))?;
        }
        child.go();
    }
    let io = match (child.next_report(by).await?, pipes) {
        (Report::Ready(_), Some(io)) => io,
        (Report::Ready(Some(fd)), None) => stdio::terminal(child.take_fd(fd)?)?,
        _ => {
            return Err(Error::Failed(
                "the container's first process died before it was ready".into(),
            ));
        }
    };
    Ok(Init {
        child,
        io,
        exit,
        plan,
    })
}

/// Runs `make` so that the process it makes is in another pid namespace. The namespace counts for
/// children only, so the agent itself does not move.
pub fn in_pid_namespace<T>(namespace: &OwnedFd, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let own =
        File::open("/proc/self/ns/pid").context(|| "open the agent's pid namespace".into())?;
    match setns(namespace, CloneFlags::CLONE_NEWPID) {
        // The namespace's first process has ended.
        Err(Errno::ESRCH) => {
            return Err(Error::Failed("the container is not running".into()));
        }
        result => result.context(|| "join the container's pid namespace".into())?,
    };
    let made = make();
    setns(&own, CloneFlags::CLONE_NEWPID)
        .context(|| "return to the agent's pid namespace".into())?;
    made
}
