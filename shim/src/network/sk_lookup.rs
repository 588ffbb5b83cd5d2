//! A BPF program that decides who gets the TCP connections to a network namespace's loopback
//! addresses.
//!
//! The kernel runs it where it looks for a listening socket (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9),
//! so two listeners answer for every port, and each connection keeps the port that it was made to.
//! It runs before the kernel's own lookup, so ports that somebody in the namespace listens on are
//! named to it ([`Ports`]), and it lets those pass.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use sys::bpf::{self, Assembler, Instruction, Map, code, op};

// linux/bpf.h
const HELPER_MAP_LOOKUP_ELEM: i32 = 1;
const HELPER_SK_RELEASE: i32 = 86;
const HELPER_SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

// struct bpf_sk_lookup
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];
/// In the host's byte order.
const LOCAL_PORT: i16 = 60;

/// Ports that the program lets pass.
#[derive(Debug)]
pub struct Ports(Map);

impl Ports {
    /// None yet.
    ///
    /// # Errors
    /// A kernel without BPF.
    pub fn new() -> io::Result<Ports> {
        Map::hash(u32::from(u16::MAX) + 1).map(Ports)
    }

    /// Lets connections to a port pass, or hands them over again.
    pub fn set(&self, port: u16, passes: bool) -> io::Result<()> {
        if passes {
            self.0.put(port.into(), 1)
        } else {
            self.0.delete(port.into())
        }
    }
}

/// Hands TCP connections to 127.0.0.0/8 and ::1 of a namespace to the listeners, as long as the
/// result is open.
///
/// # Errors
/// A kernel without it, or without BPF.
pub fn attach(
    netns: BorrowedFd<'_>,
    v4: BorrowedFd<'_>,
    v6: Option<BorrowedFd<'_>>,
    ports: &Ports,
) -> io::Result<OwnedFd> {
    let map = Map::sockets(2)?;
    map.put(0, v4.as_raw_fd())?;
    if let Some(v6) = v6 {
        map.put(1, v6.as_raw_fd())?;
    }
    let program = bpf::load_sk_lookup("forward", &program(&map, &ports.0))?;
    bpf::link_to_netns(netns, program.as_fd())
}

/// r6 is the context, r7 the socket. Entry 0 of the map is for IPv4, entry 1 for IPv6.
fn program(map: &Map, ports: &Map) -> Vec<Instruction> {
    let mut program = Assembler::default();
    program.add([
        op(code::MOVE_REGISTER, 0x16, 0, 0),
        op(code::LOAD_WORD, 0x62, PROTOCOL, 0),
    ]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, libc::IPPROTO_TCP, "pass");
    program.add([op(code::LOAD_WORD, 0x62, FAMILY, 0)]);
    program.jump(code::JUMP_EQUAL, 0x02, libc::AF_INET6, "v6");
    program.add([
        op(code::LOAD_WORD, 0x62, LOCAL_IP4, 0),
        op(code::AND_32, 0x02, 0, i32::from_ne_bytes([0xff, 0, 0, 0])),
    ]);
    let net = i32::from_ne_bytes([127, 0, 0, 0]);
    program.jump(code::JUMP_NOT_EQUAL, 0x02, net, "pass");
    program.add([op(code::STORE_WORD, 0x0a, -4, 0)]);
    program.jump(code::JUMP, 0, 0, "port");

    program.label("v6");
    for (offset, word) in LOCAL_IP6
        .into_iter()
        .zip([0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])])
    {
        program.add([op(code::LOAD_WORD, 0x62, offset, 0)]);
        program.jump(code::JUMP_NOT_EQUAL, 0x02, word, "pass");
    }
    program.add([op(code::STORE_WORD, 0x0a, -4, 1)]);

    program.label("port");
    program.add([
        op(code::LOAD_WORD, 0x62, LOCAL_PORT, 0),
        op(code::STORE_REGISTER, 0x2a, -8, 0),
    ]);
    program.add(ports.load_into(1));
    program.add([
        op(code::MOVE_REGISTER, 0xa2, 0, 0),
        op(code::ADD, 0x02, 0, -8),
        op(code::CALL, 0, 0, HELPER_MAP_LOOKUP_ELEM),
    ]);
    program.jump(code::JUMP_NOT_EQUAL, 0x00, 0, "pass");
    program.add(map.load_into(1));
    program.add([
        op(code::MOVE_REGISTER, 0xa2, 0, 0),
        op(code::ADD, 0x02, 0, -4),
        op(code::CALL, 0, 0, HELPER_MAP_LOOKUP_ELEM),
    ]);
    program.jump(code::JUMP_EQUAL, 0x00, 0, "pass");
    program.add([
        op(code::MOVE_REGISTER, 0x07, 0, 0),
        op(code::MOVE_REGISTER, 0x61, 0, 0),
        op(code::MOVE_REGISTER, 0x72, 0, 0),
        op(code::MOVE, 0x03, 0, 0),
        op(code::CALL, 0, 0, HELPER_SK_ASSIGN),
        op(code::MOVE_REGISTER, 0x71, 0, 0),
        op(code::CALL, 0, 0, HELPER_SK_RELEASE),
    ]);
    program.label("pass");
    program.add([op(code::MOVE, 0x00, 0, SK_PASS), op(code::EXIT, 0, 0, 0)]);
    program.finish()
}
