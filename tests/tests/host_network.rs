//! The host's network for a container (hostNetwork, `--net-host`), which the host has to allow.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

use cofferdam_tests::network::{Netns, Server, inside, ip, run_talk};
use cofferdam_tests::{Container, Env, PATIENCE, Release, Suite, cases, eventually};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

fn main() -> ExitCode {
    Suite::of_pods().run_on(&[Release::V1_7], cases![Once: network_of_the_host])
}

/// hostNetwork, which the host has to allow.
fn network_of_the_host(env: &Env) {
    let beyond = Netns::new(&env.id());
    // Another runtime's test may be on the same host.
    let (net, metric) = if env.is_vm() { (79, 1) } else { (80, 2) };
    let there = ["1", "2"].map(|host| (format!("10.{net}.1.{host}"), format!("fd{net}::{host}")));
    let [(v4, v6), (own_v4, own_v6)] = &there;
    let link = format!("out{net}");
    for line in [
        format!(
            "link add {link} type veth peer name back netns {}",
            beyond.name
        ),
        format!("addr add {own_v4}/24 dev {link}"),
        format!("addr add {own_v6}/64 dev {link} nodad"),
        format!("link set {link} up"),
        format!("route add default via {v4} metric {metric}"),
        format!("-6 route add default via {v6} metric {metric}"),
    ] {
        ip(&line.split(' ').collect::<Vec<_>>()).ok();
    }
    for line in [
        format!("addr add {v4}/24 dev back"),
        format!("addr add {v6}/64 dev back nodad"),
        "link set back up".to_owned(),
    ] {
        beyond.ip(&line.split(' ').collect::<Vec<_>>());
    }
    let _server = Server::new(&beyond, [v4, v6], 5353);
    let config = env.dir.join("config.toml");
    fs::write(&config, "host_network = \"passt\"\n").unwrap();
    let config = config.display().to_string();
    let mut flags = vec!["--net-host"];
    let mut tun = None;
    if env.is_vm() {
        let (id, refused) = run_talk(env, &flags);
        refused.fails_with(&["hostNetwork", "host_network = \"passt\""]);
        env.ctr(&["containers", "delete", &id]);
        tun = Some(OpenTun::new(env));
        flags.extend(["--privileged", "--runtime-config-path", &config]);
    }
    let (id, ran) = run_talk(env, &flags);
    ran.ok();
    let container = Container::adopt(env, &id);
    for address in [v4, v6] {
        for protocol in ["tcp", "udp"] {
            let ask = ["talk", "ask", protocol, address, "5353", "hello"];
            let answer = container.exec(&ask).text();
            assert_eq!(answer, format!("{protocol}:hello"), "{address}");
        }
    }
    serve(&container, "::", net);
    let said_to = |address: &str| {
        let to: IpAddr = address.parse().unwrap();
        move || {
            let mut stream = TcpStream::connect((to, net)).ok()?;
            stream.write_all(b"hello").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        }
    };
    let said = eventually(
        "the guest's server is the host's",
        PATIENCE,
        said_to("127.0.0.1"),
    );
    assert_eq!(said, "you said hello");
    for address in [own_v4, own_v6] {
        let answer = inside(&beyond, said_to(address));
        assert_eq!(answer, Some(said.clone()), "{address}");
    }
    if env.is_vm() {
        nothing_private_is_reached(&container, net, (v4, own_v4), &link, &beyond);
    }
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    drop(tun);
    ip(&["link", "delete", &link]).ok();
}

/// /dev/net/tun as udev makes it; a machine without udev may have it for root alone.
struct OpenTun;

impl OpenTun {
    fn new(env: &Env) -> OpenTun {
        let node = env.dir.join("tun");
        mknod(&node, SFlag::S_IFCHR, Mode::empty(), makedev(10, 200)).unwrap();
        fs::set_permissions(&node, Permissions::from_mode(0o666)).unwrap();
        let none = None::<&str>;
        mount(Some(&node), TUN, none, MsFlags::MS_BIND, none).unwrap();
        OpenTun
    }
}

impl Drop for OpenTun {
    fn drop(&mut self) {
        umount(TUN).unwrap();
    }
}

const TUN: &str = "/dev/net/tun";

/// A server in the container.
fn serve(container: &Container<'_>, address: &str, port: u16) {
    let script = format!("talk serve tcp {address} {port} >/dev/null 2>&1 &");
    container.exec(&["sh", "-c", &script]).ok();
}

/// What is on a loopback stays there: the host's from root of the guest, and the guest's.
fn nothing_private_is_reached(
    container: &Container<'_>,
    net: u16,
    (gateway, own): (&str, &str),
    link: &str,
    beyond: &Netns,
) {
    let secret = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    secret.set_nonblocking(true).unwrap();
    let [private, mapped, public] = [7000, 8000, 9000].map(|base| base + net);
    serve(container, "127.0.0.1", private);
    serve(container, "::ffff:127.0.0.1", mapped);
    serve(container, "::", public);
    let own: IpAddr = own.parse().unwrap();
    let connects = |port| inside(beyond, move || TcpStream::connect((own, port)).is_ok());
    // The one that came last, so the others have been seen by then.
    eventually("the public server is led to", PATIENCE, || {
        connects(public).then_some(())
    });
    for port in [private, mapped] {
        assert!(
            !connects(port),
            "a server on the guest's loopback is public"
        );
    }
    let port = secret.local_addr().unwrap().port();
    let script = format!(
        "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
         ip addr del 127.0.0.1/8 dev lo
         ip route add 127.0.0.1/32 via {gateway} dev {link}
         ! nc -w 3 127.0.0.1 {port} </dev/null"
    );
    container.exec(&["sh", "-c", &script]).ok();
    assert!(secret.accept().is_err(), "the host's loopback was reached");
}
