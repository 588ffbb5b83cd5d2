//! Servers on the loopback of a network namespace: docker's for names, or a helper of the host's
//! side that has entered it.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Server {
    pub address: IpAddr,
    pub port: u16,
    pub udp: bool,
}

/// The servers of the calling thread's namespace.
///
/// # Errors
/// /proc is not there.
pub fn all() -> io::Result<BTreeSet<Server>> {
    let mut servers = BTreeSet::new();
    for (file, udp) in [
        ("tcp", false),
        ("tcp6", false),
        ("udp", true),
        ("udp6", true),
    ] {
        let path = format!("/proc/thread-self/net/{file}");
        let table = match read_to_string(path) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            table => table?,
        };
        servers.extend(listed(&table, udp));
    }
    Ok(servers)
}

/// Those of a table of /proc/net. Of UDP only what is bound to the loopback: other sockets without
/// a peer are clients as often as servers.
fn listed(table: &str, udp: bool) -> impl Iterator<Item = Server> {
    let state = if udp { "07" } else { "0A" };
    table.lines().flat_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let found = (fields.get(3) == Some(&state))
            .then(|| place(fields.get(1)?, udp))
            .flatten();
        found.into_iter().flat_map(move |(addresses, port)| {
            let server = move |address| Server { address, port, udp };
            addresses.into_iter().map(server)
        })
    })
}

/// The addresses of the loopback that a local address answers for.
fn place(local: &str, udp: bool) -> Option<(Vec<IpAddr>, u16)> {
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let (v4, v6) = (
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    );
    // Words of four bytes, each in the host's order.
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let addresses = match address.len() {
        8 => match Ipv4Addr::from(word(0)?.to_ne_bytes()) {
            Ipv4Addr::UNSPECIFIED if !udp => vec![v4],
            address if address.is_loopback() => vec![address.into()],
            _ => return None,
        },
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let mut octets = [0; 16];
            for (place, word) in octets.chunks_exact_mut(4).zip(words) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
            match Ipv6Addr::from(octets) {
                // Of both families, unless it says otherwise.
                Ipv6Addr::UNSPECIFIED if !udp => vec![v4, v6],
                Ipv6Addr::LOCALHOST => vec![v6],
                _ => return None,
            }
        }
        _ => return None,
    };
    Some((addresses, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_on_the_loopback_count() {
        let table = "  sl  local_address rem_address   st\n\
            0: 0100007F:1B58 00000000:0000 0A 0\n   1: 00000000:0050 00000000:0000 0A 0\n\
            2: 0101010A:0051 00000000:0000 0A 0\n   3: 0100007F:0052 0100007F:0053 01 0\n\
            4: 00000000000000000000000001000000:0054 00000000000000000000000000000000:0000 0A 0\n\
            5: 00000000000000000000000000000000:0055 00000000000000000000000000000000:0000 0A 0\n\
            6: 0B00007F:0035 00000000:0000 07 0\n   7: 00000000:0044 00000000:0000 07 0\n";
        let text = |server: Server| format!("{}:{}", server.address, server.port);
        let tcp: Vec<String> = listed(table, false).map(text).collect();
        assert_eq!(
            tcp,
            [
                "127.0.0.1:7000",
                "127.0.0.1:80",
                "::1:84",
                "127.0.0.1:85",
                "::1:85"
            ]
        );
        let udp: Vec<String> = listed(table, true).map(text).collect();
        assert_eq!(udp, ["127.0.0.11:53"]);
    }
}
