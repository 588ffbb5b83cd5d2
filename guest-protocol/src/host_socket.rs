//! Unix sockets of the host in the guest: a storage of the driver [`UDS_DRIVER`].
//!
//! The agent listens on a socket at the storage's `mount_point` in the guest. For each connection
//! to it the agent dials the port of the host that the driver option [`UDS_PORT_OPTION`] gives
//! (with a hybrid transport [`UDS_PORT`]), sends one line, reads [`crate::stdio::ACCEPTED`], and
//! copies both ways. The line has the storage's `source`, which is the host's name for the socket,
//! and the ids of the process that connected:
//!
//! ```text
//! cofferdam-uds/2 <source> <uid> <gid>\n
//! ```
//!
//! The storage's options `mode=` (octal), `uid=` and `gid=` are the permissions and the owner of
//! the socket in the guest, `type=` is its kind ([`SocketKind`]). What follows the line are the
//! bytes of a stream, or the messages of the other kinds ([`crate::packets`]); those of a datagram
//! socket go to the host alone, each user's over a connection of its own.

use std::fmt;
use std::str::FromStr;

use crate::line::{BadLine, Line, plain_number};

/// Entry of `AgentDetails.extra_features`: storages of the driver [`UDS_DRIVER`].
pub const FEATURE_UDS: &str = "cofferdam.uds";

/// Storage driver for a unix socket of the host, see [`crate::host_socket`].
pub const UDS_DRIVER: &str = "cofferdam.uds";

/// Driver of the sockets below a shared directory, its mount point, in an UpdateEphemeralMounts: a
/// socket of the agent's is mounted over each. Its options are all that there are, one line each:
/// `<source> <type> <mode> <uid> <gid> <path>`, the path from the directory.
pub const UDS_BELOW_DRIVER: &str = "cofferdam.uds-below";

/// Entry of `AgentDetails.extra_features`: [`UDS_BELOW_DRIVER`].
pub const FEATURE_UDS_BELOW: &str = "cofferdam.uds-below";

/// Driver option of [`UDS_DRIVER`]: the decimal number of the host's vsock port follows it.
pub const UDS_PORT_OPTION: &str = "port=";

/// Port on the host's end of a hybrid transport to which connections to the host's unix sockets go.
pub const UDS_PORT: u32 = 1031;

/// What kind of socket it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketKind {
    /// A connection of bytes.
    #[default]
    Stream,
    /// A connection of messages.
    SeqPacket,
    /// Messages without a connection.
    Datagram,
}

/// The kinds by their names on the wire.
const KINDS: [(SocketKind, &str); 3] = [
    (SocketKind::Stream, "stream"),
    (SocketKind::SeqPacket, "seqpacket"),
    (SocketKind::Datagram, "datagram"),
];

impl fmt::Display for SocketKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = KINDS.iter().find(|(kind, _)| kind == self);
        f.write_str(known.map_or("", |(_, name)| name))
    }
}

impl FromStr for SocketKind {
    type Err = BadLine;

    fn from_str(text: &str) -> Result<SocketKind, BadLine> {
        let known = KINDS.iter().find(|(_, name)| *name == text);
        known
            .map(|(kind, _)| *kind)
            .ok_or_else(|| BadLine::new("kind of socket", text))
    }
}

const MAGIC: &str = "cofferdam-uds/2";

/// The id that setresuid(2) takes for "leave it as it is": nobody has it.
const NO_ID: u32 = u32::MAX;

/// First line of a connection to a unix socket of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSocketRequest {
    /// The host's name for the socket: not empty, without white space.
    pub name: String,
    /// User of the process that connected, in the guest.
    pub uid: u32,
    /// Group of that process.
    pub gid: u32,
}

impl Line for HostSocketRequest {
    const MAX_BYTES: usize = 600;
}

impl fmt::Display for HostSocketRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{MAGIC} {} {} {}", self.name, self.uid, self.gid)
    }
}

impl FromStr for HostSocketRequest {
    type Err = BadLine;

    fn from_str(line: &str) -> Result<HostSocketRequest, BadLine> {
        let bad = || BadLine::new("request for a socket of the host", line);
        let words: Vec<&str> = line
            .strip_suffix('\n')
            .ok_or_else(bad)?
            .split(' ')
            .collect();
        let id = |text| plain_number(text).filter(|id| *id != NO_ID).ok_or_else(bad);
        match words.as_slice() {
            [MAGIC, name, uid, gid] if is_socket_name(name) => Ok(HostSocketRequest {
                name: (*name).to_owned(),
                uid: id(uid)?,
                gid: id(gid)?,
            }),
            _ => Err(bad()),
        }
    }
}

/// Whether a storage's `source` can be the name of a socket of the host: not empty, without white
/// space, and short enough for the line.
pub fn is_socket_name(name: &str) -> bool {
    let longest_rest = format!("{MAGIC}  {NO_ID} {NO_ID}\n").len();
    !name.is_empty()
        && !name.contains(char::is_whitespace)
        && name.len() + longest_rest <= HostSocketRequest::MAX_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        let longest = (1..)
            .map(|length| "s".repeat(length))
            .take_while(|name| is_socket_name(name))
            .last()
            .unwrap();
        for (name, uid, gid) in [("csi", 0, 0), (longest.as_str(), NO_ID - 1, 100)] {
            let request = HostSocketRequest {
                name: name.into(),
                uid,
                gid,
            };
            let line = request.to_string();
            assert!(line.len() <= HostSocketRequest::MAX_BYTES);
            assert_eq!(line.parse(), Ok(request));
        }
        assert_eq!(
            "cofferdam-uds/2 csi 0 44\n".parse(),
            Ok(HostSocketRequest {
                name: "csi".into(),
                uid: 0,
                gid: 44
            })
        );
    }

    #[test]
    fn a_kind_reads_back_as_it_was_written() {
        for (kind, _) in KINDS {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("raw".parse::<SocketKind>().is_err());
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "\n",
            "cofferdam-uds/2 csi 0 0",
            "cofferdam-uds/2 csi\n",
            "cofferdam-uds/2  0 0\n",
            "cofferdam-uds/2 csi 0 0 0\n",
            "cofferdam-uds/2 csi 0 4294967295\n",
            "cofferdam-uds/2 csi -1 0\n",
            "cofferdam-uds/2 csi 00 0\n",
            "cofferdam-uds/2 c\tsi 0 0\n",
            "cofferdam-uds/1 csi 0 0\n",
        ] {
            assert!(bad.parse::<HostSocketRequest>().is_err(), "{bad:?}");
        }
        assert!(!is_socket_name(&"s".repeat(600)));
    }
}
