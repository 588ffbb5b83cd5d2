//! The kernel's tables of sockets, /proc/net/tcp and its like.

use std::fs::read_to_string;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A socket that waits for others: a listening one of TCP, or one of UDP without a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Waiting {
    /// Where it waits. Unspecified for all addresses, and of IPv6 then for IPv4 as well.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// UDP.
    pub udp: bool,
}

/// Those of the calling thread's network namespace.
///
/// # Errors
/// /proc is not there.
pub fn waiting() -> io::Result<Vec<Waiting>> {
    let mut all = Vec::new();
    for (file, udp) in [
        ("tcp", false),
        ("tcp6", false),
        ("udp", true),
        ("udp6", true),
    ] {
        match read_to_string(format!("/proc/thread-self/net/{file}")) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            table => all.extend(listed(&table?, udp)),
        }
    }
    Ok(all)
}

fn listed(table: &str, udp: bool) -> impl Iterator<Item = Waiting> {
    // TCP_CLOSE and TCP_LISTEN.
    let state = if udp { "07" } else { "0A" };
    table.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, port) = place(fields.get(1).filter(|_| fields.get(3) == Some(&state))?)?;
        Some(Waiting { address, port, udp })
    })
}

fn place(local: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of four bytes, each in the host's order.
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let address = match address.len() {
        8 => Ipv4Addr::from(word(0)?.to_ne_bytes()).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let mut octets = [0; 16];
            for (place, word) in octets.chunks_exact_mut(4).zip(words) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_names_who_waits() {
        let table = "  sl  local_address rem_address   st\n\
            0: 0100007F:1B58 00000000:0000 0A 0\n   1: 00000000:0050 00000000:0000 0A 0\n\
            3: 0100007F:0052 0100007F:0053 01 0\n\
            4: 00000000000000000000000001000000:0054 00000000000000000000000000000000:0000 0A 0\n\
            6: 0B00007F:0035 00000000:0000 07 0\n";
        let text = |one: Waiting| format!("{} {}", one.address, one.port);
        let tcp: Vec<String> = listed(table, false).map(text).collect();
        assert_eq!(tcp, ["127.0.0.1 7000", "0.0.0.0 80", "::1 84"]);
        let udp: Vec<String> = listed(table, true).map(text).collect();
        assert_eq!(udp, ["127.0.0.11 53"]);
    }
}
