//! Unix sockets of the host: a socket in the guest, of the same kind, whose connections or
//! datagrams are carried to one on the host.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use futures::FutureExt;
use guest_protocol::carry::copy_both_ways;
use guest_protocol::packets::{
    BytesOnly, MAX_PACKET, PacketSocket, Sender, copy_packets_both_ways, write_packet,
};
use guest_protocol::protocols::agent::Storage;
use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{
    HostSocketRequest, Listener, SocketKind, Stream, Transport, UDS_PORT_OPTION, is_socket_name,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, listen as listen_on, setsockopt, sockopt,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::serve;
use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::gate::Incoming;
use crate::log::log;

/// A listening socket. It ends, with its connections and its file, when it is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    task: AbortHandle,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path);
    }
}

impl Socket {
    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it another owner or mode; its connections stay.
    ///
    /// # Errors
    /// Options that are none, or the kernel's.
    pub fn set_owner(&self, options: &[String]) -> Result<()> {
        set_owner(&self.path, &SocketOptions::parse(options)?)
            .context(|| format!("set the owner of {}", self.path.display()))
    }
}

/// Listens at the storage's mount point. Each connection is carried to the socket of the host that
/// the storage names.
///
/// # Errors
/// A storage without a port, a source that cannot be a socket's name, a mount point where no socket
/// can be made.
pub fn listen(storage: &Storage, host: Transport) -> Result<Socket> {
    let Storage {
        source,
        mount_point,
        ..
    } = storage;
    let port = storage
        .driver_options
        .iter()
        .find_map(|option| option.strip_prefix(UDS_PORT_OPTION)?.parse::<u32>().ok());
    let port = port.ok_or_else(|| {
        Error::Invalid(format!(
            "storage {mount_point} has no driver option {UDS_PORT_OPTION}"
        ))
    })?;
    if !is_socket_name(source) {
        return Err(Error::Invalid(format!(
            "{source:?} cannot be the name of a socket of the host"
        )));
    }
    let path = PathBuf::from(mount_point);
    let options = SocketOptions::parse(&storage.options)?;
    let way = HostWay {
        host,
        port,
        name: source.clone(),
    };
    let task = bind(&path, &options)
        .and_then(|socket| relay(socket, options.kind, way))
        .context(|| format!("listen on {mount_point}"))?;
    Ok(Socket { path, task })
}

fn relay(socket: OwnedFd, kind: SocketKind, way: HostWay) -> io::Result<AbortHandle> {
    if kind == SocketKind::Datagram {
        setsockopt(&socket, sockopt::PassCred, &true)?;
        let socket = PacketSocket::new(socket)?;
        return Ok(tokio::spawn(carry_datagrams(socket, way)).abort_handle());
    }
    listen_on(&socket, Backlog::MAXCONN)?;
    let listener = StdListener::from(socket);
    listener.set_nonblocking(true)?;
    // The path is empty, so that the listener's drop removes no file: the drop of the `Socket`
    // does, and by the time the task ends there may be another socket of this name.
    let listener = Listener::Unix {
        listener: UnixListener::from_std(listener)?,
        path: PathBuf::new(),
    };
    let carry = move |client| carry(client, kind, way.clone());
    Ok(tokio::spawn(serve(Incoming::Open(listener), "host socket", carry)).abort_handle())
}

/// Kind, owner and permissions of the socket, as on the host.
struct SocketOptions {
    kind: SocketKind,
    mode: u32,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl SocketOptions {
    fn parse(options: &[String]) -> Result<SocketOptions> {
        let mut owner = SocketOptions {
            kind: SocketKind::Stream,
            mode: 0o600,
            uid: None,
            gid: None,
        };
        for option in options {
            let bad = || Error::Invalid(format!("bad option {option:?} of a socket of the host"));
            match option.split_once('=').ok_or_else(bad)? {
                ("mode", text) => {
                    let mode = u32::from_str_radix(text, 8)
                        .ok()
                        .filter(|mode| *mode <= 0o7777);
                    owner.mode = mode.ok_or_else(bad)?;
                }
                ("type", text) => owner.kind = text.parse().map_err(|_| bad())?,
                ("uid", text) => owner.uid = Some(text.parse().map_err(|_| bad())?),
                ("gid", text) => owner.gid = Some(text.parse().map_err(|_| bad())?),
                _ => return Err(bad()),
            }
        }
        Ok(owner)
    }
}

fn bind(path: &Path, options: &SocketOptions) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // Left behind by an agent that was killed.
    if fs::symlink_metadata(path).is_ok_and(|left| left.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let kind = match options.kind {
        SocketKind::Stream => SockType::Stream,
        SocketKind::SeqPacket => SockType::SeqPacket,
        SocketKind::Datagram => SockType::Datagram,
    };
    let socket = nix::sys::socket::socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    // No container has it yet.
    set_owner(path, options)?;
    Ok(socket)
}

/// The owner goes first, because a change of it takes bits of the mode; nobody gets more meanwhile.
fn set_owner(path: &Path, options: &SocketOptions) -> io::Result<()> {
    let now = fs::symlink_metadata(path)?;
    let narrow = now.permissions().mode() & options.mode;
    fs::set_permissions(path, fs::Permissions::from_mode(narrow))?;
    chown(path, options.uid, options.gid)?;
    fs::set_permissions(path, fs::Permissions::from_mode(options.mode))
}

/// The way to one socket of the host.
#[derive(Clone)]
pub(super) struct HostWay {
    pub host: Transport,
    /// What is dialled there.
    pub port: u32,
    /// What the host calls the socket.
    pub name: String,
}

impl HostWay {
    /// A connection to it, for a user of the guest.
    pub async fn dial(&self, Sender { uid, gid }: Sender) -> io::Result<Stream> {
        let name = self.name.clone();
        let request = HostSocketRequest { name, uid, gid };
        let mut server = self.host.dial(self.port, deadlines::HOST_DIAL).await?;
        let ask = async {
            server.write_all(request.to_string().as_bytes()).await?;
            server.read_u8().await
        };
        if timeout(deadlines::HOST_SOCKET_ANSWER, ask).await?? != ACCEPTED {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the host answered with something unknown",
            ));
        }
        Ok(server)
    }
}

async fn carry(client: Stream, kind: SocketKind, way: HostWay) -> io::Result<()> {
    let Stream::Unix(client) = client else {
        return Err(io::Error::other(
            "a client of a host socket that is on no unix socket",
        ));
    };
    let peer = client.peer_cred()?;
    let (uid, gid) = (peer.uid(), peer.gid());
    let mut server = way.dial(Sender { uid, gid }).await?;
    if kind == SocketKind::SeqPacket {
        let client = PacketSocket::new(client.into_std()?.into())?;
        return copy_packets_both_ways(&client, server).await;
    }
    copy_both_ways(&mut BytesOnly(client), &mut server).await
}

/// Users whose datagrams have a connection to the host at a time.
const MAX_SENDERS: usize = 8;

/// Sends each datagram to the host's socket as its sender. One that the host does not take is lost,
/// and so is what its sender would be told: by then it has gone on.
async fn carry_datagrams(socket: PacketSocket, way: HostWay) {
    let mut buffer = vec![0; MAX_PACKET];
    let mut connections: HashMap<Sender, Stream> = HashMap::new();
    loop {
        let sent = async {
            let (length, sender) = socket.receive(&mut buffer).await?;
            let sender = sender.ok_or_else(|| io::Error::other("a datagram without a sender"))?;
            let mut held = connections.remove(&sender);
            // The host says nothing but that the connection is over.
            if let Some(stream) = &mut held
                && stream.read_u8().now_or_never().is_some()
            {
                held = None;
            }
            let mut stream = match held {
                Some(stream) => stream,
                None => way.dial(sender).await?,
            };
            write_packet(&mut stream, &buffer[..length]).await?;
            if connections.len() == MAX_SENDERS {
                connections.clear();
            }
            connections.insert(sender, stream);
            io::Result::Ok(())
        };
        if let Err(error) = sent.await {
            log!("host socket: a datagram is lost: {error}");
            // Nothing here fails again at once, unless the socket itself is broken.
            tokio::task::yield_now().await;
        }
    }
}
