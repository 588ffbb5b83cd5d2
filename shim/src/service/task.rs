//! The task service: each call is one question to the sandbox's owner.

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status as ApiStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageFull};
use tokio::sync::watch;
use ttrpc::Result;
use ttrpc::r#async::TtrpcContext;

use super::options;
use crate::container::spec;
use crate::error::Error;
use crate::host::cgroup;
use crate::metrics;
use crate::model::ProcessId;
use crate::sandbox::owner::{SandboxHandle, answer};
use crate::sandbox::state::Status;

/// `containerd.task.v2.Task` and `.v3.Task`.
pub struct TaskService {
    sandbox: SandboxHandle,
    /// The sandbox's own id, which `Connect` must know even without a task.
    id: String,
    ended: watch::Sender<bool>,
}

impl TaskService {
    /// A service for the sandbox; `ended` turns true once a `Shutdown` has been accepted.
    pub fn new(sandbox: SandboxHandle, id: String, ended: watch::Sender<bool>) -> TaskService {
        TaskService { sandbox, id, ended }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::unimplemented(
                "a virtual machine is not restored from a checkpoint",
            )
            .into());
        }
        let config = options::config(request.options.as_ref());
        let pid = self
            .sandbox
            .ask(|owner, reply| owner.create(request, config, reply))
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let key = ProcessId::new(&request.id, &request.exec_id);
        let pid = self
            .sandbox
            .ask(|owner, reply| owner.start(key, reply))
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let key = ProcessId::new(&request.id, &request.exec_id);
        let state = move |key: &ProcessId, state: &crate::sandbox::state::State| {
            let process = state.process(key)?;
            let mut response = StateResponse {
                id: request.id.clone(),
                exec_id: request.exec_id.clone(),
                bundle: state.task(&key.container)?.bundle.clone(),
                pid: process.pid,
                stdin: process.io.stdin.clone(),
                stdout: process.io.stdout.clone(),
                stderr: process.io.stderr.clone(),
                terminal: process.io.terminal,
                ..Default::default()
            };
            response.status = match state.status(key)? {
                Status::Created => ApiStatus::CREATED.into(),
                Status::Running => ApiStatus::RUNNING.into(),
                Status::Paused => ApiStatus::PAUSED.into(),
                Status::Stopped(exit) => {
                    response.exit_status = exit.status;
                    response.exited_at = Some(exit.at.into()).into();
                    ApiStatus::STOPPED.into()
                }
            };
            Ok(response)
        };
        Ok(self
            .sandbox
            .ask(move |owner, reply| answer(reply, state(&key, &owner.state)))
            .await?)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let key = ProcessId::new(&request.id, &request.exec_id);
        let exit = self
            .sandbox
            .ask(|owner, reply| owner.wait(key, reply))
            .await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let key = ProcessId::new(&request.id, &request.exec_id);
        let exit = self
            .sandbox
            .ask(|owner, reply| owner.delete(key, reply))
            .await?;
        Ok(DeleteResponse {
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        // All processes of a container are those of its init.
        let exec_id = if request.all { "" } else { &request.exec_id };
        let key = ProcessId::new(&request.id, exec_id);
        self.sandbox
            .ask(move |owner, reply| owner.kill(key, request.signal, request.all, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let mut process = spec::parse_process(&request.spec.value)?;
        process.set_terminal(Some(request.terminal));
        self.sandbox
            .ask(|owner, reply| owner.exec(request, process, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let pids = self
            .sandbox
            .ask(move |owner, reply| answer(reply, owner.state.pids(&request.id)))
            .await?;
        let processes = pids.into_iter().map(|(pid, exec_id)| {
            let details = ProcessDetails {
                exec_id,
                ..Default::default()
            };
            let info = (!details.exec_id.is_empty()).then(|| Any {
                type_url: ProcessDetails::descriptor().full_name().to_owned(),
                value: details.write_to_bytes().unwrap_or_default(),
                ..Default::default()
            });
            ProcessInfo {
                pid,
                info: info.into(),
                ..Default::default()
            }
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.sandbox
            .ask(|owner, reply| owner.set_paused(request.id, true, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.sandbox
            .ask(|owner, reply| owner.set_paused(request.id, false, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(Error::unimplemented(
            "checkpoints are not possible: the container lives in a virtual machine",
        )
        .into())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let key = ProcessId::new(&request.id, &request.exec_id);
        self.sandbox
            .ask(move |owner, reply| {
                owner.resize_terminal(key, request.width, request.height, reply)
            })
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        if request.stdin {
            let key = ProcessId::new(&request.id, &request.exec_id);
            self.sandbox
                .ask(|owner, reply| owner.close_stdin(key, reply))
                .await?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let resources = spec::parse_resources(&request.resources.value)?;
        self.sandbox
            .ask(|owner, reply| owner.update(request.id, resources, reply))
            .await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let stats = self
            .sandbox
            .ask(|owner, reply| owner.stats(request.id, reply))
            .await?;
        let stats = metrics::pack(&stats, cgroup::host_is_v2())?;
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let own = request.id == self.id;
        let pid = self
            .sandbox
            .ask(move |owner, reply| {
                let pid = owner.state.task(&request.id).map(|task| task.init.pid);
                answer(reply, if own { pid.or(Ok(0)) } else { pid });
            })
            .await?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: pid,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        if self
            .sandbox
            .ask(move |owner, reply| owner.shutdown(request.now, reply))
            .await?
        {
            self.ended.send_replace(true);
        }
        Ok(Empty::default())
    }
}
