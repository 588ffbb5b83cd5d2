//! What a network namespace has is what a container sees: routes, rules, sysctls, packet filters,
//! servers on its loopback; at the start, and when it changes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use cofferdam_tests::network::{Netns, Server, ask, ip, run_talk};
use cofferdam_tests::{Container, Env, PATIENCE, Release, Suite, cases, eventually};

fn main() -> ExitCode {
    Suite::of_pods().run_on(
        &[Release::V1_7],
        cases![
            Once: routes_and_rules_are_those_of_the_namespace,
                sysctls_are_those_of_the_namespace,
                what_changes_in_the_namespace_changes_inside,
                server_on_the_loopback_of_the_namespace,
                programs_of_the_host_in_the_namespace_talk_to_others,
                rules_of_a_mesh_redirect_the_containers_traffic,
                vlan_and_dummy_links, twenty_links;
            Ours: rule_that_cannot_be_carried_keeps_it_from_starting,
                link_without_ethernet_is_refused, second_machine_in_a_namespace_is_refused;
        ],
    )
}

/// A namespace, and another one with the other ends of its links.
struct Pod<'e> {
    env: &'e Env,
    netns: Netns,
    beyond: Netns,
}

impl<'e> Pod<'e> {
    fn new(env: &'e Env) -> Pod<'e> {
        Pod {
            env,
            netns: Netns::new(&env.id()),
            beyond: Netns::new(&env.id()),
        }
    }

    /// A link `e<number>` with 10.`network`.`number`.2/24; the other end has .1.
    fn link(&self, network: u8, number: u8) {
        let (there, here) = (format!("n{network}n{number}"), format!("e{number}"));
        let beyond = &self.beyond.name;
        self.ip(&format!(
            "link add {here} type veth peer name {there} netns {beyond}"
        ));
        for line in [
            format!("addr add 10.{network}.{number}.1/24 dev {there}"),
            format!("link set {there} up"),
        ] {
            self.beyond.ip(&line.split(' ').collect::<Vec<_>>());
        }
        self.ip(&format!("addr add 10.{network}.{number}.2/24 dev {here}"));
        self.ip(&format!("link set {here} up"));
    }

    /// In the namespace, on the host.
    #[track_caller]
    fn ip(&self, line: &str) -> String {
        self.netns.ip(&line.split(' ').collect::<Vec<_>>())
    }

    fn flags(&self) -> Vec<String> {
        let mut flags = vec![
            "--null-io".to_owned(),
            "--privileged".to_owned(),
            format!("--with-ns=network:{}", self.netns.path()),
        ];
        for dir in ["/usr", "/lib", "/lib64", "/etc"] {
            flags.push(format!(
                "--mount=type=bind,src={dir},dst={dir},options=rbind:ro"
            ));
        }
        flags
    }

    fn container(&self) -> Container<'e> {
        let flags = self.flags();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        self.env.detached(&flags, &["sleep", "3600"])
    }
}

impl<'e> Pod<'e> {
    /// A container that can ask servers.
    fn talker(&self) -> Container<'e> {
        let namespace = format!("--with-ns=network:{}", self.netns.path());
        let (id, ran) = run_talk(self.env, &[&namespace]);
        ran.ok();
        Container::adopt(self.env, &id)
    }
}

/// What a container says to a script in which `ip` is the host's program.
#[track_caller]
fn sh(container: &Container<'_>, script: &str) -> String {
    let script = format!("ip() {{ /usr/bin/ip \"$@\"; }}; {script}");
    container.exec(&["sh", "-c", &script]).ok().text()
}

fn finish(container: Container<'_>) {
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

/// All that decides where a packet goes, but for what each kernel has of its own.
const ROUTING: [&str; 5] = [
    "-4 rule",
    "-6 rule",
    "-4 route show table all",
    "-6 route show table all",
    "-o addr show scope global",
];

/// Lines that can be compared: without numbers of links, and without what kernels make themselves.
fn comparable(said: &str) -> Vec<String> {
    let mut lines: Vec<String> = said
        .lines()
        .filter(|line| !line.contains("table local") && !line.contains("proto kernel metric 256"))
        .map(|line| {
            let line = line.split_once(": ").map_or(line, |(_, rest)| rest);
            let line = line.replace("    ", " ");
            // The host keeps the first two to itself, and a guest needs the others where a
            // network's route has been taken away.
            let states = [" linkdown", " dead", " onlink", " noprefixroute"];
            let line = states
                .iter()
                .fold(line, |line, state| line.replace(state, ""));
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        })
        .collect();
    lines.sort();
    lines
}

#[track_caller]
fn assert_routing_is_the_same(pod: &Pod<'_>, container: &Container<'_>) {
    let differs = |what: &str| {
        let host = comparable(&pod.ip(what));
        let guest = comparable(&sh(container, &format!("ip {what}")));
        (host != guest).then(|| format!("ip {what}\nhost:  {host:#?}\nguest: {guest:#?}"))
    };
    let mut last = String::new();
    for _ in 0..50 {
        match ROUTING.into_iter().find_map(differs) {
            None => return,
            Some(difference) => last = difference,
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{last}");
}

fn routes_and_rules_are_those_of_the_namespace(env: &Env) {
    let pod = Pod::new(env);
    for number in 1..=3 {
        pod.link(71, number);
    }
    for line in [
        "addr add fd71::2/64 dev e1 nodad",
        "addr add 10.71.9.9 peer 10.71.9.8/32 dev e1",
        "addr add 10.71.1.200/24 dev e1",
        "addr add 10.71.99.1/32 dev lo",
        "route add default via 10.71.1.1 dev e1 metric 100",
        "route add default via 10.71.2.1 dev e2 metric 200",
        "route add 10.171.1.0/24 via 10.71.2.1 mtu 1300 advmss 1200",
        "route add 10.171.2.0/24 via 10.200.0.1 dev e2 onlink",
        "route add 10.171.3.0/24 nexthop via 10.71.1.1 weight 2 nexthop via 10.71.2.1 weight 1",
        "route add 10.171.4.0/24 via inet6 fe80::1 dev e1",
        "route add blackhole 10.171.5.0/24",
        "route add unreachable 10.171.6.0/24 metric 7",
        "route add 10.171.7.0/24 dev e3 scope link src 10.71.3.2",
        "route add default via 10.71.3.1 dev e3 table 1003",
        "rule add from 10.71.3.2 lookup 1003 pref 1000",
        "rule add fwmark 0x7/0xff iif e2 lookup 1003",
        "rule add not to 10.71.0.0/16 lookup 1003 pref 2000",
        "-6 route add default via fe80::1 dev e1 metric 50",
        "-6 route add fd71:1::/64 via fd71::1",
        "-6 rule add from fd71::2 lookup 1003 pref 3000",
        // As the CNI plug-in ptp does: there is no network, only a gateway.
        "route del 10.71.3.0/24 dev e3",
        "neigh add 10.71.1.77 lladdr 02:00:00:00:00:77 dev e1 nud permanent",
    ] {
        pod.ip(line);
    }
    let container = pod.container();
    assert_routing_is_the_same(&pod, &container);
    let neighbours = sh(&container, "ip neigh show 10.71.1.77");
    assert!(neighbours.contains("02:00:00:00:00:77"), "{neighbours}");
    finish(container);
}

fn sysctls_are_those_of_the_namespace(env: &Env) {
    let pod = Pod::new(env);
    pod.link(72, 1);
    let values = [
        ("ipv4/ip_forward", "1"),
        ("ipv4/tcp_keepalive_time", "77"),
        ("ipv4/ip_local_port_range", "20000\t30000"),
        ("ipv4/conf/e1/rp_filter", "2"),
        ("ipv4/conf/all/arp_ignore", "1"),
        ("ipv6/conf/e1/accept_ra", "0"),
        ("core/somaxconn", "777"),
    ];
    for (name, value) in values {
        pod.netns
            .exec(&["sh", "-c", &format!("echo '{value}' >/proc/sys/net/{name}")]);
    }
    let container = pod.container();
    for (name, value) in values {
        assert_eq!(
            sh(&container, &format!("cat /proc/sys/net/{name}")),
            value,
            "{name}"
        );
    }
    finish(container);
}

fn what_changes_in_the_namespace_changes_inside(env: &Env) {
    let pod = Pod::new(env);
    pod.link(73, 1);
    pod.ip("route add default via 10.73.1.1");
    let container = pod.container();
    pod.link(73, 2);
    for line in [
        "addr add 10.73.1.9/24 dev e1",
        "route add 10.173.0.0/16 via 10.73.2.1",
        "route replace default via 10.73.2.1",
        "rule add from 10.73.2.2 lookup 102",
        "route add default via 10.73.2.1 table 102",
        "link set e1 mtu 1400",
    ] {
        pod.ip(line);
    }
    assert_routing_is_the_same(&pod, &container);
    let mtu = || sh(&container, "cat /sys/class/net/e1/mtu") == "1400";
    eventually("the MTU has changed", PATIENCE, || mtu().then_some(()));
    sh(&container, "busybox ping -c 1 -w 10 10.73.2.1");
    // What the container has set itself stays.
    sh(
        &container,
        "ip addr add 10.73.77.7/32 dev lo; ip route add blackhole 10.177.0.0/16",
    );
    for line in [
        "addr del 10.73.1.9/24 dev e1",
        "rule del from 10.73.2.2 lookup 102",
        "link set e1 down",
        "link del e2",
    ] {
        pod.ip(line);
    }
    let left = || {
        let links = sh(&container, "ls /sys/class/net; ip -o link show e1");
        let own = sh(&container, "ip addr show lo; ip route show type blackhole");
        assert!(
            own.contains("10.73.77.7") && own.contains("10.177.0.0"),
            "{own}"
        );
        (!links.contains("e2") && links.contains("state DOWN")).then_some(())
    };
    eventually(
        "the second link has gone, and the first is down",
        PATIENCE,
        left,
    );
    let rules = sh(&container, "ip rule; ip addr");
    assert!(
        !rules.contains("102") && !rules.contains("10.73.1.9"),
        "{rules}"
    );
    pod.ip("link set e1 up");
    pod.ip("route add default via 10.73.1.1");
    let reached = || {
        let ping = container.exec(&["busybox", "ping", "-c", "1", "-w", "2", "10.73.1.1"]);
        (ping.status == 0).then_some(())
    };
    eventually("the first link carries again", PATIENCE, reached);
    // Another hardware address costs the guest's card its routes for a moment.
    pod.ip("link set e1 address 02:00:00:00:73:01");
    let renamed = || sh(&container, "cat /sys/class/net/e1/address") == "02:00:00:00:73:01";
    eventually("the hardware address has changed", PATIENCE, || {
        renamed().then_some(())
    });
    eventually("the default route is there", PATIENCE, || {
        sh(&container, "ip route")
            .contains("default via 10.73.1.1")
            .then_some(())
    });
    // A link that comes back under its name.
    pod.link(74, 2);
    let reached = || {
        let ping = container.exec(&["busybox", "ping", "-c", "1", "-w", "2", "10.74.2.1"]);
        (ping.status == 0).then_some(())
    };
    eventually("the new link carries", PATIENCE, reached);
    finish(container);
}

const LOOPBACK: [&str; 2] = ["127.0.0.11", "::1"];

fn server_on_the_loopback_of_the_namespace(env: &Env) {
    let pod = Pod::new(env);
    pod.link(75, 1);
    let before = Server::new(&pod.netns, LOOPBACK, 5353);
    let container = pod.talker();
    let answers = |port: u16| {
        for address in ["127.0.0.11", "::1"] {
            for protocol in ["tcp", "udp"] {
                let port = port.to_string();
                let answer = container.exec(&["talk", "ask", protocol, address, &port, "hello"]);
                assert_eq!(
                    answer.text(),
                    format!("{protocol}:hello"),
                    "{address}:{port}"
                );
            }
        }
    };
    answers(5353);
    // Each question from another port.
    let script = "for i in $(seq 100); do talk ask udp 127.0.0.11 5353 $i; echo; done | wc -l";
    assert_eq!(container.exec(&["sh", "-c", script]).ok().text(), "100");
    // Docker's starts when the container is there.
    let after = Server::new(&pod.netns, LOOPBACK, 5454);
    answers(5454);
    drop(before);
    eventually("nobody answers any more", PATIENCE, || {
        let refused = container.exec(&["nc", "-w", "2", "127.0.0.11", "5353"]);
        (refused.status != 0).then_some(())
    });
    drop(after);
    finish(container);
}

/// As docker's server for names asks others, and as a mesh's proxy without a sidecar does.
fn programs_of_the_host_in_the_namespace_talk_to_others(env: &Env) {
    let pod = Pod::new(env);
    pod.link(78, 1);
    pod.ip("addr add fd78::2/64 dev e1 nodad");
    pod.ip("route add default via 10.78.1.1");
    let at = ["addr", "add", "fd78::1/64", "dev", "n78n1", "nodad"];
    pod.beyond.ip(&at);
    let container = pod.talker();
    let _there = Server::new(&pod.beyond, ["10.78.1.1", "fd78::1"], 5353);
    let _here = Server::new(&pod.netns, ["10.78.1.2", "fd78::2"], 5454);
    let said = ["tcp:hello", "udp:hello"];
    let both_reach = || {
        for (here, there) in [("10.78.1.2", "10.78.1.1"), ("fd78::2", "fd78::1")] {
            for (protocol, said) in ["tcp", "udp"].into_iter().zip(said) {
                let answer = container.exec(&["talk", "ask", protocol, there, "5353", "hello"]);
                assert_eq!(answer.text(), said, "{there}");
            }
            assert_eq!(ask(&pod.netns, there, 5353), said, "{there}");
            assert_eq!(ask(&pod.beyond, here, 5454), said, "{here}");
        }
    };
    both_reach();
    // A link that was away keeps its number, but nothing that was set on it.
    let other = Netns::new(&env.id());
    pod.ip(&format!("link set e1 netns {}", other.name));
    let back = format!("link set e1 netns {} up", pod.netns.name);
    other.ip(&back.split(' ').collect::<Vec<_>>());
    pod.ip("addr add 10.78.1.2/24 dev e1");
    pod.ip("addr add fd78::2/64 dev e1 nodad");
    let reached = || {
        let ask = ["talk", "ask", "udp", "10.78.1.1", "5353", "hello"];
        (container.exec(&ask).text() == said[1]).then_some(())
    };
    eventually("the link carries again", PATIENCE, reached);
    both_reach();
    finish(container);
}

fn rules_of_a_mesh_redirect_the_containers_traffic(env: &Env) {
    let pod = Pod::new(env);
    pod.link(76, 1);
    for iptables in ["iptables-nft", "iptables-legacy"] {
        let rule = |port: &str, chain: &[&str]| {
            let table = [iptables, "-t", "nat"];
            let matches = ["-p", "tcp", "-m", "tcp", "--dport", port, "-j"];
            pod.netns
                .exec(&[&table[..], &chain[..2], &matches, &chain[2..]].concat());
        };
        pod.netns.exec(&[iptables, "-t", "nat", "-N", "MESH"]);
        rule("8080", &["-A", "OUTPUT", "MESH"]);
        rule("8080", &["-A", "MESH", "REDIRECT", "--to-ports", "15001"]);
        let owner = ["-m", "owner", "--uid-owner", "1337", "-j", "RETURN"];
        pod.netns
            .exec(&[&[iptables, "-t", "nat", "-I", "MESH"], &owner[..]].concat());
        let container = pod.container();
        let script = "busybox nc -ll -p 15001 -e echo by-proxy >/dev/null 2>&1 &
            for i in 1 2 3 4 5 6 7 8 9; do
                busybox nc -w 5 10.76.1.1 8080 </dev/null && break; sleep 1; done";
        assert_eq!(sh(&container, script), "by-proxy", "{iptables}");
        // What comes later counts too, and what a container has in other tables stays.
        if iptables == "iptables-nft" {
            let own = "/usr/sbin/iptables-nft -t mangle";
            sh(
                &container,
                &format!("{own} -A OUTPUT -d 10.76.9.9 -j ACCEPT"),
            );
            rule("8081", &["-A", "OUTPUT", "MESH"]);
            rule("8081", &["-A", "MESH", "REDIRECT", "--to-ports", "15001"]);
            let script = "busybox nc -w 2 10.76.1.1 8081 </dev/null || true";
            eventually("the later rule", PATIENCE, || {
                (sh(&container, script) == "by-proxy").then_some(())
            });
            let rules = sh(&container, &format!("{own} -S OUTPUT"));
            assert!(rules.contains("10.76.9.9"), "{rules}");
        } else {
            pod.netns.exec(&[iptables, "-t", "nat", "-F"]);
            // These tables have no event of their own.
            pod.ip("addr add 10.76.1.9/24 dev e1");
            let script = "busybox nc -w 2 10.76.1.1 8080 </dev/null 2>/dev/null || echo refused";
            eventually("the rules have gone", PATIENCE, || {
                (sh(&container, script) == "refused").then_some(())
            });
        }
        finish(container);
        pod.netns.exec(&[iptables, "-t", "nat", "-F"]);
        pod.netns.exec(&[iptables, "-t", "nat", "-X"]);
    }
}

/// Rules that this guest's kernel has no part for, and rules that are not wanted.
fn rule_that_cannot_be_carried_keeps_it_from_starting(env: &Env) {
    let pod = Pod::new(env);
    pod.link(77, 1);
    let flags = pod.flags();
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    pod.netns.exec(&[
        "iptables-nft",
        "-A",
        "OUTPUT",
        "-d",
        "10.77.9.9",
        "-j",
        "DROP",
    ]);
    let config = env.dir.join("cofferdam.toml");
    fs::write(&config, "netns_rules = 'refuse'\n").unwrap();
    let config = config.to_string_lossy();
    flags.extend(["--privileged", "--runtime-config-path", &config]);
    let refused = env.run(&flags, &["true"]);
    refused.fails_with(&["do not bind a virtual machine", "OUTPUT", "netns_rules"]);
    fs::write(&*config, "netns_rules = 'ignore'\n").unwrap();
    env.run(&flags, &["true"]).ok();
}

fn vlan_and_dummy_links(env: &Env) {
    let pod = Pod::new(env);
    pod.link(78, 1);
    let beyond = "link add link n78n1 name v7 type vlan id 7";
    let vlan = ip(&[
        &["-n", &pod.beyond.name],
        &beyond.split(' ').collect::<Vec<_>>()[..],
    ]
    .concat());
    // Not every host's kernel has them.
    let has_vlan = vlan.status == 0;
    if has_vlan {
        for line in ["addr add 10.78.7.1/24 dev v7", "link set v7 up"] {
            pod.beyond.ip(&line.split(' ').collect::<Vec<_>>());
        }
        for line in [
            "link add link e1 name e1.7 type vlan id 7",
            "addr add 10.78.7.2/24 dev e1.7",
            "link set e1.7 up",
        ] {
            pod.ip(line);
        }
    }
    let dummy = ip(&["-n", &pod.netns.name, "link", "add", "vip", "type", "dummy"]);
    let has_dummy = dummy.status == 0;
    if has_dummy {
        pod.ip("addr add 10.78.100.1/32 dev vip");
        pod.ip("link set vip up");
    }
    let container = pod.container();
    assert_routing_is_the_same(&pod, &container);
    let links = || sh(&container, "ip link");
    if has_vlan {
        assert!(links().contains("e1.7@e1"), "{}", links());
        sh(&container, "busybox ping -c 1 -w 10 10.78.7.1");
    }
    if has_dummy {
        assert!(links().contains("vip"), "{}", links());
        pod.ip("link del vip");
        eventually("the dummy link has gone", PATIENCE, || {
            (!links().contains("vip")).then_some(())
        });
    }
    finish(container);
}

fn twenty_links(env: &Env) {
    let pod = Pod::new(env);
    for number in 1..=18 {
        pod.link(79, number);
    }
    let container = pod.container();
    pod.link(79, 19);
    pod.link(79, 20);
    let script = "for i in $(seq 20); do
        busybox ping -c 1 -w 10 10.79.$i.1 >/dev/null 2>&1 && echo -n $i,; done; true";
    let all: String = (1..=20).map(|number| format!("{number},")).collect();
    eventually("all links carry", PATIENCE, || {
        (sh(&container, script) == all).then_some(())
    });
    finish(container);
}

fn link_without_ethernet_is_refused(env: &Env) {
    let pod = Pod::new(env);
    pod.link(80, 1);
    pod.ip("tuntap add tun0 mode tun");
    pod.ip("addr add 10.80.9.1/24 dev tun0");
    let namespace = format!("network:{}", pod.netns.path());
    let refused = env.run(&["--with-ns", &namespace], &["true"]);
    refused.fails_with(&["tun0", "no Ethernet", "runc"]);
    pod.ip("addr del 10.80.9.1/24 dev tun0");
    env.run(&["--with-ns", &namespace], &["true"]).ok();
}

fn second_machine_in_a_namespace_is_refused(env: &Env) {
    let pod = Pod::new(env);
    pod.link(81, 1);
    let first = pod.container();
    let namespace = format!("network:{}", pod.netns.path());
    let refused = env.run(&["--with-ns", &namespace], &["true"]);
    refused.fails_with(&["another container's virtual machine", "one pod"]);
    sh(&first, "busybox ping -c 1 -w 10 10.81.1.1");
    finish(first);
    env.run(&["--with-ns", &namespace], &["true"]).ok();
}
