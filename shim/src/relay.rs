//! A listener whose connections are each joined to another one: the loop that accepts, bounded, and
//! its end.

use std::future::Future;
use std::io;
use std::sync::Arc;

use guest_protocol::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
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
pub struct Relay {
    task: JoinHandle<()>,
    retire: Arc<Notify>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    /// Takes no more connections. Those that there are go on.
    pub fn retire(&self) {
        self.retire.notify_one();
    }

    /// Whether it was retired, and its last connection has ended.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

/// Gives each connection of `listener` to `join`.
pub fn serve<A, F>(listener: A, join: impl Fn(A::Connection) -> F + Send + 'static) -> Relay
where
    A: Accept,
    F: Future<Output = ()> + Send + 'static,
{
    let retire = Arc::new(Notify::new());
    let retired = retire.clone();
    let task = tokio::spawn(async move {
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
                () = retired.notified() => break,
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    });
    Relay { task, retire }
}
