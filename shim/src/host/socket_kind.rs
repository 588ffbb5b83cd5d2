//! What kind of unix socket a file is, asked so that its server does not notice.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use guest_protocol::SocketKind;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket, socketpair};

/// The address of a socket's file that is held by a descriptor: no name leads elsewhere meanwhile.
///
/// # Errors
/// None, with a descriptor's number.
pub fn address(file: &impl AsFd) -> io::Result<UnixAddr> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()));
    Ok(UnixAddr::new(&path)?)
}

/// The kind of the socket that a process of this kernel has bound to a file, if one has: a guest's
/// own leaves a file behind as well. One that nobody listens on yet is taken for a stream.
pub fn kind_of(file: &impl AsFd) -> Option<SocketKind> {
    let address = address(file).ok()?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let datagram = socket(AddressFamily::Unix, SockType::Datagram, flags, None).ok()?;
    match connect(datagram.as_raw_fd(), &address) {
        Err(Errno::EPROTOTYPE) => {}
        Err(Errno::ECONNREFUSED) => return None,
        // It is connected, or its server takes nobody's messages (EPERM).
        _ => return Some(SocketKind::Datagram),
    }
    // A socket that is connected already is told so once a listener of its kind is found, and
    // reaches nobody.
    let pair = |kind| socketpair(AddressFamily::Unix, kind, None, flags);
    let (packets, _other): (OwnedFd, OwnedFd) = pair(SockType::SeqPacket).ok()?;
    match connect(packets.as_raw_fd(), &address) {
        Err(Errno::EISCONN | Errno::EAGAIN) => Some(SocketKind::SeqPacket),
        _ => Some(SocketKind::Stream),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use std::path::Path;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;
    use crate::host::mounts;

    fn held(path: &Path) -> File {
        mounts::hold(path).unwrap()
    }

    #[test]
    fn each_kind_is_told_and_its_server_hears_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let stream = UnixListener::bind(path("stream")).unwrap();
        let datagram = UnixDatagram::bind(path("datagram")).unwrap();
        let packets = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        bind(
            packets.as_raw_fd(),
            &UnixAddr::new(&path("seqpacket")).unwrap(),
        )
        .unwrap();
        listen(&packets, Backlog::MAXCONN).unwrap();
        for name in ["stream", "datagram", "seqpacket"] {
            let kind = kind_of(&held(&path(name))).unwrap();
            assert_eq!(kind.to_string(), name);
        }
        stream.set_nonblocking(true).unwrap();
        assert!(stream.accept().is_err());
        let packets = UnixListener::from(packets);
        packets.set_nonblocking(true).unwrap();
        assert!(packets.accept().is_err());
        drop((stream, datagram));
        assert_eq!(kind_of(&held(&path("stream"))), None);
        assert_eq!(kind_of(&held(&path("datagram"))), None);
    }
}
