//! The processes that joined a container: their table, and how one more joins.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use guest_protocol::protocols::oci;
use sys::lock;
use tokio::time::Instant;

use super::child::exec;
use super::create::in_pid_namespace;
use super::plan::ProcessPlan;
use super::{Container, Process, Started};
use crate::deadlines;
use crate::error::{Error, Result};
use crate::guest::reaper::Reaper;
use crate::spawn::step::Step;
use crate::spawn::{self, Child, Report};
use crate::stdio::{self, Claimed, Io};

/// Execs by their ids.
#[derive(Debug, Default)]
pub struct Execs {
    started: Mutex<HashMap<String, Arc<Process>>>,
    /// Ids whose process is being made.
    starting: Mutex<HashSet<String>>,
}

/// An id that nobody else can take; given up by its drop.
#[derive(Debug)]
struct Reservation<'a> {
    execs: &'a Execs,
    exec_id: &'a str,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        lock(&self.execs.starting).remove(self.exec_id);
    }
}

impl Execs {
    pub fn get(&self, exec_id: &str) -> Option<Arc<Process>> {
        lock(&self.started).get(exec_id).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Process>> {
        lock(&self.started).values().cloned().collect()
    }

    /// Drops the processes whose exit is reported and whose output is delivered.
    pub fn forget_finished(&self) {
        lock(&self.started)
            .retain(|_, process| !(process.is_reported() && process.io().is_delivered()));
    }

    /// Takes an id. That of a process whose exit is reported can be used again. None: it is in use.
    fn reserve<'a>(&'a self, exec_id: &'a str) -> Option<Reservation<'a>> {
        self.forget_finished();
        let is_used = lock(&self.started)
            .get(exec_id)
            .is_some_and(|process| !process.is_reported());
        let is_free = !is_used && lock(&self.starting).insert(exec_id.to_owned());
        // Not `then_some`: a reservation that is refused must not be made, its drop gives up the id.
        is_free.then(|| Reservation {
            execs: self,
            exec_id,
        })
    }
}

impl Container {
    /// Runs one more process in the container.
    ///
    /// # Errors
    /// A container that does not run, an exec id in use, or the step that failed in the child, in
    /// its words. Then the process does not run.
    pub async fn exec(
        &self,
        exec_id: &str,
        process: &oci::Process,
        claimed: Claimed,
        reaper: &Reaper,
    ) -> Result<Started> {
        self.check_running()?;
        if self.paused.load(Ordering::Relaxed) {
            return Err(Error::Failed(format!("container {} is paused", self.id)));
        }
        let reservation = self.execs.reserve(exec_id).ok_or_else(|| {
            Error::Invalid(format!(
                "exec {exec_id} exists already in container {}",
                self.id
            ))
        })?;
        let mut plan = ProcessPlan::new(process, self.defaults.seccomp.clone())?;
        plan.capabilities = plan.capabilities.or(self.defaults.capabilities);
        if plan.rlimits.is_empty() {
            plan.rlimits.clone_from(&self.defaults.rlimits);
        }
        if plan.oom_score_adj == 0 {
            plan.oom_score_adj = self.defaults.oom_score_adj;
        }
        if process.Own.get_or_default().umask.is_none() {
            plan.umask = self.defaults.umask;
        }
        plan.scheduler = plan.scheduler.or(self.defaults.scheduler);
        plan.io_priority = plan.io_priority.or(self.defaults.io_priority);
        plan.personality = self.defaults.personality;
        let (stdio, pipes) = if plan.terminal {
            (None, None)
        } else {
            stdio::pipes(&claimed).map(|(theirs, ours)| (Some(theirs), Some(ours)))?
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
        let mut child = in_pid_namespace(target, || self.spawn_in_cgroup(body))?;
        let exit = reaper.watch(child.pid);
        drop(stdio);
        let io = match become_program(&mut child, pipes).await {
            Ok(io) => io,
            Err(error) => {
                // The host hears that it failed, so it must not run later.
                child.kill();
                return Err(error);
            }
        };
        let process = Process::new(child.pid, child.pidfd, io);
        process.io().attach_all(claimed);
        lock(&self.execs.started).insert(exec_id.to_owned(), process.clone());
        drop(reservation);
        Ok(Started { process, exit })
    }
}

impl Container {
    /// Starts a process in the container's cgroup, or, where the kernel takes none there because
    /// the container has divided it among cgroups of its own (as systemd does), in the one that its
    /// first process is in.
    fn spawn_in_cgroup(
        &self,
        body: impl FnOnce(&mut spawn::Handle) -> Step<Infallible> + Copy,
    ) -> Result<Child> {
        match spawn::spawn(0, Some(self.cgroup.dir()), body) {
            // Without processes of its own because of its controllers, or of threads' cgroups below.
            Err(error) if matches!(error.errno(), Some(libc::EBUSY | libc::EOPNOTSUPP)) => {
                let inner = self.cgroup.of_process(self.init.pid())?;
                spawn::spawn(0, Some(inner.as_fd()), body)
            }
            result => result,
        }
    }
}

/// Waits until the child runs its program. Without pipes the child makes a terminal.
async fn become_program(child: &mut Child, pipes: Option<Io>) -> Result<Io> {
    let by = Instant::now() + deadlines::PROCESS_SETUP;
    let io = match pipes {
        Some(io) => io,
        None => match child.next_report(by).await? {
            Report::Ready(Some(fd)) => {
                let io = stdio::terminal(child.take_fd(fd)?)?;
                child.go();
                io
            }
            _ => return Err(Error::Failed("the process died before it was ready".into())),
        },
    };
    child.next_report(by).await?;
    Ok(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_id_is_taken_while_its_process_is_made() {
        let execs = Execs::default();
        let first = execs.reserve("a").unwrap();
        assert!(execs.reserve("a").is_none());
        assert!(execs.reserve("b").is_some());
        drop(first);
        assert!(execs.reserve("a").is_some());
    }
}
