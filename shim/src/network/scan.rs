//! The links of a pod's network namespace that a guest gets as NICs.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};

use super::rtnl;
use crate::error::Result;

/// An address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The link's own address, not a peer's.
    pub ip: IpAddr,
    /// Length of its prefix.
    pub prefix: u8,
}

/// A link as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    pub name: String,
    /// What `ip -details link` calls its type; `device` for hardware.
    pub kind: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    /// `NOARP` is set.
    pub no_arp: bool,
    /// It is a tap itself.
    pub tap: bool,
    /// Its addresses, but for IPv6 link-local ones that the guest makes for itself.
    pub addresses: Vec<Address>,
}

/// Finds the links that matter: Ethernet, not part of another (a bridge's port), and in use. Each
/// namespace has devices that only came with kernel modules (`gretap0`, …): they are down and have
/// no address.
pub async fn links(netlink: &Handle, known: &HashSet<u32>) -> Result<Vec<Link>> {
    let links: Vec<LinkMessage> =
        rtnl("list links", netlink.link().get().execute().try_collect()).await?;
    let addresses: Vec<AddressMessage> = rtnl(
        "list addresses",
        netlink.address().get().execute().try_collect(),
    )
    .await?;
    let mut by_link: HashMap<u32, Vec<Address>> = HashMap::new();
    for message in &addresses {
        if let Some(address) = address(message) {
            by_link
                .entry(message.header.index)
                .or_default()
                .push(address);
        }
    }
    let new = links
        .iter()
        .filter(|message| !known.contains(&message.header.index));
    Ok(new
        .filter_map(|message| {
            link(
                message,
                by_link.remove(&message.header.index).unwrap_or_default(),
            )
        })
        .collect())
}

fn link(message: &LinkMessage, addresses: Vec<Address>) -> Option<Link> {
    let flags = message.header.flags;
    if message.header.link_layer_type != LinkLayerType::Ether
        || flags.contains(LinkFlags::Loopback)
        || (addresses.is_empty() && !flags.contains(LinkFlags::Up))
    {
        return None;
    }
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: "device".into(),
        mac: [0; 6],
        mtu: 1500,
        no_arp: flags.contains(LinkFlags::Noarp),
        tap: false,
        addresses,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok()?,
            LinkAttribute::Controller(index) if *index != 0 => return None,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                        link.tap = *kind == InfoKind::Tun;
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut own, mut local, mut generated) = (None, None, false);
    let mut known_origin = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => own = Some(*ip),
            // Where there is a peer, the other attribute is the peer's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Protocol(protocol) => {
                known_origin = true;
                generated = *protocol == AddressProtocol::LinkLocal;
            }
            _ => {}
        }
    }
    let ip = local.or(own)?;
    if let IpAddr::V6(v6) = ip {
        // Kernels before 5.18 do not say where an address is from; they build it from the hardware
        // address.
        let built = v6.octets()[11..13] == [0xff, 0xfe];
        if v6.is_unicast_link_local() && (generated || (!known_origin && built)) {
            return None;
        }
    }
    Some(Address {
        ip,
        prefix: message.header.prefix_len,
    })
}
