//! Ends: exits and who is told of them, kills that have to work, and the machine's death.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use sys::point::{Point, pass};
use tokio::time::Instant;
use ttrpc::Code;

use crate::container::role::is_from_containerd;
use crate::deadlines::EXECS_AFTER_INIT;
use crate::error::Result;
use crate::from_guest::text;
use crate::guest::calls::{Ended, GuestCalls};
use crate::guest::ending;
use crate::host::exit_record;
use crate::model::{Exit, ProcessId, SignalScope};
use crate::refusal::Refusal;
use crate::sandbox::owner::SandboxOwner;
use crate::sandbox::request::{Outcome, Reply};

/// How much of the name of a container that is not there comes into the log.
const STRANGERS_NAME: usize = 80;

/// Signals that end no process unless it has a handler: none for a sandbox that stands in for one.
const IGNORED_SIGNALS: [i32; 9] = [
    0,
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

impl SandboxOwner {
    /// `Wait`.
    pub(super) fn wait(&mut self, process: &ProcessId, reply: Reply<Exit>) {
        match self.state.exit(process) {
            Ok(None) => self.runtimes.process(process).wait(reply),
            Ok(Some(exit)) => reply.send(Ok(exit)),
            Err(error) => reply.refuse(error),
        }
    }

    /// `Kill`.
    pub(super) fn kill(
        &mut self,
        process: ProcessId,
        signal: u32,
        scope: SignalScope,
        reply: Reply<()>,
    ) {
        if let Err(error) = self.state.kill(&process) {
            return reply.refuse(error);
        }
        if self.state.is_pod_sandbox(&process.container) {
            if !IGNORED_SIGNALS.contains(&signal.cast_signed()) {
                self.exited(&process, 128 + signal);
            }
            return reply.send(Ok(()));
        }
        let guest = match self.living_guest() {
            Ok(guest) => guest,
            Err(error) => return reply.refuse(error),
        };
        let is_sigkill = signal == libc::SIGKILL.cast_unsigned();
        let last_resort = is_sigkill && (scope == SignalScope::Container || process.is_init());
        if last_resort {
            self.begin_to_end(&process.container);
        } else if is_sigkill {
            self.begin_to_give_up(&process);
        }
        let deadline = ending::signal_deadline(self.config.kill_timeout());
        self.begin(async move {
            let result = guest.signal(&process, signal, scope, deadline).await;
            Outcome::Signalled {
                last_resort,
                result,
                reply,
            }
        });
    }

    /// A guest that does not even take a SIGKILL would keep its pod for ever: the machine is what
    /// can be killed.
    pub(super) fn signalled(&mut self, last_resort: bool, result: Result<()>) -> Result<()> {
        if !last_resort {
            return result;
        }
        pass(Point::SigkillAnswered);
        if let Some(reason) = ending::refuses_to_kill(&result) {
            self.vm_died(&reason);
            return Ok(());
        }
        // It runs, whatever the guest says; its end is told in any case.
        result.or_else(|error| {
            if error.code() == Code::NOT_FOUND {
                Ok(())
            } else {
                Err(error)
            }
        })
    }

    /// A SIGKILL is sent to all of a container's processes. From the first one on they have a
    /// certain time to end.
    pub(super) fn begin_to_end(&mut self, container: &str) {
        let kept = self.runtimes.container(container);
        if kept.killed.is_some() {
            return;
        }
        let (container, killed) = (container.to_owned(), Instant::now());
        kept.killed = Some(killed);
        let time = self.config.kill_timeout();
        self.after(time, Outcome::KillOverdue { container, killed });
    }

    pub(super) fn kill_overdue(&mut self, container: &str, killed: Instant) {
        // Another one may have the name by now.
        let is_it = self
            .runtimes
            .known(container)
            .is_some_and(|kept| kept.killed == Some(killed));
        if is_it && self.state.is_unfinished(container) {
            self.vm_died(&ending::overdue(container, self.config.kill_timeout()));
        }
    }

    /// A SIGKILL is sent to an exec. One that has not ended after a certain time hangs in the
    /// guest's kernel, or the guest does not obey: nobody waits for it any longer, and it goes with
    /// its container.
    fn begin_to_give_up(&mut self, process: &ProcessId) {
        let Ok(pid) = self.state.process(process).map(|process| process.pid) else {
            return;
        };
        let (process, time) = (process.clone(), self.config.kill_timeout());
        self.after(time, Outcome::ExecKillOverdue { process, pid });
    }

    pub(super) fn exec_kill_overdue(&mut self, process: &ProcessId, pid: u32) {
        // Another one may have the name by now.
        let found = self.state.process(process);
        if found.is_ok_and(|found| found.pid == pid && found.is_live()) {
            tracing::warn!(%process, "an exec did not end after a SIGKILL, and is taken for ended");
            self.exited(process, 128 + libc::SIGKILL.cast_unsigned());
        }
    }

    pub(super) fn machine_ended(&mut self, ended: &Ended) {
        if ended.out_of_memory {
            let ids = self.runtimes.limits().map(|(id, _)| id.clone());
            let ids: Vec<String> = ids.filter(|id| self.state.is_unfinished(id)).collect();
            ids.iter().for_each(|id| self.out_of_memory(id));
        }
        self.vm_died(&ended.reason);
    }

    /// The machine is of no use any more, or never was: all that is left of it ends, and every
    /// process in it with it.
    pub(super) fn vm_died(&mut self, reason: &str) {
        if self.state.alive().is_ok() && !self.ended {
            tracing::error!(reason, "the virtual machine has ended");
        }
        // Connections through a helper only end with the helper.
        if let Some(guest) = self.guest.clone() {
            self.begin(async move {
                guest.stop().await;
                Outcome::Done
            });
        }
        let exits = self.state.vm_died(reason, SystemTime::now());
        for (process, exit) in &exits {
            self.record_exit(process, *exit);
        }
        self.announce(exits);
    }

    /// Watches for the end of a process.
    pub(super) fn watch_exit(&mut self, guest: Arc<dyn GuestCalls>, process: ProcessId) {
        let task = process
            .is_init()
            .then(|| self.runtimes.container(&process.container).task_ending())
            .flatten();
        self.begin(async move {
            let status = guest.wait(&process).await;
            if let Some(task) = task {
                task.end().await;
            }
            Outcome::Exited { process, status }
        });
    }

    pub(super) fn exited(&mut self, process: &ProcessId, status: u32) {
        let at = SystemTime::now();
        let exit = Exit { pid: 0, status, at };
        if process.is_init() && self.state.exit(process) == Ok(None) {
            // Told later if execs still run, and a shim that is killed meanwhile tells nobody.
            self.record_exit(process, exit);
            pass(Point::InitEnded);
        }
        let exits = self.state.exited(process, exit);
        self.announce(exits);
        if self.state.is_held(&process.container) {
            let container = process.container.clone();
            self.after(EXECS_AFTER_INIT, Outcome::ExecsOverdue { container });
        }
    }

    pub(super) fn release_held(&mut self, container: &str) {
        let exits = self.state.release_held(container, SystemTime::now());
        self.announce(exits);
    }

    /// A container ran out of memory, as somebody says who may be wrong.
    pub(super) fn out_of_memory(&mut self, container: &str) {
        match self.state.out_of_memory(container) {
            Ok(true) if self.is_unannounced(container) => {}
            Ok(true) => {
                self.note_out_of_memory(container);
                self.events.publish(TaskOOM {
                    container_id: container.to_owned(),
                    ..Default::default()
                });
            }
            Ok(false) => {}
            Err(_) if self.strangers.take() => {
                let container = text(container, STRANGERS_NAME);
                tracing::warn!(
                    container,
                    "the guest says that a container ran out of memory which it does not have"
                );
            }
            Err(_) => {}
        }
    }

    /// CRI-O takes no events. It looks for a file in the bundle, as its own runtimes' monitor
    /// leaves there (conmon).
    fn note_out_of_memory(&self, container: &str) {
        if is_from_containerd() {
            return;
        }
        let bundle = self.state.task(container).map(|task| task.bundle.clone());
        let noted = bundle.map(|bundle| std::fs::write(Path::new(&bundle).join("oom"), ""));
        if let Ok(Err(error)) = noted {
            tracing::warn!(%error, container, "CRI-O is not told that memory ran out");
        }
    }

    /// Whether events of this task would be about something that containerd does not know.
    pub(super) fn is_unannounced(&self, container: &str) -> bool {
        self.pod.hidden_from_containerd && container == self.identity.id
    }

    /// Keeps an init's exit in its bundle, for `delete`.
    fn record_exit(&self, process: &ProcessId, exit: Exit) {
        let init = self.state.process(process).ok();
        let init = init.filter(|_| process.is_init());
        if let (Some(init), Ok(task)) = (init, self.state.task(&process.container)) {
            let pid = init.pid;
            exit_record::write(Path::new(&task.bundle), Exit { pid, ..exit });
        }
    }

    /// Tells the world of exits: events, everybody who waits.
    pub(super) fn announce(&mut self, exits: Vec<(ProcessId, Exit)>) {
        for (process, exit) in exits {
            if process.is_init() {
                self.runtimes.container(&process.container).stop_task();
            }
            if self.is_unannounced(&process.container) {
                continue;
            }
            self.events.publish(TaskExit {
                id: process.exec.as_ref().unwrap_or(&process.container).clone(),
                container_id: process.container.clone(),
                pid: exit.pid,
                exit_status: exit.status,
                exited_at: Some(exit.at.into()).into(),
                ..Default::default()
            });
        }
        pass(Point::ExitTold);
        let state = &self.state;
        for (process, kept) in self.runtimes.processes() {
            let answer = match state.exit(process) {
                Ok(None) => continue,
                Ok(Some(exit)) => Ok(exit),
                Err(refusal) => Err(refusal.into()),
            };
            kept.waiters
                .drain(..)
                .for_each(|waiter| waiter.send(answer.clone()));
        }
    }

    /// Gives up all that is kept of a process; with its init of the whole container.
    pub(super) fn forget(&mut self, process: &ProcessId) {
        self.state.deleted(process);
        self.watch_idle();
        let waiters = self.runtimes.remove(process);
        for waiter in waiters {
            let gone = || Refusal::Deleted(process.clone());
            let refusal = self.state.exit(process).err().unwrap_or_else(gone);
            waiter.send(Err(refusal.into()));
        }
    }
}
