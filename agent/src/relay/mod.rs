//! Connections that are carried between host and guest.
//!
//! ```text
//!  tcp    host ── vsock 1030, "cofferdam-forward/1 80" ──> agent ──> 127.0.0.1:80, [::1]:80
//!  unix   container ──> socket in the guest, agent ── vsock, "cofferdam-uds/2 …" ──> host
//!
//!  serve ── accept ──> a task for each connection, MAX_CONNECTIONS at a time
//!                        ├─ read or send the line, wait for the answer       with deadlines
//!                        └─ copy_both_ways │ copy_until_end_of               without
//! ```
//!
//! The lines belong to `guest_protocol` (`forward`, `host_socket`). This file has what both kinds
//! share: the accept loop and the copying.
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

pub mod tcp;
pub mod unix;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use guest_protocol::Stream;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, copy_bidirectional_with_sizes, split};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::deadlines;
use crate::gate::Incoming;
use crate::log::log;

/// Connections of one listener at a time; one more is closed.
const MAX_CONNECTIONS: usize = 256;

/// How much one direction moves at once, in bytes.
const CHUNK: usize = 16 << 10;

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

/// Copies both ways until both sides have ended. The end of one is passed on to the other, which
/// may go on.
///
/// # Errors
/// The failed read or write.
pub async fn copy_both_ways<A, B>(mut one: A, mut other: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + AsRawFd + Unpin,
    B: AsyncRead + AsyncWrite + AsRawFd + Unpin,
{
    let sockets = [one.as_raw_fd(), other.as_raw_fd()];
    tokio::select! {
        done = copy_bidirectional_with_sizes(&mut one, &mut other, CHUNK,
            CHUNK) => done.map(|_| ()),
        () = wait_until_both_closed(sockets) => Ok(()),
    }
}

/// Copies both ways until `last` has ended. The end of the other is passed on, and `last` may go
/// on.
///
/// # Errors
/// The failed read or write.
pub async fn copy_until_end_of<A, B>(last: A, other: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + AsRawFd,
    B: AsyncRead + AsyncWrite + AsRawFd,
{
    let sockets = [last.as_raw_fd(), other.as_raw_fd()];
    let ((mut from, mut to), (mut other_from, mut other_to)) = (split(last), split(other));
    let back = async {
        copy(&mut other_from, &mut to).await?;
        to.shutdown().await?;
        std::future::pending().await
    };
    tokio::select! {
        done = copy(&mut from, &mut other_to) => done.map(|_| ()),
        failed = back => failed,
        () = wait_until_both_closed(sockets) => Ok(()),
    }
}

/// Waits until neither socket can be written to. A peer that has closed its socket looks like one
/// that has only finished sending, until something is written to it, and the other side may never
/// send anything; a write of no bytes tells the two apart. A socket whose write side was shut down,
/// because the other side's input ended, cannot be written to either; but as long as one of the two
/// can, there is something to carry.
async fn wait_until_both_closed(sockets: [RawFd; 2]) {
    let is_closed = |socket| {
        let sent = send(socket, &[], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        !matches!(sent, Ok(_) | Err(Errno::EAGAIN))
    };
    while !sockets.into_iter().all(is_closed) {
        sleep(deadlines::DEAD_CONNECTION_POLL).await;
    }
}
