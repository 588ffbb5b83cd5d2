//! Copying between the two sides of a connection that is carried: a port that is forwarded, a unix
//! socket of the host. Host and agent each carry one half of it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, copy_bidirectional_with_sizes, split};
use tokio::time::sleep;

use crate::deadlines::DEAD_CONNECTION_POLL;

/// How much one direction moves at once, in bytes.
const CHUNK: usize = 16 << 10;

/// Copies both ways until both sides have ended. The end of one is passed on to the other, which
/// may go on.
///
/// # Errors
/// The failed read or write.
pub async fn copy_both_ways<A, B>(one: &mut A, other: &mut B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + AsRawFd + Unpin,
    B: AsyncRead + AsyncWrite + AsRawFd + Unpin,
{
    let sockets = [one.as_raw_fd(), other.as_raw_fd()];
    tokio::select! {
        done = copy_bidirectional_with_sizes(one, other, CHUNK, CHUNK) => done.map(|_| ()),
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
        sleep(DEAD_CONNECTION_POLL).await;
    }
}
