//! The requests of the task API, each a few decisions of the owner's and something begun.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed,
    TaskStart,
};
use oci_spec::runtime::{LinuxResources, Process};
use tokio::time::Instant;
use ttrpc::Code;

use crate::config::Config;
use crate::container::create::{Container, CreateContainer, HostSide, in_guest};
use crate::container::hooks::{HookPhase, HostHooks};
use crate::container::role::{self, Role};
use crate::container::spec;
use crate::error::{Error, Result};
use crate::from_guest::Stats;
use crate::guest::agent_calls::{self, PendingExec, PreconnectedStdio};
use crate::guest::boot::Guest;
use crate::guest::ending::{self, DeleteBy};
use crate::guest::machine_size::ResourceLimits;
use crate::model::Exit;
use crate::model::{ProcessId, Stdio};
use crate::sandbox::owner::{Pod, Reply, SandboxOwner, SandboxSpec, answer};
use crate::sandbox::sandbox_requests;
use crate::stdio::{HostIo, Pumps};

/// Signals that end no process unless it has a handler: none for a sandbox that stands in for one.
const IGNORED_SIGNALS: [i32; 8] = [
    0,
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
];

/// A guest, and the container that was made in it if one was.
type Created = (Arc<Guest>, Option<(Container, Pumps)>);

impl SandboxOwner {
    /// `Create`: the host's part and the guest's boot side by side, then the container in the
    /// guest. For a pod's sandbox the guest is all that is made: the sandbox stands in for the
    /// process that would do nothing but wait.
    pub fn create(
        &mut self,
        request: CreateTaskRequest,
        config: Result<Config>,
        reply: Reply<u32>,
    ) {
        let io = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let (config, role, create) = match self.read_create(config, &request, io.clone()) {
            Ok(read) => read,
            Err(error) => return answer(reply, Err(error)),
        };
        if let Err(error) = self.state.create(&request.id, &request.bundle, io) {
            return answer(reply, Err(error));
        }
        if role != Role::Sandbox {
            self.limits.insert(
                request.id.clone(),
                ResourceLimits::of_container(&create.spec),
            );
        }
        let launching = self.guest_for(config, SandboxSpec::of(&create.spec));
        let (launching, shares) =
            match launching.and_then(|launching| Ok((launching, self.shares()?))) {
                Ok(both) => both,
                Err(error) => {
                    self.create_failed(&request.id);
                    return answer(reply, Err(error));
                }
            };
        let size = self.machine_size();
        let hooks = HostHooks::of(&create.spec, &request.id, &request.bundle);
        self.hooks.insert(request.id.clone(), hooks.clone());
        let namespace = self.identity.namespace.clone();
        let work = async move {
            if role == Role::Sandbox {
                let guest = launching.clone().await?;
                if guest.pod {
                    hooks
                        .run(HookPhase::Create, guest.vm.identity().pid)
                        .await?;
                    return Ok((guest, None));
                }
            }
            let host_io = HostIo::open(&create.io, &namespace, &create.id).await?;
            // mount(2) may wait for a slow disk, which must not hold up other requests.
            let host = tokio::task::spawn_blocking(move || {
                let host = HostSide::prepare(&create, &shares);
                host.map(|host| (create, host))
            });
            let (create, host) = host
                .await
                .map_err(|error| Error::internal(error.to_string()))??;
            let guest = launching.await?;
            guest
                .resize(size)
                .await
                .map_err(|error| error.context("cannot make room for the container"))?;
            hooks
                .run(HookPhase::Create, guest.vm.identity().pid)
                .await?;
            let made = in_guest(&guest, &create, host, host_io).await?;
            Ok((guest, Some(made)))
        };
        self.spawn_then(work, move |owner, result| {
            owner.created(request, result, reply)
        });
    }

    /// Reads and checks what a client wants: what is wrong is refused before anything is made.
    fn read_create(
        &mut self,
        config: Result<Config>,
        request: &CreateTaskRequest,
        io: Stdio,
    ) -> Result<(Config, Role, CreateContainer)> {
        // The machine that is there is as it was configured, whatever has become of the file since.
        let config = if self.launching.is_some() {
            Ok(self.config.clone())
        } else {
            config
        }?;
        let bundle = PathBuf::from(&request.bundle);
        let mut spec = spec::load(&bundle)?;
        let config = match spec.annotations() {
            Some(annotations) if self.launching.is_none() => config.annotated(annotations)?,
            _ => config,
        };
        let role = Role::of(&spec);
        let sandbox = &self.identity.id;
        let find = |pid| {
            self.state.owner(pid).map(|id| {
                if id == sandbox {
                    String::new()
                } else {
                    id.to_owned()
                }
            })
        };
        let pid_namespace = role::namespaces(&spec, role, find)?;
        if role == Role::Sandbox && self.launching.is_none() {
            self.pod = Pod::of(&spec);
        }
        if let Some(files) = self.pod.files.as_ref().filter(|_| role == Role::Member) {
            sandbox_requests::add_files(&mut spec, files)?;
        }
        let annotations = spec.annotations().as_ref();
        let pod_uid = role::UID.of(role::is_from_containerd(), |key| {
            annotations?.get(key).map(String::as_str)
        });
        let pod_uid = pod_uid.map(str::to_owned);
        let create = CreateContainer {
            id: request.id.clone(),
            bundle,
            rootfs: request.rootfs.clone(),
            spec,
            io,
            pid_namespace,
            sysctls: if role == Role::Member {
                self.pod.sysctls.clone()
            } else {
                HashMap::new()
            },
            pod_uid,
            shm: self
                .pod
                .shm
                .as_ref()
                .filter(|_| role == Role::Member)
                .map(|shm| shm.source.clone()),
        };
        Ok((config, role, create))
    }

    fn create_failed(&mut self, id: &str) {
        self.state.create_failed(id);
        self.limits.remove(id);
        self.hooks.remove(id);
    }

    fn created(&mut self, request: CreateTaskRequest, result: Result<Created>, reply: Reply<u32>) {
        let (guest, made) = match result {
            Ok(created) => created,
            Err(error) => {
                self.create_failed(&request.id);
                return answer(reply, Err(error));
            }
        };
        let key = ProcessId::new(&request.id, "");
        let pid = self.state.created(
            &request.id,
            guest.vm.identity().pid.cast_unsigned(),
            made.is_none(),
        );
        if let Some((container, pumps)) = made {
            self.containers.insert(request.id.clone(), container);
            self.pumps.insert(key.clone(), pumps);
            self.watch_exit(guest, key);
        }
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        self.events.publish(&TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io).into(),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        });
        answer(reply, Ok(pid));
        if self.state.alive().is_err() {
            // The machine ended while the guest answered: nobody else will say that this container
            // did too.
            self.vm_died("its virtual machine has ended");
        }
    }

    /// `Start`.
    pub fn start(&mut self, key: ProcessId, reply: Reply<u32>) {
        let Some(guest) = self.guest.clone() else {
            let error = self.state.process(&key).err();
            let error = error
                .unwrap_or_else(|| Error::precondition(format!("{key} is still being created")));
            return answer(reply, Err(error));
        };
        let io = match self
            .state
            .start(&key)
            .and_then(|()| Ok(self.state.process(&key)?.io.clone()))
        {
            Ok(io) => io,
            Err(error) => return answer(reply, Err(error)),
        };
        let exec = self.announced.get_mut(&key);
        let exec = exec.map(|exec| PendingExec {
            process: exec.process.clone(),
            dialled: exec.dialled.take(),
        });
        let namespace = self.identity.namespace.clone();
        let is_pod_sandbox = self.state.is_pod_sandbox(&key.container);
        // Between the sandbox's creation and its start its network may have been made.
        let ledger =
            (key.is_init() && key.container == self.identity.id).then(|| self.ledger.clone());
        let target = key.clone();
        let starting = guest.clone();
        let work = async move {
            if let Some(ledger) = ledger {
                starting.add_links(&ledger).await?;
            }
            match exec {
                None if is_pod_sandbox => Ok(None),
                None => agent_calls::start_init(&starting, &target.container)
                    .await
                    .map(|()| None),
                Some(exec) => agent_calls::start_exec(&starting, &target, exec, &io, &namespace)
                    .await
                    .map(Some),
            }
        };
        self.spawn_then(work, move |owner, result| {
            owner.started(guest, key, result, reply)
        });
    }

    fn started(
        &mut self,
        guest: Arc<Guest>,
        key: ProcessId,
        result: Result<Option<Pumps>>,
        reply: Reply<u32>,
    ) {
        let pumps = match result {
            Ok(pumps) => pumps,
            Err(error) => {
                if self.state.start_failed(&key).is_some() {
                    self.announce(Vec::new());
                }
                return answer(reply, Err(error));
            }
        };
        if let Some(mut pumps) = pumps {
            if self.stdin_closed.contains(&key) {
                pumps.close_stdin();
            }
            self.pumps.insert(key.clone(), pumps);
            self.watch_exit(guest.clone(), key.clone());
        }
        if let Some((width, height)) = self.pending_terminal_sizes.remove(&key) {
            let resized = key.clone();
            tokio::spawn(async move {
                agent_calls::resize_terminal(&guest, &resized, width, height).await
            });
        }
        let (pid, early) = match self.state.started(&key) {
            Ok(started) => started,
            Err(error) => return answer(reply, Err(error)),
        };
        let container_id = key.container.clone();
        if key.is_init() {
            self.run_hooks(&key.container, HookPhase::Started);
            if !self.is_unannounced(&key.container) {
                self.events.publish(&TaskStart {
                    container_id,
                    pid,
                    ..Default::default()
                });
            }
        } else {
            let exec_id = key.exec.clone();
            self.events.publish(&TaskExecStarted {
                container_id,
                exec_id,
                pid,
                ..Default::default()
            });
        }
        answer(reply, Ok(pid));
        if let Some(exit) = early {
            self.exited(&key, exit.status);
        }
    }

    /// `Exec`: only announces the process.
    pub fn exec(&mut self, request: ExecProcessRequest, process: Process, reply: Reply<()>) {
        let key = ProcessId::new(&request.id, &request.exec_id);
        let io = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let result = self.state.exec(&key, io);
        if result.is_ok() {
            let io = self
                .state
                .process(&key)
                .map(|process| process.io.clone())
                .unwrap_or_default();
            let dialled = self
                .guest
                .as_ref()
                .and_then(|guest| PreconnectedStdio::begin(guest, &key, &io));
            if let Some(container) = self.containers.get(&request.id) {
                container.runs_as(process.user());
            }
            self.announced.insert(key, PendingExec { process, dialled });
            let (container_id, exec_id) = (request.id, request.exec_id);
            self.events.publish(&TaskExecAdded {
                container_id,
                exec_id,
                ..Default::default()
            });
        }
        answer(reply, result);
    }

    /// `Delete`: the answer comes when the output is read and everything of the process is undone.
    pub fn delete(&mut self, key: ProcessId, reply: Reply<Exit>) {
        let (pid, exit) = match self
            .state
            .delete(&key)
            .and_then(|exit| Ok((self.state.process(&key)?.pid, exit)))
        {
            Ok(deleting) => deleting,
            Err(error) => return answer(reply, Err(error)),
        };
        let exit = exit.unwrap_or(Exit {
            pid,
            status: 0,
            at: SystemTime::UNIX_EPOCH,
        });
        let pumps: Vec<Pumps> = match key.is_init() {
            true => self.take_pumps(&key.container),
            false => self.pumps.remove(&key).into_iter().collect(),
        };
        let guest = self.living_guest().ok().filter(|_| key.is_init());
        let container = if key.is_init() {
            self.containers.remove(&key.container)
        } else {
            None
        };
        let id = key.container.clone();
        let by = DeleteBy::from(Instant::now(), self.killed.get(&id).copied());
        let work = async move {
            futures::future::join_all(pumps.into_iter().map(|pumps| pumps.drain(by.drained))).await;
            match container {
                Some(container) => container.remove(guest, &id, by.removed).await,
                None => Ok(()),
            }
        };
        self.spawn_then(work, move |owner, removed| {
            if let Err(error) = removed {
                // Nobody would hear of its processes any more, and they would keep what they have.
                owner.vm_died(&error.message);
            }
            owner.forget(&key);
            if key.is_init() {
                owner.give_back(&key.container);
                owner.run_hooks(&key.container, HookPhase::Deleted);
                owner.hooks.remove(&key.container);
                owner.events.publish(&TaskDelete {
                    container_id: key.container.clone(),
                    pid: exit.pid,
                    exit_status: exit.status,
                    exited_at: Some(exit.at.into()).into(),
                    ..Default::default()
                });
            }
            answer(reply, Ok(exit));
        });
    }

    /// Nobody waits for hooks that can change nothing any more.
    fn run_hooks(&self, id: &str, moment: HookPhase) {
        let (Some(hooks), Some(guest)) = (self.hooks.get(id).cloned(), self.guest.as_ref()) else {
            return;
        };
        let pid = guest.vm.identity().pid;
        tokio::spawn(async move { hooks.run(moment, pid).await });
    }

    /// The machine shrinks by what a container may no longer use. Nobody waits for it.
    fn give_back(&mut self, id: &str) {
        let before = self.machine_size();
        self.limits.remove(id);
        let after = self.machine_size();
        if let Ok(guest) = self.living_guest()
            && after != before
            && !self.state.is_empty()
        {
            tokio::spawn(async move {
                if let Err(error) = guest.resize(after).await {
                    tracing::warn!(%error, "the virtual machine keeps its size");
                }
            });
        }
    }

    /// `Kill`.
    pub fn kill(&mut self, key: ProcessId, signal: u32, all: bool, reply: Reply<()>) {
        if let Err(error) = self.state.kill(&key) {
            return answer(reply, Err(error));
        }
        if self.state.is_pod_sandbox(&key.container) {
            if !IGNORED_SIGNALS.contains(&signal.cast_signed()) {
                self.exited(&key, 128 + signal);
            }
            return answer(reply, Ok(()));
        }
        let guest = match self.living_guest() {
            Ok(guest) => guest,
            Err(error) => return answer(reply, Err(error)),
        };
        let is_last_resort = signal == libc::SIGKILL.cast_unsigned() && (all || key.is_init());
        if is_last_resort {
            self.begin_to_end(&key.container);
        } else if signal == libc::SIGKILL.cast_unsigned() {
            self.begin_to_give_up(&key);
        }
        let deadline = ending::signal_deadline(self.config.kill_timeout());
        let work = async move { agent_calls::signal(&guest, &key, signal, all, deadline).await };
        self.spawn_then(work, move |owner, result| {
            // A guest that does not even take a SIGKILL would keep its pod for ever: the machine is
            // what can be killed.
            match ending::refuses_to_kill(&result).filter(|_| is_last_resort) {
                Some(reason) => {
                    owner.vm_died(&reason);
                    answer(reply, Ok(()));
                }
                // It runs, whatever the guest says; its end is told in any case.
                None if is_last_resort
                    && result
                        .as_ref()
                        .is_err_and(|error| error.code == Code::NOT_FOUND) =>
                {
                    answer(reply, Ok(()));
                }
                None => answer(reply, result),
            }
        });
    }

    /// `Wait`.
    pub fn wait(&mut self, key: ProcessId, reply: Reply<Exit>) {
        match self.state.exit(&key) {
            Ok(None) => self.waiters.entry(key).or_default().push(reply),
            Ok(Some(exit)) => answer(reply, Ok(exit)),
            Err(error) => answer(reply, Err(error)),
        }
    }

    /// `Pause` and `Resume`.
    pub fn set_paused(&mut self, id: String, paused: bool, reply: Reply<()>) {
        if let Err(error) = self.state.may_pause(&id, paused) {
            return answer(reply, Err(error));
        }
        let guest = match self.living_guest() {
            Ok(guest) => guest,
            Err(error) => return answer(reply, Err(error)),
        };
        let container_id = id.clone();
        self.spawn_then(
            async move { agent_calls::set_paused(&guest, &id, paused).await },
            move |owner, result| {
                if result.is_ok() {
                    owner.state.set_paused(&container_id, paused);
                    match paused {
                        true => owner.events.publish(&TaskPaused {
                            container_id,
                            ..Default::default()
                        }),
                        false => owner.events.publish(&TaskResumed {
                            container_id,
                            ..Default::default()
                        }),
                    }
                }
                answer(reply, result);
            },
        );
    }

    /// `ResizePty`: before the start it is remembered, without a terminal it is nothing.
    pub fn resize_terminal(&mut self, key: ProcessId, width: u32, height: u32, reply: Reply<()>) {
        match self.state.process(&key) {
            Err(error) => answer(reply, Err(error)),
            Ok(process) if !process.io.terminal => answer(reply, Ok(())),
            Ok(_) if key.is_init() || self.pumps.contains_key(&key) => {
                self.forward_to_guest(reply, |guest| async move {
                    agent_calls::resize_terminal(&guest, &key, width, height).await
                });
            }
            Ok(_) => {
                self.pending_terminal_sizes.insert(key, (width, height));
                answer(reply, Ok(()));
            }
        }
    }

    /// `CloseIO` of stdin; before the start it is remembered.
    pub fn close_stdin(&mut self, key: ProcessId, reply: Reply<()>) {
        let result = self.state.process(&key).map(drop);
        if result.is_ok() {
            match self.pumps.get_mut(&key) {
                Some(pumps) => pumps.close_stdin(),
                None => self.stdin_closed.push(key),
            }
        }
        answer(reply, result);
    }

    /// `Update`: room is made before a limit is raised, and given back after one is lowered or
    /// refused.
    pub fn update(&mut self, id: String, resources: LinuxResources, reply: Reply<()>) {
        let guest = match self
            .state
            .task(&id)
            .map(drop)
            .and_then(|()| self.living_guest())
        {
            Ok(guest) => guest,
            Err(error) => return answer(reply, Err(error)),
        };
        let is_pod = self.state.is_pod_sandbox(&id);
        let before = self.machine_size();
        let Some(need) = self.need(&id) else {
            return answer(
                reply,
                Err(Error::precondition(format!("{id} is being deleted"))),
            );
        };
        let old = *need;
        *need = old.updated(&resources);
        let after = self.machine_size();
        let target = id.clone();
        let work = async move {
            guest.resize(before.max(after)).await?;
            let updated = match is_pod {
                true => Ok(()),
                false => agent_calls::update(&guest, &target, &resources).await,
            };
            let resized = guest
                .resize(if updated.is_ok() { after } else { before })
                .await;
            updated.and(resized)
        };
        self.spawn_then(work, move |owner, result| {
            if result.is_err()
                && let Some(need) = owner.need(&id)
            {
                *need = old;
            }
            answer(reply, result);
        });
    }

    fn need(&mut self, id: &str) -> Option<&mut ResourceLimits> {
        if self.state.is_pod_sandbox(id) {
            Some(&mut self.pod.need)
        } else {
            self.limits.get_mut(id)
        }
    }

    /// `Stats`: the agent keeps a container's numbers until it is removed, so also after its exit.
    pub fn stats(&mut self, id: String, reply: Reply<Stats>) {
        if let Err(error) = self.state.task(&id) {
            return answer(reply, Err(error));
        }
        if self.state.is_pod_sandbox(&id) {
            // What the machine itself uses is in the pod's cgroup on the host.
            return answer(reply, Ok(Stats::default()));
        }
        self.forward_to_guest(reply, |guest| async move {
            agent_calls::stats(&guest, &id).await
        });
    }

    /// `Shutdown`: ends the sandbox if nothing needs it, or if `now`. Says whether it did.
    pub fn shutdown(&mut self, now: bool, reply: Reply<bool>) {
        self.ended |= now || self.state.is_empty();
        if self.ended && !self.state.is_empty() {
            self.vm_died("the sandbox was told to stop");
        }
        answer(reply, Ok(self.ended));
    }
}
