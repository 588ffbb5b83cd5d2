//! What BPF programs that classify packets have in common: the kernel's numbers, and the way to a
//! packet's headers.
//!
//! The context is in r6, a header on the stack at [`HEADER`].

use sys::bpf::{Assembler, code, op};

// linux/bpf.h
const HELPER_SKB_LOAD_BYTES: i32 = 26;
/// `protocol` of `struct __sk_buff`, in the network's byte order.
const PROTOCOL: i16 = 16;

/// `TC_ACT_UNSPEC`: the next filter decides.
const NEXT_FILTER: i32 = -1;
/// `TC_ACT_OK`: the kernel goes on with the packet.
pub const PASS: i32 = 0;
/// `TC_ACT_SHOT`.
pub const DROP: i32 = 2;

pub const ETHERNET_HEADER: i32 = 14;
/// The least that it has.
pub const IPV4_HEADER: i32 = 20;
pub const IPV6_HEADER: i32 = 40;

/// Where a header is on the stack.
pub const HEADER: i16 = -40;

/// A constant of two bytes as a load of memory in the network's order gives it.
pub const fn be(value: u16) -> i32 {
    value.to_be() as i32
}

/// A program that goes on at the label of a packet's protocol (`ETH_P_IP`, …), and at "next" with
/// others.
pub fn begin(protocols: &[(i32, &'static str)]) -> Assembler {
    let mut program = Assembler::default();
    program.add([
        op(code::MOVE_REGISTER, 0x16, 0, 0),
        op(code::LOAD_WORD, 0x62, PROTOCOL, 0),
    ]);
    for (protocol, label) in protocols {
        let protocol = u16::try_from(*protocol).unwrap_or_default();
        program.jump(code::JUMP_EQUAL, 0x02, be(protocol), label);
    }
    program.jump(code::JUMP, 0, 0, "next");
    program
}

/// Copies what the packet has at `offset` to `place` on the stack. One that is too short goes on at
/// `otherwise`.
pub fn load(
    program: &mut Assembler,
    offset: i32,
    place: i16,
    length: i32,
    otherwise: &'static str,
) {
    program.add([
        op(code::MOVE, 0x02, 0, offset),
        op(code::MOVE_REGISTER, 0xa3, 0, 0),
        op(code::ADD, 0x03, 0, place.into()),
    ]);
    load_from(program, length, otherwise);
}

/// As [`load`], with the offset in r2 and the place in r3.
pub fn load_from(program: &mut Assembler, length: i32, otherwise: &'static str) {
    program.add([
        op(code::MOVE_REGISTER, 0x61, 0, 0),
        op(code::MOVE, 0x04, 0, length),
        op(code::CALL, 0, 0, HELPER_SKB_LOAD_BYTES),
    ]);
    program.jump(code::JUMP_NOT_EQUAL, 0x00, 0, otherwise);
}

/// Ends at a label with a verdict.
pub fn verdict(program: &mut Assembler, label: &'static str, verdict: i32) {
    program.label(label);
    program.add([op(code::MOVE, 0x00, 0, verdict), op(code::EXIT, 0, 0, 0)]);
}

/// Ends at "next", for the next filter.
pub fn next(program: &mut Assembler) {
    verdict(program, "next", NEXT_FILTER);
}
