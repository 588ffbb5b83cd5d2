//! Connections that are carried through the guest: the line that opens one, and the bytes both
//! ways.

pub mod tcp;
pub mod unix;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use guest_protocol::Stream;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, copy_bidirectional_with_sizes, split,
};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::gate::Arrivals;
use crate::log::log;

/// By when a peer must have sent its line, or the answer to ours.
pub const HANDSHAKE: Duration = Duration::from_secs(5);

/// Connections of one listener at a time; what comes above is closed.
const MOST: usize = 256;

/// How much one direction moves at once, in bytes.
const CHUNK: usize = 16 << 10;

/// How often a connection is asked whether it still leads anywhere.
const PULSE: Duration = Duration::from_secs(1);

/// Accepts for ever, with one task for each connection; they end with this one.
pub async fn serve<W>(mut arrivals: Arrivals, what: &'static str, work: impl Fn(Stream) -> W)
where
    W: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = arrivals.accept() => accepted,
            Some(ended) = connections.join_next() => {
                if let Ok(Err(error)) = ended {
                    log!("{what}: {error}");
                }
                continue;
            }
        };
        match accepted {
            Ok(stream) if connections.len() < MOST => {
                connections.spawn(work(stream));
            }
            Ok(_) => log!("{what}: {MOST} connections already, one more is closed"),
            Err(error) => {
                log!("{what}: accept: {error}");
                // Out of descriptors, for example: others must close some first.
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Reads one line of at most `most` bytes and nothing behind it. The newline is not part of the
/// answer.
///
/// # Errors
/// A peer that is late, that hangs up, or whose line has no end.
pub async fn read_line(stream: &mut Stream, most: usize) -> io::Result<String> {
    let read = async {
        let mut line = Vec::with_capacity(most);
        loop {
            match stream.read_u8().await? {
                b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
                _ if line.len() == most => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the first line has no end",
                    ));
                }
                byte => line.push(byte),
            }
        }
    };
    timeout(HANDSHAKE, read).await?
}

/// Copies both ways until both sides have ended. The end of one is passed on to the other, which
/// may go on.
///
/// # Errors
/// The failed read or write.
pub async fn both_ways<A, B>(mut one: A, mut other: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + AsRawFd + Unpin,
    B: AsyncRead + AsyncWrite + AsRawFd + Unpin,
{
    let sockets = [one.as_raw_fd(), other.as_raw_fd()];
    tokio::select! {
        done = copy_bidirectional_with_sizes(&mut one, &mut other, CHUNK,
            CHUNK) => done.map(|_| ()),
        () = dead_end(sockets) => Ok(()),
    }
}

/// Copies both ways until `last` has ended. The end of the other is passed on, and `last` may go
/// on.
///
/// # Errors
/// The failed read or write.
pub async fn until_end_of<A, B>(last: A, other: B) -> io::Result<()>
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
        () = dead_end(sockets) => Ok(()),
    }
}

/// Waits until neither socket takes anything. A peer that is gone looks like one that has only
/// finished sending, until something is sent to it, and the other side may never do so; sending
/// nothing tells the two apart. A socket that was told the other's end takes nothing either, but as
/// long as one does, there is something to carry.
async fn dead_end(sockets: [RawFd; 2]) {
    let deaf = |socket| {
        let sent = send(socket, &[], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        !matches!(sent, Ok(_) | Err(Errno::EAGAIN))
    };
    while !sockets.into_iter().all(deaf) {
        sleep(PULSE).await;
    }
}
