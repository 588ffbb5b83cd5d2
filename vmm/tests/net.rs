//! Network cards of a real machine on real taps, and the network namespace that QEMU runs in.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use common::tap::{Netns, queue};
use common::{Lab, SOON};
use vmm::parts::Vm;
use vmm::{Device, MachineConfig, Net};

fn card(taps: Vec<OwnedFd>, last: u8, mtu: Option<u16>) -> Device {
    Device::Net(Net {
        name: format!("eth{last}"),
        taps,
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0xab, last],
        mtu,
    })
}

/// A guest that configures every card it finds by the last byte of its address, and pings the
/// host's end.
const PINGS: &str = "while :; do for n in /sys/class/net/eth*; do [ -e $n ] || continue; d=${n##*/}; \
    a=$(cat $n/address 2>/dev/null) || continue; i=${a##*:}; \
    ip addr add 10.0.$i.2/24 dev $d 2>/dev/null; ip link set $d up; \
    echo $a mtu $(cat $n/mtu) queues $(ls $n/queues 2>/dev/null | grep -c rx); \
    ping -c 1 -W 1 10.0.$i.1 >/dev/null && echo $a pong; done; \
    [ -e /sys/class/net/eth0 ] || echo no card; usleep 20000; done";

#[tokio::test]
async fn packets_pass_through_cards_plugged_before_the_guest_runs_and_after() {
    let netns = Netns::new();
    let mut lab = Lab::new(PINGS).await;
    // A guest uses no more queues than it has CPUs.
    (lab.config.vcpus, lab.config.max_vcpus) = (2, 2);
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let first = vm
        .attach(card(
            netns.tap("tap11", 1, "10.0.11.1/24"),
            0x11,
            Some(1400),
        ))
        .await
        .unwrap();
    assert_eq!(
        (first.id.as_str(), first.pci_path.as_str()),
        ("net1", "04/00")
    );
    vm.cont().await.unwrap();
    lab.prints("02:00:00:00:ab:11 mtu 1400 queues 1").await;
    lab.prints("02:00:00:00:ab:11 pong").await;
    let second = vm
        .attach(card(netns.tap("tap12", 2, "10.0.12.1/24"), 0x12, None))
        .await
        .unwrap();
    lab.prints("02:00:00:00:ab:12 mtu 1500 queues 2").await;
    lab.prints("02:00:00:00:ab:12 pong").await;
    vm.detach(&second.id, SOON).await.unwrap();
    vm.detach(&first.id, SOON).await.unwrap();
    lab.prints("no card").await;
    // QEMU was the last to hold their queues: the taps are gone with the netdevs, and the names are
    // free again.
    let left = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    assert!(!left.contains("tap"), "{left}");
    let again = vm
        .attach(card(netns.tap("tap11", 2, "10.0.11.1/24"), 0x11, None))
        .await
        .unwrap();
    assert_eq!(again.pci_path, "04/00");
    lab.prints("02:00:00:00:ab:11 mtu 1500 queues 2").await;
    vm.stop(SOON).await.unwrap();
}

#[tokio::test]
async fn a_card_that_cannot_be_is_refused_and_leaves_no_descriptor() {
    let netns = Netns::new();
    let lab = Lab::new("").await;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let held = || {
        std::fs::read_dir(format!("/proc/{}/fd", vm.process.identity().pid))
            .unwrap()
            .count()
    };
    let before = held();
    let null = || {
        OwnedFd::from(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")
                .unwrap(),
        )
    };
    // A name of its own each time: the child of another test, between its fork and its exec, may
    // hold the last one yet.
    for round in 0..5 {
        let taps = netns.tap(&format!("tap{round}"), 2, &format!("10.0.{round}.1/24"));
        let good = |count: usize| {
            taps.iter()
                .take(count)
                .map(|tap| tap.try_clone().unwrap())
                .collect::<Vec<_>>()
        };
        let bad_queue = good(1).into_iter().chain([null()]).collect();
        let bare = netns.run(|| queue(&format!("bare{round}"), libc::IFF_TAP | libc::IFF_NO_PI));
        for (taps, vhost, wanted) in [
            (
                Vec::new(),
                Vec::new(),
                "a network card of 0 tap queues and 0 of vhost-net",
            ),
            (
                good(2),
                vec![null()],
                "a network card of 2 tap queues and 1 of vhost-net",
            ),
            (bad_queue, Vec::new(), " as a tap queue: "),
            (
                vec![bare],
                Vec::new(),
                "a tap queue must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
            ),
        ] {
            let net = Net {
                name: "eth0".into(),
                taps,
                vhost,
                mac: [2, 0, 0, 0, 0, 1],
                mtu: None,
            };
            let error = vm.attach(Device::Net(net)).await.unwrap_err().to_string();
            assert!(
                error.starts_with("NIC eth0: ") && error.contains(wanted),
                "{wanted}: {error}"
            );
        }
    }
    assert_eq!(held(), before);
    assert_eq!(
        vm.attach(card(netns.tap("tap5", 1, "10.0.5.1/24"), 1, None))
            .await
            .unwrap()
            .pci_path,
        "04/00"
    );
}

#[tokio::test]
async fn qemu_runs_in_the_network_namespace_it_was_given() {
    let netns = Netns::new();
    let lab = Lab::new("").await;
    let inode = netns.inode();
    let config = MachineConfig {
        netns: Some(Arc::new(netns.0)),
        ..lab.config.clone()
    };
    let vm = Vm::spawn(&config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let of = |path: String| std::fs::metadata(path).unwrap().ino();
    assert_eq!(
        of(format!("/proc/{}/ns/net", vm.process.identity().pid)),
        inode
    );
    assert_ne!(
        of("/proc/thread-self/ns/net".into()),
        inode,
        "the caller stays where it was"
    );
    vm.stop(SOON).await.unwrap();
    let config = MachineConfig {
        netns: Some(Arc::new(File::open("/dev/null").unwrap().into())),
        ..lab.config.clone()
    };
    let error = Vm::spawn(&config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("launcher: cannot enter the network namespace: Invalid argument"),
        "{error}"
    );
}
