//! A pod's network as CNI made it, seen from inside, from other pods and from the host; and a
//! container's without CNI.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, ExitCode};
use std::time::Duration;

use cofferdam_tests::bundle::Bundle;
use cofferdam_tests::command::{Running, run};
use cofferdam_tests::cri::MTU;
use cofferdam_tests::network::{Netns, ip};
use cofferdam_tests::pod::Pod;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Core: pods_reach_each_other, pod_and_host_reach_each_other,
            container_without_network_has_loopback_only,
            network_namespace_given_to_ctr_is_used_and_left_as_it_was;
        Once: port_forward_reaches_a_server_on_loopback, host_port, link_is_as_cni_made_it, macvlan,
            names_of_the_network_survive_a_second_container;
        Ours: network_made_by_a_hook, network_made_before_the_start,
            links_of_all_kinds_can_be_made, traffic_can_be_shaped;
    ])
}

/// Asks the server at `address` over TCP, until it is there.
fn ask_tcp(address: SocketAddr, text: &str) -> String {
    eventually(
        &format!("an answer of {address} over TCP"),
        PATIENCE,
        || {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            stream.write_all(text.as_bytes()).ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            (!answer.is_empty()).then_some(answer)
        },
    )
}

fn ask_udp(address: SocketAddr, text: &str) -> String {
    let any: IpAddr = if address.is_ipv4() {
        [0; 4].into()
    } else {
        [0; 16].into()
    };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    eventually(
        &format!("an answer of {address} over UDP"),
        PATIENCE,
        || {
            socket.send_to(text.as_bytes(), address).ok()?;
            let mut answer = [0; 100];
            let (count, _) = socket.recv_from(&mut answer).ok()?;
            Some(String::from_utf8_lossy(&answer[..count]).into_owned())
        },
    )
}

fn at(address: &str, port: u16) -> SocketAddr {
    (address.parse::<IpAddr>().unwrap(), port).into()
}

fn pods_reach_each_other(env: &Env) {
    let (server, client) = (Pod::new(env), Pod::new(env));
    server.run("tcp", &["talk", "serve", "tcp", "::", "7000"]);
    server.run("udp", &["talk", "serve", "udp", "::", "7000"]);
    let client = client.idle("client");
    let addresses = server.addresses();
    assert_eq!(
        addresses.len(),
        2,
        "an address of each family: {addresses:?}"
    );
    for address in &addresses {
        for protocol in ["tcp", "udp"] {
            let answer = client.sh(&format!("talk ask {protocol} {address} 7000 hello"));
            assert_eq!(answer, "you said hello", "{protocol} {address}");
        }
    }
}

fn pod_and_host_reach_each_other(env: &Env) {
    let pod = Pod::new(env);
    pod.run("tcp", &["talk", "serve", "tcp", "::", "7000"]);
    pod.run("udp", &["talk", "serve", "udp", "::", "7000"]);
    for address in pod.addresses() {
        assert_eq!(ask_tcp(at(&address, 7000), "hello"), "you said hello");
        assert_eq!(ask_udp(at(&address, 7000), "hello"), "you said hello");
    }
    let client = pod.idle("client");
    for gateway in env.cri().gateways() {
        let server = TcpListener::bind((gateway.as_str(), 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let serve = std::thread::spawn(move || {
            let (mut stream, peer) = server.accept().unwrap();
            let mut text = [0; 100];
            let count = stream.read(&mut text).unwrap();
            stream.write_all(&text[..count]).unwrap();
            peer
        });
        assert_eq!(
            client.sh(&format!("talk ask tcp {gateway} {port} hello")),
            "hello"
        );
        let peer = serve.join().unwrap().ip().to_string();
        assert!(
            pod.addresses().contains(&peer),
            "{peer} is not the pod's address"
        );
        let server = UdpSocket::bind((gateway.as_str(), 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let serve = std::thread::spawn(move || {
            let mut text = [0; 100];
            let (count, peer) = server.recv_from(&mut text).unwrap();
            server.send_to(&text[..count], peer).unwrap();
        });
        assert_eq!(
            client.sh(&format!("talk ask udp {gateway} {port} hello")),
            "hello"
        );
        serve.join().unwrap();
    }
}

fn port_forward_reaches_a_server_on_loopback(env: &Env) {
    let pod = Pod::new(env);
    pod.run("loopback", &["talk", "serve", "tcp", "127.0.0.1", "7001"])
        .wait_for_log("listening");
    pod.run("everywhere", &["talk", "serve", "tcp", "::", "7002"])
        .wait_for_log("listening");
    let said = env.dir.join("said");
    let forward = env
        .cri()
        .command(["port-forward", &pod.id, ":7001", ":7002"]);
    let mut forward = Running::start_into(forward, None, File::create(&said).unwrap());
    for port in [7001, 7002] {
        let local = eventually(&format!("port {port} is forwarded"), PATIENCE, || {
            let said = std::fs::read_to_string(&said).unwrap();
            let line = said.lines().find(|line| {
                line.contains("127.0.0.1:") && line.ends_with(&format!("-> {port}"))
            })?;
            line.split_once("127.0.0.1:")?
                .1
                .split(' ')
                .next()?
                .parse::<u16>()
                .ok()
        });
        for round in 0..3 {
            let text = format!("hello{round}");
            assert_eq!(
                ask_tcp(at("127.0.0.1", local), &text),
                format!("you said {text}")
            );
        }
    }
    forward.child.kill().unwrap();
    forward.wait(PATIENCE);
}

fn host_port(env: &Env) {
    let mapping =
        |protocol: u8| json!({"protocol": protocol, "container_port": 7000, "host_port": 7080});
    let pod = Pod::with(env, json!({"port_mappings": [mapping(0), mapping(1)]}));
    pod.run("tcp", &["talk", "serve", "tcp", "::", "7000"]);
    pod.run("udp", &["talk", "serve", "udp", "::", "7000"]);
    let host = at(&env.cri().gateways()[0], 7080);
    assert_eq!(ask_tcp(host, "hello"), "you said hello");
    assert_eq!(ask_udp(host, "hello"), "you said hello");
}

fn link_is_as_cni_made_it(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let [gateway, gateway6] = env.cri().gateways();
    assert_eq!(container.sh("ls /sys/class/net"), "eth0\nlo");
    assert_eq!(container.sh("cat /sys/class/net/eth0/mtu"), MTU.to_string());
    let (addresses, seen) = (pod.addresses(), container.sh("ip -o addr show dev eth0"));
    assert!(
        seen.contains(&format!(" {}/24 ", addresses[0])),
        "{addresses:?}: {seen}"
    );
    assert!(
        seen.contains(&format!(" {}/64 ", addresses[1])),
        "{addresses:?}: {seen}"
    );
    let routes = container.sh("ip route; ip -6 route");
    assert!(
        routes.contains(&format!("default via {gateway} dev eth0")),
        "{routes}"
    );
    assert!(
        routes.contains(&format!("default via {gateway6} dev eth0")),
        "{routes}"
    );
    assert!(
        container.sh("ip link show lo").contains("UP"),
        "loopback is down"
    );
    // What CNI answered the kubelet with is what others send to.
    let neighbours = ip(&["neigh", "show", "dev", &env.cri().bridge()]);
    let mac = container.sh("cat /sys/class/net/eth0/address");
    container.sh(&format!("ping -c 1 {gateway}"));
    let known = ip(&["neigh", "show", &addresses[0], "dev", &env.cri().bridge()])
        .ok()
        .text();
    assert!(
        known.contains(&mac),
        "{mac} is not in {known:?}; before: {:?}",
        neighbours.text()
    );
}

fn names_of_the_network_survive_a_second_container(env: &Env) {
    let pod = Pod::new(env);
    let first = pod.idle("first");
    first.sh("talk ask tcp 127.0.0.1 9 x || true; ip -o addr >/dev/shm/addresses");
    let second = pod.idle("second");
    second.sh("ip -o addr | cmp - /dev/shm/addresses");
    first.remove(&["-f"]);
    pod.idle("third")
        .sh("ip -o addr | cmp - /dev/shm/addresses");
}

fn macvlan(env: &Env) {
    let env = env.with_own_daemon(None);
    let (lower, host) = ("mvl0", "mvl1");
    ip(&["link", "add", lower, "type", "veth", "peer", "name", host]).ok();
    let [gateway, gateway6] = env.cri().gateways();
    ip(&["addr", "add", &format!("{gateway}/24"), "dev", host]).ok();
    ip(&[
        "addr",
        "add",
        &format!("{gateway6}/64"),
        "dev",
        host,
        "nodad",
    ])
    .ok();
    for link in [lower, host] {
        ip(&["link", "set", link, "up"]).ok();
    }
    env.daemon.stop(Signal::SIGTERM);
    let ipam = env
        .cri()
        .ipam(json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]));
    env.cri().set_network(&[
        json!({"type": "macvlan", "master": lower, "mode": "bridge", "ipam": ipam}),
    ]);
    env.daemon.start_again();
    {
        let pod = Pod::new(&env);
        pod.run("tcp", &["talk", "serve", "tcp", "::", "7000"]);
        for address in pod.addresses() {
            assert_eq!(ask_tcp(at(&address, 7000), "hello"), "you said hello");
        }
        let two = Pod::new(&env);
        let client = two.idle("client");
        for address in pod.addresses() {
            assert_eq!(
                client.sh(&format!("talk ask tcp {address} 7000 hello")),
                "you said hello"
            );
        }
    }
    ip(&["link", "delete", lower]).ok();
}

fn container_without_network_has_loopback_only(env: &Env) {
    let seen = env
        .run(
            &[],
            &[
                "sh",
                "-c",
                "ls /sys/class/net; ip -o addr show lo | head -n 1",
            ],
        )
        .ok()
        .text();
    assert!(seen.starts_with("lo\n"), "{seen}");
}

fn network_namespace_given_to_ctr_is_used_and_left_as_it_was(env: &Env) {
    let netns = Netns::new(&env.id());
    let (host, inside) = ("vns0", "vns1");
    ip(&[
        "link",
        "add",
        host,
        "type",
        "veth",
        "peer",
        "name",
        inside,
        "netns",
        &netns.name,
    ])
    .ok();
    ip(&["addr", "add", "10.87.0.1/24", "dev", host]).ok();
    ip(&["link", "set", host, "up"]).ok();
    netns.ip(&["addr", "add", "10.87.0.2/24", "dev", inside]);
    netns.ip(&["link", "set", inside, "up", "mtu", "1300"]);
    let state = || {
        let qdiscs = netns.exec(&["tc", "qdisc", "show"])
            + &netns.exec(&["tc", "filter", "show", "dev", inside]);
        // Carrier and flags settle by themselves; names, kinds and MTUs do not.
        let links = netns
            .ip(&["-br", "link"])
            .lines()
            .map(|line| line.split('@').next().unwrap().to_owned())
            .collect();
        (
            qdiscs,
            netns.ip(&["-br", "addr", "show", "dev", inside]),
            links,
        )
    };
    let before: (String, String, Vec<String>) = state();
    let with = format!("network:{}", netns.path());
    {
        let container = env.detached(
            &["--null-io", "--with-ns", &with],
            &["nc", "-ll", "-p", "7000", "-e", "cat"],
        );
        let seen = container
            .exec(&[
                "sh",
                "-c",
                "cat /sys/class/net/vns1/mtu; ip -o addr show dev vns1",
            ])
            .ok()
            .text();
        assert!(
            seen.starts_with("1300\n") && seen.contains("10.87.0.2/24"),
            "{seen}"
        );
        let answer = eventually("an answer from the container", PATIENCE, || {
            let mut stream =
                TcpStream::connect_timeout(&at("10.87.0.2", 7000), Duration::from_secs(5)).ok()?;
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .ok()?;
            stream.write_all(b"hello").ok()?;
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).ok()?;
            Some(answer)
        });
        assert_eq!(&answer, b"hello");
    }
    eventually("the namespace is as it was", PATIENCE, || {
        (state() == before).then_some(())
    });
    drop(netns);
    eventually("its link is gone", PATIENCE, || {
        (ip(&["link", "show", host]).status != 0).then_some(())
    });
}

/// Makes a link between the host and the namespace of a process, as nerdctl and docker do it.
const MAKE_LINK: &str = "ip link add $1 type veth peer name eth0 netns $2
    ip link set $1 up
    nsenter -t $2 -n sh -c 'ip address add 10.99.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.99.0.1'";

/// Starts a container whose network is made by then, and gives what it sees of it.
fn seen_of(env: &Env, prepare: impl FnOnce(&Bundle), between: impl FnOnce(u32)) -> String {
    let bundle = Bundle::new(
        env,
        &["sh", "-c", "ip -o -4 address show dev eth0; ip route"],
    );
    prepare(&bundle);
    let log = env.dir.join("log");
    let task = bundle.start();
    let pid = task
        .create_with(|request| request.stdout = format!("file://{}", log.display()))
        .unwrap()
        .pid;
    between(pid);
    task.start("").unwrap();
    assert_eq!(task.wait("").unwrap().exit_status, 0);
    task.delete("").unwrap();
    task.shutdown(false).unwrap();
    std::fs::read_to_string(log).unwrap()
}

fn assert_network(seen: &str) {
    assert!(
        seen.contains("inet 10.99.0.2/24") && seen.contains("default via 10.99.0.1 dev eth0"),
        "{seen}"
    );
}

/// And taken away by one, however fast the container's server is told to end after the delete.
fn network_made_by_a_hook(env: &Env) {
    let undone = env.dir.join("undone");
    let seen = seen_of(
        env,
        |bundle| {
            let script =
                format!("set -- hook0 $(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')\n{MAKE_LINK}");
            let path = format!("PATH={}", std::env::var("PATH").unwrap());
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-ec", script], "env": [path]});
            let undo = format!("sleep 1; touch {}", undone.display());
            let undo = json!({"path": "/bin/sh", "args": ["sh", "-ec", undo], "env": [path]});
            bundle.edit(|spec| {
                spec["hooks"] = json!({"createRuntime": [hook], "poststop": [undo]});
            });
        },
        |_| {},
    );
    assert_network(&seen);
    assert!(undone.exists(), "the poststop hook was cut off");
}

fn network_made_before_the_start(env: &Env) {
    let seen = seen_of(
        env,
        |_| {},
        |pid| {
            let mut make = Command::new("sh");
            make.args(["-ec", MAKE_LINK, "sh", "late0", &pid.to_string()]);
            run(make, PATIENCE).ok();
        },
    );
    assert_network(&seen);
}

/// A privileged container with the host's programs. By their names its shell runs busybox's.
fn with_tools(env: &Env) -> Container<'_> {
    let mounts = ["/usr", "/lib", "/lib64"]
        .map(|dir| format!("type=bind,src={dir},dst={dir},options=rbind:ro"));
    let mut flags = vec!["--null-io", "--privileged"];
    for mount in &mounts {
        flags.extend(["--mount", mount]);
    }
    env.detached(&flags, &["sleep", "3600"])
}

/// Only ours: what a host's kernel has is the host's business.
fn links_of_all_kinds_can_be_made(env: &Env) {
    let container = with_tools(env);
    let script = "ip() { /usr/sbin/ip \"$@\"; }; ip -o link | wc -l
        ip link add d0 type veth peer name d1
        for kind in dummy bridge ifb bond wireguard 'vxlan id 1 dstport 4789' 'vrf table 9' \\
            'ipip remote 1.2.3.4' 'gre remote 1.2.3.4' 'gretap remote 1.2.3.4' \\
            'geneve id 1 remote 1.2.3.4' 'vlan id 7' macvlan ipvlan; do
            on=; case $kind in vlan*|macvlan|ipvlan) on='link d0';; esac
            ip link add $on name new type $kind && ip link del new || echo no $kind; done
        ip tuntap add new mode tun && ip link del new; ip -o link | wc -l";
    let said = container.exec(&["sh", "-c", script]).ok();
    assert_eq!(said.text(), "1\n3", "{}", said.errors());
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

fn traffic_can_be_shaped(env: &Env) {
    let container = with_tools(env);
    let script = "set -e; ip() { /usr/sbin/ip \"$@\"; }; tc() { /usr/sbin/tc \"$@\"; }
        tc qdisc add dev lo root netem delay 150ms
        busybox ping -c 1 127.0.0.1 | grep -o 'time=.*'
        for kind in 'tbf rate 1mbit burst 32kbit latency 400ms' fq_codel fq sfq prio; do
            tc qdisc replace dev lo root $kind; done
        tc qdisc replace dev lo root handle 1: htb default 1
        tc class add dev lo parent 1: classid 1:1 htb rate 1mbit
        tc filter add dev lo parent 1: u32 match ip dst 127.0.0.2 flowid 1:1
        tc qdisc add dev lo clsact; tc qdisc del dev lo clsact
        ip link add ifb0 type ifb
        tc qdisc add dev lo ingress
        tc filter add dev lo parent ffff: matchall action mirred egress redirect dev ifb0";
    let said = container.exec(&["sh", "-c", script]).ok().text();
    // There and back.
    let took = said
        .strip_prefix("time=3")
        .and_then(|rest| rest.split_once('.'));
    assert!(took.is_some_and(|(rest, _)| rest.len() == 2), "{said}");
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}
