//! Servers on the loopback of a network namespace: docker's for names, or a helper of the host's
//! side that has entered it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sys::socket_table::{self, Waiting};

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
    let all = socket_table::waiting()?;
    Ok(all.into_iter().flat_map(on_loopback).collect())
}

/// The addresses of the loopback that a socket answers for. Of UDP only what is bound to the
/// loopback: other sockets without a peer are clients as often as servers.
fn on_loopback(socket: Waiting) -> impl Iterator<Item = Server> {
    let (v4, v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    let Waiting { address, port, udp } = socket;
    let addresses = match address {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) if !udp => vec![v4],
        // Of both families, unless it says otherwise.
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) if !udp => vec![v4, v6],
        address if address.is_loopback() => vec![address],
        _ => vec![],
    };
    let server = move |address| Server { address, port, udp };
    addresses.into_iter().map(server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_on_the_loopback_count() {
        let servers = |address: &str, udp| {
            let address = address.parse().unwrap();
            let socket = Waiting {
                address,
                port: 80,
                udp,
            };
            let text = |server: Server| server.address.to_string();
            on_loopback(socket).map(text).collect::<Vec<_>>()
        };
        assert_eq!(servers("127.0.0.1", false), ["127.0.0.1"]);
        assert_eq!(servers("0.0.0.0", false), ["127.0.0.1"]);
        assert_eq!(servers("::", false), ["127.0.0.1", "::1"]);
        assert_eq!(servers("::1", true), ["::1"]);
        assert_eq!(servers("127.0.0.11", true), ["127.0.0.11"]);
        for (other, udp) in [("10.1.1.2", false), ("0.0.0.0", true), ("::", true)] {
            assert!(servers(other, udp).is_empty(), "{other}");
        }
    }
}
