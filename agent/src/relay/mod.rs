//! Connections that are carried between host and guest.
//!
//! ```text
//!  tcp    host ── vsock 1030, "cofferdam-forward/1 80" ──> agent ──> 127.0.0.1:80, [::1]:80
//!  unix   container ──> socket in the guest, agent ── vsock, "cofferdam-uds/2 …" ──> host
//!  loopback   container ──> 127.0.0.11:53, agent ── the same line ──> host, 127.0.0.11:53 there
//!
//!  serve ── accept ──> a task for each connection, MAX_CONNECTIONS at a time
//!                        ├─ read or send the line, wait for the answer       with deadlines
//!                        └─ copy_both_ways │ copy_until_end_of               without
//! ```
//!
//! The lines and the copying belong to `guest_protocol` (`forward`, `host_socket`, `carry`): the
//! host does the same. This file has the accept loop of both kinds.
//!
//! Rules that a change must not break:
//!
//! * Nothing behind the line is read with it: that belongs to the connection.
//! * The end of one direction is passed on, and the other direction may go on: servers answer what
//!   is complete.
//! * A connection whose two sides are both gone ends, though neither side says so
//!   (`wait_until_both_closed`). Otherwise a client that comes and goes would leave a task and two
//!   descriptors each time.
//! * What is carried may be slow or silent for ever; a deadline here is for the handshake only.

pub mod loopback;
pub mod tcp;
pub mod unix;

use std::io;

use guest_protocol::Stream;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::deadlines;
use crate::gate::Incoming;
use crate::log::log;

/// Connections of one listener at a time; one more is closed.
const MAX_CONNECTIONS: usize = 256;

/// Accepts for ever, with one task for each connection. The tasks end when this future is dropped.
/// `name` is for the log.
pub async fn serve<W>(mut incoming: Incoming, name: &'static str, work: impl Fn(Stream) -> W)
where
    W: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = incoming.accept() => accepted,
            Some(ended) = connections.join_next() => {
                if let Ok(Err(error)) = ended {
                    log!("{name}: {error}");
                }
                continue;
            }
        };
        match accepted {
            Ok(stream) if connections.len() < MAX_CONNECTIONS => {
                connections.spawn(work(stream));
            }
            Ok(_) => log!("{name}: {MAX_CONNECTIONS} connections already, one more is closed"),
            Err(error) => {
                log!("{name}: accept: {error}");
                // Out of descriptors, for example: others must close some first.
                sleep(deadlines::ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
}
