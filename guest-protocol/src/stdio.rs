//! Raw stdio: one vsock stream for each stdio channel of a process, beside ttrpc.
//!
//! The host dials [`crate::STDIO_PORT`] and sends one header line; the agent answers [`ACCEPTED`]
//! and then the stream carries the channel's bytes and nothing else. A stream for a process that
//! does not exist yet is kept until `CreateContainer` or `ExecProcess` makes it, so the host
//! connects before the process can run. End of file on a stream is end of file of the channel. The
//! header is text:
//!
//! ```text
//! cofferdam-stdio/1 stdout <container id> <exec id>\n
//! ```
//!
//! The exec id is empty for the container's init process. Ids hold no white space (containerd
//! allows only `[A-Za-z0-9_.-]`).

use std::fmt;
use std::str::FromStr;

use crate::line::{BadLine, Line};

/// Sent by the agent once it holds the stream.
pub const ACCEPTED: u8 = b'+';

const MAGIC: &str = "cofferdam-stdio/1";

/// A stdio channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Channel {
    /// Host to process.
    Stdin,
    /// Process to host; with a terminal, everything it shows.
    Stdout,
    /// Process to host; absent with a terminal.
    Stderr,
}

/// First line of a raw stdio stream: which channel of which process it carries.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// Which of the process's three channels.
    pub channel: Channel,
    /// Id of the process's container.
    pub container_id: String,
    /// The exec, empty for the container's init process.
    pub exec_id: String,
}

impl Line for Header {
    /// Two ids of at most 255 bytes, and the rest.
    const MAX_BYTES: usize = 600;
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let channel = match self.channel {
            Channel::Stdin => "stdin",
            Channel::Stdout => "stdout",
            Channel::Stderr => "stderr",
        };
        writeln!(
            f,
            "{MAGIC} {channel} {} {}",
            self.container_id, self.exec_id
        )
    }
}

impl FromStr for Header {
    type Err = BadLine;

    /// Parses a whole line, the newline included.
    fn from_str(line: &str) -> Result<Header, BadLine> {
        let bad = || BadLine::new("stdio header", line);
        let mut fields = line.strip_suffix('\n').ok_or_else(bad)?.split(' ');
        let mut field = || fields.next().ok_or_else(bad);
        if field()? != MAGIC {
            return Err(bad());
        }
        let channel = match field()? {
            "stdin" => Channel::Stdin,
            "stdout" => Channel::Stdout,
            "stderr" => Channel::Stderr,
            _ => return Err(bad()),
        };
        let container_id = field()?.to_owned();
        let exec_id = field()?.to_owned();
        if container_id.is_empty() || fields.next().is_some() {
            return Err(bad());
        }
        Ok(Header {
            channel,
            container_id,
            exec_id,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_as_it_was_written() {
        for (channel, exec_id) in [
            (Channel::Stdin, ""),
            (Channel::Stdout, "e1"),
            (Channel::Stderr, "a.b_c-d"),
        ] {
            let header = Header {
                channel,
                container_id: "web".into(),
                exec_id: exec_id.into(),
            };
            assert_eq!(header.to_string().parse::<Header>().unwrap(), header);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [
            "",
            "\n",
            "GET / HTTP/1.1\n",
            "cofferdam-stdio/1 stdout c \n extra",
            "cofferdam-stdio/1 stdout c",
            "cofferdam-stdio/1 stdwhat c e\n",
            "cofferdam-stdio/1 stdout  e\n",
            "cofferdam-stdio/1 stdout c e f\n",
            "cofferdam-stdio/2 stdout c e\n",
        ] {
            assert!(line.parse::<Header>().is_err(), "{line:?}");
        }
    }
}
