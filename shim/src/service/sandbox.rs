//! `containerd.runtime.sandbox.v1.Sandbox`: a pod's sandbox without a task (containerd's `sandboxer
//! = "shim"`).

use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::platform::Platform;
use serde_json::json;
use tokio::sync::watch;
use ttrpc::Result;
use ttrpc::r#async::TtrpcContext;

use crate::config::Config;
use crate::error::Error;
use crate::host::cgroup;
use crate::metrics;
use crate::model::{ProcessId, SignalScope};
use crate::sandbox::request::{Quiet, Request, SandboxHandle};
use crate::sandbox::state::Status;

/// What containerd looks for in a sandbox's status.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

pub struct SandboxService {
    sandbox: SandboxHandle,
    ended: watch::Sender<bool>,
}

impl SandboxService {
    /// A service for the sandbox; `ended` turns true once a `ShutdownSandbox` has been accepted.
    pub fn new(sandbox: SandboxHandle, ended: watch::Sender<bool>) -> SandboxService {
        SandboxService { sandbox, ended }
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let id = request.sandbox_id.clone();
        let (request, config) = (
            Quiet::new(request, &id),
            Quiet::new(Config::load(None, &[]), ".."),
        );
        let create = |reply| Request::CreateSandbox {
            request,
            config,
            reply,
        };
        self.sandbox.ask(create).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let sandbox = request.sandbox_id;
        let process = ProcessId::init(&sandbox);
        let started = self.sandbox.ask(|reply| Request::Start { process, reply });
        let pid = match started.await {
            Err(error) if error.code() == ttrpc::Code::NOT_FOUND => {
                let why =
                    format!("the sandbox {sandbox} is not created: CreateSandbox comes first");
                return Err(Error::precondition(why).into());
            }
            started => started?,
        };
        let status = |reply| Request::SandboxStatus { sandbox, reply };
        let created_at = self.sandbox.ask(status).await?.created_at;
        Ok(StartSandboxResponse {
            pid,
            created_at: Some(created_at.into()).into(),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Result<PlatformResponse> {
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Default::default()
        };
        Ok(PlatformResponse {
            platform: Some(platform).into(),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        let process = ProcessId::init(&request.sandbox_id);
        let kill = |reply| Request::Kill {
            process,
            signal: libc::SIGKILL.cast_unsigned(),
            scope: SignalScope::Process,
            reply,
        };
        match self.sandbox.ask(kill).await {
            // Stopped already, or never there: what is wanted is so.
            Err(error) if error.code() != ttrpc::Code::NOT_FOUND => Err(error.into()),
            _ => Ok(StopSandboxResponse::default()),
        }
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let process = ProcessId::init(&request.sandbox_id);
        let exit = self
            .sandbox
            .ask(|reply| Request::Wait { process, reply })
            .await?;
        let exited_at = Some(exit.at.into()).into();
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at,
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let sandbox = request.sandbox_id.clone();
        let verbose = request.verbose;
        let status = self
            .sandbox
            .ask(|reply| Request::SandboxStatus { sandbox, reply })
            .await?;
        let mut response = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: READY.to_owned(),
            created_at: Some(status.created_at.into()).into(),
            ..Default::default()
        };
        match status.status {
            Status::Stopped(exit) => {
                response.state = NOT_READY.to_owned();
                response.exited_at = Some(exit.at.into()).into();
            }
            Status::Created => response.state = NOT_READY.to_owned(),
            Status::Running | Status::Paused => {}
        }
        if verbose {
            // As containerd's own sandboxes say it, for `crictl inspectp`.
            let state = match status.status {
                Status::Running | Status::Paused => "running",
                Status::Created => "created",
                Status::Stopped(_) => "stopped",
            };
            let info = json!({"pid": status.pid, "processStatus": state});
            response.info = [
                ("machine".to_owned(), status.machine),
                ("info".to_owned(), info.to_string()),
            ]
            .into();
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        let sandbox = request.sandbox_id;
        self.sandbox
            .ask(|reply| Request::PingSandbox { sandbox, reply })
            .await?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        if self
            .sandbox
            .ask(|reply| Request::Shutdown { now: true, reply })
            .await?
        {
            self.ended.send_replace(true);
        }
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let stats = self
            .sandbox
            .ask(|reply| Request::SandboxStats { reply })
            .await?;
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = Some(SystemTime::now().into()).into();
        metrics.id = request.sandbox_id;
        metrics.data = Some(metrics::pack(&stats, cgroup::host_is_v2())?).into();
        Ok(response)
    }
}
