//! What the host connects to: the ttrpc services, and raw stdio streams (`stdio_streams`).
//!
//! ```text
//!  ttrpc ──> method of AgentService
//!              1. wire forms become types: "" is None, "*" is everybody
//!              2. one call of the sandbox, a container or the machine
//!              3. an error becomes a status, by its kind (`error.rs`)
//! ```
//!
//! The protocol is that of Kata Containers' agent, and its tools may call too; what we added is
//! announced in [`FEATURES`].
//!
//! Rules that a change must not break:
//!
//! * Work that makes or ends something runs in a task of its own ([`finish`]): it goes on if the
//!   caller gives up or its connection ends, because half a container helps nobody.
//! * A wait inside a call is shorter than the host's deadline for the call (`deadlines.rs`). Only
//!   `WaitProcess`, `ReadStdout`, `ReadStderr`, `WriteStdin` and `GetOOMEvent` wait for something
//!   that may never come, and `Memory.Wait` for up to a minute.
//! * A method that is implemented is in [`METHODS`]; a test compares the two. Every other method
//!   of the service is UNIMPLEMENTED, because the generated answer for it would be NOT_FOUND, which
//!   the protocol has for processes.
//! * A container that does not exist is INVALID_ARGUMENT, a process that does not exist is
//!   NOT_FOUND, and what cannot be done to an existing one is UNAVAILABLE: the shim decides by it.
//! * No policy lives here: what a signal means is the container's business, and which order things
//!   end in is the sandbox's.

mod own;
pub mod stdio_streams;

use std::collections::HashMap;
use std::fs;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use guest_protocol::protocols::agent as api;
use guest_protocol::protocols::agent_ttrpc::{AgentService, create_agent_service};
use guest_protocol::protocols::csi;
use guest_protocol::protocols::health as health_api;
use guest_protocol::protocols::health_ttrpc::{Health, create_health};
use guest_protocol::protocols::types;
use guest_protocol::stdio::Channel;
use guest_protocol::{
    ALL_PROCESSES, FEATURE_CLOCK, FEATURE_IMAGES, FEATURE_MEMORY, FEATURE_NETWORK,
    FEATURE_OWN_FIELDS, FEATURE_POD, FEATURE_PORT_FORWARD, FEATURE_RAW_STDIO, FEATURE_SIGNAL_ALL,
    FEATURE_UDS, FEATURE_UDS_BELOW,
};
use protobuf::well_known_types::empty::Empty;
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::cgroup::stats;
use crate::container::{Process, Recipient};
use crate::error::{Error, Result};
use crate::guest::boot::Mode;
use crate::guest::metrics;
use crate::guest::settings::{self, Online};
use crate::network;
use crate::sandbox::Sandbox;
use crate::stock::STOCK;
use crate::storage::{copy, driver_names, look_up_mounts, volume_usage};

/// Version of the protocol, which Kata's agent calls its API version.
const API_VERSION: &str = "0.0.1";

/// What GetGuestDetails announces beside the version.
const FEATURES: [&str; 12] = [
    "seccomp",
    FEATURE_RAW_STDIO,
    FEATURE_SIGNAL_ALL,
    FEATURE_PORT_FORWARD,
    FEATURE_UDS,
    FEATURE_POD,
    FEATURE_OWN_FIELDS,
    FEATURE_CLOCK,
    FEATURE_UDS_BELOW,
    FEATURE_MEMORY,
    FEATURE_NETWORK,
    FEATURE_IMAGES,
];

/// The methods that the trait below implements.
const METHODS: [&str; 32] = [
    "AddARPNeighbors",
    "CloseStdin",
    "CopyFile",
    "CreateContainer",
    "CreateSandbox",
    "DestroySandbox",
    "ExecProcess",
    "GetGuestDetails",
    "GetMetrics",
    "GetOOMEvent",
    "GetVolumeStats",
    "ListInterfaces",
    "ListRoutes",
    "OnlineCPUMem",
    "PauseContainer",
    "ReadStderr",
    "ReadStdout",
    "RemoveContainer",
    "RemoveStaleVirtiofsShareMounts",
    "ReseedRandomDev",
    "ResumeContainer",
    "SetGuestDateTime",
    "SignalProcess",
    "StartContainer",
    "StatsContainer",
    "TtyWinResize",
    "UpdateContainer",
    "UpdateEphemeralMounts",
    "UpdateInterface",
    "UpdateRoutes",
    "WaitProcess",
    "WriteStdin",
];

/// The services, for a ttrpc server. `shutdown_requested` is notified once the sandbox is
/// destroyed.
pub fn services(
    sandbox: Arc<Sandbox>,
    shutdown_requested: Arc<Notify>,
    mode: Mode,
) -> HashMap<String, Service> {
    let own = own::services(sandbox.clone());
    let agent = Arc::new(Agent {
        sandbox,
        shutdown_requested,
        mode,
    });
    let mut services = create_agent_service(agent.clone());
    for service in services.values_mut() {
        // The generated default answers NOT_FOUND, which the protocol uses for processes.
        service
            .methods
            .retain(|name, _| METHODS.contains(&name.as_str()));
    }
    services.extend(create_health(agent));
    if !STOCK {
        services.extend(own);
    }
    services
}

struct Agent {
    sandbox: Arc<Sandbox>,
    shutdown_requested: Arc<Notify>,
    mode: Mode,
}

type Reply<T> = ttrpc::Result<T>;

/// The exec that a request means: none is the container's first process, which the wire calls by an
/// empty id or by the container's own.
fn exec_id<'a>(container_id: &str, wire: &'a str) -> Option<&'a str> {
    Some(wire).filter(|id| !id.is_empty() && *id != container_id)
}

/// Finishes the work even if the caller gives up or its connection ends.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Reply<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(Error::Failed(format!("the request failed: {error}")).into()),
    }
}

async fn finish_empty(work: impl Future<Output = Result<()>> + Send + 'static) -> Reply<Empty> {
    finish(work).await.map(|()| Empty::new())
}

#[async_trait]
impl AgentService for Agent {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> Reply<Empty> {
        let sandbox = self.sandbox.clone();
        finish_empty(async move { sandbox.create(&request).await }).await
    }

    async fn destroy_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::DestroySandboxRequest,
    ) -> Reply<Empty> {
        let sandbox = self.sandbox.clone();
        let result = finish_empty(async move { sandbox.destroy().await }).await;
        self.shutdown_requested.notify_one();
        result
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> Reply<Empty> {
        let sandbox = self.sandbox.clone();
        finish_empty(async move { sandbox.create_container(request).await }).await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: api::StartContainerRequest,
    ) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        finish_empty(async move { container.start().await }).await
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: api::RemoveContainerRequest,
    ) -> Reply<Empty> {
        let sandbox = self.sandbox.clone();
        finish_empty(async move { sandbox.remove_container(&request.container_id).await }).await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        mut request: api::ExecProcessRequest,
    ) -> Reply<Empty> {
        let sandbox = self.sandbox.clone();
        let process = request
            .process
            .take()
            .ok_or_else(|| Error::Invalid("the request has no process".into()))?;
        finish_empty(async move {
            sandbox
                .exec(&request.container_id, &request.exec_id, &process)
                .await
        })
        .await
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: api::SignalProcessRequest,
    ) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        let recipient = if request.exec_id == ALL_PROCESSES {
            Recipient::All
        } else {
            Recipient::Process(exec_id(&request.container_id, &request.exec_id))
        };
        // A number that no signal has is refused by the kernel.
        let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
        container.signal(recipient, signal)?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: api::WaitProcessRequest,
    ) -> Reply<api::WaitProcessResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let exec_id = exec_id(&request.container_id, &request.exec_id);
        let process = container.unreported(exec_id)?;
        let status = process.wait().await;
        if STOCK {
            process.io().close_output();
        }
        container.mark_reported(&process);
        Ok(api::WaitProcessResponse {
            status,
            ..Default::default()
        })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: api::UpdateContainerRequest,
    ) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        finish_empty(async move { container.update(request.resources.get_or_default()).await })
            .await
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: api::StatsContainerRequest,
    ) -> Reply<api::StatsContainerResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let stats = stats::read(container.cgroup());
        Ok(api::StatsContainerResponse {
            cgroup_stats: Some(stats).into(),
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: api::PauseContainerRequest,
    ) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        finish_empty(async move { container.pause().await }).await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: api::ResumeContainerRequest,
    ) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        finish_empty(async move { container.resume().await }).await
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        request: api::WriteStreamRequest,
    ) -> Reply<api::WriteStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        process.io().write(&request.data).await?;
        let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
        Ok(api::WriteStreamResponse {
            len,
            ..Default::default()
        })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        request: api::ReadStreamRequest,
    ) -> Reply<api::ReadStreamResponse> {
        self.read(Channel::Stdout, request).await
    }

    async fn read_stderr(
        &self,
        _: &TtrpcContext,
        request: api::ReadStreamRequest,
    ) -> Reply<api::ReadStreamResponse> {
        self.read(Channel::Stderr, request).await
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: api::CloseStdinRequest) -> Reply<Empty> {
        self.process(&request.container_id, &request.exec_id)?
            .io()
            .close_stdin();
        Ok(Empty::new())
    }

    async fn tty_win_resize(
        &self,
        _: &TtrpcContext,
        request: api::TtyWinResizeRequest,
    ) -> Reply<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        process.io().resize(request.row, request.column)?;
        Ok(Empty::new())
    }

    async fn get_oom_event(
        &self,
        _: &TtrpcContext,
        _: api::GetOOMEventRequest,
    ) -> Reply<api::OOMEvent> {
        let container_id = self.sandbox.oom.next().await;
        Ok(api::OOMEvent {
            container_id,
            ..Default::default()
        })
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: api::GuestDetailsRequest,
    ) -> Reply<api::GuestDetailsResponse> {
        let details = api::AgentDetails {
            version: env!("CARGO_PKG_VERSION").into(),
            init_daemon: self.mode == Mode::Init,
            storage_handlers: driver_names(),
            supports_seccomp: true,
            extra_features: FEATURES
                .into_iter()
                .take(if STOCK { 1 } else { FEATURES.len() })
                .map(str::to_owned)
                .collect(),
            ..Default::default()
        };
        let mut response = api::GuestDetailsResponse {
            agent_details: Some(details).into(),
            ..Default::default()
        };
        if request.mem_block_size {
            let size = fs::read_to_string("/sys/devices/system/memory/block_size_bytes")
                .unwrap_or_default();
            response.mem_block_size_bytes = u64::from_str_radix(size.trim(), 16).unwrap_or(0);
        }
        if request.mem_hotplug_probe {
            response.support_mem_hotplug_probe =
                fs::exists("/sys/devices/system/memory/probe").unwrap_or(false);
        }
        Ok(response)
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        mut request: api::UpdateInterfaceRequest,
    ) -> Reply<types::Interface> {
        let timeout = self.sandbox.hotplug_timeout;
        let interface = request.interface.take();
        let interface =
            interface.ok_or_else(|| Error::Invalid("the request has no interface".into()))?;
        finish(async move {
            network::update_interface(&interface, timeout)
                .await
                .map(|()| interface)
        })
        .await
    }

    async fn update_routes(
        &self,
        _: &TtrpcContext,
        request: api::UpdateRoutesRequest,
    ) -> Reply<api::Routes> {
        network::update_routes(request.routes.get_or_default())?;
        Ok(network::list_routes()?)
    }

    async fn list_interfaces(
        &self,
        _: &TtrpcContext,
        _: api::ListInterfacesRequest,
    ) -> Reply<api::Interfaces> {
        Ok(network::list_interfaces()?)
    }

    async fn list_routes(&self, _: &TtrpcContext, _: api::ListRoutesRequest) -> Reply<api::Routes> {
        Ok(network::list_routes()?)
    }

    async fn add_arp_neighbors(
        &self,
        _: &TtrpcContext,
        request: api::AddARPNeighborsRequest,
    ) -> Reply<Empty> {
        network::add_neighbours(request.neighbors.get_or_default())?;
        Ok(Empty::new())
    }

    async fn copy_file(&self, _: &TtrpcContext, request: api::CopyFileRequest) -> Reply<Empty> {
        copy(&request)?;
        Ok(Empty::new())
    }

    async fn update_ephemeral_mounts(
        &self,
        _: &TtrpcContext,
        request: api::UpdateEphemeralMountsRequest,
    ) -> Reply<Empty> {
        self.sandbox.update_ephemeral(&request.storages)?;
        Ok(Empty::new())
    }

    async fn remove_stale_virtiofs_share_mounts(
        &self,
        _: &TtrpcContext,
        _: api::RemoveStaleVirtiofsShareMountsRequest,
    ) -> Reply<Empty> {
        finish_empty(look_up_mounts()).await
    }

    async fn get_metrics(
        &self,
        _: &TtrpcContext,
        _: api::GetMetricsRequest,
    ) -> Reply<api::Metrics> {
        Ok(api::Metrics {
            metrics: metrics::text(),
            ..Default::default()
        })
    }

    async fn get_volume_stats(
        &self,
        _: &TtrpcContext,
        request: api::VolumeStatsRequest,
    ) -> Reply<csi::VolumeStatsResponse> {
        Ok(volume_usage(&request.volume_guest_path)?)
    }

    async fn online_cpu_mem(
        &self,
        _: &TtrpcContext,
        request: api::OnlineCPUMemRequest,
    ) -> Reply<Empty> {
        let wanted = if request.cpu_only {
            Online::Cpus
        } else {
            Online::CpusAndMemory
        };
        finish_empty(async move { settings::online(request.nb_cpus, wanted).await }).await
    }

    async fn reseed_random_dev(
        &self,
        _: &TtrpcContext,
        request: api::ReseedRandomDevRequest,
    ) -> Reply<Empty> {
        settings::reseed(&request.data)?;
        Ok(Empty::new())
    }

    async fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        request: api::SetGuestDateTimeRequest,
    ) -> Reply<Empty> {
        settings::set_clock(request.Sec, request.Usec)?;
        Ok(Empty::new())
    }
}

impl Agent {
    fn process(&self, container_id: &str, wire_exec_id: &str) -> Result<Arc<Process>> {
        self.sandbox
            .process(container_id, exec_id(container_id, wire_exec_id))
    }

    async fn read(
        &self,
        channel: Channel,
        request: api::ReadStreamRequest,
    ) -> Reply<api::ReadStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let limit = usize::try_from(request.len).unwrap_or(usize::MAX);
        let data = process.io().read(channel, limit).await?;
        Ok(api::ReadStreamResponse {
            data,
            ..Default::default()
        })
    }
}

#[async_trait]
impl Health for Agent {
    async fn check(
        &self,
        _: &TtrpcContext,
        _: health_api::CheckRequest,
    ) -> Reply<health_api::HealthCheckResponse> {
        let status = health_api::health_check_response::ServingStatus::SERVING.into();
        Ok(health_api::HealthCheckResponse {
            status,
            ..Default::default()
        })
    }

    async fn version(
        &self,
        _: &TtrpcContext,
        _: health_api::CheckRequest,
    ) -> Reply<health_api::VersionCheckResponse> {
        Ok(health_api::VersionCheckResponse {
            grpc_version: API_VERSION.into(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_methods_is_that_of_the_trait() {
        let source = include_str!("mod.rs");
        let (_, body) = source.split_once("impl AgentService for Agent {").unwrap();
        let (body, _) = body.split_once("\n}\n").unwrap();
        let mut implemented: Vec<String> = body
            .split("async fn ")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once('(')?.0.replace('_', "")))
            .collect();
        implemented.sort();
        let mut listed = METHODS.map(str::to_ascii_lowercase);
        listed.sort();
        assert_eq!(implemented, listed);
    }
}
