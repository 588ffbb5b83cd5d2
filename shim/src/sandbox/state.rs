//! What may happen in which state: pure decisions, no IO, no clock.
//!
//! ```text
//! init:  Creating ─▶ Created ─▶ Starting ─▶ Running ─▶ Exited ─▶ Deleting ─▶ (gone)
//!                       └──────────── killed ────────────▲
//! exec:              Created ─▶ Starting ─▶ Running ─▶ Exited ─▶ Deleting ─▶ (gone)
//! ```
//!
//! Two rules of containerd's event order are kept here: an exit never comes before its start (an
//! exit that overtakes the start's answer waits in `early`), and the exit of a container's init is
//! the container's last (it waits in `held` while execs are still on their way out).

use std::collections::BTreeMap;

use crate::model::{Exit, Freezer, ProcessId, Stdio};
use crate::refusal::Refusal;

type Result<T> = std::result::Result<T, Refusal>;

/// Pids that no process of the host has: above the kernel's limit of 2^22 (PID_MAX_LIMIT).
const FIRST_PID: u32 = 4_194_304;

/// Exit status of what ended with its virtual machine, as after SIGKILL.
pub const KILLED: u32 = 137;

/// What stands behind a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// A container in the guest.
    Container,
    /// The sandbox itself: a pod's sandbox has no container, whose process would only wait.
    PodSandbox,
}

/// Where in its life a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The guest is making the container.
    Creating,
    /// Ready to start.
    Created,
    /// The guest has been asked to start it; its exit may already be known.
    Starting {
        /// An exit that overtook the answer to the start.
        early: Option<Exit>,
    },
    Running,
    Exited(Exit),
    /// Being deleted; what the answer will say. A created process that is deleted has no exit.
    Deleting(Option<Exit>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// What containerd knows it by.
    pub pid: u32,
    /// Where in its life it is.
    pub stage: Stage,
    /// Its input and output.
    pub io: Stdio,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub bundle: String,
    pub init: Process,
    /// The others, by exec id.
    pub execs: BTreeMap<String, Process>,
    /// Frozen by `Pause`.
    pub freezer: Freezer,
    pub kind: TaskKind,
    /// Init's exit, while execs are still on their way out.
    held: Option<Exit>,
    /// It has been told that this container ran out of memory: once is enough.
    oom_told: bool,
}

/// What `State` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not started yet.
    Created,
    Running,
    Paused,
    Stopped(Exit),
}

/// All tasks of a sandbox.
#[derive(Debug, Default)]
pub struct State {
    tasks: BTreeMap<String, Task>,
    pids: u32,
    /// Why there is no virtual machine any more.
    dead: Option<String>,
}

impl State {
    /// Whether nothing is left that needs the sandbox.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    #[cfg(test)]
    pub fn ids(&self) -> Vec<String> {
        self.tasks.keys().cloned().collect()
    }

    /// A container.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn task(&self, id: &str) -> Result<&Task> {
        self.tasks
            .get(id)
            .ok_or_else(|| Refusal::NotThere(ProcessId::init(id)))
    }

    fn task_mut(&mut self, id: &str) -> Result<&mut Task> {
        self.tasks
            .get_mut(id)
            .ok_or_else(|| Refusal::NotThere(ProcessId::init(id)))
    }

    /// A process.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn process(&self, key: &ProcessId) -> Result<&Process> {
        let task = self.task(&key.container)?;
        match &key.exec {
            None => Ok(&task.init),
            Some(exec) => task
                .execs
                .get(exec)
                .ok_or_else(|| Refusal::NotThere(key.clone())),
        }
    }

    fn process_mut(&mut self, key: &ProcessId) -> Result<&mut Process> {
        let task = self.task_mut(&key.container)?;
        match &key.exec {
            None => Ok(&mut task.init),
            Some(exec) => task
                .execs
                .get_mut(exec)
                .ok_or_else(|| Refusal::NotThere(key.clone())),
        }
    }

    /// Whether there still is a virtual machine, or will be.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` with the reason of its end.
    pub fn alive(&self) -> Result<()> {
        match &self.dead {
            None => Ok(()),
            Some(reason) => Err(Refusal::MachineEnded(reason.clone())),
        }
    }

    fn next_pid(&mut self) -> u32 {
        self.pids += 1;
        FIRST_PID + self.pids
    }

    /// A container is about to be made.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`; `FAILED_PRECONDITION` without a virtual machine.
    pub fn create(&mut self, id: &str, bundle: &str, io: Stdio) -> Result<()> {
        self.alive()?;
        if self.tasks.contains_key(id) {
            return Err(Refusal::Exists(ProcessId::init(id)));
        }
        let init = Process {
            pid: self.next_pid(),
            stage: Stage::Creating,
            io,
        };
        let task = Task {
            bundle: bundle.to_owned(),
            init,
            execs: BTreeMap::new(),
            freezer: Freezer::Thawed,
            kind: TaskKind::Container,
            held: None,
            oom_told: false,
        };
        self.tasks.insert(id.to_owned(), task);
        Ok(())
    }

    /// The guest has made the container, or the sandbox stands in for it. It goes by the pid of a
    /// process in the sandbox's network namespace, unless another one has that already.
    pub fn created(&mut self, id: &str, pid: u32, kind: TaskKind) -> u32 {
        let taken = self.tasks.values().any(|task| task.init.pid == pid);
        let Some(task) = self.tasks.get_mut(id) else {
            return pid;
        };
        task.init.stage = Stage::Created;
        task.kind = kind;
        if !taken {
            task.init.pid = pid;
        }
        task.init.pid
    }

    /// The guest, or the host before it, could not make the container.
    pub fn create_failed(&mut self, id: &str) {
        self.tasks.remove(id);
    }

    /// The container whose init goes by this pid.
    pub fn owner(&self, pid: u32) -> Option<&str> {
        self.tasks
            .iter()
            .find(|(_, task)| task.init.pid == pid)
            .map(|(id, _)| id.as_str())
    }

    /// Whether the sandbox itself stands in for this container's process.
    pub fn is_pod_sandbox(&self, id: &str) -> bool {
        self.tasks
            .get(id)
            .is_some_and(|task| task.kind == TaskKind::PodSandbox)
    }

    /// A further process is announced.
    ///
    /// # Errors
    /// `NOT_FOUND`, `ALREADY_EXISTS`; `FAILED_PRECONDITION` if the container does not run.
    pub fn exec(&mut self, key: &ProcessId, io: Stdio) -> Result<()> {
        self.alive()?;
        let pid = self.next_pid();
        let task = self.task_mut(&key.container)?;
        let Some(exec) = &key.exec else {
            return Err(Refusal::NoExecId(key.container.clone()));
        };
        if task.execs.contains_key(exec) {
            return Err(Refusal::Exists(key.clone()));
        }
        task.running()?;
        task.has_processes(&key.container)?;
        task.execs.insert(
            exec.clone(),
            Process {
                pid,
                stage: Stage::Created,
                io,
            },
        );
        Ok(())
    }

    /// A process is about to be started.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` if it was started before, or its container does not run.
    pub fn start(&mut self, key: &ProcessId) -> Result<()> {
        self.alive()?;
        let task = self.task(&key.container)?;
        if !key.is_init() {
            task.running()?;
            if task.freezer == Freezer::Frozen {
                return Err(Refusal::Paused(key.container.clone()));
            }
        }
        let process = self.process_mut(key)?;
        match process.stage {
            Stage::Created => process.stage = Stage::Starting { early: None },
            Stage::Creating => {
                return Err(Refusal::BeingCreated(key.clone()));
            }
            Stage::Exited(_) | Stage::Deleting(_) => {
                return Err(Refusal::Ended(key.clone()));
            }
            Stage::Starting { .. } | Stage::Running => {
                return Err(Refusal::Started(key.clone()));
            }
        }
        Ok(())
    }

    /// The guest has started it. Returns its pid, and its exit if that was faster than the answer.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn started(&mut self, key: &ProcessId) -> Result<(u32, Option<Exit>)> {
        let process = self.process_mut(key)?;
        let early = match process.stage {
            Stage::Starting { early } => {
                process.stage = Stage::Running;
                early
            }
            // Its machine ended meanwhile, and its end has been told.
            _ => {
                return Err(Refusal::EndedBeforeStart(key.clone()));
            }
        };
        Ok((process.pid, early))
    }

    /// The guest could not start it. It can be started again, unless its exit came meanwhile.
    /// Returns the exits to tell the world: of an init, which containerd knows since its creation,
    /// but not of an exec without a start.
    pub fn start_failed(&mut self, key: &ProcessId) -> Vec<(ProcessId, Exit)> {
        let Ok(process) = self.process_mut(key) else {
            return Vec::new();
        };
        let Stage::Starting { early } = process.stage else {
            return Vec::new();
        };
        process.stage = early.map_or(Stage::Created, Stage::Exited);
        let exit = early.filter(|_| key.is_init());
        exit.map(|exit| (key.clone(), exit)).into_iter().collect()
    }

    /// A process has ended. Returns the exits to tell the world, in order.
    pub fn exited(&mut self, key: &ProcessId, exit: Exit) -> Vec<(ProcessId, Exit)> {
        let Ok(process) = self.process_mut(key) else {
            return Vec::new();
        };
        let exit = Exit {
            pid: process.pid,
            ..exit
        };
        match &mut process.stage {
            Stage::Starting { early } => {
                *early = Some(exit);
                return Vec::new();
            }
            Stage::Created | Stage::Running => {}
            Stage::Creating | Stage::Exited(_) | Stage::Deleting(_) => return Vec::new(),
        }
        let Some(task) = self.tasks.get_mut(&key.container) else {
            return Vec::new();
        };
        if key.is_init() && task.has_live_execs() {
            task.held.get_or_insert(exit);
            return Vec::new();
        }
        let mut exits = vec![(key.clone(), exit)];
        match &key.exec {
            None => task.end(exit),
            Some(exec) => {
                if let Some(exec) = task.execs.get_mut(exec) {
                    exec.stage = Stage::Exited(exit);
                }
            }
        }
        if !key.is_init()
            && !task.has_live_execs()
            && let Some(held) = task.held.take()
        {
            task.end(held);
            exits.push((ProcessId::init(&key.container), held));
        }
        exits
    }

    /// Whether init's exit waits for execs.
    pub fn is_held(&self, id: &str) -> bool {
        self.tasks.get(id).is_some_and(|task| task.held.is_some())
    }

    /// Init has been dead for long enough: what is left of its container ends as killed.
    pub fn release_held(&mut self, id: &str, at: std::time::SystemTime) -> Vec<(ProcessId, Exit)> {
        if !self.is_held(id) {
            return Vec::new();
        }
        self.kill_task(id, at)
    }

    fn kill_task(&mut self, id: &str, at: std::time::SystemTime) -> Vec<(ProcessId, Exit)> {
        let Some(task) = self.tasks.get_mut(id) else {
            return Vec::new();
        };
        let mut exits = Vec::new();
        for (exec_id, exec) in &mut task.execs {
            if exec.is_live() {
                let exit = Exit {
                    pid: exec.pid,
                    status: KILLED,
                    at,
                };
                // Without a start event there is no exit event either; who waits for it is answered
                // by `Exited`.
                if exec.stage == Stage::Running {
                    exits.push((ProcessId::exec(id, exec_id), exit));
                }
                exec.stage = Stage::Exited(exit);
            }
        }
        if !matches!(
            task.init.stage,
            Stage::Creating | Stage::Exited(_) | Stage::Deleting(_)
        ) {
            let exit = task.held.take().unwrap_or(Exit {
                pid: task.init.pid,
                status: KILLED,
                at,
            });
            task.end(exit);
            exits.push((ProcessId::init(id), exit));
        }
        exits
    }

    /// There is no virtual machine any more. Returns the exits to tell the world, in order; the
    /// first reason stays.
    pub fn vm_died(&mut self, reason: &str, at: std::time::SystemTime) -> Vec<(ProcessId, Exit)> {
        self.dead.get_or_insert_with(|| reason.to_owned());
        let mut ids: Vec<String> = self.tasks.keys().cloned().collect();
        // A pod's sandbox comes last, as its containers cannot outlive it: what is deleted with it,
        // containerd takes for the end of the shim.
        ids.sort_by_key(|id| self.is_pod_sandbox(id));
        ids.iter().flat_map(|id| self.kill_task(id, at)).collect()
    }

    /// Whether a signal may be sent.
    ///
    /// # Errors
    /// `NOT_FOUND` once it has ended (clients take only that for "already gone");
    /// `FAILED_PRECONDITION` before.
    pub fn kill(&self, key: &ProcessId) -> Result<()> {
        match self.process(key)?.stage {
            Stage::Exited(_) | Stage::Deleting(_) => Err(Refusal::Finished(key.clone())),
            Stage::Creating => Err(Refusal::BeingCreated(key.clone())),
            Stage::Created if !key.is_init() => Err(Refusal::NotStarted(key.clone())),
            Stage::Created | Stage::Starting { .. } | Stage::Running => Ok(()),
        }
    }

    /// Whether a container's init could still be made to end: it is there and has not.
    pub fn is_unfinished(&self, id: &str) -> bool {
        self.tasks.get(id).is_some_and(|task| {
            task.held.is_none()
                && matches!(
                    task.init.stage,
                    Stage::Created | Stage::Starting { .. } | Stage::Running
                )
        })
    }

    /// A container ran out of memory. Whether the world is to be told: once in its life.
    ///
    /// # Errors
    /// `NOT_FOUND`: no container of this sandbox, or none in the guest.
    pub fn out_of_memory(&mut self, id: &str) -> Result<bool> {
        let task = self.task_mut(id)?;
        if task.kind == TaskKind::PodSandbox {
            return Err(Refusal::NotInGuest(id.to_owned()));
        }
        if matches!(task.init.stage, Stage::Creating | Stage::Deleting(_)) {
            return Err(Refusal::NotInGuest(id.to_owned()));
        }
        Ok(!std::mem::replace(&mut task.oom_told, true))
    }

    /// A process is about to be deleted. Returns what the answer will say.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` while it runs.
    pub fn delete(&mut self, key: &ProcessId) -> Result<Option<Exit>> {
        let process = self.process_mut(key)?;
        let exit = match process.stage {
            Stage::Created => None,
            Stage::Exited(exit) => Some(exit),
            Stage::Deleting(_) => {
                return Err(Refusal::BeingDeleted(key.clone()));
            }
            Stage::Creating | Stage::Starting { .. } | Stage::Running => {
                return Err(Refusal::Running(key.clone()));
            }
        };
        process.stage = Stage::Deleting(exit);
        Ok(exit)
    }

    /// It is deleted.
    pub fn deleted(&mut self, key: &ProcessId) {
        match &key.exec {
            None => drop(self.tasks.remove(&key.container)),
            Some(exec) => {
                if let Some(task) = self.tasks.get_mut(&key.container) {
                    task.execs.remove(exec);
                }
            }
        }
    }

    /// Pauses or resumes a container, after [`State::may_set_freezer`].
    pub fn set_freezer(&mut self, id: &str, to: Freezer) {
        if let Some(task) = self.tasks.get_mut(id) {
            task.freezer = to;
        }
    }

    /// Whether a container can be paused or resumed.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` if it does not run, or is in that state already.
    pub fn may_set_freezer(&self, id: &str, to: Freezer) -> Result<()> {
        self.alive()?;
        let task = self.task(id)?;
        task.running()?;
        task.has_processes(id)?;
        match to {
            _ if task.freezer != to => Ok(()),
            Freezer::Frozen => Err(Refusal::AlreadyPaused(id.to_owned())),
            Freezer::Thawed => Err(Refusal::NotPaused(id.to_owned())),
        }
    }

    /// What `State` answers.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn status(&self, key: &ProcessId) -> Result<Status> {
        let freezer = self.task(&key.container)?.freezer;
        Ok(match self.process(key)?.stage {
            Stage::Creating | Stage::Created | Stage::Starting { .. } | Stage::Deleting(None) => {
                Status::Created
            }
            Stage::Running if freezer == Freezer::Frozen => Status::Paused,
            Stage::Running => Status::Running,
            Stage::Exited(exit) | Stage::Deleting(Some(exit)) => Status::Stopped(exit),
        })
    }

    /// The exit, once there is one.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn exit(&self, key: &ProcessId) -> Result<Option<Exit>> {
        Ok(match self.status(key)? {
            Status::Stopped(exit) => Some(exit),
            _ => None,
        })
    }

    /// Pids of a container's living processes, with the exec's id. Init stays in
    /// the list until it is deleted: containerd takes a task without pids for leaked when it comes
    /// back, and its exit status is lost.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn pids(&self, id: &str) -> Result<Vec<(u32, Option<String>)>> {
        let task = self.task(id)?;
        let execs = task
            .execs
            .iter()
            .filter(|(_, exec)| exec.is_live())
            .map(|(id, exec)| (exec.pid, Some(id.clone())));
        Ok(std::iter::once((task.init.pid, None))
            .chain(execs)
            .collect())
    }
}

impl Process {
    /// Whether it runs, or is about to.
    pub fn is_live(&self) -> bool {
        matches!(self.stage, Stage::Starting { .. } | Stage::Running)
    }
}

impl Task {
    fn running(&self) -> Result<()> {
        match self.init.stage {
            Stage::Running if self.held.is_none() => Ok(()),
            Stage::Creating | Stage::Created | Stage::Starting { .. } => {
                Err(Refusal::ContainerNotStarted)
            }
            _ => Err(Refusal::ContainerEnded),
        }
    }

    fn has_processes(&self, id: &str) -> Result<()> {
        if self.kind == TaskKind::PodSandbox {
            return Err(Refusal::SandboxHasNoProcesses(id.to_owned()));
        }
        Ok(())
    }

    fn has_live_execs(&self) -> bool {
        self.execs.values().any(Process::is_live)
    }

    fn end(&mut self, exit: Exit) {
        self.init.stage = Stage::Exited(exit);
        self.freezer = Freezer::Thawed;
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "state_orders.rs"]
mod orders;
