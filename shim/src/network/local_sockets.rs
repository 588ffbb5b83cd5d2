//! A BPF classifier that leaves to the sockets of a pod's network namespace what comes for them.
//!
//! Some servers of the host's side are in the namespace: docker's server for names asks other
//! servers from there, and meshes without sidecars have their proxies there. The guest has the
//! link's address too, so only the kernel's table of sockets tells whose a packet is. Packets for
//! the guest go on to the next filter.
//!
//! To send anything, the namespace has to learn its neighbours' hardware addresses: it gets a copy
//! of their answers, but not of their questions, which are for the guest to answer.

use std::io;
use std::os::fd::OwnedFd;

use sys::bpf::{self, Assembler, Instruction, code, op};

// linux/bpf.h
const HELPER_CLONE_REDIRECT: i32 = 13;
const HELPER_SKB_LOAD_BYTES: i32 = 26;
const HELPER_SK_LOOKUP_TCP: i32 = 84;
const HELPER_SK_LOOKUP_UDP: i32 = 85;
const HELPER_SK_RELEASE: i32 = 86;
/// `BPF_F_CURRENT_NETNS`, that of the device.
const CURRENT_NETNS: i32 = -1;
/// `TC_ACT_UNSPEC`: the next filter decides.
const NEXT_FILTER: i32 = -1;
/// `TC_ACT_OK`: the kernel goes on with the packet.
const PASS: i32 = 0;

/// `protocol` of `struct __sk_buff`, in the network's byte order.
const PROTOCOL: i16 = 16;

const ETHERNET_HEADER: i32 = 14;
const IPV6_HEADER: i32 = 40;
const NEIGHBOUR_ADVERTISEMENT: i32 = 136;

/// The program for a link whose guest is behind `tap`.
///
/// # Errors
/// A kernel without BPF.
pub fn load(tap: u32) -> io::Result<OwnedFd> {
    bpf::load_classifier("local_sockets", &program(tap.cast_signed()))
}

/// The program for a tap whose packets the host sends as its own: what is to or from the loopback is
/// dropped.
///
/// # Errors
/// A kernel without BPF.
pub fn load_guard() -> io::Result<OwnedFd> {
    bpf::load_classifier("no_loopback", &guard())
}

/// `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// A header is on the stack at -40. r6 is the context.
fn guard() -> Vec<Instruction> {
    const HEADER: i16 = -40;
    let mut program = Assembler::default();
    let load = |program: &mut Assembler, length: i32| {
        program.add([
            op(code::MOVE_REGISTER, 0x61, 0, 0),
            op(code::MOVE, 0x02, 0, ETHERNET_HEADER),
            op(code::MOVE_REGISTER, 0xa3, 0, 0),
            op(code::ADD, 0x03, 0, HEADER.into()),
            op(code::MOVE, 0x04, 0, length),
            op(code::CALL, 0, 0, HELPER_SKB_LOAD_BYTES),
        ]);
        program.jump(code::JUMP_NOT_EQUAL, 0x00, 0, "drop");
    };
    // 127.0.0.0/8 at this place of the header, or 0.0.0.0/8, which is the loopback for connect(2).
    let is_loopback = |program: &mut Assembler, at: i16| {
        program.add([
            op(code::LOAD_WORD, 0xa2, HEADER + at, 0),
            op(code::AND_32, 0x02, 0, i32::from_ne_bytes([0xff, 0, 0, 0])),
        ]);
        let net = i32::from_ne_bytes([127, 0, 0, 0]);
        program.jump(code::JUMP_EQUAL, 0x02, net, "drop");
        program.jump(code::JUMP_EQUAL, 0x02, 0, "drop");
    };
    program.add([
        op(code::MOVE_REGISTER, 0x16, 0, 0),
        op(code::LOAD_WORD, 0x62, PROTOCOL, 0),
    ]);
    let ethernet = |protocol: i32| be(u16::try_from(protocol).unwrap_or_default());
    program.jump(code::JUMP_EQUAL, 0x02, ethernet(libc::ETH_P_IPV6), "v6");
    program.jump(code::JUMP_NOT_EQUAL, 0x02, ethernet(libc::ETH_P_IP), "next");
    load(&mut program, 20);
    is_loopback(&mut program, 12);
    is_loopback(&mut program, 16);
    program.jump(code::JUMP, 0, 0, "next");

    // ::/96 with ::1 and the unspecified one, and ::ffff:0:0/96: none of it is on a wire.
    program.label("v6");
    load(&mut program, IPV6_HEADER);
    for (at, other) in [(8, "destination"), (24, "end")] {
        for word in 0..2 {
            program.add([op(code::LOAD_WORD, 0xa2, HEADER + at + 4 * word, 0)]);
            program.jump(code::JUMP_NOT_EQUAL, 0x02, 0, other);
        }
        program.add([op(code::LOAD_WORD, 0xa2, HEADER + at + 8, 0)]);
        program.jump(code::JUMP_EQUAL, 0x02, 0, "drop");
        let mapped = i32::from_ne_bytes([0, 0, 0xff, 0xff]);
        program.jump(code::JUMP_EQUAL, 0x02, mapped, "drop");
        program.label(other);
    }
    program.label("next");
    program.add([
        op(code::MOVE, 0x00, 0, NEXT_FILTER),
        op(code::EXIT, 0, 0, 0),
    ]);
    program.label("drop");
    program.add([op(code::MOVE, 0x00, 0, DROP), op(code::EXIT, 0, 0, 0)]);
    program.finish()
}

/// A constant of two bytes as a load of memory in the network's order gives it.
const fn be(value: u16) -> i32 {
    value.to_be() as i32
}

/// On the stack: a header at -40, and `struct bpf_sock_tuple` at -80.
///
/// r6 is the context, r7 the protocol, r8 the tuple's size in bytes; to "ports", r2 comes with the
/// ports' offset in the packet and r3 with their place in the tuple.
fn program(tap: i32) -> Vec<Instruction> {
    const HEADER: i16 = -40;
    const TUPLE: i16 = -80;
    let mut program = Assembler::default();
    // `bpf_skb_load_bytes` of what is at `offset`, to `place` on the stack.
    let load = |program: &mut Assembler, offset: i32, place: i16, length: i32| {
        program.add([
            op(code::MOVE_REGISTER, 0x61, 0, 0),
            op(code::MOVE, 0x02, 0, offset),
            op(code::MOVE_REGISTER, 0xa3, 0, 0),
            op(code::ADD, 0x03, 0, place.into()),
            op(code::MOVE, 0x04, 0, length),
            op(code::CALL, 0, 0, HELPER_SKB_LOAD_BYTES),
        ]);
        program.jump(code::JUMP_NOT_EQUAL, 0x00, 0, "next");
    };
    // Words of the header become words of the tuple.
    let copy = |program: &mut Assembler, from: i16, words: i16| {
        for word in 0..words {
            program.add([
                op(code::LOAD_WORD, 0xa2, HEADER + from + 4 * word, 0),
                op(code::STORE_REGISTER, 0x2a, TUPLE + 4 * word, 0),
            ]);
        }
    };
    program.add([
        op(code::MOVE_REGISTER, 0x16, 0, 0),
        op(code::LOAD_WORD, 0x62, PROTOCOL, 0),
    ]);
    let ethernet = |protocol: i32| be(u16::try_from(protocol).unwrap_or_default());
    program.jump(code::JUMP_EQUAL, 0x02, ethernet(libc::ETH_P_ARP), "arp");
    program.jump(code::JUMP_EQUAL, 0x02, ethernet(libc::ETH_P_IPV6), "v6");
    program.jump(code::JUMP_NOT_EQUAL, 0x02, ethernet(libc::ETH_P_IP), "next");

    // struct iphdr: the header's length, the fragment, the protocol, both addresses.
    load(&mut program, ETHERNET_HEADER, HEADER, 20);
    program.add([
        op(code::LOAD_HALF, 0xa2, HEADER + 6, 0),
        op(code::AND_32, 0x02, 0, be(0x3fff)),
    ]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, 0, "next");
    copy(&mut program, 12, 2);
    program.add([
        op(code::LOAD_BYTE, 0xa7, HEADER + 9, 0),
        op(code::LOAD_BYTE, 0xa2, HEADER, 0),
        op(code::AND_32, 0x02, 0, 0x0f),
        op(code::LEFT_SHIFT_32, 0x02, 0, 2),
        op(code::ADD, 0x02, 0, ETHERNET_HEADER),
        op(code::MOVE, 0x08, 0, 12),
        op(code::MOVE_REGISTER, 0xa3, 0, 0),
        op(code::ADD, 0x03, 0, i32::from(TUPLE) + 8),
    ]);
    program.jump(code::JUMP, 0, 0, "ports");

    // struct ipv6hdr: the next header, both addresses. Others may be between it and the ports:
    // such packets are the guest's.
    program.label("v6");
    load(&mut program, ETHERNET_HEADER, HEADER, IPV6_HEADER);
    program.add([op(code::LOAD_BYTE, 0xa7, HEADER + 6, 0)]);
    program.jump(code::JUMP_EQUAL, 0x07, libc::IPPROTO_ICMPV6, "icmp");
    copy(&mut program, 8, 8);
    program.add([
        op(code::MOVE, 0x02, 0, ETHERNET_HEADER + IPV6_HEADER),
        op(code::MOVE, 0x08, 0, 36),
        op(code::MOVE_REGISTER, 0xa3, 0, 0),
        op(code::ADD, 0x03, 0, i32::from(TUPLE) + 32),
    ]);

    program.label("ports");
    program.add([
        op(code::MOVE_REGISTER, 0x61, 0, 0),
        op(code::MOVE, 0x04, 0, 4),
        op(code::CALL, 0, 0, HELPER_SKB_LOAD_BYTES),
    ]);
    program.jump(code::JUMP_NOT_EQUAL, 0x00, 0, "next");
    program.add([
        op(code::MOVE_REGISTER, 0x61, 0, 0),
        op(code::MOVE_REGISTER, 0xa2, 0, 0),
        op(code::ADD, 0x02, 0, TUPLE.into()),
        op(code::MOVE_REGISTER, 0x83, 0, 0),
        op(code::MOVE, 0x04, 0, CURRENT_NETNS),
        op(code::MOVE, 0x05, 0, 0),
    ]);
    program.jump(code::JUMP_EQUAL, 0x07, libc::IPPROTO_TCP, "tcp");
    program.jump(code::JUMP_NOT_EQUAL, 0x07, libc::IPPROTO_UDP, "next");
    program.add([op(code::CALL, 0, 0, HELPER_SK_LOOKUP_UDP)]);
    program.jump(code::JUMP, 0, 0, "found");
    program.label("tcp");
    program.add([op(code::CALL, 0, 0, HELPER_SK_LOOKUP_TCP)]);
    program.label("found");
    program.jump(code::JUMP_EQUAL, 0x00, 0, "next");
    program.add([
        op(code::MOVE_REGISTER, 0x01, 0, 0),
        op(code::CALL, 0, 0, HELPER_SK_RELEASE),
    ]);
    program.jump(code::JUMP, 0, 0, "pass");

    // struct icmp6hdr: the type.
    program.label("icmp");
    load(&mut program, ETHERNET_HEADER + IPV6_HEADER, TUPLE, 1);
    program.add([op(code::LOAD_BYTE, 0xa2, TUPLE, 0)]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, NEIGHBOUR_ADVERTISEMENT, "next");
    program.jump(code::JUMP, 0, 0, "copy");

    // struct arphdr: the operation, where two is an answer.
    program.label("arp");
    load(&mut program, ETHERNET_HEADER, HEADER, 8);
    program.add([op(code::LOAD_HALF, 0xa2, HEADER + 6, 0)]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, be(2), "next");

    program.label("copy");
    program.add([
        op(code::MOVE_REGISTER, 0x61, 0, 0),
        op(code::MOVE, 0x02, 0, tap),
        op(code::MOVE, 0x03, 0, 0),
        op(code::CALL, 0, 0, HELPER_CLONE_REDIRECT),
    ]);
    program.label("pass");
    program.add([op(code::MOVE, 0x00, 0, PASS), op(code::EXIT, 0, 0, 0)]);
    program.label("next");
    program.add([
        op(code::MOVE, 0x00, 0, NEXT_FILTER),
        op(code::EXIT, 0, 0, 0),
    ]);
    program.finish()
}
