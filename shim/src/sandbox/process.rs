//! What the guest is asked to do with a process or a container, each call with its deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_client::protocols::agent::{
    CgroupStats, ExecProcessRequest, GetOOMEventRequest, PauseContainerRequest, ResumeContainerRequest,
    SignalProcessRequest, StartContainerRequest, StatsContainerRequest, TtyWinResizeRequest, UpdateContainerRequest,
    WaitProcessRequest,
};
use agent_client::{ALL_PROCESSES, context};
use oci_spec::runtime::{LinuxResources, Process};
use tokio::task::JoinHandle;
use ttrpc::Code;

use super::launch::Guest;
use super::state::{Io, Key};
use crate::container::to_proto;
use crate::error::{Error, Result};
use crate::stdio::{GuestIo, HostIo, Pumps};

/// Starting a process: it includes the guest's reading of the program from the image.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// An agent gives up streams that nobody claims after 30 s; those of a client that takes nearly as long are made again.
const HELD_BY_AGENT: Duration = Duration::from_secs(20);

/// Everything that only changes something inside the guest.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// containerd's collector waits 2 s for the statistics of one shim.
const STATS_DEADLINE: Duration = Duration::from_secs(2);

/// Exit status of a process that the guest has lost track of, as containerd's "unknown".
const UNKNOWN_STATUS: u32 = 255;

/// Lets a container's init run.
///
/// # Errors
/// The agent's own words.
pub async fn start_init(guest: &Guest, id: &str) -> Result<()> {
    let request = StartContainerRequest { container_id: id.to_owned(), ..Default::default() };
    guest.agent.agent.start_container(context(Some(START_DEADLINE)), &request).await?;
    Ok(())
}

/// The streams of an exec that is announced, being connected while its client gets around to starting it.
pub struct Dialled {
    begun: Instant,
    streams: JoinHandle<Result<GuestIo>>,
}

impl Dialled {
    /// Begins to connect them, if the agent takes streams.
    pub fn begin(guest: &Arc<Guest>, key: &Key, io: &Io) -> Option<Dialled> {
        let (transport, key, io) = (guest.transport.clone(), key.clone(), io.clone());
        let dial = async move { GuestIo::raw(&transport, &key, &io).await };
        guest.raw_stdio.then(|| Dialled { begun: Instant::now(), streams: tokio::spawn(dial) })
    }

    /// The streams, if the agent still holds them for the process.
    async fn take(mut self) -> Option<GuestIo> {
        if self.begun.elapsed() > HELD_BY_AGENT {
            return None;
        }
        (&mut self.streams).await.ok()?.ok()
    }
}

impl Drop for Dialled {
    fn drop(&mut self) {
        self.streams.abort();
    }
}

/// What is known of an announced exec.
pub struct Announced {
    /// What to run.
    pub process: Process,
    /// Its streams.
    pub dialled: Option<Dialled>,
}

/// Runs a further process in a container, its stdio connected before.
///
/// # Errors
/// The agent's own words; a stdio path that does not open.
pub async fn start_exec(guest: &Guest, key: &Key, exec: Announced, io: &Io, namespace: &str) -> Result<Pumps> {
    let Announced { process, dialled } = exec;
    let host_io = HostIo::open(io, namespace, &key.container).await?;
    let dialled = match dialled {
        Some(dialled) => dialled.take().await,
        None => None,
    };
    let raw = match (guest.raw_stdio, dialled) {
        (false, _) => None,
        (true, Some(streams)) => Some(streams),
        (true, None) => Some(GuestIo::raw(&guest.transport, key, io).await?),
    };
    let request = ExecProcessRequest {
        container_id: key.container.clone(),
        exec_id: key.exec.clone(),
        process: Some(to_proto::process(&process)).into(),
        ..Default::default()
    };
    guest.agent.agent.exec_process(context(Some(START_DEADLINE)), &request).await?;
    let guest_io = raw.unwrap_or_else(|| GuestIo::polled(&guest.agent, key, io));
    Ok(Pumps::start(host_io, guest_io))
}

/// Waits for the end of a process: its status, or `None` if the connection to the guest ended first.
pub async fn wait(guest: &Guest, key: &Key) -> Option<u32> {
    let request =
        WaitProcessRequest { container_id: key.container.clone(), exec_id: key.exec.clone(), ..Default::default() };
    match guest.agent.agent.wait_process(context(None), &request).await {
        Ok(response) => Some(response.status.cast_unsigned()),
        Err(ttrpc::Error::RpcStatus(status)) => {
            tracing::warn!(message = status.message(), %key, "the guest does not know how the process ended");
            Some(UNKNOWN_STATUS)
        }
        Err(_) => None,
    }
}

/// Sends a signal, with `all` to every process of the container; SIGKILL to init is for all of them anyway.
///
/// # Errors
/// `NOT_FOUND` if it is gone already.
pub async fn signal(guest: &Guest, key: &Key, signal: u32, all: bool) -> Result<()> {
    let exec_id = if all && guest.signal_all { ALL_PROCESSES } else { &key.exec };
    let request = SignalProcessRequest {
        container_id: key.container.clone(),
        exec_id: exec_id.to_owned(),
        signal,
        ..Default::default()
    };
    guest.agent.agent.signal_process(context(Some(CALL_DEADLINE)), &request).await?;
    Ok(())
}

/// Sets the size of a process's terminal, in characters.
///
/// # Errors
/// The agent's own words.
pub async fn resize(guest: &Guest, key: &Key, width: u32, height: u32) -> Result<()> {
    let request = TtyWinResizeRequest {
        container_id: key.container.clone(),
        exec_id: key.exec.clone(),
        row: height,
        column: width,
        ..Default::default()
    };
    match guest.agent.agent.tty_win_resize(context(Some(CALL_DEADLINE)), &request).await {
        // There is no terminal, or nobody before it any more.
        Err(ttrpc::Error::RpcStatus(status)) if matches!(status.code(), Code::UNAVAILABLE | Code::NOT_FOUND) => Ok(()),
        other => other.map(drop).map_err(Error::from),
    }
}

/// Freezes (`true`) or thaws a container.
///
/// # Errors
/// The agent's own words.
pub async fn set_paused(guest: &Guest, id: &str, paused: bool) -> Result<()> {
    let id = id.to_owned();
    let call = context(Some(CALL_DEADLINE));
    if paused {
        let request = PauseContainerRequest { container_id: id, ..Default::default() };
        guest.agent.agent.pause_container(call, &request).await?;
    } else {
        let request = ResumeContainerRequest { container_id: id, ..Default::default() };
        guest.agent.agent.resume_container(call, &request).await?;
    }
    Ok(())
}

/// A container's statistics.
///
/// # Errors
/// The agent's own words.
pub async fn stats(guest: &Guest, id: &str) -> Result<CgroupStats> {
    let request = StatsContainerRequest { container_id: id.to_owned(), ..Default::default() };
    let mut response = guest.agent.agent.stats_container(context(Some(STATS_DEADLINE)), &request).await?;
    Ok(response.cgroup_stats.take().unwrap_or_default())
}

/// Changes a container's limits; what is not named stays.
///
/// # Errors
/// The agent's own words.
pub async fn update(guest: &Guest, id: &str, resources: &LinuxResources) -> Result<()> {
    let request = UpdateContainerRequest {
        container_id: id.to_owned(),
        resources: Some(to_proto::resources(resources)).into(),
        ..Default::default()
    };
    guest.agent.agent.update_container(context(Some(CALL_DEADLINE)), &request).await?;
    Ok(())
}

/// The next container that ran out of memory; `None` once the connection to the guest has ended.
pub async fn oom(guest: &Arc<Guest>) -> Option<String> {
    loop {
        match guest.agent.agent.get_oom_event(context(None), &GetOOMEventRequest::default()).await {
            Ok(event) => return Some(event.container_id),
            Err(ttrpc::Error::RpcStatus(status)) => {
                tracing::debug!(message = status.message(), "no OOM event");
                tokio::time::sleep(CALL_DEADLINE).await;
            }
            Err(_) => return None,
        }
    }
}
