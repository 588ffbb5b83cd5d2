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

use super::classifier::{
    ETHERNET_HEADER, HEADER, IPV4_HEADER, IPV6_HEADER, PASS, be, begin, load, load_from, next,
    verdict,
};

// linux/bpf.h
const HELPER_CLONE_REDIRECT: i32 = 13;
const HELPER_SK_LOOKUP_TCP: i32 = 84;
const HELPER_SK_LOOKUP_UDP: i32 = 85;
const HELPER_SK_RELEASE: i32 = 86;
/// `BPF_F_CURRENT_NETNS`, that of the device.
const CURRENT_NETNS: i32 = -1;

const NEIGHBOUR_ADVERTISEMENT: i32 = 136;

/// The program for a link whose guest is behind `tap`.
///
/// # Errors
/// A kernel without BPF.
pub fn program(tap: u32) -> io::Result<OwnedFd> {
    bpf::load_classifier("local_sockets", &instructions(tap.cast_signed()))
}

/// `struct bpf_sock_tuple` is on the stack below the header. r7 is the protocol, r8 the tuple's
/// size in bytes; to "ports", r2 comes with the ports' offset in the packet and r3 with their place
/// in the tuple.
fn instructions(tap: i32) -> Vec<Instruction> {
    const TUPLE: i16 = HEADER - 40;
    // Words of the header become words of the tuple.
    let copy = |program: &mut Assembler, from: i16, words: i16| {
        for word in 0..words {
            program.add([
                op(code::LOAD_WORD, 0xa2, HEADER + from + 4 * word, 0),
                op(code::STORE_REGISTER, 0x2a, TUPLE + 4 * word, 0),
            ]);
        }
    };
    let mut program = begin(&[
        (libc::ETH_P_IP, "v4"),
        (libc::ETH_P_IPV6, "v6"),
        (libc::ETH_P_ARP, "arp"),
    ]);

    // struct iphdr: the header's length, the fragment, the protocol, both addresses.
    program.label("v4");
    load(&mut program, ETHERNET_HEADER, HEADER, IPV4_HEADER, "next");
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
    load(&mut program, ETHERNET_HEADER, HEADER, IPV6_HEADER, "next");
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
    load_from(&mut program, 4, "next");
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
    load(
        &mut program,
        ETHERNET_HEADER + IPV6_HEADER,
        TUPLE,
        1,
        "next",
    );
    program.add([op(code::LOAD_BYTE, 0xa2, TUPLE, 0)]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, NEIGHBOUR_ADVERTISEMENT, "next");
    program.jump(code::JUMP, 0, 0, "copy");

    // struct arphdr: the operation, where two is an answer.
    program.label("arp");
    load(&mut program, ETHERNET_HEADER, HEADER, 8, "next");
    program.add([op(code::LOAD_HALF, 0xa2, HEADER + 6, 0)]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, be(2), "next");

    program.label("copy");
    program.add([
        op(code::MOVE_REGISTER, 0x61, 0, 0),
        op(code::MOVE, 0x02, 0, tap),
        op(code::MOVE, 0x03, 0, 0),
        op(code::CALL, 0, 0, HELPER_CLONE_REDIRECT),
    ]);
    verdict(&mut program, "pass", PASS);
    next(&mut program);
    program.finish()
}
