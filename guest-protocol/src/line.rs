//! Requests that are one line of text, and reading one without a byte of what follows it.
//!
//! Three of the protocol's streams begin with such a line, after which the stream carries bytes of
//! somebody else: stdio ([`crate::stdio::Header`]), forwarded TCP connections
//! ([`crate::forward::ForwardRequest`]) and unix sockets of the host
//! ([`crate::host_socket::HostSocketRequest`]). Whoever takes the stream answers one byte,
//! [`crate::stdio::ACCEPTED`], or closes it.

use std::fmt::Display;
use std::io;
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncReadExt};

/// A request that is one line. `Display` writes it and `FromStr` parses it, both with the newline.
pub trait Line: Display + FromStr<Err = BadLine> {
    /// Longest line in bytes, the newline included.
    const MAX_BYTES: usize;
}

/// A line that does not follow its format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a {expected}: {shown:?}")]
pub struct BadLine {
    expected: &'static str,
    /// The beginning of the line.
    shown: String,
}

impl BadLine {
    pub(crate) fn new(expected: &'static str, line: &str) -> BadLine {
        BadLine {
            expected,
            shown: line.chars().take(80).collect(),
        }
    }
}

/// Reads one line and not a byte behind it. The caller sets the deadline.
///
/// # Errors
/// `InvalidData` for a line that is too long or does not follow its format; the stream's own.
pub async fn read_line<T: Line>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let invalid = |error: BadLine| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut line = Vec::with_capacity(T::MAX_BYTES);
    while line.last() != Some(&b'\n') {
        if line.len() == T::MAX_BYTES {
            let shown = String::from_utf8_lossy(&line);
            return Err(invalid(BadLine::new("line of the allowed length", &shown)));
        }
        line.push(stream.read_u8().await?);
    }
    String::from_utf8_lossy(&line).parse().map_err(invalid)
}

/// A number that is written in the one way that `Display` has for it: no sign, no leading zero.
pub(crate) fn plain_number<T: FromStr + Display>(text: &str) -> Option<T> {
    let number: T = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::ForwardRequest;

    async fn read(mut bytes: &[u8]) -> (io::Result<ForwardRequest>, &[u8]) {
        let request = read_line(&mut bytes).await;
        (request, bytes)
    }

    #[tokio::test]
    async fn what_follows_the_line_stays_in_the_stream() {
        let (request, rest) = read(b"cofferdam-forward/1 80\nGET /\n").await;
        assert_eq!(request.unwrap(), ForwardRequest { port: 80 });
        assert_eq!(rest, b"GET /\n");
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_given_up() {
        let (request, rest) = read(&[b'x'; 1000]).await;
        assert_eq!(request.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(rest.len(), 1000 - ForwardRequest::MAX_BYTES);
        let (request, _) = read(b"cofferdam-forward/1 8").await;
        assert_eq!(request.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
