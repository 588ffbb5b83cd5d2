//! BPF programs that Cofferdam assembles itself: instructions, bpf(2), maps.
//!
//! The kernel verifies a program before it loads it, so no program can break memory. Constants and
//! layouts are those of linux/bpf.h.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::check;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_PSEUDO_MAP_FD: u8 = 1;

/// Operation codes (`struct bpf_insn`, field `code`), by the names of their assembler mnemonics.
pub mod code {
    /// `ldxb`: a register from one byte of memory.
    pub const LOAD_BYTE: u8 = 0x71;
    /// `ldxh`: a register from two bytes of memory.
    pub const LOAD_HALF: u8 = 0x69;
    /// `ldxw`: a register from four bytes of memory.
    pub const LOAD_WORD: u8 = 0x61;
    /// `stw`: an immediate number to memory.
    pub const STORE_WORD: u8 = 0x62;
    /// `stxw`: a register to memory.
    pub const STORE_REGISTER: u8 = 0x63;
    /// `mov`, of an immediate number.
    pub const MOVE: u8 = 0xb7;
    /// `mov32`, of an immediate number.
    pub const MOVE_32: u8 = 0xb4;
    /// `mov`, of a register.
    pub const MOVE_REGISTER: u8 = 0xbf;
    /// `mov32`, of a register.
    pub const MOVE_REGISTER_32: u8 = 0xbc;
    /// `add`, of an immediate number.
    pub const ADD: u8 = 0x07;
    /// `and32`, with an immediate number.
    pub const AND_32: u8 = 0x54;
    /// `lsh32`, by an immediate number.
    pub const LEFT_SHIFT_32: u8 = 0x64;
    /// `rsh32`, by an immediate number.
    pub const RIGHT_SHIFT_32: u8 = 0x74;
    /// `ja`.
    pub const JUMP: u8 = 0x05;
    /// `jeq`, with an immediate number.
    pub const JUMP_EQUAL: u8 = 0x15;
    /// `jeq32`, with an immediate number, whose sign goes no further (Linux 5.1).
    pub const JUMP_EQUAL_32: u8 = 0x16;
    /// `jne`, with an immediate number.
    pub const JUMP_NOT_EQUAL: u8 = 0x55;
    /// `call`, of a helper function.
    pub const CALL: u8 = 0x85;
    /// `exit`.
    pub const EXIT: u8 = 0x95;
}

/// One instruction, `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// One of [`code`].
    pub code: u8,
    /// The destination in the low half, the source in the high half.
    pub registers: u8,
    /// Of a jump, in instructions from the next one; of a load or store, in bytes.
    pub offset: i16,
    /// The number that is part of the instruction.
    pub immediate: i32,
}

/// One instruction, its fields in the kernel's order.
pub const fn op(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

/// A program in the making, whose jumps name the places that they lead to.
#[derive(Debug, Default)]
pub struct Assembler {
    program: Vec<Instruction>,
    jumps: Vec<(usize, &'static str)>,
    labels: HashMap<&'static str, usize>,
}

impl Assembler {
    /// Adds instructions.
    pub fn add(&mut self, instructions: impl IntoIterator<Item = Instruction>) {
        self.program.extend(instructions);
    }

    /// Adds a jump forward, with the registers and the number that it compares.
    pub fn jump(&mut self, code: u8, registers: u8, immediate: i32, label: &'static str) {
        self.jumps.push((self.program.len(), label));
        self.program.push(op(code, registers, 0, immediate));
    }

    /// Gives the place of the next instruction a name.
    pub fn label(&mut self, name: &'static str) {
        self.labels.insert(name, self.program.len());
    }

    /// The program. A label that is missing makes a jump that the kernel refuses to load.
    #[must_use]
    pub fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            let target = self.labels.get(label).copied().unwrap_or(usize::MAX);
            self.program[at].offset = i16::try_from(target - at - 1).unwrap_or(i16::MAX);
        }
        self.program
    }
}

/// A map whose keys and values are 32 bits wide.
#[derive(Debug)]
pub struct Map(OwnedFd);

impl Map {
    /// A hash table of numbers.
    ///
    /// # Errors
    /// A kernel without BPF, or a caller without CAP_BPF.
    pub fn hash(max_entries: u32) -> io::Result<Map> {
        Map::create(BPF_MAP_TYPE_HASH, max_entries, BPF_F_NO_PREALLOC)
    }

    /// Sockets by their indices.
    ///
    /// # Errors
    /// As [`Map::hash`].
    pub fn sockets(max_entries: u32) -> io::Result<Map> {
        Map::create(BPF_MAP_TYPE_SOCKMAP, max_entries, 0)
    }

    fn create(kind: u32, max_entries: u32, flags: u32) -> io::Result<Map> {
        let attributes = MapAttributes {
            kind,
            key_size: 4,
            value_size: 4,
            max_entries,
            flags,
        };
        descriptor(BPF_MAP_CREATE, &attributes).map(Map)
    }

    /// Sets an entry. In a map of sockets a value is a socket's descriptor.
    ///
    /// # Errors
    /// A full map, or a descriptor that is no socket.
    pub fn put(&self, key: u32, value: i32) -> io::Result<()> {
        bpf(BPF_MAP_UPDATE_ELEM, &self.element(&key, Some(&value))).map(|_| ())
    }

    /// Takes an entry out. One that is not there is a success.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete(&self, key: u32) -> io::Result<()> {
        match bpf(BPF_MAP_DELETE_ELEM, &self.element(&key, None)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn element(&self, key: &u32, value: Option<&i32>) -> ElementAttributes {
        ElementAttributes {
            map: number(self.0.as_fd()),
            padding: 0,
            key: std::ptr::from_ref(key).addr() as u64,
            value: value.map_or(0, |value| std::ptr::from_ref(value).addr() as u64),
            flags: 0,
        }
    }

    /// The two instructions that put the map's address into a register, as a helper function wants
    /// it (`lddw`).
    pub fn load_into(&self, register: u8) -> [Instruction; 2] {
        const LOAD_DOUBLE_WORD: u8 = 0x18;
        let registers = register | (BPF_PSEUDO_MAP_FD << 4);
        [
            op(LOAD_DOUBLE_WORD, registers, 0, self.0.as_raw_fd()),
            op(0, 0, 0, 0),
        ]
    }
}

/// Loads a program that decides over the accesses to devices in a cgroup. `name` is what bpftool(8)
/// shows, 15 bytes at most.
///
/// # Errors
/// A program that the kernel finds wrong, a kernel without BPF, or a caller without CAP_BPF.
pub fn load_cgroup_device(name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    load(BPF_PROG_TYPE_CGROUP_DEVICE, 0, name, program)
}

/// Loads a program that a filter of traffic control asks about each packet. `name` is what
/// bpftool(8) shows, 15 bytes at most.
///
/// # Errors
/// As [`load_cgroup_device`].
pub fn load_classifier(name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    load(BPF_PROG_TYPE_SCHED_CLS, 0, name, program)
}

/// Loads a program that decides which socket gets a connection (Linux 5.9). `name` is what
/// bpftool(8) shows, 15 bytes at most.
///
/// # Errors
/// As [`load_cgroup_device`].
pub fn load_sk_lookup(name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    load(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, name, program)
}

fn load(
    kind: u32,
    expected_attach: u32,
    name: &str,
    program: &[Instruction],
) -> io::Result<OwnedFd> {
    let mut attributes = LoadAttributes {
        kind,
        count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        expected_attach,
        ..Default::default()
    };
    // The last byte stays zero.
    for (to, from) in attributes.name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    descriptor(BPF_PROG_LOAD, &attributes)
}

/// Runs a program of [`load_classifier`] on a packet that is nowhere (`BPF_PROG_TEST_RUN`); gives
/// its verdict. For tests.
///
/// # Errors
/// The kernel's refusal, of a packet that is shorter than Ethernet's header for one.
pub fn try_classifier(program: &OwnedFd, packet: &[u8]) -> io::Result<i32> {
    let mut attributes = TestAttributes {
        program: number(program.as_fd()),
        result: 0,
        size_in: u32::try_from(packet.len()).unwrap_or(u32::MAX),
        size_out: 0,
        data_in: packet.as_ptr().addr() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
    };
    // SAFETY: as in `bpf`; the kernel reads `size_in` bytes of the packet, and writes its result
    // into the attributes, which nobody else has.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            std::ptr::from_mut(&mut attributes),
            size_of::<TestAttributes>(),
        )
    })?;
    Ok(attributes.result.cast_signed())
}

/// Puts a program of [`load_cgroup_device`] in force on a cgroup, next to those that are there, for
/// as long as the cgroup is.
///
/// # Errors
/// The kernel's refusal.
pub fn attach_to_cgroup(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: number(cgroup),
        program: number(program),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(|_| ())
}

/// Puts a program of [`load_sk_lookup`] in force in a network namespace, for as long as the result
/// is open.
///
/// # Errors
/// The kernel's refusal.
pub fn link_to_netns(netns: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: number(program),
        target: number(netns),
        kind: BPF_SK_LOOKUP,
        flags: 0,
    };
    descriptor(BPF_LINK_CREATE, &attributes)
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

// Each is a command's part of `union bpf_attr`.

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
struct TestAttributes {
    program: u32,
    result: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the callers in this file pass the command's part of `union bpf_attr`, whose size is
    // given. What its addresses point to outlives the call and has the size that the kernel reads:
    // 4 bytes for a key or value, because a `Map` is only made that way, and `count` instructions.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    })?;
    i32::try_from(result).map_err(io::Error::other)
}

fn descriptor<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel just made this descriptor for us; these commands set close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
