//! Servers on the loopback of the pod's network namespace on the host, such as docker's for names:
//! each is reached at the same address and port of the guest's loopback.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use guest_protocol::Transport;
use guest_protocol::carry::copy_both_ways;
use guest_protocol::packets::{MAX_PACKET, Sender, read_packet, write_packet};
use guest_protocol::protocols::network::LoopbackServer;
use tokio::io::split;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::MAX_CONNECTIONS;
use super::unix::HostWay;
use crate::deadlines;
use crate::log::log;

/// Clients of one UDP server at a time: each has a connection to the host, which has places for
/// all.
const MAX_CLIENTS: usize = 64;

/// Datagrams of one client that wait for the host; more are lost, as on a network.
const WAITING: usize = 16;

/// The servers that the guest answers for.
#[derive(Debug, Default)]
pub struct Servers(HashMap<LoopbackServerKey, AbortHandle>);

/// The message's fields.
type LoopbackServerKey = (String, u32, bool, String);

impl Drop for Servers {
    fn drop(&mut self) {
        self.0.values().for_each(AbortHandle::abort);
    }
}

impl Servers {
    /// Makes them those that the host has. One whose address a container has taken is left out:
    /// in one namespace there could not be both either.
    pub fn set(&mut self, wanted: &[LoopbackServer], port: u32, host: &Transport) {
        let key = |server: &LoopbackServer| {
            let LoopbackServer {
                address,
                port,
                udp,
                name,
                ..
            } = server.clone();
            (address, port, udp, name)
        };
        self.0.retain(|known, task| {
            let stays = wanted.iter().any(|server| key(server) == *known);
            if !stays {
                task.abort();
            }
            stays
        });
        for server in wanted {
            if self.0.contains_key(&key(server)) {
                continue;
            }
            let way = HostWay {
                host: host.clone(),
                port,
                name: server.name.clone(),
            };
            match listen(server, way) {
                Ok(task) => {
                    self.0.insert(key(server), task);
                }
                Err(error) => log!(
                    "no way to {}:{} of the host's namespace: {error}",
                    server.address,
                    server.port
                ),
            }
        }
    }
}

fn listen(server: &LoopbackServer, way: HostWay) -> io::Result<AbortHandle> {
    let address = server.address.parse::<IpAddr>().ok();
    let address = address.filter(IpAddr::is_loopback);
    let port = u16::try_from(server.port).ok().filter(|port| *port != 0);
    let at = address.zip(port).map(SocketAddr::from);
    let at = at.ok_or_else(|| io::Error::other("no place on the loopback"))?;
    if server.udp {
        let socket = std::net::UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        return Ok(tokio::spawn(datagrams(Arc::new(socket), way)).abort_handle());
    }
    let listener = std::net::TcpListener::bind(at)?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    Ok(tokio::spawn(connections(listener, way)).abort_handle())
}

fn nobody() -> Sender {
    Sender { uid: 0, gid: 0 }
}

async fn connections(listener: TcpListener, way: HostWay) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next() => continue,
        };
        match accepted {
            Ok((client, _)) if open.len() < MAX_CONNECTIONS => {
                open.spawn(carry(client, way.clone()));
            }
            Ok(_) => log!("loopback: {MAX_CONNECTIONS} connections already, one more is closed"),
            Err(error) => {
                log!("loopback: accept: {error}");
                sleep(deadlines::ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
}

async fn carry(mut client: TcpStream, way: HostWay) {
    let carried = async {
        client.set_nodelay(true)?;
        let mut server = way.dial(nobody()).await?;
        copy_both_ways(&mut client, &mut server).await
    };
    if let Err(error) = carried.await {
        log!("loopback: {error}");
        // The client sees a reset, as it would from the server itself.
        let _ = client.set_zero_linger();
    }
}

/// One that sends datagrams.
struct Client {
    datagrams: mpsc::Sender<Vec<u8>>,
    last: Instant,
    task: AbortHandle,
}

/// A stream to the host for each client, until nothing has come back for a while, or others need
/// its place: a resolver takes another port for each question.
async fn datagrams(socket: Arc<UdpSocket>, way: HostWay) {
    let mut clients: HashMap<SocketAddr, Client> = HashMap::new();
    let mut open = JoinSet::new();
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let (length, from) = tokio::select! {
            Some(ended) = open.join_next() => {
                if let Ok(from) = ended {
                    clients.remove(&from);
                }
                continue;
            }
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                // Of an answer that a client did not wait for.
                Err(_) => {
                    tokio::task::yield_now().await;
                    continue;
                }
            },
        };
        if !clients.contains_key(&from) && clients.len() >= MAX_CLIENTS {
            let oldest = clients.iter().min_by_key(|(_, client)| client.last);
            if let Some(client) = oldest
                .map(|(from, _)| *from)
                .and_then(|from| clients.remove(&from))
            {
                client.task.abort();
            }
        }
        let client = clients.entry(from).or_insert_with(|| {
            let (sender, receiver) = mpsc::channel(WAITING);
            let (socket, way) = (socket.clone(), way.clone());
            let task = open.spawn(async move {
                if let Err(error) = exchange(&socket, from, receiver, way).await {
                    log!("loopback: {error}");
                }
                from
            });
            Client {
                datagrams: sender,
                last: Instant::now(),
                task,
            }
        });
        client.last = Instant::now();
        let _ = client.datagrams.try_send(buffer[..length].to_owned());
    }
}

async fn exchange(
    socket: &UdpSocket,
    client: SocketAddr,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
    way: HostWay,
) -> io::Result<()> {
    let (mut from, mut to) = split(way.dial(nobody()).await?);
    let out = async {
        while let Some(datagram) = datagrams.recv().await {
            write_packet(&mut to, &datagram).await?;
        }
        Ok(())
    };
    let back = async {
        let mut buffer = vec![0; MAX_PACKET];
        let mut patience = deadlines::LOOPBACK_ANSWER;
        while let Ok(answer) = timeout(patience, read_packet(&mut from, &mut buffer)).await {
            let Some(answer) = answer? else { break };
            socket.send_to(answer, client).await?;
            patience = deadlines::LOOPBACK_IDLE;
        }
        Ok(())
    };
    tokio::select! {
        done = out => done,
        done = back => done,
    }
}
