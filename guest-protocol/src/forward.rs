//! Forwarded TCP connections: the host connects to [`FORWARD_PORT`] in the guest and sends one
//! line; the agent connects to that TCP port of the guest's loopback, IPv4 first and then IPv6,
//! answers [`crate::stdio::ACCEPTED`], and the stream carries the connection's bytes. If nobody
//! listens on the port, the agent closes the stream without an answer.
//!
//! ```text
//! cofferdam-forward/1 <TCP port>\n
//! ```

use std::fmt;
use std::str::FromStr;

use crate::line::{BadLine, Line, plain_number};

/// Entry of `AgentDetails.extra_features`: streams to TCP ports of the guest's loopback, see
/// [`crate::forward`].
pub const FEATURE_PORT_FORWARD: &str = "cofferdam.port-forward";

/// Port in the guest for forwarded TCP connections.
pub const FORWARD_PORT: u32 = 1030;

const MAGIC: &str = "cofferdam-forward/1";

/// First line of a forwarded connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardRequest {
    /// TCP port on the guest's loopback; a line with port 0 does not parse.
    pub port: u16,
}

impl Line for ForwardRequest {
    const MAX_BYTES: usize = MAGIC.len() + " 65535\n".len();
}

impl fmt::Display for ForwardRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{MAGIC} {}", self.port)
    }
}

impl FromStr for ForwardRequest {
    type Err = BadLine;

    fn from_str(line: &str) -> Result<ForwardRequest, BadLine> {
        line.strip_prefix(MAGIC)
            .and_then(|rest| rest.strip_prefix(' ')?.strip_suffix('\n'))
            .and_then(plain_number)
            .filter(|port| *port != 0)
            .map(|port| ForwardRequest { port })
            .ok_or_else(|| BadLine::new("request for a TCP port", line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        for port in [1, 80, 65535] {
            let line = ForwardRequest { port }.to_string();
            assert!(line.len() <= ForwardRequest::MAX_BYTES);
            assert_eq!(line.parse(), Ok(ForwardRequest { port }));
        }
        assert_eq!(
            ForwardRequest { port: 80 }.to_string(),
            "cofferdam-forward/1 80\n"
        );
    }

    #[test]
    fn only_a_port_can_be_asked_for() {
        for bad in [
            "",
            "\n",
            "cofferdam-forward/1\n",
            "cofferdam-forward/1 \n",
            "cofferdam-forward/1 0\n",
            "cofferdam-forward/1 +80\n",
            "cofferdam-forward/1 080\n",
            "cofferdam-forward/1 65536\n",
            "cofferdam-forward/1 80 \n",
            "cofferdam-forward/1 80",
            "cofferdam-forward/2 80\n",
            "cofferdam-forward/1  80\n",
        ] {
            assert!(bad.parse::<ForwardRequest>().is_err(), "{bad:?}");
        }
    }
}
