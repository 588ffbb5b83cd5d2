//! Real namespaces, links and frames. They need root.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, SockaddrLike, bind, socket,
};

use super::*;

/// Ethernet type for experiments, IEEE 802.
const EXPERIMENT: u16 = 0x88b5;
/// `virtio_net_hdr` of a tap that nobody has configured.
const HEADER: usize = 10;

/// A namespace with a path, as CNI makes them; here the path is a thread's.
struct Bound {
    path: PathBuf,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Bound {
    fn new() -> Bound {
        let (stop, stopped) = channel();
        let (say, hear) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let (process, thread) = (std::process::id(), nix::unistd::gettid());
            say.send(PathBuf::from(format!(
                "/proc/{process}/task/{thread}/ns/net"
            )))
            .unwrap();
            let _ = stopped.recv();
        });
        Bound {
            path: hear.recv().unwrap(),
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn open(&self) -> Netns {
        Netns::open(&self.path).unwrap()
    }

    /// Runs a command line in it.
    fn sh(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        let output = self.open().run(|| command.args(words).output()).unwrap();
        assert!(
            output.status.success(),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// A veth pair with one end in `other`, both up.
    fn veth(&self, name: &str, other: &Bound, peer: &str) {
        self.sh(&format!("ip link add {name} type veth peer name {peer}"));
        self.sh(&format!(
            "ip link set {peer} netns {}",
            other.path.display()
        ));
        self.sh(&format!("ip link set {name} up"));
        other.sh(&format!("ip link set {peer} up"));
    }

    /// A socket that sends and receives frames of [`EXPERIMENT`] on a link.
    fn packet_socket(&self, link: &str) -> OwnedFd {
        self.open()
            .run(|| {
                let kind = SockType::Raw;
                let fd = socket(
                    AddressFamily::Packet,
                    kind,
                    SockFlag::SOCK_NONBLOCK,
                    None::<SockProtocol>,
                )?;
                // SAFETY: all zeroes is a valid address.
                let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
                to.sll_family = libc::AF_PACKET as u16;
                to.sll_protocol = EXPERIMENT.to_be();
                to.sll_ifindex = nix::net::if_::if_nametoindex(link)?.cast_signed();
                let length = size_of::<libc::sockaddr_ll>() as u32;
                let to =
                    // SAFETY: it points at a whole sockaddr_ll, whose size is given.
                    unsafe { LinkAddr::from_raw(std::ptr::from_ref(&to).cast(), Some(length)) };
                bind(fd.as_raw_fd(), &to.unwrap())?;
                Ok(fd)
            })
            .unwrap()
    }

    fn ingress(&self, link: &str) -> String {
        self.sh(&format!("tc qdisc show dev {link}"))
            + &self.sh(&format!("tc filter show dev {link} parent ffff:fff2"))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().unwrap().join();
    }
}

fn frame(payload: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(EXPERIMENT.to_be_bytes());
    frame.resize(60, payload);
    frame
}

/// Sends a frame until it comes out of one of the descriptors behind `skip` bytes: a link takes its
/// first frames for nothing, until its carrier is noticed.
fn pass(frame: &[u8], send: impl Fn(&[u8]), fds: &[OwnedFd], skip: usize) {
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        send(frame);
        let mut polls: Vec<PollFd> = fds
            .iter()
            .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut polls, PollTimeout::from(100_u16)).unwrap();
        for fd in fds {
            let mut buffer = [0; 2048];
            while let Ok(length) = File::from(fd.try_clone().unwrap()).read(&mut buffer) {
                if buffer[skip..length] == *frame {
                    return;
                }
            }
        }
    }
    panic!("the frame did not come");
}

fn send(fd: &OwnedFd, header: usize, frame: &[u8]) {
    let whole = [vec![0; header], frame.to_vec()].concat();
    assert_eq!(
        File::from(fd.try_clone().unwrap()).write(&whole).unwrap(),
        whole.len()
    );
}

/// Sends a frame each way between a socket beyond a link and a tap's queues.
fn assert_frames_pass(beyond: &OwnedFd, taps: &[OwnedFd]) {
    pass(&frame(99), |frame| send(beyond, 0, frame), taps, HEADER);
    for (number, tap) in taps.iter().enumerate() {
        let out = [beyond.try_clone().unwrap()];
        pass(
            &frame(number as u8),
            |frame| send(tap, HEADER, frame),
            &out,
            0,
        );
    }
}

fn names(endpoints: &[Endpoint]) -> Vec<&str> {
    let mut names: Vec<&str> = endpoints
        .iter()
        .map(|endpoint| endpoint.link.name.as_str())
        .collect();
    names.sort_unstable();
    names
}

async fn connect(pod: &Bound) -> (Network, Vec<Endpoint>, Vec<Redirect>) {
    let mut network = Network::new(pod.open(), false).unwrap();
    let mut recorded = Vec::new();
    let record = |redirect: &Redirect| {
        recorded.push(redirect.clone());
        Ok(())
    };
    let endpoints = network
        .connect_new(2, Others::Refused, record)
        .await
        .unwrap();
    (network, endpoints, recorded)
}

#[tokio::test]
async fn a_veth_becomes_a_nic_and_frames_pass_both_ways() {
    let (pod, host) = (Bound::new(), Bound::new());
    pod.veth("eth0", &host, "host0");
    pod.sh("ip link set eth0 mtu 1400 address 0a:58:0a:00:00:05");
    pod.sh("ip address add 10.0.0.5/24 dev eth0");
    pod.sh("ip address add fd00::5/64 dev eth0 nodad");
    pod.sh("ip address add fe80::1234/64 dev eth0 nodad");

    let (_network, endpoints, recorded) = connect(&pod).await;

    assert_eq!(names(&endpoints), ["eth0"]);
    assert_eq!(recorded.len(), 1);
    let interface = endpoints[0].link.interface("02/00");
    assert_eq!(
        (
            interface.device.as_str(),
            interface.name.as_str(),
            interface.mtu
        ),
        ("eth0", "eth0", 1400)
    );
    assert_eq!(
        (interface.hwAddr.as_str(), interface.devicePath.as_str()),
        ("0a:58:0a:00:00:05", "02/00")
    );
    assert_eq!((interface.type_.as_str(), interface.raw_flags), ("veth", 0));
    let mut addresses: Vec<String> = interface
        .IPAddresses
        .iter()
        .map(|a| format!("{:?} {}/{}", a.family.unwrap(), a.address, a.mask))
        .collect();
    addresses.sort();
    assert_eq!(
        addresses,
        ["v4 10.0.0.5/24", "v6 fd00::5/64", "v6 fe80::1234/64"],
        "and no generated one"
    );
    let fds = endpoints[0].clone_fds().unwrap();
    assert_eq!(fds.taps.len(), 2);
    assert!(pod.sh("ip link show vmtap0").contains("mtu 1400"));
    assert_frames_pass(&host.packet_socket("host0"), &fds.taps);

    drop((fds, endpoints));
    assert!(
        !pod.sh("ip link").contains("vmtap"),
        "a tap goes with its descriptors"
    );
}

#[tokio::test]
async fn a_macvlan_and_a_bridge_are_nics_and_a_bridges_ports_are_not() {
    let (pod, host) = (Bound::new(), Bound::new());
    host.veth("uplink", &host, "switch");
    host.sh("ip link add mac0 link uplink type macvlan mode bridge");
    host.sh(&format!("ip link set mac0 netns {}", pod.path.display()));
    pod.veth("port0", &host, "host0");
    pod.sh("ip link add br0 type bridge");
    pod.sh("ip link set port0 master br0");
    for link in ["mac0", "br0"] {
        pod.sh(&format!("ip link set {link} up"));
    }

    let (_network, endpoints, _) = connect(&pod).await;

    assert_eq!(names(&endpoints), ["br0", "mac0"]);
    for endpoint in &endpoints {
        let fds = endpoint.clone_fds().unwrap();
        let (kind, beyond) = if endpoint.link.name == "br0" {
            ("bridge", "host0")
        } else {
            ("macvlan", "switch")
        };
        assert_eq!(endpoint.link.interface("").type_, kind);
        assert_frames_pass(&host.packet_socket(beyond), &fds.taps);
    }
}

#[tokio::test]
async fn a_link_that_is_a_tap_is_opened_itself() {
    for (options, queues) in [("", 1), ("multi_queue", 2)] {
        let pod = Bound::new();
        pod.sh(&format!("ip tuntap add name tap0 mode tap {options}"));
        pod.sh("ip link set tap0 up");

        let (_network, endpoints, recorded) = connect(&pod).await;

        assert_eq!(names(&endpoints), ["tap0"]);
        assert!(recorded.is_empty(), "nothing to undo");
        let fds = endpoints[0].clone_fds().unwrap();
        assert_eq!(fds.taps.len(), queues);
        assert_frames_pass(&pod.packet_socket("tap0"), &fds.taps);
        assert_eq!(pod.sh("ip -o link").lines().count(), 2, "no tap of our own");
    }
}

#[tokio::test]
async fn routes_and_permanent_neighbours_are_told_to_the_agent() {
    let (pod, host) = (Bound::new(), Bound::new());
    pod.veth("eth0", &host, "host0");
    for line in [
        "ip address add 10.0.0.5/24 dev eth0",
        "ip address add 10.9.0.2 peer 10.9.0.1 dev eth0",
        "ip address add fd00::5/64 dev eth0 nodad",
        "ip route add 169.254.1.1 dev eth0 scope link",
        "ip route add default via 10.0.0.1 dev eth0 src 10.0.0.5 mtu 1300",
        "ip route add 172.16.0.0/12 via 192.168.9.9 dev eth0 onlink",
        "ip -6 route add default via fd00::1 dev eth0",
        "ip route add 10.66.0.0/16 dev eth0 table 77",
        "ip route add blackhole 10.77.0.0/16",
        "ip neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
        "ip neigh add fd00::1 lladdr ee:ee:ee:ee:ee:01 dev eth0 nud permanent",
        "ip neigh add 10.0.0.77 lladdr ee:ee:ee:ee:ee:77 dev eth0 nud stale",
    ] {
        pod.sh(line);
    }

    let (network, _endpoints, _) = connect(&pod).await;

    let mut routes: Vec<String> = network
        .routes()
        .await
        .unwrap()
        .iter()
        .map(|route| {
            assert_eq!(route.device, "eth0");
            let family = route.family.unwrap();
            let (dest, gateway, source) = (&route.dest, &route.gateway, &route.source);
            format!(
                "{family:?} [{dest}] via [{gateway}] src [{source}] {} {} {}",
                route.scope, route.flags, route.mtu
            )
        })
        .collect();
    routes.sort();
    assert_eq!(
        routes,
        [
            "v4 [10.9.0.1/32] via [] src [10.9.0.2] 253 0 0",
            "v4 [169.254.1.1/32] via [] src [] 253 0 0",
            "v4 [172.16.0.0/12] via [192.168.9.9] src [] 0 4 0",
            "v4 [] via [10.0.0.1] src [10.0.0.5] 0 0 1300",
            "v6 [] via [fd00::1] src [] 0 0 0",
        ]
    );
    let mut neighbours: Vec<String> = network
        .neighbours()
        .await
        .unwrap()
        .iter()
        .map(|n| {
            assert_eq!((n.device.as_str(), n.state), ("eth0", 0x80));
            format!("{} {}", n.toIPAddress.address, n.lladdr)
        })
        .collect();
    neighbours.sort();
    assert_eq!(
        neighbours,
        ["169.254.1.1 ee:ee:ee:ee:ee:ee", "fd00::1 ee:ee:ee:ee:ee:01"]
    );
}

#[tokio::test]
async fn links_that_come_later_are_found_and_the_others_are_not_made_twice() {
    let (pod, host) = (Bound::new(), Bound::new());
    pod.sh("ip link add idle type bridge");
    let (mut network, endpoints, _) = connect(&pod).await;
    assert!(
        endpoints.is_empty(),
        "a device without address that is down is nobody's"
    );

    pod.veth("eth0", &host, "host0");
    let first = network
        .connect_new(1, Others::Refused, |_| Ok(()))
        .await
        .unwrap();
    assert_eq!(names(&first), ["eth0"]);
    pod.veth("eth1", &host, "host1");
    let second = network
        .connect_new(1, Others::Refused, |_| Ok(()))
        .await
        .unwrap();
    assert_eq!(names(&second), ["eth1"]);
    assert!(
        network
            .connect_new(1, Others::Refused, |_| Ok(()))
            .await
            .unwrap()
            .is_empty()
    );
    assert_frames_pass(
        &host.packet_socket("host1"),
        &second[0].clone_fds().unwrap().taps,
    );
}

#[tokio::test]
async fn undoing_leaves_the_link_as_it_was_and_may_happen_twice() {
    let (pod, host) = (Bound::new(), Bound::new());
    for name in ["plain", "ingress", "clsact"] {
        pod.veth(name, &host, &format!("{name}-peer"));
        if name != "plain" {
            pod.sh(&format!("tc qdisc add dev {name} {name}"));
            pod.sh(&format!(
                "tc filter add dev {name} parent ffff:fff2 protocol ip u32 match u32 0xffffffff \
                 0xffffffff flowid 1:1"
            ));
        }
    }
    let all = || ["plain", "ingress", "clsact"].map(|name| pod.ingress(name));
    let before = all();

    let (_network, endpoints, recorded) = connect(&pod).await;
    for endpoint in &endpoints {
        let peer = format!("{}-peer", endpoint.link.name);
        assert_frames_pass(
            &host.packet_socket(&peer),
            &endpoint.clone_fds().unwrap().taps,
        );
    }
    assert!(
        all().iter().all(|state| state.contains("mirred")),
        "{:?}",
        all()
    );

    drop(endpoints);
    for _ in 0..2 {
        for redirect in &recorded {
            let text = serde_json::to_string(redirect).unwrap();
            serde_json::from_str::<Redirect>(&text)
                .unwrap()
                .undo()
                .unwrap();
        }
        assert_eq!(all(), before);
    }
}

#[tokio::test]
async fn what_a_dead_pod_left_does_not_stop_the_next() {
    let (pod, host) = (Bound::new(), Bound::new());
    pod.veth("eth0", &host, "host0");
    drop(connect(&pod).await);
    assert!(
        pod.ingress("eth0").contains("ingress"),
        "nobody has undone it"
    );

    let (_network, endpoints, _) = connect(&pod).await;
    assert_frames_pass(
        &host.packet_socket("host0"),
        &endpoints[0].clone_fds().unwrap().taps,
    );
}

#[tokio::test]
async fn a_failure_midway_leaves_nothing() {
    let (pod, host) = (Bound::new(), Bound::new());
    pod.veth("eth0", &host, "host0");
    pod.veth("eth1", &host, "host1");
    let state = || {
        (
            pod.sh("ip -o link").lines().count(),
            pod.ingress("eth0"),
            pod.ingress("eth1"),
        )
    };
    let before = state();
    let mut network = Network::new(pod.open(), false).unwrap();

    let mut left = 1;
    let record = |_: &Redirect| {
        left -= 1;
        if left < 0 {
            Err(Error::internal("the disk is full"))
        } else {
            Ok(())
        }
    };
    let error = network
        .connect_new(1, Others::Refused, record)
        .await
        .unwrap_err();

    assert!(
        error
            .to_string()
            .ends_with("to the virtual machine: the disk is full"),
        "{error}"
    );
    // A child that another test starts holds the tap until it runs its program.
    let patience = Instant::now() + Duration::from_secs(10);
    while state() != before && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(state(), before);
    assert_eq!(
        network
            .connect_new(1, Others::Refused, |_| Ok(()))
            .await
            .unwrap()
            .len(),
        2,
        "and it can be tried again"
    );
}

#[tokio::test]
async fn undoing_in_a_namespace_or_on_a_link_that_is_gone_is_no_error() {
    let (pod, host) = (Bound::new(), Bound::new());
    pod.veth("eth0", &host, "host0");
    let (network, endpoints, recorded) = connect(&pod).await;
    drop((network, endpoints));

    host.sh("ip link delete host0");
    recorded[0].undo().unwrap();
    pod.veth("eth0", &host, "host0");
    pod.sh("tc qdisc add dev eth0 ingress");
    recorded[0].undo().unwrap();
    assert!(
        pod.ingress("eth0").contains("ingress"),
        "another link of the same name is not ours"
    );

    drop(pod);
    recorded[0].undo().unwrap();
    let other = Redirect {
        netns: "/proc/self/ns/net".into(),
        ..recorded[0].clone()
    };
    other.undo().unwrap();
}

#[test]
fn the_hosts_own_network_is_refused() {
    let error =
        Network::new(Netns::open("/proc/self/ns/net".as_ref()).unwrap(), false).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("a virtual machine cannot have the host's own network"),
        "{error}"
    );
}
