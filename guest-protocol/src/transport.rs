//! How bytes reach the guest: kernel vsock, or a unix socket of a user space vsock device
//! ("hybrid").

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::deadlines::VSOCK_DAEMON_ANSWER;
use crate::key::Key;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

/// `VMADDR_PORT_ANY` of vsock(7): the kernel picks a free port.
const PORT_ANY: u32 = u32::MAX;

/// Longest answer line to `CONNECT`, in bytes. The device answers `OK <port>\n`.
const MAX_ANSWER: usize = 64;

/// The way to one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// AF_VSOCK of the host's kernel (vhost-vsock).
    Vsock {
        /// Context id of the guest.
        cid: u32,
    },
    /// The unix socket of a user space vsock device: `CONNECT <port>\n` is answered by `OK
    /// <port>\n`; what the guest dials arrives on `<path>_<port>`.
    Hybrid {
        /// The device's socket.
        path: PathBuf,
    },
    /// A plain unix socket of an agent that runs as an ordinary process. There are no ports: the
    /// port is appended to the path as `<path>_<port>`, but for the agent's own, which is `<path>`.
    Unix {
        /// The agent's socket.
        path: PathBuf,
    },
    /// Another one, to a guest that asks for a key.
    Keyed {
        /// The way.
        way: Box<Transport>,
        /// What each connection begins with.
        key: Key,
    },
}

/// A connected byte stream.
#[derive(Debug)]
pub enum Stream {
    /// Hybrid vsock or a plain unix socket.
    Unix(UnixStream),
    /// Kernel vsock.
    Vsock(VsockStream),
}

/// Listens for what the guest dials.
#[derive(Debug)]
pub enum Listener {
    /// `<path>_<port>` of a hybrid transport; the file is removed on drop.
    Unix {
        /// The bound socket.
        listener: UnixListener,
        /// Its file.
        path: PathBuf,
    },
    /// A port on the host's kernel vsock.
    Vsock {
        /// The bound socket.
        listener: VsockListener,
        /// The only guest that may connect.
        cid: u32,
    },
}

impl Transport {
    /// Connects to a port of the guest within `deadline`.
    ///
    /// # Errors
    /// `TimedOut` after the deadline; `ConnectionRefused` when nobody listens on the port yet.
    pub async fn dial(&self, port: u32, deadline: Duration) -> io::Result<Stream> {
        timeout(deadline, self.connect(port)).await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("guest port {port} did not answer within {deadline:?}"),
            )
        })?
    }

    async fn connect(&self, port: u32) -> io::Result<Stream> {
        match self {
            Transport::Vsock { cid } => Ok(Stream::Vsock(
                VsockStream::connect(VsockAddr::new(*cid, port)).await?,
            )),
            Transport::Hybrid { path } => {
                // A task of its own, so that giving up on the dial never breaks it off:
                // vhost-device-vsock 0.3 spins for ever on a connection that ends before it has
                // answered the CONNECT line. A daemon that hangs does so anyway.
                let connecting = timeout(VSOCK_DAEMON_ANSWER, connect_hybrid(path.clone(), port));
                let dial = tokio::spawn(connecting).await.map_err(io::Error::other)?;
                dial.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
                    .map(Stream::Unix)
            }
            Transport::Unix { path } if port == crate::AGENT_PORT => {
                UnixStream::connect(path).await.map(Stream::Unix)
            }
            Transport::Unix { path } => UnixStream::connect(with_port(path, port))
                .await
                .map(Stream::Unix),
            Transport::Keyed { way, key } => {
                let mut stream = Box::pin(way.connect(port)).await?;
                stream.write_all(key.line()).await?;
                Ok(stream)
            }
        }
    }

    /// Listens for connections that the guest makes to the host's `port`. On kernel vsock the port
    /// is picked by the kernel, because all guests share one port space: use [`Listener::port`].
    ///
    /// # Errors
    /// The bind error, for example a socket path that is too long.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        match self {
            Transport::Vsock { cid } => {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT_ANY))?;
                Ok(Listener::Vsock {
                    listener,
                    cid: *cid,
                })
            }
            Transport::Hybrid { path } | Transport::Unix { path } => {
                let path = with_port(path, port);
                let listener = UnixListener::bind(&path)?;
                Ok(Listener::Unix { listener, path })
            }
            Transport::Keyed { way, .. } => way.listen(port),
        }
    }
}

fn with_port(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

async fn connect_hybrid(path: PathBuf, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    // The guest's servers speak second, so nothing can follow the line yet.
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    while answer.last() != Some(&b'\n') {
        let mut chunk = [0; MAX_ANSWER];
        let length = stream.read(&mut chunk).await?;
        if length == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("nobody listens on guest port {port}"),
            ));
        }
        answer.extend_from_slice(&chunk[..length]);
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "vsock device answered CONNECT with a long line",
            ));
        }
    }
    if answer.starts_with(b"OK") {
        return Ok(stream);
    }
    let answer = String::from_utf8_lossy(&answer).trim().to_owned();
    Err(io::Error::new(
        io::ErrorKind::ConnectionRefused,
        format!("vsock device answered CONNECT with {answer:?}"),
    ))
}

impl Listener {
    /// The port that the guest must dial, where it was not the caller's choice (kernel vsock).
    ///
    /// # Errors
    /// The socket's own error.
    pub fn port(&self, wanted: u32) -> io::Result<u32> {
        match self {
            Listener::Unix { .. } => Ok(wanted),
            Listener::Vsock { listener, .. } => Ok(listener.local_addr()?.port()),
        }
    }

    /// The next connection from this listener's guest; connections of others are dropped.
    ///
    /// # Errors
    /// The socket's own error.
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
            Listener::Vsock { listener, cid } => loop {
                let (stream, peer) = listener.accept().await?;
                if peer.cid() == *cid {
                    return Ok(Stream::Vsock(stream));
                }
            },
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix { path, .. } = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Vsock(stream) => stream.as_raw_fd(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Vsock(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Vsock(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vsock device that gives one answer to `CONNECT`, in pieces.
    async fn dial(answer: &'static [&'static [u8]]) -> io::Result<Stream> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path)?;
        let device = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            let mut request = [0; 13];
            stream.read_exact(&mut request).await?;
            assert_eq!(&request, b"CONNECT 1024\n");
            for piece in answer {
                stream.write_all(piece).await?;
                tokio::task::yield_now().await;
            }
            Ok::<_, io::Error>(())
        });
        let result = Transport::Hybrid { path }
            .dial(1024, Duration::from_secs(5))
            .await;
        device.await??;
        result
    }

    #[tokio::test]
    async fn a_hybrid_device_that_agrees_connects() {
        dial(&[b"O", b"K 10", b"73\n"]).await.unwrap();
    }

    #[tokio::test]
    async fn a_hybrid_device_that_does_not_is_an_error() {
        assert_eq!(
            dial(&[]).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        assert_eq!(
            dial(&[b"NO\n"]).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        assert_eq!(
            dial(&[&[b'x'; 200]]).await.unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }
}
