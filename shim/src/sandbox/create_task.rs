//! The making of a task: what is read of the request, what is made for it on the host and in the
//! guest, side by side, and what becomes of a making that failed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use sys::point::{Point, pass, reach};

use crate::config::{Config, HostNetwork};
use crate::container::create::{CreateContainer, in_guest};
use crate::container::hooks::{HookPhase, HostHooks};
use crate::container::role::{self, Role};
use crate::container::shared_volumes::SharedVolumes;
use crate::container::spec;
use crate::error::{IoContext, Result};
use crate::guest::machine_size::{ResourceLimits, WantedSize};
use crate::guest::task_process::TaskProcess;
use crate::host::exit_record;
use crate::host::ledger::Ledger;
use crate::model::{ProcessId, SignalScope, Stdio};
use crate::sandbox::host_calls::HostCalls;
use crate::sandbox::owner::{Launching, SandboxOwner};
use crate::sandbox::pod::{Pod, SandboxSpec};
use crate::sandbox::request::{Created, Outcome, Quiet, Reply, Request};
use crate::sandbox::sandbox_requests;
use crate::sandbox::state::TaskKind;
use crate::stdio::HostIo;

impl SandboxOwner {
    /// `Create`: the host's part and the guest's boot side by side, then the container in the
    /// guest. For a pod's sandbox the guest is all that is made: the sandbox stands in for the
    /// process that would do nothing but wait.
    pub(super) fn create(
        &mut self,
        quiet: Box<Quiet<CreateTaskRequest>>,
        config: Result<Config>,
        reply: Reply<u32>,
    ) {
        let request = &quiet.value;
        let io = Stdio::of_request(
            &request.stdin,
            &request.stdout,
            &request.stderr,
            request.terminal,
        );
        let (config, role, create) = match self.read_create(config, request, io.clone()) {
            Ok(read) => read,
            Err(error) => return reply.refuse(error),
        };
        let id = request.id.clone();
        if let Err(error) = self.state.create(&id, &request.bundle, io) {
            return reply.refuse(error);
        }
        let hooks = HostHooks::of(&create.spec, &id, &request.bundle);
        let kept = self.runtimes.container(&id);
        kept.hooks = hooks.clone();
        if role != Role::Sandbox {
            kept.limits = Some(ResourceLimits::of_container(&create.spec));
        }
        let launching = self.guest_for(config, SandboxSpec::of(&create.spec));
        let (launching, shares) =
            match launching.and_then(|launching| Ok((launching, self.shares()?))) {
                Ok(both) => both,
                Err(error) => {
                    self.create_failed(&id);
                    return reply.refuse(error);
                }
            };
        self.limits_changed();
        let making = Making {
            launching,
            host: self.host.clone(),
            shares,
            wanted: self.wanted.clone(),
            hooks,
            namespace: self.identity.namespace.clone(),
            ledger: self.ledger.clone(),
            root_in_memory: self.config.root_in_memory,
        };
        self.begin(async move {
            let result = Box::new(making.run(role, create).await);
            pass(Point::ContainerCreated);
            Outcome::Created {
                request: quiet,
                result,
                reply,
            }
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
        reach(Point::CreateSpecRead).doing(|| "read the container's spec".into())?;
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
        let host_network = config.host_network == HostNetwork::Passt;
        let begins = role == Role::Sandbox && self.launching.is_none();
        let pinned = role::pinned(&spec, role)?;
        let known = if begins { &pinned } else { &self.pod.pinned };
        let pid_namespace = role::namespaces(&spec, role, host_network, known, find)?;
        if begins {
            self.pod = Pod {
                pinned,
                ..Pod::of(&spec)
            };
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
            first: (!self.state.is_pod_sandbox(sandbox)).then(|| sandbox.clone()),
            sysctls: if role == Role::Member {
                self.pod.sysctls.clone()
            } else {
                HashMap::new()
            },
            pod_uid,
            root_in_memory: false,
            memory_mib: 0,
            shm: self
                .pod
                .shm
                .as_ref()
                .filter(|_| role == Role::Member)
                .map(|shm| shm.source.clone()),
        };
        Ok((config, role, create))
    }

    pub(super) fn create_failed(&mut self, id: &str) {
        self.state.create_failed(id);
        self.forget(&ProcessId::init(id));
        self.limits_changed();
    }

    pub(super) fn created(
        &mut self,
        request: CreateTaskRequest,
        result: Result<Created>,
        reply: Reply<u32>,
    ) {
        let (guest, mut made) = match result {
            Ok(created) => created,
            Err(error) => {
                self.create_failed(&request.id);
                return reply.refuse(error);
            }
        };
        let init = ProcessId::init(&request.id);
        let kind = if made.is_some() {
            TaskKind::Container
        } else {
            TaskKind::PodSandbox
        };
        let task = made.as_mut().and_then(|(container, _)| container.task());
        let task_pid = task.map(|task| {
            self.watch_task(&init, task);
            task.pid()
        });
        let pid = task_pid.unwrap_or_else(|| guest.pid());
        let pid = self.state.created(&request.id, pid, kind);
        exit_record::write_live(Path::new(&request.bundle), pid);
        if let Some((container, mut pumps)) = made {
            self.runtimes.container(&request.id).container = Some(container);
            let kept = self.runtimes.process(&init);
            if kept.stdin_closed {
                pumps.close_stdin();
            }
            kept.pumps = Some(pumps);
            self.watch_exit(guest, init);
        }
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        self.events.publish(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io).into(),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        });
        reply.send(Ok(pid));
        if self.state.alive().is_err() {
            // The machine ended while the guest answered: nobody else will say that this container
            // did too.
            self.vm_died("its virtual machine has ended");
        }
    }
}

impl SandboxOwner {
    /// Signals for the process by whose pid a container goes are for the container. Its end is the
    /// container's.
    fn watch_task(&self, process: &ProcessId, task: &mut TaskProcess) {
        let (process, handle) = (process.clone(), self.handle.clone());
        task.watch(move |signal| {
            handle.tell(Request::Kill {
                process: process.clone(),
                signal,
                scope: SignalScope::Process,
                reply: Reply::new().0,
            });
        });
    }
}

/// What the making of a container needs of the owner.
struct Making {
    launching: Launching,
    host: Arc<dyn HostCalls>,
    shares: Arc<SharedVolumes>,
    wanted: WantedSize,
    hooks: HostHooks,
    namespace: String,
    ledger: Arc<Ledger>,
    root_in_memory: bool,
}

impl Making {
    /// Makes a container: the host's part while the guest boots, then the guest's. Hooks that undo
    /// what others made are run if it fails after they made it, as runc does.
    async fn run(self, role: Role, mut create: CreateContainer) -> Result<Created> {
        create.root_in_memory = self.root_in_memory;
        create.memory_mib = self.wanted.get().most_mib / 2;
        if role == Role::Sandbox {
            let guest = self.launching.clone().await?;
            if guest.features().pod {
                self.run_create_hooks(guest.pid()).await?;
                return Ok((guest, None));
            }
        }
        let host_io = HostIo::open(&create.io, &self.namespace, &create.id).await?;
        reach(Point::ContainerFifosOpen).doing(|| format!("open the stdio of {}", create.id))?;
        let (create, host_side) = self.host.prepare(create, self.shares.clone()).await?;
        let guest = self.launching.clone().await?;
        let sized = guest.fit(&self.wanted).await;
        sized.map_err(|error| error.context("cannot make room for the container"))?;
        let pid = guest.pid();
        self.run_create_hooks(pid).await?;
        match in_guest(&*guest, &create, host_side, host_io, &self.ledger).await {
            Ok(made) => Ok((guest, Some(made))),
            Err(error) => {
                let _ = self.hooks.run(HookPhase::Deleted, pid).await;
                Err(error)
            }
        }
    }

    async fn run_create_hooks(&self, pid: u32) -> Result<()> {
        let made = self.hooks.run(HookPhase::Create, pid).await;
        if made.is_err() {
            let _ = self.hooks.run(HookPhase::Deleted, pid).await;
        }
        made
    }
}
