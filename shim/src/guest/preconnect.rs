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
    begun: Instant,
    streams: JoinHandle<Result<GuestIo>>,
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
        let dial = async move { GuestIo::raw(&agent, &transport, &process, &io).await };
        PreconnectedStdio {
            begun: Instant::now(),
            streams: tokio::spawn(dial),
        }
    }

    /// The streams, if the agent still holds them for the process.
    pub(super) async fn take(mut self) -> Option<GuestIo> {
        if self.begun.elapsed() > STREAMS_HELD {
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
