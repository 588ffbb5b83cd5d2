//! A listener whose connections are each joined to another one: the loop that accepts, bounded, and
//! its end.

use std::future::Future;
use std::io;

use guest_protocol::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use crate::deadlines::ACCEPT_AGAIN;

/// Connections at a time. The next wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 512;

/// Something that connections come from.
pub trait Accept: Send + Sync + 'static {
    type Connection: Send;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

impl Accept for TcpListener {
    type Connection = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        Ok(TcpListener::accept(self).await?.0)
    }
}

impl Accept for Listener {
    type Connection = guest_protocol::Stream;

    async fn accept(&self) -> io::Result<guest_protocol::Stream> {
        Listener::accept(self).await
    }
}

/// The listener and its connections; all of them end with this.
#[derive(Debug)]
pub struct Relay(JoinHandle<()>);

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Gives each connection of `listener` to `join`.
pub fn serve<A, F>(listener: A, join: impl Fn(A::Connection) -> F + Send + 'static) -> Relay
where
    A: Accept,
    F: Future<Output = ()> + Send + 'static,
{
    Relay(tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept(),
                    if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok(connection) => {
                        connections.spawn(join(connection));
                    }
                    Err(error) => {
                        tracing::debug!(%error, "cannot accept a connection");
                        sleep(ACCEPT_AGAIN).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }))
}
