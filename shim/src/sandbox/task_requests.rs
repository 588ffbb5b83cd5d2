//! The requests of the task API, each a few decisions and something begun, and what is made of
//! their outcomes.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use futures::future::join_all;
use oci_spec::runtime::{Box as ConsoleSize, BoxBuilder, LinuxResources, Process as ProcessSpec};
use sys::point::{Point, pass};
use tokio::time::Instant;

use crate::container::hooks::HookPhase;
use crate::error::Result;
use crate::from_guest::Stats;
use crate::guest::calls::GuestCalls;
use crate::guest::ending::DeleteBy;
use crate::guest::machine_size::ResourceLimits;
use crate::model::{Exit, Freezer, ProcessId, Stdio};
use crate::refusal::Refusal;
use crate::sandbox::owner::SandboxOwner;
use crate::sandbox::request::{Outcome, ProcessState, Reply};
use crate::sandbox::runtime::PendingExec;
use crate::stdio::{HostIo, Pumps};

impl SandboxOwner {
    /// `Start`.
    pub(super) fn start(&mut self, process: ProcessId, reply: Reply<u32>) {
        let Some(guest) = self.guest.clone() else {
            let creating = || Refusal::BeingCreated(process.clone());
            let refusal = self.state.process(&process).err().unwrap_or_else(creating);
            return reply.refuse(refusal);
        };
        let started = self.state.start(&process);
        let io = match started.and_then(|()| Ok(self.state.process(&process)?.io.clone())) {
            Ok(io) => io,
            Err(error) => return reply.refuse(error),
        };
        // An exec whose start fails can be started again.
        let kept = self.runtimes.process(&process);
        let size = kept.terminal_size;
        let exec = kept.exec.as_mut().map(|exec| {
            let mut spec = exec.spec.clone();
            if let Some(size) = size {
                spec.set_console_size(console_size(size));
            }
            (spec, exec.preconnected.take())
        });
        let namespace = self.identity.namespace.clone();
        let is_pod_sandbox = self.state.is_pod_sandbox(&process.container);
        // Between the sandbox's creation and its start its network may have been made.
        let is_sandbox = process.is_init() && process.container == self.identity.id;
        let ledger = is_sandbox.then(|| self.ledger.clone());
        self.begin(async move {
            let starting = async {
                if let Some(ledger) = ledger {
                    guest.add_links(&ledger).await?;
                }
                match exec {
                    None if is_pod_sandbox => Ok(None),
                    None => {
                        guest.start_container(&process.container).await?;
                        Ok(None)
                    }
                    Some((spec, preconnected)) => {
                        let host_io = HostIo::open(&io, &namespace, &process.container).await?;
                        let guest_io = guest.exec(&process, &spec, &io, preconnected).await?;
                        Ok(Some(Pumps::start(host_io, guest_io)))
                    }
                }
            };
            let result = starting.await;
            pass(Point::ContainerStarted);
            Outcome::Started {
                guest,
                process,
                result,
                reply,
            }
        });
    }

    pub(super) fn started(
        &mut self,
        guest: Arc<dyn GuestCalls>,
        process: ProcessId,
        result: Result<Option<Pumps>>,
        reply: Reply<u32>,
    ) {
        let pumps = match result {
            Ok(pumps) => pumps,
            Err(error) => {
                let exits = self.state.start_failed(&process);
                self.announce(exits);
                return reply.refuse(error);
            }
        };
        let (pid, early) = match self.state.started(&process) {
            Ok(started) => started,
            Err(error) => return reply.refuse(error),
        };
        let kept = self.runtimes.process(&process);
        let size = kept.terminal_size.take();
        if let Some(mut pumps) = pumps {
            if kept.stdin_closed {
                pumps.close_stdin();
            }
            kept.pumps = Some(pumps);
            self.watch_exit(guest.clone(), process.clone());
        }
        if let Some((width, height)) = size {
            let resized = process.clone();
            self.begin(async move {
                let _ = guest.resize_terminal(&resized, width, height).await;
                Outcome::Done
            });
        }
        let container_id = process.container.clone();
        if process.is_init() {
            self.run_poststart_hooks(&process.container);
            if !self.is_unannounced(&process.container) {
                self.events.publish(TaskStart {
                    container_id,
                    pid,
                    ..Default::default()
                });
            }
        } else {
            let exec_id = process.exec_id().to_owned();
            self.events.publish(TaskExecStarted {
                container_id,
                exec_id,
                pid,
                ..Default::default()
            });
            pass(Point::ExecRuns);
        }
        reply.send(Ok(pid));
        if let Some(exit) = early {
            self.exited(&process, exit.status);
        }
    }

    /// `Exec`: only announces the process.
    pub(super) fn exec(
        &mut self,
        request: ExecProcessRequest,
        spec: ProcessSpec,
        reply: Reply<()>,
    ) {
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        let io = Stdio::of_request(
            &request.stdin,
            &request.stdout,
            &request.stderr,
            request.terminal,
        );
        if let Err(error) = self.state.exec(&process, io.clone()) {
            return reply.refuse(error);
        }
        let guest = self.guest.as_ref();
        let preconnected = guest.and_then(|guest| guest.preconnect(&process, &io));
        if let Some(container) = &self.runtimes.container(&request.id).container {
            container.runs_as(spec.user());
        }
        self.runtimes.process(&process).exec = Some(PendingExec { spec, preconnected });
        self.events.publish(TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        });
        pass(Point::ExecAnnounced);
        reply.send(Ok(()));
    }

    /// `Delete`: the answer comes when the output is read, everything of the process is undone and
    /// the host's hooks for its end are over.
    pub(super) fn delete(&mut self, process: ProcessId, reply: Reply<Exit>) {
        let deleting = self.state.delete(&process);
        let (pid, exit) =
            match deleting.and_then(|exit| Ok((self.state.process(&process)?.pid, exit))) {
                Ok(deleting) => deleting,
                Err(error) => return reply.refuse(error),
            };
        let exit = exit.unwrap_or(Exit {
            pid,
            status: 0,
            at: SystemTime::UNIX_EPOCH,
        });
        let pumps = self.runtimes.take_pumps(&process);
        let vm_pid = self.guest.as_ref().map(|guest| guest.pid());
        let guest = self.living_guest().ok().filter(|_| process.is_init());
        let (mut container, mut hooks, mut killed) = (None, None, None);
        if process.is_init() {
            let kept = self.runtimes.container(&process.container);
            container = kept.container.take();
            hooks = Some(kept.hooks.clone()).zip(vm_pid);
            killed = kept.killed;
        }
        let by = DeleteBy::from(Instant::now(), killed);
        let ended_with = guest.clone();
        self.begin(async move {
            join_all(pumps.into_iter().map(|pumps| pumps.drain(by.drained))).await;
            let result = match container {
                Some(container) => {
                    container
                        .remove(guest, &process.container, by.removed)
                        .await
                }
                None => Ok(()),
            };
            if let Some(guest) = ended_with.filter(|_| result.is_err()) {
                // It may go on using what it has of the host, however long the hooks take.
                guest.stop().await;
            }
            if let Some((hooks, pid)) = hooks {
                // They undo what others made for the container, its network first of all.
                let _ = hooks.run(HookPhase::Deleted, pid).await;
            }
            Outcome::Deleted {
                process,
                exit,
                result,
                reply,
            }
        });
    }

    pub(super) fn deleted(&mut self, process: &ProcessId, exit: Exit, result: Result<()>) {
        if let Err(error) = result {
            // Nobody would hear of its processes any more, and they would keep what they have.
            self.vm_died(&error.to_string());
        }
        self.sandbox_task_deleted |= process.is_init() && process.container == self.identity.id;
        self.forget(process);
        if process.is_init() {
            self.give_back();
            self.events.publish(TaskDelete {
                container_id: process.container.clone(),
                pid: exit.pid,
                exit_status: exit.status,
                exited_at: Some(exit.at.into()).into(),
                ..Default::default()
            });
            pass(Point::DeleteQueued);
        }
    }

    /// Hooks after the start can change nothing any more: nobody waits for them but the sandbox's
    /// end.
    fn run_poststart_hooks(&mut self, id: &str) {
        let (Some(kept), Some(guest)) = (self.runtimes.known(id), self.guest.as_ref()) else {
            return;
        };
        let (hooks, pid) = (kept.hooks.clone(), guest.pid());
        self.begin(async move {
            let _ = hooks.run(HookPhase::Started, pid).await;
            Outcome::Done
        });
    }

    /// The machine shrinks by what a container may no longer use. Nobody waits for that.
    fn give_back(&mut self) {
        let changed = self.limits_changed();
        if let Ok(guest) = self.living_guest()
            && changed
            && !self.state.is_empty()
        {
            let wanted = self.wanted.clone();
            self.begin(async move {
                if let Err(error) = guest.fit(&wanted).await {
                    tracing::warn!(%error, "the virtual machine keeps its size");
                }
                Outcome::Done
            });
        }
    }

    /// `State`.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub(super) fn process_state(&self, process: &ProcessId) -> Result<ProcessState> {
        Ok(ProcessState {
            bundle: self.state.task(&process.container)?.bundle.clone(),
            process: self.state.process(process)?.clone(),
            status: self.state.status(process)?,
        })
    }

    /// `Connect`: the server's own pid is told to whoever asks, as runc's shim does.
    pub(super) fn task_pid(&self, id: &str) -> u32 {
        self.state.task(id).map_or(0, |task| task.init.pid)
    }

    /// `Pause` and `Resume`.
    pub(super) fn set_freezer(&mut self, container: String, to: Freezer, reply: Reply<()>) {
        let may = self.state.may_set_freezer(&container, to);
        let guest = match may.and_then(|()| self.living_guest()) {
            Ok(guest) => guest,
            Err(error) => return reply.refuse(error),
        };
        self.begin(async move {
            let result = guest.set_freezer(&container, to).await;
            Outcome::FreezerSet {
                container,
                to,
                result,
                reply,
            }
        });
    }

    pub(super) fn freezer_set(&mut self, container_id: String, to: Freezer) {
        self.state.set_freezer(&container_id, to);
        pass(Point::Paused);
        if to == Freezer::Frozen {
            self.events.publish(TaskPaused {
                container_id,
                ..Default::default()
            });
        } else {
            self.events.publish(TaskResumed {
                container_id,
                ..Default::default()
            });
        }
    }

    /// `ResizePty`: before the start it is remembered, without a terminal it is nothing.
    pub(super) fn resize_terminal(
        &mut self,
        process: ProcessId,
        width: u32,
        height: u32,
        reply: Reply<()>,
    ) {
        let found = self.state.process(&process);
        let has_terminal = match found.map(|found| found.io.terminal) {
            Ok(has_terminal) => has_terminal,
            Err(error) => return reply.refuse(error),
        };
        if !has_terminal {
            return reply.send(Ok(()));
        }
        let kept = self.runtimes.process(&process);
        if process.is_init() || kept.pumps.is_some() {
            return self.forward_to_guest(reply, |guest| async move {
                guest.resize_terminal(&process, width, height).await
            });
        }
        kept.terminal_size = Some((width, height));
        reply.send(Ok(()));
    }

    /// `CloseIO` of stdin; before there is any it is remembered.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub(super) fn close_stdin(&mut self, process: &ProcessId) -> Result<()> {
        self.state.process(process)?;
        let kept = self.runtimes.process(process);
        kept.stdin_closed = true;
        if let Some(pumps) = &mut kept.pumps {
            pumps.close_stdin();
        }
        Ok(())
    }

    /// `Update`: room is made before a limit is raised, and given back after one is lowered or
    /// refused.
    pub(super) fn update(
        &mut self,
        container: String,
        resources: LinuxResources,
        reply: Reply<()>,
    ) {
        let task = self.state.task(&container).map(drop);
        let guest = match task.and_then(|()| self.living_guest()) {
            Ok(guest) => guest,
            Err(error) => return reply.refuse(error),
        };
        let is_pod = self.state.is_pod_sandbox(&container);
        let old = self.limits_of(&container);
        let Some(old) = old else {
            // The sandbox's own container, under an agent that cannot do without one.
            return reply.refuse(Refusal::SandboxHasNoLimits(container));
        };
        let number = self.count_update(&container);
        self.set_limits(&container, old.updated(&resources));
        let wanted = self.wanted.clone();
        self.begin(async move {
            let updating = async {
                guest.grow(&wanted).await?;
                if !is_pod {
                    guest.update(&container, &resources).await?;
                }
                guest.fit(&wanted).await
            };
            let result = updating.await;
            Outcome::Updated {
                container,
                old,
                number,
                result,
                reply,
            }
        });
    }

    pub(super) fn updated(
        &mut self,
        container: &str,
        (old, number): (ResourceLimits, u64),
        result: Result<()>,
        reply: Reply<()>,
    ) {
        let guest = match self.living_guest() {
            // A newer update counts on these limits, whatever became of the older one.
            Ok(guest) if result.is_err() && self.updates(container) == number => guest,
            _ => return reply.send(result),
        };
        self.set_limits(container, old);
        let wanted = self.wanted.clone();
        self.begin(async move {
            if let Err(error) = guest.fit(&wanted).await {
                tracing::warn!(%error, "the virtual machine keeps the size of a refused update");
            }
            reply.send(result);
            Outcome::Done
        });
    }

    fn updates(&self, container: &str) -> u64 {
        self.runtimes
            .known(container)
            .map_or(0, |kept| kept.updates)
    }

    fn count_update(&mut self, container: &str) -> u64 {
        let kept = self.runtimes.container(container);
        kept.updates += 1;
        kept.updates
    }

    fn limits_of(&self, container: &str) -> Option<ResourceLimits> {
        if self.state.is_pod_sandbox(container) {
            Some(self.pod.need)
        } else {
            self.runtimes.known(container)?.limits
        }
    }

    fn set_limits(&mut self, container: &str, limits: ResourceLimits) {
        if self.state.is_pod_sandbox(container) {
            self.pod.need = limits;
        } else if self.state.task(container).is_ok() {
            self.runtimes.container(container).limits = Some(limits);
        }
        self.limits_changed();
    }

    /// `Stats`: the agent keeps a container's numbers until it is removed, so also after its exit.
    pub(super) fn stats(&mut self, container: String, reply: Reply<Stats>) {
        if let Err(error) = self.state.task(&container) {
            return reply.refuse(error);
        }
        if self.state.is_pod_sandbox(&container) {
            // What the machine itself uses is in the pod's cgroup on the host.
            return reply.send(Ok(Stats::default()));
        }
        self.forward_to_guest(reply, |guest| async move { guest.stats(&container).await });
    }
}

/// As a spec has it. What the client asked for before the start is there from the first moment on.
fn console_size((width, height): (u32, u32)) -> Option<ConsoleSize> {
    let size = BoxBuilder::default().width(width).height(height);
    size.build().ok()
}
