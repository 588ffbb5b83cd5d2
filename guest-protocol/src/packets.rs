//! Sockets that keep messages apart (datagrams, sequenced packets), carried over a byte stream.
//! Host and agent each carry one half.
//!
//! A message is its length, four bytes with the highest first, and its bytes. The end of the stream
//! is the end of the socket.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::ucred;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, UnixAddr, UnixCredentials, recvmsg,
    sendmsg, shutdown,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf, ReadHalf, WriteHalf,
    split,
};
use tokio::net::UnixStream;

/// Longest message in bytes: more than a sender can have in flight by Linux's default
/// (net.core.wmem_default).
pub const MAX_PACKET: usize = 256 << 10;

/// A datagram or sequenced-packet socket.
#[derive(Debug)]
pub struct PacketSocket(AsyncFd<OwnedFd>);

/// Who has sent a message, as far as the kernel was asked (`SO_PASSCRED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sender {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What is said where somebody passes descriptors.
fn no_descriptors() -> io::Error {
    invalid("file descriptors were passed over it, which cannot leave the kernel that they are of")
}

impl PacketSocket {
    /// Takes a socket, which does not block from then on.
    ///
    /// # Errors
    /// The kernel's, or no runtime.
    pub fn new(socket: OwnedFd) -> io::Result<PacketSocket> {
        let flags = OFlag::from_bits_truncate(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the descriptor is owned by the value, and closed after it is deregistered.
        Ok(PacketSocket(unsafe { AsyncFd::register(socket) }?))
    }

    /// The next message and, if the kernel tells, its sender. No bytes are the end of a
    /// sequenced-packet socket, or a message without any.
    ///
    /// # Errors
    /// The socket's own. `InvalidData`: the message is longer than the buffer, or had descriptors
    /// with it; it is gone, and those are closed.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Option<Sender>)> {
        self.0
            .async_io(Interest::READABLE, |socket| {
                // Room for a sender and for nothing else: the kernel closes descriptors itself.
                let mut control = nix::cmsg_space!(ucred);
                let mut parts = [IoSliceMut::new(buffer)];
                let got = recvmsg::<UnixAddr>(
                    socket.as_raw_fd(),
                    &mut parts,
                    Some(&mut control),
                    MsgFlags::MSG_CMSG_CLOEXEC,
                )?;
                let mut sender = None;
                let mut descriptors = got.flags.contains(MsgFlags::MSG_CTRUNC);
                for message in got.cmsgs()? {
                    match message {
                        ControlMessageOwned::ScmCredentials(who) => {
                            let (uid, gid) = (who.uid(), who.gid());
                            sender = Some(Sender { uid, gid });
                        }
                        ControlMessageOwned::ScmRights(passed) => {
                            descriptors = true;
                            passed.into_iter().for_each(close);
                        }
                        _ => {}
                    }
                }
                if descriptors {
                    return Err(no_descriptors());
                }
                if got.flags.contains(MsgFlags::MSG_TRUNC) {
                    return Err(invalid("a message is longer than 256 KiB"));
                }
                Ok((got.bytes, sender))
            })
            .await
    }

    /// Sends one message, by the ids of `sender` if there is one.
    ///
    /// # Errors
    /// The socket's own.
    pub async fn send(&self, message: &[u8], sender: Option<Sender>) -> io::Result<()> {
        self.0
            .async_io(Interest::WRITABLE, |socket| {
                let who = sender.map(|Sender { uid, gid }| {
                    let pid = std::process::id().cast_signed();
                    UnixCredentials::from(ucred { pid, uid, gid })
                });
                let control: Vec<_> = who.iter().map(ControlMessage::ScmCredentials).collect();
                sendmsg::<UnixAddr>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(message)],
                    &control,
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )?;
                Ok(())
            })
            .await
    }
}

fn close(passed: RawFd) {
    let _ = nix::unistd::close(passed);
}

/// Writes one message to a stream.
///
/// # Errors
/// The stream's own.
pub async fn write_packet(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(message).await
}

/// Reads one message of a stream into `buffer`, which has room for [`MAX_PACKET`]. None is the end
/// of the stream.
///
/// # Errors
/// The stream's own; a length that no message has.
pub async fn read_packet<'a>(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &'a mut [u8],
) -> io::Result<Option<&'a [u8]>> {
    let length = match stream.read_u32().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        length => usize::try_from(length?).map_err(io::Error::other)?,
    };
    let message = buffer
        .get_mut(..length)
        .ok_or_else(|| invalid("a message is longer than 256 KiB"))?;
    stream.read_exact(message).await?;
    Ok(Some(message))
}

/// Carries a sequenced-packet socket until one side has ended. Half of it cannot be left open: the
/// other side could not tell an end from a message without bytes.
///
/// # Errors
/// The failed read or write.
pub async fn copy_packets_both_ways<S>(socket: &PacketSocket, stream: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (from, to) = split(stream);
    let copied = tokio::select! {
        copied = packets_out(socket, to) => copied,
        copied = packets_in(from, socket) => copied,
    };
    let _ = shutdown(socket.0.as_raw_fd(), Shutdown::Both);
    copied
}

async fn packets_out<S: AsyncWrite>(socket: &PacketSocket, mut to: WriteHalf<S>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let (length, _) = socket.receive(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        write_packet(&mut to, &buffer[..length]).await?;
    }
}

async fn packets_in<S: AsyncRead>(mut from: ReadHalf<S>, socket: &PacketSocket) -> io::Result<()> {
    let mut buffer = vec![0; MAX_PACKET];
    while let Some(message) = read_packet(&mut from, &mut buffer).await? {
        socket.send(message, None).await?;
    }
    Ok(())
}

/// A stream socket over which bytes can be sent, but no descriptors: one that is passed ends it,
/// where a plain read would close it without a word.
#[derive(Debug)]
pub struct BytesOnly(pub UnixStream);

impl AsRawFd for BytesOnly {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsyncRead for BytesOnly {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            let got = self.0.try_io(Interest::READABLE, || {
                let socket = self.0.as_fd().as_raw_fd();
                let mut parts = [IoSliceMut::new(buf.initialize_unfilled())];
                // Without room for them the kernel closes descriptors, and says so.
                let got = recvmsg::<UnixAddr>(socket, &mut parts, None, MsgFlags::empty())?;
                match got.flags.contains(MsgFlags::MSG_CTRUNC) {
                    true => Err(no_descriptors()),
                    false => Ok(got.bytes),
                }
            });
            match got {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                got => {
                    buf.advance(got?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for BytesOnly {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

    use super::*;

    fn pair(kind: SockType) -> (PacketSocket, PacketSocket) {
        let (one, other) =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        (
            PacketSocket::new(one).unwrap(),
            PacketSocket::new(other).unwrap(),
        )
    }

    fn pass_a_descriptor(socket: RawFd) {
        let passed = [0];
        let control = [ControlMessage::ScmRights(&passed)];
        let parts = [IoSlice::new(b"x")];
        sendmsg::<UnixAddr>(socket, &parts, &control, MsgFlags::empty(), None).unwrap();
    }

    #[tokio::test]
    async fn messages_stay_apart_and_the_end_comes_through() {
        let (client, guest) = pair(SockType::SeqPacket);
        let (host, server) = pair(SockType::SeqPacket);
        let (one, other) = tokio::io::duplex(10);
        let carried = async {
            tokio::join!(
                copy_packets_both_ways(&guest, one),
                copy_packets_both_ways(&host, other)
            )
        };
        let talk = async {
            for message in [&b"one"[..], &[7; 100_000], b"three"] {
                client.send(message, None).await.unwrap();
            }
            let mut buffer = vec![0; MAX_PACKET];
            for length in [3, 100_000, 5] {
                assert_eq!(server.receive(&mut buffer).await.unwrap().0, length);
            }
            server.send(b"answer", None).await.unwrap();
            assert_eq!(client.receive(&mut buffer).await.unwrap().0, 6);
            drop(client);
            assert_eq!(server.receive(&mut buffer).await.unwrap().0, 0);
        };
        let ((there, back), ()) = tokio::join!(carried, talk);
        there.unwrap();
        back.unwrap();
    }

    #[tokio::test]
    async fn a_datagram_has_its_sender_and_nothing_too_long_is_cut() {
        let (sender, receiver) = pair(SockType::Datagram);
        setsockopt(&receiver.0, sockopt::PassCred, &true).unwrap();
        let who = Sender { uid: 7, gid: 9 };
        sender.send(b"hello", Some(who)).await.unwrap();
        let mut buffer = [0; 100];
        let got = receiver.receive(&mut buffer).await.unwrap();
        assert_eq!(got, (5, Some(who)));
        sender.send(&[0; 101], None).await.unwrap();
        let error = receiver.receive(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        pass_a_descriptor(sender.0.as_raw_fd());
        assert!(receiver.receive(&mut buffer).await.is_err());
        sender.send(b"next", None).await.unwrap();
        assert_eq!(receiver.receive(&mut buffer).await.unwrap().0, 4);
    }

    #[tokio::test]
    async fn a_length_that_no_message_has_ends_it() {
        let mut buffer = vec![0; MAX_PACKET];
        let long = u32::MAX.to_be_bytes();
        assert!(read_packet(&mut &long[..], &mut buffer).await.is_err());
        assert_eq!(read_packet(&mut &b""[..], &mut buffer).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_descriptor_ends_a_stream_and_bytes_do_not() {
        let (client, agent) = UnixStream::pair().unwrap();
        let mut agent = BytesOnly(agent);
        client.try_write(b"abc").unwrap();
        assert_eq!(agent.read(&mut [0; 10]).await.unwrap(), 3);
        pass_a_descriptor(client.as_raw_fd());
        let error = agent.read(&mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(client);
        assert_eq!(agent.read(&mut [0; 10]).await.unwrap(), 0);
    }
}
