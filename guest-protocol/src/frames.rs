//! A watch over the ttrpc frames of an agent connection, below the client that reads them.
//!
//! The client keeps a frame of up to 4 MiB for whoever sends one, keeps any number of them for a
//! call that is not awake yet, and a small frame may decode to something thirty times as large. A
//! guest can send all of that at will, so here is what a guest may say: one response for each
//! request, none larger than [`MAX_FRAME`]. Anything else is the end of the connection, before a
//! byte of it is stored.

use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

/// The largest answer in bytes. The largest that is asked for are 32 KiB of output; the list of
/// routes that answers `UpdateRoutes` has room for a thousand of them.
pub const MAX_FRAME: u32 = 128 * 1024;

/// A connection of whose frames none breaks the rules.
#[derive(Debug)]
pub(crate) struct Watched<S> {
    stream: S,
    incoming: Frames,
    outgoing: Frames,
    verdict: Verdict,
}

/// The rule that an agent broke, once it has: calls that are made or end after that hear of a
/// closed connection only.
pub(crate) type Verdict = Arc<OnceLock<String>>;

/// One direction.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; MESSAGE_HEADER_LENGTH],
    /// Bytes of the header that are there.
    have: usize,
    /// Bytes of the payload that are to come.
    left: usize,
    /// Frames that have begun.
    count: u64,
}

impl Frames {
    /// Takes the next bytes of the stream; `check` sees each header, and the number of frames with
    /// it.
    fn take(
        &mut self,
        mut bytes: &[u8],
        check: impl Fn(MessageHeader, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let payload = self.left.min(bytes.len());
            self.left -= payload;
            bytes = &bytes[payload..];
            let part = (MESSAGE_HEADER_LENGTH - self.have).min(bytes.len());
            self.header[self.have..self.have + part].copy_from_slice(&bytes[..part]);
            self.have += part;
            bytes = &bytes[part..];
            if self.have == MESSAGE_HEADER_LENGTH {
                let header = MessageHeader::from(self.header);
                self.count += 1;
                check(header, self.count)?;
                self.left = header.length as usize;
                self.have = 0;
            }
        }
        Ok(())
    }
}

impl<S> Watched<S> {
    pub(crate) fn new(stream: S, verdict: Verdict) -> Watched<S> {
        Watched {
            stream,
            incoming: Frames::default(),
            outgoing: Frames::default(),
            verdict,
        }
    }
}

fn forbidden(what: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        let requests = this.outgoing.count;
        let checked = this
            .incoming
            .take(&buf.filled()[before..], |header, count| {
                let (kind, length) = (header.type_, header.length);
                match () {
                    () if kind != MESSAGE_TYPE_RESPONSE => Err(forbidden(format!(
                        "the agent sent a frame of type {kind}, which is no response"
                    ))),
                    () if length > MAX_FRAME => Err(forbidden(format!(
                        "the agent answered with {length} bytes: {MAX_FRAME} are allowed"
                    ))),
                    () if count > requests => {
                        Err(forbidden("the agent answered what it was not asked".into()))
                    }
                    () => Ok(()),
                }
            });
        if let Err(error) = &checked {
            let _ = this.verdict.set(error.to_string());
        }
        Poll::Ready(checked)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, buf))?;
        this.outgoing.take(&buf[..written], |_, _| Ok(()))?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn frame(kind: u8, length: u32, payload: &[u8]) -> Vec<u8> {
        let header = MessageHeader {
            length,
            stream_id: 1,
            type_: kind,
            flags: 0,
        };
        [Vec::from(header), payload.to_vec()].concat()
    }

    /// What the client reads after it has asked `requests` times.
    async fn read(requests: usize, sent: &[u8]) -> io::Result<Vec<u8>> {
        let (ours, mut agent) = duplex(1 << 20);
        let mut watched = Watched::new(ours, Verdict::default());
        for _ in 0..requests {
            // In pieces that fit no frame.
            for piece in frame(1, 5, b"hello").chunks(4) {
                watched.write_all(piece).await?;
            }
        }
        agent.write_all(sent).await?;
        drop(agent);
        let mut all = Vec::new();
        let mut piece = [0; 7];
        loop {
            match watched.read(&mut piece).await? {
                0 => return Ok(all),
                count => all.extend_from_slice(&piece[..count]),
            }
        }
    }

    #[tokio::test]
    async fn answers_pass_unchanged() {
        let answers = [frame(2, 3, b"abc"), frame(2, 0, b""), frame(2, 1, b"x")].concat();
        assert_eq!(read(3, &answers).await.unwrap(), answers);
        let largest = frame(2, MAX_FRAME, &vec![7; MAX_FRAME as usize]);
        assert_eq!(read(1, &largest).await.unwrap(), largest);
    }

    #[tokio::test]
    async fn what_is_no_answer_ends_the_connection() {
        let words =
            async |requests, sent: Vec<u8>| read(requests, &sent).await.unwrap_err().to_string();
        assert!(
            words(1, frame(2, MAX_FRAME + 1, b""))
                .await
                .contains("131073 bytes")
        );
        assert!(
            words(1, frame(2, u32::MAX, b""))
                .await
                .contains("4294967295 bytes")
        );
        assert!(words(1, frame(3, 0, b"")).await.contains("type 3"));
        assert!(words(1, frame(1, 0, b"")).await.contains("type 1"));
        let twice = [frame(2, 0, b""), frame(2, 0, b"")].concat();
        assert!(words(1, twice).await.contains("not asked"));
    }
}
