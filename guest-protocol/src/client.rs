//! The client's end of the agent connection: one ttrpc connection, every call with a deadline.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use crate::frames::{Verdict, Watched};
use crate::protocols::agent_ttrpc::AgentServiceClient;
use crate::protocols::clock_ttrpc::ClockClient;
use crate::protocols::health_ttrpc::HealthClient;
use crate::protocols::memory_ttrpc::MemoryClient;
use crate::protocols::network_ttrpc::NetworkClient;
use crate::transport::Stream;

/// A connection to a guest agent. Clones share it; calls run side by side.
#[derive(Clone)]
pub struct AgentClient {
    /// The agent service.
    pub agent: AgentServiceClient,
    /// Health and version.
    pub health: HealthClient,
    /// The time of day, see [`crate::FEATURE_CLOCK`].
    pub clock: ClockClient,
    /// Memory that grows, see [`crate::FEATURE_MEMORY`].
    pub memory: MemoryClient,
    /// The network as the host has it, see [`crate::FEATURE_NETWORK`].
    pub network: NetworkClient,
    verdict: Verdict,
}

impl AgentClient {
    /// Speaks ttrpc over a stream that is connected to the agent's port.
    pub fn new(stream: Stream) -> AgentClient {
        match stream {
            Stream::Unix(stream) => AgentClient::over(stream),
            Stream::Vsock(stream) => AgentClient::over(stream),
        }
    }

    /// Speaks ttrpc over any connection to an agent. The agent can make it keep no more than one
    /// small answer for each call: one that breaks this rule (see `frames.rs`) has its connection
    /// closed.
    pub fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
    ) -> AgentClient {
        let verdict = Verdict::default();
        let client =
            ttrpc::r#async::Client::new(Socket::new(Watched::new(stream, verdict.clone())));
        AgentClient {
            agent: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client.clone()),
            clock: ClockClient::new(client.clone()),
            memory: MemoryClient::new(client.clone()),
            network: NetworkClient::new(client),
            verdict,
        }
    }

    /// The rule that the agent broke, if that is why the connection is closed.
    pub fn broken(&self) -> Option<&str> {
        self.verdict.get().map(String::as_str)
    }
}

/// The context of one call. `deadline` also travels to the agent (`timeout_nano`); `None` is for
/// the calls that are parked until something happens in the guest (wait, read, OOM) and end with
/// the connection.
pub fn context(deadline: Option<Duration>) -> Context {
    match deadline {
        Some(deadline) => ttrpc::context::with_duration(deadline),
        None => Context::default(),
    }
}
