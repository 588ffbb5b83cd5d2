//! The streams of an exec that is announced: they are connected while its client gets around to
//! starting it, which hides the time that takes.

use std::time::Instant;

use guest_protocol::Transport;
use tokio::task::JoinHandle;

use crate::deadlines::STREAMS_HELD;
use crate::error::Result;
use crate::from_guest::Agent;
use crate::model::{ProcessId, Stdio};
use crate::stdio::GuestIo;

/// Streams that are being connected, or are. A drop closes them.
pub struct PreconnectedStdio {
    /// With the time at which they were there.
    streams: JoinHandle<Result<(Instant, GuestIo)>>,
}

impl std::fmt::Debug for PreconnectedStdio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PreconnectedStdio")
    }
}

impl PreconnectedStdio {
    pub(super) fn begin(
        agent: &Agent,
        transport: &Transport,
        process: &ProcessId,
        io: &Stdio,
    ) -> PreconnectedStdio {
        let (agent, transport) = (agent.clone(), transport.clone());
        let (process, io) = (process.clone(), io.clone());
        let dial = async move {
            let streams = GuestIo::raw(&agent, &transport, &process, &io).await?;
            Ok((Instant::now(), streams))
        };
        PreconnectedStdio {
            streams: tokio::spawn(dial),
        }
    }

    /// The streams, if the agent still holds them for the process.
    pub(super) async fn take(mut self) -> Option<GuestIo> {
        let (connected, streams) = (&mut self.streams).await.ok()?.ok()?;
        (connected.elapsed() < STREAMS_HELD).then_some(streams)
    }
}

impl Drop for PreconnectedStdio {
    fn drop(&mut self) {
        self.streams.abort();
    }
}
