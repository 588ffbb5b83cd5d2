//! What the guest is asked to do with a process or a container, each call with its deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_protocol::protocols::agent::{
    ExecProcessRequest, PauseContainerRequest, ResumeContainerRequest, SignalProcessRequest,
    StartContainerRequest, StatsContainerRequest, TtyWinResizeRequest, UpdateContainerRequest,
    WaitProcessRequest,
};
use guest_protocol::{ALL_PROCESSES, deadlines};
use oci_spec::runtime::{LinuxResources, Process};
use tokio::task::JoinHandle;
use ttrpc::Code;

use crate::error::Result;
use crate::from_guest::Stats;
use crate::guest::boot::Guest;
use crate::guest::guest_spec;
use crate::model::{ProcessId, Stdio};
use crate::stdio::{GuestIo, HostIo, Pumps};

/// An agent gives up streams that nobody claims after 30 s; those of a client that takes nearly as
/// long are made again.
const HELD_BY_AGENT: Duration = Duration::from_secs(20);

/// Everything that only changes something inside the guest.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// containerd's collector waits 2 s for the statistics of one shim.
const STATS_DEADLINE: Duration = Duration::from_secs(2);

/// Lets a container's init run.
///
/// # Errors
/// The agent's own words.
pub async fn start_init(guest: &Guest, id: &str) -> Result<()> {
    let request = StartContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    guest
        .agent
        .start_container(&request, deadlines::START_PROCESS)
        .await
}

/// The streams of an exec that is announced, being connected while its client gets around to
/// starting it.
pub struct PreconnectedStdio {
    begun: Instant,
    streams: JoinHandle<Result<GuestIo>>,
}

impl std::fmt::Debug for PreconnectedStdio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PreconnectedStdio")
    }
}

impl PreconnectedStdio {
    /// Begins to connect them, if the agent takes streams.
    pub fn begin(guest: &Arc<Guest>, key: &ProcessId, io: &Stdio) -> Option<PreconnectedStdio> {
        let (transport, key, io) = (guest.transport.clone(), key.clone(), io.clone());
        let dial = async move { GuestIo::raw(&transport, &key, &io).await };
        guest.raw_stdio.then(|| PreconnectedStdio {
            begun: Instant::now(),
            streams: tokio::spawn(dial),
        })
    }

    /// The streams, if the agent still holds them for the process.
    async fn take(mut self) -> Option<GuestIo> {
        if self.begun.elapsed() > HELD_BY_AGENT {
            return None;
        }
        (&mut self.streams).await.ok()?.ok()
    }
}

impl Drop for PreconnectedStdio {
    fn drop(&mut self) {
        self.streams.abort();
    }
}

/// What is known of an announced exec.
#[derive(Debug)]
pub struct PendingExec {
    /// What to run.
    pub process: Process,
    /// Its streams.
    pub dialled: Option<PreconnectedStdio>,
}

/// Runs a further process in a container, its stdio connected before.
///
/// # Errors
/// The agent's own words; a stdio path that does not open.
pub async fn start_exec(
    guest: &Guest,
    key: &ProcessId,
    exec: PendingExec,
    io: &Stdio,
    namespace: &str,
) -> Result<Pumps> {
    let PendingExec { process, dialled } = exec;
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
        process: Some(guest_spec::process(&process)).into(),
        ..Default::default()
    };
    let started = guest
        .agent
        .exec_process(&request, deadlines::START_PROCESS)
        .await;
    if started
        .as_ref()
        .is_err_and(|error| error.code == Code::DEADLINE_EXCEEDED)
    {
        // It may run all the same by now, and nobody would know.
        let sigkill = libc::SIGKILL.cast_unsigned();
        let _ = signal(guest, key, sigkill, false, CALL_DEADLINE).await;
    }
    started?;
    let guest_io = raw.unwrap_or_else(|| GuestIo::polled(&guest.agent, key, io));
    Ok(Pumps::start(host_io, guest_io))
}

/// Waits for the end of a process: its status, or `None` if the agent failed first, and with it the
/// machine.
pub async fn wait(guest: &Guest, key: &ProcessId) -> Option<u32> {
    let request = WaitProcessRequest {
        container_id: key.container.clone(),
        exec_id: key.exec.clone(),
        ..Default::default()
    };
    guest.agent.wait_process(&request).await
}

/// Sends a signal, with `all` to every process of the container; SIGKILL to init is for all of them
/// anyway.
///
/// # Errors
/// `NOT_FOUND` if it is gone already.
pub async fn signal(
    guest: &Guest,
    key: &ProcessId,
    signal: u32,
    all: bool,
    deadline: Duration,
) -> Result<()> {
    let exec_id = if all && guest.signal_all {
        ALL_PROCESSES
    } else {
        &key.exec
    };
    let request = SignalProcessRequest {
        container_id: key.container.clone(),
        exec_id: exec_id.to_owned(),
        signal,
        ..Default::default()
    };
    guest.agent.signal_process(&request, deadline).await
}

/// Sets the size of a process's terminal, in characters.
///
/// # Errors
/// The agent's own words.
pub async fn resize_terminal(
    guest: &Guest,
    key: &ProcessId,
    width: u32,
    height: u32,
) -> Result<()> {
    let request = TtyWinResizeRequest {
        container_id: key.container.clone(),
        exec_id: key.exec.clone(),
        row: height,
        column: width,
        ..Default::default()
    };
    match guest.agent.tty_win_resize(&request, CALL_DEADLINE).await {
        // There is no terminal, or nobody before it any more.
        Err(error) if matches!(error.code, Code::UNAVAILABLE | Code::NOT_FOUND) => Ok(()),
        other => other,
    }
}

/// Freezes (`true`) or thaws a container.
///
/// # Errors
/// The agent's own words.
pub async fn set_paused(guest: &Guest, id: &str, paused: bool) -> Result<()> {
    let id = id.to_owned();
    if paused {
        let request = PauseContainerRequest {
            container_id: id,
            ..Default::default()
        };
        guest
            .agent
            .pause_container(&request, deadlines::CHANGE_CONTAINER)
            .await
    } else {
        let request = ResumeContainerRequest {
            container_id: id,
            ..Default::default()
        };
        guest
            .agent
            .resume_container(&request, deadlines::CHANGE_CONTAINER)
            .await
    }
}

/// A container's statistics.
///
/// # Errors
/// The agent's own words.
pub async fn stats(guest: &Guest, id: &str) -> Result<Stats> {
    let request = StatsContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    guest.agent.stats(&request, STATS_DEADLINE).await
}

/// Changes a container's limits; what is not named stays.
///
/// # Errors
/// The agent's own words.
pub async fn update(guest: &Guest, id: &str, resources: &LinuxResources) -> Result<()> {
    let request = UpdateContainerRequest {
        container_id: id.to_owned(),
        resources: Some(guest_spec::resources(resources)).into(),
        ..Default::default()
    };
    guest
        .agent
        .update_container(&request, deadlines::CHANGE_CONTAINER)
        .await
}
