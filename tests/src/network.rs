//! The host's side of networks: `ip`, network namespaces, and servers in them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::command::{Output, run};
use crate::cri::TALK;
use crate::{Env, PATIENCE};

/// Runs `ip ARGS`.
#[track_caller]
pub fn ip(args: &[&str]) -> Output {
    let mut command = Command::new("ip");
    command.args(args);
    run(command, Duration::from_secs(20))
}

/// A network namespace under /run/netns that goes with the value.
pub struct Netns {
    /// Its name.
    pub name: String,
}

impl Netns {
    /// Makes it, with its loopback up.
    pub fn new(name: &str) -> Netns {
        ip(&["netns", "add", name]).ok();
        let netns = Netns {
            name: name.to_owned(),
        };
        netns.ip(&["link", "set", "lo", "up"]);
        netns
    }

    /// Its file.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs `ip ARGS` inside; gives what it says.
    #[track_caller]
    pub fn ip(&self, args: &[&str]) -> String {
        ip(&[&["-n", &self.name], args].concat()).ok().text()
    }

    /// Runs a program of the host inside.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> String {
        ip(&[&["netns", "exec", &self.name], command].concat())
            .ok()
            .text()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.name]);
    }
}

/// Between two looks of a server.
const PAUSE: Duration = Duration::from_millis(50);

/// Does something in a namespace of the host.
pub fn inside<T: Send + 'static>(netns: &Netns, act: impl FnOnce() -> T + Send + 'static) -> T {
    let file = File::open(netns.path()).unwrap();
    let thread = std::thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
        act()
    });
    thread.join().unwrap()
}

/// What a server says to `hello` by TCP and by UDP.
pub fn ask(netns: &Netns, address: &str, port: u16) -> [String; 2] {
    let to: (IpAddr, u16) = (address.parse().unwrap(), port);
    inside(netns, move || {
        let mut text = [0; 100];
        let mut tcp = TcpStream::connect_timeout(&to.into(), PATIENCE).unwrap();
        tcp.write_all(b"hello").unwrap();
        let length = tcp.read(&mut text).unwrap();
        let by_tcp = String::from_utf8_lossy(&text[..length]).into_owned();
        let any = if to.0.is_ipv4() { "0.0.0.0" } else { "::" };
        let udp = UdpSocket::bind((any, 0)).unwrap();
        udp.connect(to).unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        udp.send(b"hello").unwrap();
        let length = udp.recv(&mut text).unwrap();
        [
            by_tcp,
            String::from_utf8_lossy(&text[..length]).into_owned(),
        ]
    })
}

/// Answers in a namespace of the host, until it is dropped.
pub struct Server {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Answers by TCP and UDP at these addresses.
    pub fn new(netns: &Netns, addresses: [&str; 2], port: u16) -> Server {
        let over = Arc::new(AtomicBool::new(false));
        let addresses = addresses.map(|ip| ip.parse::<IpAddr>().unwrap());
        let sockets = inside(netns, move || {
            addresses.map(|ip| {
                let tcp = TcpListener::bind((ip, port)).unwrap();
                (tcp, UdpSocket::bind((ip, port)).unwrap())
            })
        });
        let mut threads = Vec::new();
        for (tcp, udp) in sockets {
            tcp.set_nonblocking(true).unwrap();
            udp.set_read_timeout(Some(PAUSE)).unwrap();
            let end = over.clone();
            threads.push(std::thread::spawn(move || {
                while !end.load(Ordering::Relaxed) {
                    let mut text = [0; 100];
                    if let Ok((length, from)) = udp.recv_from(&mut text) {
                        let answer = [b"udp:", &text[..length]].concat();
                        udp.send_to(&answer, from).unwrap();
                    }
                    if let Ok((mut client, _)) = tcp.accept() {
                        client.set_nonblocking(false).unwrap();
                        let length = client.read(&mut text).unwrap();
                        let answer = [b"tcp:", &text[..length]].concat();
                        client.write_all(&answer).unwrap();
                    }
                }
            }));
        }
        Server { over, threads }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// `ctr run` of a container that can ask servers, with its id.
pub fn run_talk(env: &Env, flags: &[&str]) -> (String, Output) {
    let (snapshotter, runtime, id) = (env.daemon.snapshotter, env.runtime.name(), env.id());
    let first = ["run", "-d", "--null-io", "--snapshotter", snapshotter];
    let last = [TALK, &id, "sleep", "3600"];
    let command = [&first[..], &["--runtime", runtime], flags, &last].concat();
    let ran = run(env.daemon.ctr_command(command), PATIENCE);
    (id, ran)
}
