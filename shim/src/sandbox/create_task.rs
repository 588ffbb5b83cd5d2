//! The making of a task: what is read of the request, what is made for it on the host and in the
//! guest, side by side, and what becomes of a making that failed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use sys::point::{Point, pass, reach};
use tokio::time::timeout;

use crate::config::Config;
use crate::container::create::{CreateContainer, HostSide, in_guest};
use crate::container::hooks::{HookPhase, HostHooks};
use crate::container::role::{self, Role};
use crate::container::shared_volumes::SharedVolumes;
use crate::container::spec;
use crate::error::{Error, IoContext, Result};
use crate::guest::machine_size::{ResourceLimits, WantedSize};
use crate::model::{ProcessId, Stdio};
use crate::sandbox::owner::{Launching, SandboxOwner};
use crate::sandbox::pod::{Pod, SandboxSpec};
use crate::sandbox::request::{Created, Outcome, Quiet, Reply};
use crate::sandbox::sandbox_requests;
use crate::stdio::HostIo;

/// How long the host may take to mount what a container has of it.
const HOST_DEADLINE: Duration = Duration::from_secs(60);

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
        let io = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let (config, role, create) = match self.read_create(config, request, io.clone()) {
            Ok(read) => read,
            Err(error) => return reply.send(Err(error)),
        };
        let id = request.id.clone();
        if let Err(error) = self.state.create(&id, &request.bundle, io) {
            return reply.send(Err(error));
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
                    return reply.send(Err(error));
                }
            };
        self.limits_changed();
        let wanted = self.wanted.clone();
        let namespace = self.identity.namespace.clone();
        self.begin(async move {
            let making = make(role, create, launching, shares, &wanted, &hooks, &namespace);
            let result = Box::new(making.await);
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

    pub(super) fn create_failed(&mut self, id: &str) {
        self.state.create_failed(id);
        self.forget(&ProcessId::new(id, ""));
        self.limits_changed();
    }

    pub(super) fn created(
        &mut self,
        request: CreateTaskRequest,
        result: Result<Created>,
        reply: Reply<u32>,
    ) {
        let (guest, made) = match result {
            Ok(created) => created,
            Err(error) => {
                self.create_failed(&request.id);
                return reply.send(Err(error));
            }
        };
        let init = ProcessId::new(&request.id, "");
        let vm_pid = guest.vm.identity().pid.cast_unsigned();
        let pid = self.state.created(&request.id, vm_pid, made.is_none());
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
        self.events.publish(&TaskCreate {
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

/// Makes a container: the host's part while the guest boots, then the guest's. Hooks that undo what
/// others made are run if it fails after they made it, as runc does.
async fn make(
    role: Role,
    create: CreateContainer,
    launching: Launching,
    shares: Arc<SharedVolumes>,
    wanted: &WantedSize,
    hooks: &HostHooks,
    namespace: &str,
) -> Result<Created> {
    if role == Role::Sandbox {
        let guest = launching.clone().await?;
        if guest.pod {
            let pid = guest.vm.identity().pid;
            run_create_hooks(hooks, pid).await?;
            return Ok((guest, None));
        }
    }
    let host_io = HostIo::open(&create.io, namespace, &create.id).await?;
    reach(Point::ContainerFifosOpen).doing(|| format!("open the stdio of {}", create.id))?;
    // mount(2) may wait for a slow disk, which must not hold up other requests, and for one that is
    // gone for ever, which must not hold up this one: what it makes so late is undone by its drop.
    let id = create.id.clone();
    let host = tokio::task::spawn_blocking(move || {
        let host = HostSide::prepare(&create, &shares);
        host.map(|host| (create, host))
    });
    let Ok(host) = timeout(HOST_DEADLINE, host).await else {
        return Err(Error::deadline(format!(
            "the mounts of {id} took longer than {HOST_DEADLINE:?}: a storage on the host hangs"
        )));
    };
    let (create, host) = host.map_err(|error| Error::internal(error.to_string()))??;
    let guest = launching.await?;
    let sized = guest.fit(wanted).await;
    sized.map_err(|error| error.context("cannot make room for the container"))?;
    let pid = guest.vm.identity().pid;
    run_create_hooks(hooks, pid).await?;
    match in_guest(&guest, &create, host, host_io).await {
        Ok(made) => Ok((guest, Some(made))),
        Err(error) => {
            let _ = hooks.run(HookPhase::Deleted, pid).await;
            Err(error)
        }
    }
}

async fn run_create_hooks(hooks: &HostHooks, pid: i32) -> Result<()> {
    let made = hooks.run(HookPhase::Create, pid).await;
    if made.is_err() {
        let _ = hooks.run(HookPhase::Deleted, pid).await;
    }
    made
}
