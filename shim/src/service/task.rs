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
use crate::model::{Freezer, ProcessId, SignalScope};
use crate::sandbox::request::{Quiet, Request, SandboxHandle};
use crate::sandbox::state::Status;

/// `containerd.task.v2.Task` and `.v3.Task`.
pub struct TaskService {
    sandbox: SandboxHandle,
    ended: watch::Sender<bool>,
}

impl TaskService {
    /// A service for the sandbox; `ended` turns true once a `Shutdown` has been accepted.
    pub fn new(sandbox: SandboxHandle, ended: watch::Sender<bool>) -> TaskService {
        TaskService { sandbox, ended }
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
        let config = Quiet::new(options::config(request.options.as_ref()), "..");
        let id = request.id.clone();
        let request = Quiet::new(request, &id);
        let create = |reply| Request::Create {
            request,
            config,
            reply,
        };
        let pid = self.sandbox.ask(create).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        let pid = self
            .sandbox
            .ask(|reply| Request::Start { process, reply })
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        let found = self
            .sandbox
            .ask(|reply| Request::State { process, reply })
            .await?;
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: found.bundle,
            pid: found.process.pid,
            stdin: found.process.io.stdin.unwrap_or_default(),
            stdout: found.process.io.stdout.unwrap_or_default(),
            stderr: found.process.io.stderr.unwrap_or_default(),
            terminal: found.process.io.terminal,
            ..Default::default()
        };
        response.status = match found.status {
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
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        let exit = self
            .sandbox
            .ask(|reply| Request::Wait { process, reply })
            .await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        let exit = self
            .sandbox
            .ask(|reply| Request::Delete { process, reply })
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
        let (exec_id, scope) = if request.all {
            ("", SignalScope::Container)
        } else {
            (request.exec_id.as_str(), SignalScope::Process)
        };
        let process = ProcessId::of_request(&request.id, exec_id);
        let kill = |reply| Request::Kill {
            process,
            signal: request.signal,
            scope,
            reply,
        };
        self.sandbox.ask(kill).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let mut spec = spec::parse_process(&request.spec.value)?;
        spec.set_terminal(Some(request.terminal));
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        let (request, spec) = (
            Quiet::new(request, &process.to_string()),
            Quiet::new(spec, ".."),
        );
        let exec = |reply| Request::Exec {
            request,
            spec,
            reply,
        };
        self.sandbox.ask(exec).await?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let pids = self
            .sandbox
            .ask(|reply| Request::Pids {
                container: request.id,
                reply,
            })
            .await?;
        let processes = pids.into_iter().map(|(pid, exec_id)| {
            let info = exec_id.map(|exec_id| {
                let details = ProcessDetails {
                    exec_id,
                    ..Default::default()
                };
                Any {
                    type_url: ProcessDetails::descriptor().full_name().to_owned(),
                    value: details.write_to_bytes().unwrap_or_default(),
                    ..Default::default()
                }
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
            .ask(|reply| Request::SetFreezer {
                container: request.id,
                to: Freezer::Frozen,
                reply,
            })
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.sandbox
            .ask(|reply| Request::SetFreezer {
                container: request.id,
                to: Freezer::Thawed,
                reply,
            })
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
        let process = ProcessId::of_request(&request.id, &request.exec_id);
        self.sandbox
            .ask(|reply| Request::ResizeTerminal {
                process,
                width: request.width,
                height: request.height,
                reply,
            })
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        if request.stdin {
            let process = ProcessId::of_request(&request.id, &request.exec_id);
            self.sandbox
                .ask(|reply| Request::CloseStdin { process, reply })
                .await?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let resources = Box::new(spec::parse_resources(&request.resources.value)?);
        self.sandbox
            .ask(|reply| Request::Update {
                container: request.id,
                resources,
                reply,
            })
            .await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let stats = self
            .sandbox
            .ask(|reply| Request::Stats {
                container: request.id,
                reply,
            })
            .await?;
        let stats = metrics::pack(&stats, cgroup::host_is_v2())?;
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let connect = |reply| Request::Connect {
            container: request.id,
            reply,
        };
        let pid = self.sandbox.ask(connect).await?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: pid,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        if self
            .sandbox
            .ask(|reply| Request::Shutdown {
                now: request.now,
                reply,
            })
            .await?
        {
            self.ended.send_replace(true);
        }
        Ok(Empty::default())
    }
}
