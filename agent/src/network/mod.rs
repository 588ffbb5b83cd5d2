//! The guest's network: the host says which interface has which name, addresses, routes and
//! neighbours.
//!
//! ```text
//!  UpdateInterface ── link ─────┐
//!  UpdateRoutes    ── route ────┼── netlink: one request, its answers ── kernel (NETLINK_ROUTE)
//!  AddARPNeighbors ── this file ┤
//!  Network.Set     ── mirror ───┴── netfilter ── kernel (NETLINK_NETFILTER, IPT_SO_SET_REPLACE)
//!  ListInterfaces, ListRoutes: the same files, by dumps
//! ```
//!
//! `link` finds the interface that is meant (by PCI path, else by hardware address, else by name)
//! and gives it what the host has for it. `route` keeps to the main table. `netlink` knows the wire
//! and nothing of links or routes. `mirror` sets all of it as the host's kernel has it, in the
//! kernel's own messages: our own shim uses it, and of the other calls only `UpdateInterface`. This
//! file has what the others share: addresses as text and as bytes.
//!
//! Rules that a change must not break:
//!
//! * A call can be repeated: it makes what is missing, changes what is there, and removes nothing
//!   (`mirror`: only what it has made itself). The shim repeats the calls when a link comes late.
//! * An interface is taken down only if its name or its hardware address changes, because that
//!   costs it its routes and its IPv6 addresses.
//! * Routes without a gateway come before those with one, which are reached over them.
//! * What the kernel answers is parsed with bounds: a broken attribute ends the list.
//! * The kernel answers a netlink request before the send returns. Nothing is awaited here but a
//!   card that is being plugged in.

mod link;
mod mirror;
mod netfilter;
mod netlink;
mod route;

use std::net::IpAddr;

use guest_protocol::protocols::agent::ARPNeighbors;
use guest_protocol::protocols::types::IPFamily;

use self::netlink::{Message, Netlink};
use crate::error::{Context, Error, Result};

pub use link::{list as list_interfaces, update as update_interface};
pub use mirror::Mirror;
pub use route::{list as list_routes, update as update_routes};

/// Makes what is missing and changes what is there: a call can be repeated.
const PUT: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

// linux/neighbour.h
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

fn open() -> Result<Netlink> {
    Netlink::open().context(|| "open a netlink socket".into())
}

/// Adds neighbours, of both families.
///
/// # Errors
/// Text that is not an address, an unknown device, the kernel's refusal.
pub fn add_neighbours(neighbours: &ARPNeighbors) -> Result<()> {
    let netlink = open()?;
    let links = link::all(&netlink)?;
    for neighbour in &neighbours.ARPNeighbors {
        let device = link::index_of(&links, &neighbour.device)?;
        let address = parse_ip(&neighbour.toIPAddress.get_or_default().address)?;
        let state = match u16::try_from(neighbour.state) {
            Ok(0) => NUD_PERMANENT,
            Ok(state) => state,
            Err(_) => {
                return Err(Error::Invalid(format!(
                    "{} is no state of a neighbour",
                    neighbour.state
                )));
            }
        };
        let flags = u8::try_from(neighbour.flags).map_err(|_| {
            Error::Invalid(format!(
                "{:#x} are no flags of a neighbour",
                neighbour.flags
            ))
        })?;
        // struct ndmsg
        let mut fixed = vec![family(address), 0, 0, 0];
        fixed.extend(device.to_ne_bytes());
        fixed.extend(state.to_ne_bytes());
        fixed.extend([flags, libc::RTN_UNICAST]);
        let mut message =
            Message::new(libc::RTM_NEWNEIGH, PUT, &fixed).with(NDA_DST, &octets(address));
        if !neighbour.lladdr.is_empty() {
            message = message.with(NDA_LLADDR, &parse_mac(&neighbour.lladdr)?);
        }
        netlink
            .request(message)
            .context(|| format!("add neighbour {address} on {}", neighbour.device))?;
    }
    Ok(())
}

fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| Error::Invalid(format!("{text:?} is no IP address")))
}

/// A prefix length as text.
fn parse_length(text: &str, address: IpAddr) -> Result<u8> {
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = text.parse().ok().filter(|length| *length <= most);
    length.ok_or_else(|| Error::Invalid(format!("{text:?} is no prefix length for {address}")))
}

/// Bytes in hexadecimal, joined by colons: six of them on Ethernet, 20 on InfiniBand.
fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let byte = |text: &str| {
        u8::from_str_radix(text, 16)
            .ok()
            .filter(|_| text.len() == 2)
    };
    let bytes = text.split(':').map(byte).collect::<Option<Vec<_>>>();
    bytes
        .filter(|bytes| (6..=32).contains(&bytes.len()))
        .ok_or_else(|| Error::Invalid(format!("{text:?} is no hardware address")))
}

fn family(address: IpAddr) -> u8 {
    // Both numbers fit.
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    u8::try_from(family).unwrap_or_default()
}

fn protocol_family(address: IpAddr) -> IPFamily {
    if address.is_ipv4() {
        IPFamily::v4
    } else {
        IPFamily::v6
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(octets.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_read_back() {
        assert_eq!(
            sys::mac_text(&parse_mac("02:00:5e:AB:cd:0f").unwrap()),
            "02:00:5e:ab:cd:0f"
        );
        for bad in [
            "",
            "02:00:5e:ab:cd",
            "2:0:5e:ab:cd:f",
            "02-00-5e-ab-cd-0f",
            "02:00:5e:ab:cd:gg",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_mask_is_a_prefix_length() {
        let (v4, v6) = (parse_ip("10.0.0.1").unwrap(), parse_ip("fd00::1").unwrap());
        assert_eq!(
            (
                parse_length("32", v4).unwrap(),
                parse_length("128", v6).unwrap()
            ),
            (32, 128)
        );
        assert!(parse_length("33", v4).is_err() && parse_length("255.255.255.0", v4).is_err());
        assert!(parse_length("129", v6).is_err() && parse_length("", v6).is_err());
    }
}
