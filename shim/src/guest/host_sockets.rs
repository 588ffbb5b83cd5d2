//! Unix sockets of the host that containers have as mounts, and servers on the loopback of the pod's
//! network namespace: serves the connections that the guest makes to them.
//!
//! The agent listens on a socket in the guest and dials here for each connection, or for each user
//! that sends datagrams, with the name that the shim gave to the socket. Only names that were given
//! lead anywhere.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use guest_protocol::carry::copy_both_ways;
use guest_protocol::packets::{
    BytesOnly, MAX_PACKET, PacketSocket, Sender, copy_packets_both_ways, read_packet, write_packet,
};
use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{HostSocketRequest, Listener, SocketKind, Stream, read_line};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::deadlines::{HOST_SOCKET, HOST_SOCKET_CONNECTED, HOST_SOCKET_LOOK_AGAIN};
use crate::error::{IoContext, Result};
use crate::guest::sockets_below::SocketsBelow;
use crate::host::socket_kind;
use crate::network::{Server, in_netns};
use crate::relay;

/// Connections to one socket at a time: half of what a sandbox has for all.
const MAX_CONNECTIONS: usize = 256;

/// Bytes of a name that the guest cannot guess.
const NAME_BYTES: usize = 16;

/// The id that setresuid(2) takes for "as it is": nobody has it.
const NO_ID: u32 = u32::MAX;

/// A name for a socket that another container cannot guess, in hex.
pub fn random_name() -> Result<String> {
    let mut bytes = [0; NAME_BYTES];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.doing(|| "read /dev/urandom".to_owned())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// As whom a process speaks to a server of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// The users that containerd asked for in one container, its first process's first. Clones share
/// them.
#[derive(Clone, Debug, Default)]
pub struct Users(Arc<Mutex<Vec<User>>>);

impl Users {
    /// One more: that of the first process or of an exec.
    pub fn add(&self, user: &oci_spec::runtime::User) {
        let groups = user.additional_gids().clone().unwrap_or_default();
        let user = User {
            uid: user.uid(),
            gid: user.gid(),
            groups,
        };
        let mut users = sys::lock(&self.0);
        if !users.contains(&user) {
            users.push(user);
        }
    }

    /// The guest's word counts only for what its processes could be under any runtime: root can
    /// become anybody, others stay who they are. Where it says something else, they are the first
    /// process.
    fn believe(&self, uid: u32, gid: u32) -> Option<User> {
        let users = sys::lock(&self.0);
        let known = |gid: Option<u32>| {
            users
                .iter()
                .find(|user| user.uid == uid && gid.is_none_or(|gid| user.gid == gid))
        };
        if let Some(user) = known(Some(gid)) {
            return Some(user.clone());
        }
        if users.iter().any(|user| user.uid == 0) {
            return Some(User {
                uid,
                gid,
                groups: Vec::new(),
            });
        }
        known(None).or(users.first()).cloned()
    }
}

/// With whose rights the way from a directory to a socket is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// The socket is itself a mount: what is above it is closed to nobody.
    AsShim,
    /// The directory is the mount.
    AsUser,
}

/// A socket's place: a directory as it was when the container was made, so that no rename leads
/// elsewhere, and the way from there, on which no link is followed.
#[derive(Clone, Debug)]
pub struct PinnedSocket {
    /// Where the way begins.
    pub directory: Arc<File>,
    /// The way.
    pub path: PathBuf,
    /// With whose rights.
    pub walk: Walk,
    /// What is connected to it.
    pub kind: SocketKind,
    /// As whom.
    pub users: Users,
}

/// A server on the loopback of a network namespace, which is held open.
#[derive(Clone, Debug)]
struct NetnsServer {
    netns: Arc<OwnedFd>,
    server: Server,
}

#[derive(Clone, Debug)]
enum Place {
    Unix(PinnedSocket),
    Loopback(NetnsServer),
}

/// A place that connections are made to.
#[derive(Clone, Debug)]
struct Served {
    place: Place,
    /// How many more connections it may have.
    slots: Arc<Semaphore>,
}

/// A place, and what ends its connections by its drop.
type Open = (Served, watch::Sender<()>);

/// The host's sockets by the names that the guest knows them by. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Sockets(Arc<Mutex<HashMap<String, Open>>>);

impl Sockets {
    /// Lets the guest connect to a socket by the name `name`, which has no white space. The file is
    /// looked up in its directory at each connection: a server that restarts makes its socket anew.
    pub fn add(&self, name: &str, socket: PinnedSocket) {
        self.serve(name, Place::Unix(socket));
    }

    /// Lets the guest connect to a server on the loopback of a namespace, by a name.
    pub fn add_server(&self, name: &str, netns: Arc<OwnedFd>, server: Server) {
        self.serve(name, Place::Loopback(NetnsServer { netns, server }));
    }

    fn serve(&self, name: &str, place: Place) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let served = Served { place, slots };
        sys::lock(&self.0).insert(name.to_owned(), (served, watch::Sender::new(())));
    }

    /// No more connections by this name; those that are there end.
    pub fn remove(&self, name: &str) {
        sys::lock(&self.0).remove(name);
    }

    fn get(&self, name: &str) -> Option<(Served, watch::Receiver<()>)> {
        sys::lock(&self.0)
            .get(name)
            .map(|(place, over)| (place.clone(), over.subscribe()))
    }
}

impl PinnedSocket {
    /// The socket that a mount has as its source, at a path without links.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn mounted(path: &Path, kind: SocketKind, users: &Users) -> io::Result<PinnedSocket> {
        let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the root directory is no socket",
            ));
        };
        // The path is that of the mount's source as it was judged: a link in it came later.
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        let directory = File::from(openat2(
            AT_FDCWD,
            parent,
            how.resolve(ResolveFlag::RESOLVE_NO_SYMLINKS),
        )?);
        Ok(PinnedSocket {
            directory: Arc::new(directory),
            path: file.into(),
            walk: Walk::AsShim,
            kind,
            users: users.clone(),
        })
    }

    /// Its file as it is now.
    fn open(&self) -> io::Result<File> {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let file = File::from(openat2(&*self.directory, &self.path, how.resolve(resolve))?);
        if !file.metadata()?.file_type().is_socket() {
            return Err(io::Error::other(format!(
                "{} is no socket any more",
                self.path.display()
            )));
        }
        Ok(file)
    }
}

/// The host's sockets of a running guest, served as long as this lives.
pub struct HostSockets {
    /// Those that its containers have.
    pub sockets: Sockets,
    /// The port of the host that the agent dials for a connection to one of them.
    pub port: u32,
    /// More of them, below volumes, if the agent can mount those.
    pub below: Option<SocketsBelow>,
    _relay: relay::Relay,
}

impl HostSockets {
    /// Serves the connections that come to `listener`, which the guest reaches by `port`.
    pub fn serve(listener: Listener, port: u32) -> HostSockets {
        let sockets = Sockets::default();
        let served = sockets.clone();
        let relay = relay::serve(listener, move |guest| {
            let sockets = served.clone();
            async move {
                if let Err(error) = join(guest, &sockets).await {
                    tracing::debug!(%error, "a guest's connection to a unix socket of the host broke");
                }
            }
        });
        HostSockets {
            sockets,
            port,
            below: None,
            _relay: relay,
        }
    }
}

async fn join(mut guest: Stream, sockets: &Sockets) -> io::Result<()> {
    let late = |what: &str| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{what} within {HOST_SOCKET:?}"),
        )
    };
    let wanted = timeout(HOST_SOCKET, read_line(&mut guest))
        .await
        .map_err(|_| late("the agent sent no line"))??;
    let HostSocketRequest { name, uid, gid } = wanted;
    let (served, mut over) = sockets.get(&name).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("the guest asked for the unknown socket {name:?}"),
        )
    })?;
    // One container's connections take no other one's place.
    let _slot = served.slots.try_acquire_owned().map_err(|_| {
        io::Error::other(format!("{MAX_CONNECTIONS} connections to {name:?} already"))
    })?;
    let carry = async {
        match served.place {
            Place::Unix(socket) => carry_unix(guest, &socket, uid, gid).await,
            Place::Loopback(server) if server.server.udp => carry_datagrams(guest, &server).await,
            Place::Loopback(server) => {
                let mut host = TcpStream::from_std(server.connect().await?)?;
                host.set_nodelay(true)?;
                guest.write_all(&[ACCEPTED]).await?;
                copy_both_ways(&mut guest, &mut host).await
            }
        }
    };
    tokio::select! {
        copied = carry => copied,
        _ = over.changed() => Ok(()),
    }
}

async fn carry_unix(mut guest: Stream, place: &PinnedSocket, uid: u32, gid: u32) -> io::Result<()> {
    let user = place
        .users
        .believe(uid, gid)
        .ok_or_else(|| io::Error::other("nobody may use the socket"))?;
    let mut host = connect(place, &user).await?;
    guest.write_all(&[ACCEPTED]).await?;
    match place.kind {
        SocketKind::Stream => {
            let stream = std::os::unix::net::UnixStream::from(host);
            let mut host = BytesOnly(UnixStream::from_std(stream)?);
            copy_both_ways(&mut guest, &mut host).await
        }
        SocketKind::SeqPacket => copy_packets_both_ways(&PacketSocket::new(host)?, guest).await,
        SocketKind::Datagram => {
            let mut buffer = vec![0; MAX_PACKET];
            let (uid, gid) = (user.uid, user.gid);
            let sender = Some(Sender { uid, gid });
            let mut server = PacketSocket::new(host)?;
            while let Some(message) = read_packet(&mut guest, &mut buffer).await? {
                if let Err(error) = server.send(message, sender).await {
                    if error.kind() != io::ErrorKind::ConnectionRefused {
                        return Err(error);
                    }
                    // The server has begun anew, as that of the system's log does.
                    host = connect(place, &user).await?;
                    server = PacketSocket::new(host)?;
                    server.send(message, sender).await?;
                }
            }
            Ok(())
        }
    }
}

/// Carries one client's datagrams and their answers.
async fn carry_datagrams(mut guest: Stream, server: &NetnsServer) -> io::Result<()> {
    let host = tokio::net::UdpSocket::from_std(server.run(|| {
        let Server { address, port, .. } = server.server;
        let socket = std::net::UdpSocket::bind((address_of_client(address), 0))?;
        socket.connect((address, port))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?)?;
    guest.write_all(&[ACCEPTED]).await?;
    let (mut from, mut to) = tokio::io::split(guest);
    let there = async {
        let mut buffer = vec![0; MAX_PACKET];
        while let Some(datagram) = read_packet(&mut from, &mut buffer).await? {
            // One that the server does not take is lost, as it would be otherwise.
            let _ = host.send(datagram).await;
        }
        Ok(())
    };
    let back = async {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            match host.recv(&mut buffer).await {
                Ok(length) => write_packet(&mut to, &buffer[..length]).await?,
                // Of a datagram before.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error),
            }
        }
    };
    tokio::select! {
        done = there => done,
        done = back => done,
    }
}

/// An address of the loopback that a client of a server on it has.
fn address_of_client(server: IpAddr) -> IpAddr {
    match server {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

impl NetnsServer {
    /// Runs `work`, which must not block, in the namespace.
    fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_netns(self.netns.as_fd(), work)
    }

    async fn connect(&self) -> io::Result<std::net::TcpStream> {
        let to = SocketAddr::new(self.server.address, self.server.port);
        let own = self.clone();
        let connected = tokio::task::spawn_blocking(move || {
            own.run(|| std::net::TcpStream::connect_timeout(&to, HOST_SOCKET_CONNECTED))
        });
        let stream = connected.await.map_err(io::Error::other)??;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

/// Connects on a thread of its own, which is `user` from then on: the server and the permissions of
/// its socket see the process in the container, not the shim.
async fn connect(place: &PinnedSocket, user: &User) -> io::Result<OwnedFd> {
    let (tell, told) = tokio::sync::oneshot::channel();
    let (place, user) = (place.clone(), user.clone());
    std::thread::Builder::new()
        .name("uds-connect".to_owned())
        .spawn(move || {
            let _ = tell.send(connect_as(&place, &user));
        })?;
    told.await.map_err(io::Error::other)?
}

/// Waits for room in the server's backlog, as a blocking client would. Only for a thread that ends
/// with it.
fn connect_as(place: &PinnedSocket, user: &User) -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, connect, socket};
    let file = match place.walk {
        Walk::AsShim => {
            let file = place.open()?;
            become_user(user)?;
            file
        }
        Walk::AsUser => {
            become_user(user)?;
            place.open()?
        }
    };
    let address = socket_kind::address(&file)?;
    let kind = match place.kind {
        SocketKind::Stream => SockType::Stream,
        SocketKind::SeqPacket => SockType::SeqPacket,
        SocketKind::Datagram => SockType::Datagram,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, kind, flags, None)?;
    let end = Instant::now() + HOST_SOCKET_CONNECTED;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Err(Errno::EAGAIN) if Instant::now() < end => {
                std::thread::sleep(HOST_SOCKET_LOOK_AGAIN)
            }
            Err(error) => return Err(io::Error::from(error)),
            Ok(()) => return Ok(fd),
        }
    }
}

/// The calling thread alone becomes `user`: the system calls know threads, only their wrappers in
/// the C library change the whole process.
fn become_user(user: &User) -> io::Result<()> {
    let User { uid, gid, groups } = user;
    if *uid == NO_ID || *gid == NO_ID {
        return Err(io::Error::other("an id that is none"));
    }
    let groups: Vec<Gid> = groups
        .iter()
        .copied()
        .map(Gid::from_raw_unchecked)
        .collect();
    set_thread_groups(&groups)?;
    // The effective ids alone: with the real or saved one a local user of that id could signal this
    // thread, and with it the process.
    set_thread_res_gid(None, Gid::from_raw(*gid), None)?;
    set_thread_res_uid(None, Uid::from_raw(*uid), None)?;
    Ok(())
}

#[cfg(test)]
#[path = "host_sockets_tests.rs"]
mod tests;
