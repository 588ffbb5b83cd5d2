//! A BPF classifier for a tap whose packets the host sends as its own ([`super::user_mode`]): what
//! is to or from the host's loopback is dropped, which pasta would reach with it.
//!
//! The unspecified addresses are the loopback for connect(2). Of IPv6 all of ::/96 and
//! ::ffff:0:0/96 goes: none of it is on a wire.

use std::io;
use std::os::fd::OwnedFd;

use sys::bpf::{self, Assembler, Instruction, code, op};

use super::classifier::{
    DROP, ETHERNET_HEADER, HEADER, IPV4_HEADER, IPV6_HEADER, begin, load, next, verdict,
};

/// The program.
///
/// # Errors
/// A kernel without BPF.
pub fn program() -> io::Result<OwnedFd> {
    bpf::load_classifier("no_loopback", &instructions())
}

fn instructions() -> Vec<Instruction> {
    let mut program = begin(&[(libc::ETH_P_IP, "v4"), (libc::ETH_P_IPV6, "v6")]);

    // struct iphdr: both addresses.
    program.label("v4");
    load(&mut program, ETHERNET_HEADER, HEADER, IPV4_HEADER, "drop");
    for at in [12, 16] {
        let net = |first| i32::from_ne_bytes([first, 0, 0, 0]);
        program.add([
            op(code::LOAD_WORD, 0xa2, HEADER + at, 0),
            op(code::AND_32, 0x02, 0, net(0xff)),
        ]);
        for first in [127, 0] {
            program.jump(code::JUMP_EQUAL, 0x02, net(first), "drop");
        }
    }
    program.jump(code::JUMP, 0, 0, "next");

    // struct ipv6hdr: the first three words of both addresses.
    program.label("v6");
    load(&mut program, ETHERNET_HEADER, HEADER, IPV6_HEADER, "drop");
    for (at, other) in [(8, "destination"), (24, "next")] {
        let word = |program: &mut Assembler, number: i16| {
            program.add([op(code::LOAD_WORD, 0xa2, HEADER + at + 4 * number, 0)]);
        };
        for number in 0..2 {
            word(&mut program, number);
            program.jump(code::JUMP_NOT_EQUAL, 0x02, 0, other);
        }
        word(&mut program, 2);
        for third in [[0; 4], [0, 0, 0xff, 0xff]] {
            program.jump(code::JUMP_EQUAL_32, 0x02, i32::from_ne_bytes(third), "drop");
        }
        if other != "next" {
            program.label(other);
        }
    }
    next(&mut program);
    verdict(&mut program, "drop", DROP);
    program.finish()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// A packet without a payload.
    fn packet(from: &str, to: &str) -> Vec<u8> {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut packet = vec![2; 12];
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                packet.extend([8, 0, 0x45]);
                packet.extend([0; 11]);
                packet.extend(from.octets());
                packet.extend(to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                packet.extend([0x86, 0xdd, 0x60]);
                packet.extend([0; 7]);
                packet.extend(from.octets());
                packet.extend(to.octets());
            }
            _ => panic!("two families"),
        }
        packet
    }

    /// By the kernel.
    #[test]
    fn nothing_gets_to_the_hosts_loopback() {
        let program = program().unwrap();
        let verdict = |packet: &[u8]| bpf::try_classifier(&program, packet).unwrap();
        for to in ["127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3"] {
            assert_eq!(verdict(&packet("192.0.2.2", to)), DROP, "{to}");
            assert_eq!(verdict(&packet(to, "192.0.2.1")), DROP, "from {to}");
        }
        for to in [
            "::1",
            "::",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:192.0.2.1",
        ] {
            assert_eq!(verdict(&packet("fd00::2", to)), DROP, "{to}");
            assert_eq!(verdict(&packet(to, "fd00::1")), DROP, "from {to}");
        }
        for (from, to) in [
            ("192.0.2.2", "192.0.2.1"),
            ("10.0.0.127", "128.0.0.1"),
            ("fd00::2", "fd00::1"),
            ("fe80::1", "ff02::1"),
            ("64:ff9b::7f00:1", "2001:db8::1"),
        ] {
            assert_eq!(verdict(&packet(from, to)), -1, "{from} {to}");
        }
        let mut arp = packet("127.0.0.1", "127.0.0.1");
        arp[12..14].copy_from_slice(&[8, 6]);
        assert_eq!(verdict(&arp), -1);
    }
}
