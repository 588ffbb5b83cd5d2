//! Route netlink in as few words as the agent needs: requests, attributes, dumps. A crate for it
//! would make the agent larger by 800 kB.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::deadlines::NETLINK_ANSWER;

/// Bytes of a `struct nlmsghdr`.
const HEADER: usize = 16;

/// Bytes of a `struct nlattr`.
const ATTRIBUTE: usize = 4;

/// The kernel's largest part of a dump, in bytes.
const BUFFER: usize = 32 << 10;

/// One request.
pub struct Message(Vec<u8>);

impl Message {
    /// A request of type `kind` (`RTM_…`) with the fixed part that belongs to it.
    pub fn new(kind: u16, flags: i32, fixed: &[u8]) -> Message {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        // The flags of a message are 16 bits wide.
        let flags =
            u16::try_from(flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or_default();
        bytes.extend(flags.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(fixed);
        Message(bytes)
    }

    /// Fills in bytes of the fixed part.
    pub fn fixed(&mut self, at: usize, bytes: &[u8]) {
        self.0[HEADER + at..HEADER + at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds an attribute.
    pub fn with(mut self, kind: u16, value: &[u8]) -> Message {
        self.0.extend(attribute(kind, value));
        self
    }
}

/// An attribute in bytes, for those that hold others.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes in `bytes`; they end at the first one that is not whole.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(number16(bytes, 0)?);
        // The highest two bits are flags.
        let kind = number16(bytes, 2)? & 0x3fff;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The 16-bit number at `at`.
pub fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u16::from_ne_bytes(*bytes))
}

/// The 32-bit number at `at`.
pub fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A connection to the kernel.
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// The failed system call.
    pub fn open() -> io::Result<Netlink> {
        let protocol = SockProtocol::NetlinkRoute;
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        let deadline = i64::try_from(NETLINK_ANSWER.as_millis()).unwrap_or(i64::MAX);
        setsockopt(&fd, ReceiveTimeout, &TimeVal::milliseconds(deadline))?;
        Ok(Netlink(fd))
    }

    /// Sends a request and returns the messages that came before its acknowledgement, without their
    /// headers.
    ///
    /// # Errors
    /// The kernel's refusal, or its silence.
    pub fn request(&self, message: Message) -> io::Result<Vec<Vec<u8>>> {
        let Message(mut bytes) = message;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while let (Some(length), Some(kind)) = (number32(rest, 0), number16(rest, 4)) {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let Some(payload) = rest.get(HEADER..length) else {
                    break;
                };
                match i32::from(kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        // Both begin with an error number, zero or negative.
                        return match number32(payload, 0).unwrap_or_default().cast_signed() {
                            0 => Ok(answers),
                            error => Err(Errno::from_raw(error.saturating_neg()).into()),
                        };
                    }
                    libc::NLMSG_NOOP => {}
                    _ => answers.push(payload.to_owned()),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_as_they_were_written() {
        let bytes = [
            attribute(3, b"eth0\0"),
            attribute(1, &[]),
            attribute(7, &[1, 2, 3, 4]),
        ]
        .concat();
        let read: Vec<(u16, &[u8])> = attributes(&bytes).collect();
        assert_eq!(
            read,
            [(3, b"eth0\0".as_slice()), (1, &[]), (7, &[1, 2, 3, 4])]
        );
    }

    #[test]
    fn broken_attributes_end_the_list() {
        for bytes in [
            [0, 0, 1, 0].as_slice(),
            &[3, 0, 1, 0],
            &[9, 0, 1, 0, 5],
            &[4, 0],
            &[],
        ] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn the_kernel_answers() {
        let netlink = Netlink::open().unwrap();
        let links = netlink
            .request(Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; 16]))
            .unwrap();
        assert!(
            links
                .iter()
                .any(|link| attributes(&link[16..]).any(|attribute| attribute == (3, b"lo\0")))
        );
        let error = netlink
            .request(Message::new(libc::RTM_GETLINK, 0, &[0; 16]))
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
