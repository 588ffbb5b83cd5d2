//! The links of a pod's network namespace: which ones a guest gets, and how.

use std::collections::HashMap;
use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::Emitable;
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
    pub up: bool,
    /// `NOARP` is set.
    pub no_arp: bool,
    /// It is a tap itself.
    pub tap: bool,
    pub is_ethernet: bool,
    /// The link of the same namespace that it stands on.
    pub parent: Option<u32>,
    /// What makes it one of its kind.
    info: Vec<LinkInfo>,
    /// Its addresses, but for IPv6 link-local ones that the guest makes for itself.
    pub addresses: Vec<Address>,
}

/// Kinds of links that a guest's kernel makes as well as the host's, without a card.
const MADE_IN_GUEST: [InfoKind; 2] = [InfoKind::Vlan, InfoKind::Dummy];

impl Link {
    /// Whether the guest makes one like it, because all that it stands on is the guest's too.
    pub fn is_made_in_guest(&self, links: &[Link]) -> bool {
        let kind =
            |info: &LinkInfo| matches!(info, LinkInfo::Kind(kind) if MADE_IN_GUEST.contains(kind));
        let stands = |parent| links.iter().any(|link| link.index == parent);
        self.info.iter().any(kind) && (self.kind == "dummy" || self.parent.is_some_and(stands))
    }

    /// The message that makes one like it.
    pub fn message(&self) -> Vec<u8> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(self.name.clone()),
            LinkAttribute::Address(self.mac.to_vec()),
            LinkAttribute::Mtu(self.mtu),
        ];
        message
            .attributes
            .extend(self.parent.map(LinkAttribute::Link));
        message
            .attributes
            .push(LinkAttribute::LinkInfo(self.info.clone()));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }
}

/// Finds the links that matter: not part of another (a bridge's port), and in use, or `known` from
/// before. Each namespace has devices that only came with kernel modules (`gretap0`, …): they are
/// down and have no address.
pub async fn links(netlink: &Handle, known: &HashMap<u32, String>) -> Result<Vec<Link>> {
    let messages: Vec<LinkMessage> =
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
    let mut links = Vec::new();
    for message in &messages {
        let index = message.header.index;
        let addresses = by_link.remove(&index).unwrap_or_default();
        links.extend(link(message, addresses, known.contains_key(&index)));
    }
    Ok(links)
}

fn link(message: &LinkMessage, addresses: Vec<Address>, known: bool) -> Option<Link> {
    let flags = message.header.flags;
    let up = flags.contains(LinkFlags::Up);
    if flags.contains(LinkFlags::Loopback) || (addresses.is_empty() && !up && !known) {
        return None;
    }
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: "device".into(),
        mac: [0; 6],
        mtu: 1500,
        up,
        no_arp: flags.contains(LinkFlags::Noarp),
        tap: false,
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        parent: None,
        info: Vec::new(),
        addresses,
    };
    let (mut is_port, mut elsewhere) = (false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::Controller(index) => is_port = *index != 0,
            LinkAttribute::Link(index) => link.parent = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                        link.tap = *kind == InfoKind::Tun;
                    }
                    if matches!(info, LinkInfo::Kind(_) | LinkInfo::Data(_)) {
                        link.info.push(info.clone());
                    }
                }
            }
            _ => {}
        }
    }
    link.parent = link.parent.filter(|_| !elsewhere);
    (!is_port).then_some(link)
}

/// An address, unless it is an IPv6 link-local one that its kernel has made.
pub fn address(message: &AddressMessage) -> Option<Address> {
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
