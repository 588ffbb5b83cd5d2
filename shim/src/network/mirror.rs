//! What of a network namespace the guest's kernel gets: messages of rtnetlink, as the host's kernel
//! has them but for what only holds there.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::{Stream, TryStreamExt};
use guest_protocol::protocols::network::NetworkState;
use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags,
    RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::{LOOPBACK, rtnl, scan};
use crate::error::Result;

/// Addresses, neighbours, routes and rules that concern the links of `names`, and the loopback.
pub async fn state(netlink: &Handle, names: &HashMap<u32, String>) -> Result<NetworkState> {
    let concerns = |index: u32| index == LOOPBACK || names.contains_key(&index);
    // One after the other: a socket takes one dump at a time.
    let mut addresses = all("list addresses", netlink.address().get().execute()).await?;
    addresses.retain(|message| concerns(message.header.index) && !is_guests_own(message));
    let mut routes = Vec::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    routes.append(&mut all("list IPv4 routes", netlink.route().get(v4).execute()).await?);
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    routes.append(&mut all("list IPv6 routes", netlink.route().get(v6).execute()).await?);
    routes.retain(|message| is_carried(message) && links(message).all(concerns));
    let of_addresses: Vec<Prefix> = addresses.iter().filter_map(prefix).collect();
    for address in &mut addresses {
        adapt_address(address, &routes);
    }
    // Those that the guest's kernel makes of the addresses.
    routes.retain(|route| !of_addresses.iter().any(|prefix| prefix.is_of(route)));
    routes.iter_mut().for_each(adapt_route);
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let of_family = netlink.rule().get(version).execute();
        rules.append(&mut all("list rules of routing", of_family).await?);
    }
    rules.iter_mut().for_each(adapt_rule);
    let mut neighbours = all("list neighbours", netlink.neighbours().get().execute()).await?;
    neighbours.retain(|message| {
        message.header.state == NeighbourState::Permanent && concerns(message.header.ifindex)
    });
    neighbours.iter_mut().for_each(adapt_neighbour);
    Ok(NetworkState {
        addresses: addresses.iter().map(bytes).collect(),
        neighbours: neighbours.iter().map(bytes).collect(),
        routes: routes.iter().map(bytes).collect(),
        rules: rules.iter().map(bytes).collect(),
        ..Default::default()
    })
}

async fn all<T>(
    doing: &str,
    dump: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>> {
    rtnl(doing, dump.try_collect()).await
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

/// What the guest's kernel gives its links by itself.
fn is_guests_own(message: &AddressMessage) -> bool {
    let Some(address) = scan::address(message) else {
        return true;
    };
    // By a router's announcement, which the guest hears too; here it runs out.
    let is_permanent = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Flags(flags) => flags.contains(AddressFlags::Permanent),
        _ => false,
    };
    if address.ip.is_ipv6() && !message.attributes.iter().any(is_permanent) {
        return true;
    }
    message.header.index == LOOPBACK && address.ip.is_loopback()
}

/// The network that an address is in, to which its kernel adds a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    link: u32,
    ip: IpAddr,
    length: u8,
}

impl Prefix {
    fn is_of(&self, route: &RouteMessage) -> bool {
        route.header.protocol == RouteProtocol::Kernel
            && route.header.destination_prefix_length == self.length
            && links(route).eq([self.link])
            && destination(route) == Some(self.ip)
    }
}

fn prefix(message: &AddressMessage) -> Option<Prefix> {
    let length = message.header.prefix_len;
    let host_bits = u32::from(length);
    let address = |attribute: &AddressAttribute| match attribute {
        // A peer's, if there is one.
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    };
    let ip = match message.attributes.iter().find_map(address)? {
        IpAddr::V4(ip) => {
            Ipv4Addr::from_bits(ip.to_bits() & !u32::MAX.unbounded_shr(host_bits)).into()
        }
        IpAddr::V6(ip) => {
            Ipv6Addr::from_bits(ip.to_bits() & !u128::MAX.unbounded_shr(host_bits)).into()
        }
    };
    Some(Prefix {
        link: message.header.index,
        ip,
        length,
    })
}

/// Takes off an address what holds on the host alone: how long it is valid, what its checks have
/// found. Its kernel's route to the network is left to the guest's kernel, or forbidden if somebody
/// has removed it here, as the CNI plug-in `ptp` does.
fn adapt_address(message: &mut AddressMessage, routes: &[RouteMessage]) {
    let prefix = prefix(message);
    let v6 = prefix.is_some_and(|prefix| prefix.ip.is_ipv6());
    let has_route = routes
        .iter()
        .any(|route| prefix.is_some_and(|prefix| prefix.is_of(route)));
    let mut all = AddressFlags::empty();
    message.attributes.retain(|attribute| match attribute {
        AddressAttribute::Flags(flags) => {
            all = *flags;
            false
        }
        AddressAttribute::Address(_)
        | AddressAttribute::Local(_)
        | AddressAttribute::Label(_)
        | AddressAttribute::Broadcast(_)
        | AddressAttribute::RoutePriority(_) => true,
        _ => false,
    });
    let mut flags =
        all & (AddressFlags::Noprefixroute | AddressFlags::Mcautojoin | AddressFlags::Homeaddress);
    if v6 {
        // Duplicate detection takes a second before the address can be used, and is the business
        // of whoever assigned the address.
        flags |= AddressFlags::Nodad;
    }
    // An address alone in its network has no such route, and no other kernel would make one.
    let own = scan::address(message).map(|address| address.ip);
    let alone = prefix.is_some_and(|prefix| !v6 && prefix.length == 32 && Some(prefix.ip) == own);
    if !has_route && !alone && message.header.index != LOOPBACK {
        flags |= AddressFlags::Noprefixroute;
    }
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.push(AddressAttribute::Flags(flags));
}

/// Whether a route is one that somebody has set, or that depends on more than the guest's
/// addresses.
fn is_carried(message: &RouteMessage) -> bool {
    let header = &message.header;
    let kernels = header.protocol == RouteProtocol::Kernel;
    let guests_own = match (header.kind, destination(message)) {
        (RouteType::Unicast, Some(IpAddr::V6(to))) => {
            // Of link-local addresses, and what the loopback answers for.
            kernels && (to.is_unicast_link_local() || to.is_loopback())
        }
        (RouteType::Unicast, _) => false,
        (
            RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast,
            _,
        ) => kernels,
        (RouteType::Unreachable, _) => kernels,
        _ => false,
    };
    let announced = header.protocol == RouteProtocol::Ra;
    !guests_own && !announced && !header.flags.contains(RouteFlags::Cloned)
}

fn destination(message: &RouteMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
            _ => None,
        })
}

/// The links that a route leads over.
fn links(message: &RouteMessage) -> impl Iterator<Item = u32> {
    message
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::Oif(index) | RouteAttribute::Iif(index) => vec![*index],
            RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
            _ => Vec::new(),
        })
}

/// Takes off a route what holds on the host alone: states, its age, and the number of an object of
/// which the route itself says the same.
fn adapt_route(message: &mut RouteMessage) {
    message.header.flags &= RouteFlags::Onlink;
    message.attributes.retain(|attribute| {
        !matches!(
            attribute,
            RouteAttribute::CacheInfo(_) | RouteAttribute::NhId(_) | RouteAttribute::Expires(_)
        )
    });
    for attribute in &mut message.attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            hops.iter_mut().for_each(adapt_hop);
        }
    }
}

fn adapt_hop(hop: &mut RouteNextHop) {
    hop.flags &= RouteNextHopFlags::Onlink;
}

/// Takes off a rule what its kernel has found, and says the priority that is none: left out, it
/// would mean "before all others".
fn adapt_rule(message: &mut RuleMessage) {
    message.header.flags &= RuleFlags::Invert;
    let has_priority = |attribute: &RuleAttribute| matches!(attribute, RuleAttribute::Priority(_));
    if !message.attributes.iter().any(has_priority) {
        message.attributes.push(RuleAttribute::Priority(0));
    }
}

fn adapt_neighbour(message: &mut NeighbourMessage) {
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
}
