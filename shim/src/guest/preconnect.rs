//! The streams of an exec that is announced: they are connected while its client gets around to
//! starting it, which hides the time that takes.

use std::time::{Duration, Instant};

use guest_protocol::Transport;
use tokio::task::JoinHandle;

use crate::error::Result;
use crate::model::{ProcessId, Stdio};
use crate::stdio::GuestIo;

/// An agent gives up streams that nobody claims after 30 s; those of a client that takes nearly as
/// long are made again.
const HELD_BY_AGENT: Duration = Duration::from_secs(20);

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
        transport: &Transport,
        process: &ProcessId,
        io: &Stdio,
    ) -> PreconnectedStdio {
        let (transport, process, io) = (transport.clone(), process.clone(), io.clone());
        PreconnectedStdio {
            begun: Instant::now(),
            streams: tokio::spawn(async move { GuestIo::raw(&transport, &process, &io).await }),
        }
    }

    /// The streams, if the agent still holds them for the process.
    pub(super) async fn take(mut self) -> Option<GuestIo> {
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
