//! A BPF program that decides who gets the TCP connections to a network namespace's loopback
//! addresses.
//!
//! The kernel runs it where it looks for a listening socket (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9),
//! so two listeners answer for every port, and each connection keeps the port that it was made to.
//! It runs before the kernel's own lookup, so ports that somebody in the namespace listens on are
//! named to it ([`Ports`]), and it lets those pass.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;
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
pub struct Ports(OwnedFd);

impl Ports {
    /// None yet.
    ///
    /// # Errors
    /// A kernel without BPF.
    pub fn new() -> io::Result<Ports> {
        let every = u32::from(u16::MAX) + 1;
        create_map(BPF_MAP_TYPE_HASH, every, BPF_F_NO_PREALLOC).map(Ports)
    }

    /// Lets connections to a port pass, or hands them over again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set(&self, port: u16, passes: bool) -> io::Result<()> {
        match passes {
            true => put(&self.0, port.into(), 1),
            false => delete(&self.0, port.into()),
        }
    }
}

/// One instruction, `struct bpf_insn`. `registers` holds the destination in its low half.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
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
    let map = create_map(BPF_MAP_TYPE_SOCKMAP, 2, 0)?;
    put(&map, 0, v4.as_raw_fd())?;
    if let Some(v6) = v6 {
        put(&map, 1, v6.as_raw_fd())?;
    }
    let program = load(&program(map.as_raw_fd(), ports.0.as_raw_fd()))?;
    let attributes = LinkAttributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: netns.as_raw_fd().cast_unsigned(),
        kind: BPF_SK_LOOKUP,
        flags: 0,
    };
    descriptor(BPF_LINK_CREATE, &attributes)
}

/// r6 is the context, r7 the socket. Entry 0 of the map is for IPv4, entry 1 for IPv6.
fn program(map: i32, ports: i32) -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61; // ldxw
    const LOAD_MAP: u8 = 0x18; // lddw, two instructions long
    const STORE_WORD: u8 = 0x62; // stw
    const STORE_REGISTER: u8 = 0x63; // stxw
    const MOVE: u8 = 0xb7;
    const MOVE_REGISTER: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const AND_32: u8 = 0x54;
    const JUMP: u8 = 0x05;
    const JUMP_EQUAL: u8 = 0x15;
    const JUMP_NOT_EQUAL: u8 = 0x55;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    /// Stands for the distance to the end of the program.
    const TO_PASS: i16 = i16::MAX;
    let op = |code, registers, offset, immediate| Instruction {
        code,
        registers,
        offset,
        immediate,
    };

    let is_loopback_v4 = [
        op(LOAD_WORD, 0x62, LOCAL_IP4, 0),
        op(AND_32, 0x02, 0, i32::from_ne_bytes([0xff, 0, 0, 0])),
        op(
            JUMP_NOT_EQUAL,
            0x02,
            TO_PASS,
            i32::from_ne_bytes([127, 0, 0, 0]),
        ),
        op(STORE_WORD, 0x0a, -4, 0),
    ];
    let mut is_loopback_v6 = Vec::new();
    for (offset, word) in LOCAL_IP6
        .into_iter()
        .zip([0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])])
    {
        is_loopback_v6.push(op(LOAD_WORD, 0x62, offset, 0));
        is_loopback_v6.push(op(JUMP_NOT_EQUAL, 0x02, TO_PASS, word));
    }
    is_loopback_v6.push(op(STORE_WORD, 0x0a, -4, 1));
    let length = |part: &[Instruction]| i16::try_from(part.len()).unwrap_or(i16::MAX);

    let mut program = vec![
        op(MOVE_REGISTER, 0x16, 0, 0),
        op(LOAD_WORD, 0x62, PROTOCOL, 0),
        op(JUMP_NOT_EQUAL, 0x02, TO_PASS, libc::IPPROTO_TCP),
        op(LOAD_WORD, 0x62, FAMILY, 0),
        op(
            JUMP_EQUAL,
            0x02,
            length(&is_loopback_v4) + 1,
            libc::AF_INET6,
        ),
    ];
    program.extend(is_loopback_v4);
    program.push(op(JUMP, 0, length(&is_loopback_v6), 0));
    program.extend(is_loopback_v6);
    program.extend([
        op(LOAD_WORD, 0x62, LOCAL_PORT, 0),
        op(STORE_REGISTER, 0x2a, -8, 0),
        op(LOAD_MAP, 0x01 | (BPF_PSEUDO_MAP_FD << 4), 0, ports),
        op(0, 0, 0, 0),
        op(MOVE_REGISTER, 0xa2, 0, 0),
        op(ADD, 0x02, 0, -8),
        op(CALL, 0, 0, HELPER_MAP_LOOKUP_ELEM),
        op(JUMP_NOT_EQUAL, 0x00, TO_PASS, 0),
        op(LOAD_MAP, 0x01 | (BPF_PSEUDO_MAP_FD << 4), 0, map),
        op(0, 0, 0, 0),
        op(MOVE_REGISTER, 0xa2, 0, 0),
        op(ADD, 0x02, 0, -4),
        op(CALL, 0, 0, HELPER_MAP_LOOKUP_ELEM),
        op(JUMP_EQUAL, 0x00, TO_PASS, 0),
        op(MOVE_REGISTER, 0x07, 0, 0),
        op(MOVE_REGISTER, 0x61, 0, 0),
        op(MOVE_REGISTER, 0x72, 0, 0),
        op(MOVE, 0x03, 0, 0),
        op(CALL, 0, 0, HELPER_SK_ASSIGN),
        op(MOVE_REGISTER, 0x71, 0, 0),
        op(CALL, 0, 0, HELPER_SK_RELEASE),
    ]);
    let end = program.len();
    for (index, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == TO_PASS {
            instruction.offset = i16::try_from(end - index - 1).unwrap_or(i16::MAX);
        }
    }
    program.extend([op(MOVE, 0x00, 0, SK_PASS), op(EXIT, 0, 0, 0)]);
    program
}

#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    device: u32,
    expected_attach: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes have the layout of the command's part of `union bpf_attr`, and their
    // size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|result| *result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

fn descriptor<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel just made this descriptor for us; these commands set close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn create_map(kind: u32, max_entries: u32, flags: u32) -> io::Result<OwnedFd> {
    let attributes = MapAttributes {
        kind,
        key_size: 4,
        value_size: 4,
        max_entries,
        flags,
    };
    descriptor(BPF_MAP_CREATE, &attributes)
}

/// A value is a number, or a socket's descriptor.
fn put(map: &OwnedFd, key: u32, value: i32) -> io::Result<()> {
    let attributes = ElementAttributes {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: std::ptr::from_ref(&key).addr() as u64,
        value: std::ptr::from_ref(&value).addr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attributes).map(|_| ())
}

fn delete(map: &OwnedFd, key: u32) -> io::Result<()> {
    let attributes = ElementAttributes {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: std::ptr::from_ref(&key).addr() as u64,
        value: 0,
        flags: 0,
    };
    match bpf(BPF_MAP_DELETE_ELEM, &attributes) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        expected_attach: BPF_SK_LOOKUP,
        ..Default::default()
    };
    attributes.name[..7].copy_from_slice(b"forward");
    descriptor(BPF_PROG_LOAD, &attributes)
}
