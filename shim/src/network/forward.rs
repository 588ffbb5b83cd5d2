//! Port forwarding: what connects to loopback in a pod's network namespace on the host reaches the
//! guest's loopback. With the host's network ([`HostPorts`]) the same leads from the host's own
//! addresses to the guest.
//!
//! `kubectl port-forward` ends in containerd dialling `localhost:<port>` inside the pod's network
//! namespace, where nobody listens, because the pod's servers run in the guest. So a listener
//! answers there for every port. A port that somebody does listen on there, such as a proxy of the
//! host's side, stays theirs.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use guest_protocol::carry::copy_both_ways;
use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{FORWARD_PORT, ForwardRequest, Stream, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::netns::Netns;
use super::servers;
use super::sk_lookup::{self, Ports};
use crate::deadlines::{FORWARD_ACCEPTED, FORWARD_LISTENER};
use crate::relay::{Relay, serve};

/// Of one guest, that lead from the host.
const MAX_HOST_PORTS: usize = 128;

/// To all of them at a time.
const MAX_HOST_CONNECTIONS: usize = 512;

/// Forwards as long as it lives.
#[derive(Debug)]
pub struct Forwarder {
    /// Attached while it is open.
    _program: OwnedFd,
    /// Ports of its own listeners.
    pub ports: Vec<u16>,
    _relays: Vec<Relay>,
}

impl Forwarder {
    /// Begins to answer on the loopback addresses of a namespace. The guest's agent must have
    /// [`guest_protocol::FEATURE_PORT_FORWARD`]. On a host that cannot do it there is no forwarding,
    /// and a warning.
    pub fn start(netns: &Netns, transport: &Transport) -> Option<Forwarder> {
        match start(netns, transport) {
            Ok(forwarder) => Some(forwarder),
            Err(error) => {
                tracing::warn!(%error,
                    "no port forwarding to this pod: it needs Linux 5.9 with BPF");
                None
            }
        }
    }
}

/// Ports of the host that lead to the guest's, where the guest's network is the host's own.
#[derive(Debug)]
pub struct HostPorts {
    transport: Transport,
    relays: BTreeMap<u16, Relay>,
    /// Of listeners that the guest has closed.
    retired: Vec<Relay>,
    /// Those that could not be had, which is said once.
    missing: BTreeSet<u16>,
    connections: Arc<Semaphore>,
}

impl HostPorts {
    /// None yet.
    pub fn new(transport: &Transport) -> HostPorts {
        HostPorts {
            transport: transport.clone(),
            relays: BTreeMap::new(),
            retired: Vec::new(),
            missing: BTreeSet::new(),
            connections: Arc::new(Semaphore::new(MAX_HOST_CONNECTIONS)),
        }
    }

    /// Listens at these ports, and at no others any more: what is connected stays. They are the
    /// guest's word.
    pub fn set(&mut self, ports: &[u32]) {
        let ports = ports.iter().filter_map(|port| u16::try_from(*port).ok());
        let ports = ports.filter(|port| *port != 0);
        let wanted: BTreeSet<u16> = ports.take(MAX_HOST_PORTS).collect();
        let gone: Vec<u16> = self.relays.keys().copied().collect();
        for port in gone.into_iter().filter(|port| !wanted.contains(port)) {
            if let Some(relay) = self.relays.remove(&port) {
                relay.retire();
                self.retired.push(relay);
            }
        }
        self.retired.retain(|relay| !relay.is_over());
        self.missing.retain(|port| wanted.contains(port));
        for port in wanted {
            if self.relays.contains_key(&port) {
                continue;
            }
            match listen(port, &self.transport, &self.connections) {
                Ok(relay) => {
                    self.missing.remove(&port);
                    self.relays.insert(port, relay);
                }
                // Who has it may let go of it.
                Err(error) if self.missing.insert(port) => tracing::warn!(%error, port,
                    "the host does not lead to the guest's port"),
                Err(_) => {}
            }
        }
    }
}

fn listen(port: u16, transport: &Transport, connections: &Arc<Semaphore>) -> io::Result<Relay> {
    // Of both families, where the host has both.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
    let listener = listener.or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Err(error),
        _ => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
    })?;
    listener.set_nonblocking(true)?;
    let (transport, connections) = (transport.clone(), connections.clone());
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Ok(serve(listener, move |mut connection: TcpStream| {
        let (transport, connections) = (transport.clone(), connections.clone());
        async move {
            let permit = connections.try_acquire().map_err(io::Error::other);
            let carried = match permit {
                Ok(_permit) => carry(&mut connection, &transport, port).await,
                Err(error) => Err(error),
            };
            reset_if_broken(&connection, carried);
        }
    }))
}

/// The ports of the namespace that are somebody's.
#[derive(Debug)]
struct Taken {
    netns: Netns,
    /// Of our own listeners.
    own: Vec<u16>,
    ports: Mutex<(Ports, HashSet<u16>)>,
}

impl Taken {
    /// Looks again who listens, tells the program, and says whether `port` is somebody's.
    fn look(&self, port: u16) -> io::Result<bool> {
        let servers = self.netns.run(servers::all)?;
        let now: HashSet<u16> = servers
            .into_iter()
            .filter(|server| !server.udp && !self.own.contains(&server.port))
            .map(|server| server.port)
            .collect();
        let mut known = sys::lock(&self.ports);
        let (ports, before) = &mut *known;
        for port in before.symmetric_difference(&now) {
            ports.set(*port, now.contains(port))?;
        }
        *before = now;
        Ok(before.contains(&port))
    }
}

fn start(netns: &Netns, transport: &Transport) -> io::Result<Forwarder> {
    let (v4, v6) = netns.run(|| {
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // A namespace may have no IPv6.
        Ok((v4, TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok()))
    })?;
    let ports = Ports::new()?;
    let program = sk_lookup::attach(netns.fd(), v4.as_fd(), v6.as_ref().map(AsFd::as_fd), &ports)?;
    let own: Vec<u16> = [Some(&v4), v6.as_ref()]
        .into_iter()
        .flatten()
        .filter_map(|listener| Some(listener.local_addr().ok()?.port()))
        .collect();
    let taken = Taken {
        netns: netns.try_clone()?,
        own: own.clone(),
        ports: Mutex::new((ports, HashSet::new())),
    };
    taken.look(0)?;
    let taken = Arc::new(taken);
    let mut relays = Vec::new();
    for listener in [Some(v4), v6].into_iter().flatten() {
        listener.set_nonblocking(true)?;
        let (transport, taken) = (transport.clone(), taken.clone());
        let listener = tokio::net::TcpListener::from_std(listener)?;
        relays.push(serve(listener, move |connection| {
            forward(connection, transport.clone(), taken.clone())
        }));
    }
    Ok(Forwarder {
        _program: program,
        ports: own,
        _relays: relays,
    })
}

async fn forward(mut connection: TcpStream, transport: Transport, taken: Arc<Taken>) {
    let joined = join(&mut connection, &transport, taken).await;
    reset_if_broken(&connection, joined);
}

/// The client sees a reset, as it would from the port itself.
fn reset_if_broken(connection: &TcpStream, carried: io::Result<()>) {
    if let Err(error) = carried {
        tracing::debug!(%error, "a forwarded connection broke");
        let _ = connection.set_zero_linger();
    }
}

async fn join(
    connection: &mut TcpStream,
    transport: &Transport,
    taken: Arc<Taken>,
) -> io::Result<()> {
    // The port that the client asked for, not the listener's.
    let wanted = connection.local_addr()?;
    let port = wanted.port();
    if taken.look(port)? {
        // Its listener has come since the last look; from now on the program lets it be.
        let dial = move || {
            taken
                .netns
                .run(|| std::net::TcpStream::connect_timeout(&wanted, FORWARD_LISTENER))
        };
        let listener = tokio::task::spawn_blocking(dial)
            .await
            .map_err(io::Error::other)??;
        listener.set_nonblocking(true)?;
        let mut listener = TcpStream::from_std(listener)?;
        return copy_both_ways(connection, &mut listener).await;
    }
    carry(connection, transport, port).await
}

/// To one of the guest's ports and back.
async fn carry(connection: &mut TcpStream, transport: &Transport, port: u16) -> io::Result<()> {
    let late = |_| {
        let what = format!("the guest did not answer for port {port}");
        io::Error::new(io::ErrorKind::TimedOut, what)
    };
    let guest = timeout(FORWARD_ACCEPTED, dial(transport, port)).await;
    let mut guest = guest.map_err(late)??;
    connection.set_nodelay(true)?;
    copy_both_ways(connection, &mut guest).await
}

async fn dial(transport: &Transport, port: u16) -> io::Result<Stream> {
    let mut guest = transport.dial(FORWARD_PORT, FORWARD_ACCEPTED).await?;
    guest
        .write_all(ForwardRequest { port }.to_string().as_bytes())
        .await?;
    match guest.read_u8().await {
        Ok(ACCEPTED) => Ok(guest),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            format!("nobody listens on port {port} in the guest"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};
    use std::time::Duration;

    use tempfile::TempDir;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;
    use tokio::task::JoinHandle;

    use super::*;

    const REFUSED: u16 = 81;
    const DEADLINE: Duration = Duration::from_secs(5);

    /// A guest whose ports all answer with their number and then echo, but for [`REFUSED`].
    struct Guest {
        transport: Transport,
        task: JoinHandle<()>,
        _dir: TempDir,
    }

    impl Guest {
        fn new() -> Guest {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("agent");
            let listener =
                UnixListener::bind(format!("{}_{FORWARD_PORT}", path.display())).unwrap();
            let task = tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(async move {
                        let mut stream = BufReader::new(stream);
                        let mut line = String::new();
                        stream.read_line(&mut line).await.unwrap();
                        let port = line
                            .trim_end()
                            .strip_prefix("cofferdam-forward/1 ")
                            .unwrap()
                            .to_owned();
                        if port == REFUSED.to_string() {
                            return;
                        }
                        stream
                            .write_all(format!("+{port}:").as_bytes())
                            .await
                            .unwrap();
                        let mut all = Vec::new();
                        // A server that answers only what is complete: it needs the client's
                        // half-close.
                        if stream.read_to_end(&mut all).await.is_ok() {
                            let _ = stream.write_all(&all).await;
                        }
                    });
                }
            });
            Guest {
                transport: Transport::Unix { path },
                task,
                _dir: dir,
            }
        }
    }

    impl Drop for Guest {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    fn connect(netns: &Netns, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        let stream = netns.run(|| std::net::TcpStream::connect_timeout(&to, DEADLINE))?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    async fn exchange(mut stream: TcpStream, request: &[u8]) -> io::Result<Vec<u8>> {
        let mut answer = Vec::new();
        timeout(DEADLINE, async {
            stream.write_all(request).await?;
            stream.shutdown().await?;
            stream.read_to_end(&mut answer).await
        })
        .await
        .unwrap()?;
        Ok(answer)
    }

    #[tokio::test]
    async fn any_port_of_any_loopback_address_reaches_the_guest() {
        let (netns, guest) = (Netns::create().await.unwrap(), Guest::new());
        let _forwarder = Forwarder::start(&netns, &guest.transport).unwrap();
        for ip in ["127.0.0.1", "127.9.8.7", "::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            for port in [1, 80, 8080, 65535] {
                let answer = exchange(connect(&netns, (ip, port)).unwrap(), b"hello")
                    .await
                    .unwrap();
                assert_eq!(
                    String::from_utf8(answer).unwrap(),
                    format!("{port}:hello"),
                    "{ip}"
                );
            }
        }
    }

    /// Sends its port back to one connection.
    async fn own_server(listener: std::net::TcpListener) {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (mut stream, _) = timeout(DEADLINE, listener.accept()).await.unwrap().unwrap();
        stream.write_all(b"own").await.unwrap();
    }

    #[tokio::test]
    async fn a_port_that_somebody_has_in_the_namespace_stays_theirs() {
        let (netns, guest) = (Netns::create().await.unwrap(), Guest::new());
        let bind = |port: u16| {
            netns
                .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)))
                .unwrap()
        };
        let before = bind(7000);
        let _forwarder = Forwarder::start(&netns, &guest.transport).unwrap();
        let after = bind(7001);
        for (port, listener) in [(7000, before), (7001, after)] {
            let stream = connect(&netns, (Ipv4Addr::LOCALHOST, port)).unwrap();
            let (answer, ()) = tokio::join!(exchange(stream, b""), own_server(listener));
            assert_eq!(answer.unwrap(), b"own", "{port}");
        }
        // Any connection shows that they have gone.
        let other = exchange(connect(&netns, (Ipv4Addr::LOCALHOST, 80)).unwrap(), b"")
            .await
            .unwrap();
        assert_eq!(other, b"80:");
        let again = exchange(connect(&netns, (Ipv4Addr::LOCALHOST, 7000)).unwrap(), b"")
            .await
            .unwrap();
        assert_eq!(again, b"7000:");
    }

    #[tokio::test]
    async fn a_port_that_nobody_serves_resets_the_connection() {
        let (netns, guest) = (Netns::create().await.unwrap(), Guest::new());
        let _forwarder = Forwarder::start(&netns, &guest.transport).unwrap();
        for ip in [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::from(Ipv6Addr::LOCALHOST),
        ] {
            let mut stream = connect(&netns, (ip, REFUSED)).unwrap();
            let error = timeout(DEADLINE, stream.read(&mut [0; 8]))
                .await
                .unwrap()
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }

    #[tokio::test]
    async fn other_addresses_of_the_namespace_are_left_alone() {
        let (netns, guest) = (Netns::create().await.unwrap(), Guest::new());
        let _forwarder = Forwarder::start(&netns, &guest.transport).unwrap();
        let mut add = std::process::Command::new("ip");
        add.args(["address", "add", "10.1.1.1/32", "dev", "lo"]);
        assert!(netns.run(|| add.status()).unwrap().success());
        let own: IpAddr = "10.1.1.1".parse().unwrap();

        assert_eq!(
            connect(&netns, (own, 80)).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        let listener = netns.run(|| TcpListener::bind((own, 80))).unwrap();
        let _stream = connect(&netns, (own, 80)).unwrap();
        listener.accept().unwrap();
        // And so is the host.
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        drop(held);
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    }

    #[tokio::test]
    async fn fifty_connections_at_once_each_get_their_own_bytes() {
        let (netns, guest) = (Netns::create().await.unwrap(), Guest::new());
        let _forwarder = Forwarder::start(&netns, &guest.transport).unwrap();
        let mut exchanges = Vec::new();
        for port in 1000..1050_u16 {
            let stream = connect(&netns, (Ipv4Addr::LOCALHOST, port)).unwrap();
            let request = vec![port as u8; 300_000];
            exchanges.push(tokio::spawn(async move {
                (port, exchange(stream, &request).await.unwrap())
            }));
        }
        let mut seen = HashSet::new();
        for exchange in exchanges {
            let (port, answer) = exchange.await.unwrap();
            assert_eq!(
                answer,
                [format!("{port}:").as_bytes(), &vec![port as u8; 300_000]].concat()
            );
            seen.insert(port);
        }
        assert_eq!(seen.len(), 50);
    }

    #[tokio::test]
    async fn everything_ends_with_the_forwarder() {
        let (netns, guest) = (Netns::create().await.unwrap(), Guest::new());
        let forwarder = Forwarder::start(&netns, &guest.transport).unwrap();
        let mut stream = connect(&netns, (Ipv4Addr::LOCALHOST, 80)).unwrap();
        let mut greeting = [0; 3];
        timeout(DEADLINE, stream.read_exact(&mut greeting))
            .await
            .unwrap()
            .unwrap();

        drop(forwarder);

        let rest = timeout(DEADLINE, stream.read(&mut greeting)).await.unwrap();
        assert!(matches!(rest, Ok(0) | Err(_)), "{rest:?}");
        let error = connect(&netns, (Ipv4Addr::LOCALHOST, 80)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_guest_that_is_gone_resets_the_connection() {
        let netns = Netns::create().await.unwrap();
        let transport = Transport::Unix {
            path: "/nonexistent/agent".into(),
        };
        let _forwarder = Forwarder::start(&netns, &transport).unwrap();
        let mut stream = connect(&netns, (Ipv4Addr::LOCALHOST, 80)).unwrap();
        let error = timeout(DEADLINE, stream.read(&mut [0; 8]))
            .await
            .unwrap()
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
