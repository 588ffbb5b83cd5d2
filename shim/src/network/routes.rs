//! Routes and permanent neighbours of a pod's network namespace, as the agent's messages.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use guest_protocol::protocols::types;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::rtnl;
use crate::error::Result;

/// The main table's routes over the links of `names`. Those that the kernel made are left out: the
/// guest's kernel makes them from the addresses.
pub async fn routes(netlink: &Handle, names: &HashMap<u32, String>) -> Result<Vec<types::Route>> {
    // One after the other: a request is sent when it is made, and a socket takes one dump at a
    // time.
    let v4 = netlink
        .route()
        .get(RouteMessageBuilder::<Ipv4Addr>::new().build())
        .execute();
    let mut routes: Vec<RouteMessage> = rtnl("list IPv4 routes", v4.try_collect()).await?;
    let v6 = netlink
        .route()
        .get(RouteMessageBuilder::<Ipv6Addr>::new().build())
        .execute();
    routes.append(&mut rtnl("list IPv6 routes", v6.try_collect()).await?);
    Ok(routes
        .iter()
        .filter_map(|message| route(message, names))
        .collect())
}

fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<types::Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    if header.protocol == RouteProtocol::Kernel && !leads_to_peer(message) {
        return None;
    }
    let mut route = types::Route {
        scope: u8::from(header.scope).into(),
        ..Default::default()
    };
    route.flags = (header.flags & RouteFlags::Onlink).bits();
    route.family = family(u8::from(header.address_family) == libc::AF_INET6 as u8);
    let mut table = u32::from(header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Oif(index) => route.device.clone_from(names.get(index)?),
            RouteAttribute::Destination(to) => {
                route.dest = format!("{}/{}", ip(to)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway)?.to_string(),
            RouteAttribute::PrefSource(source) => route.source = ip(source)?.to_string(),
            RouteAttribute::Metrics(metrics) => {
                let mtu = |metric: &RouteMetric| {
                    if let RouteMetric::Mtu(mtu) = metric {
                        Some(*mtu)
                    } else {
                        None
                    }
                };
                route.mtu = metrics.iter().find_map(mtu).unwrap_or_default();
            }
            // The agent's message has one next hop and a gateway of the route's own family.
            RouteAttribute::MultiPath(_) | RouteAttribute::Via(_) => {
                tracing::warn!(
                    ?message,
                    "the guest does without a route that its agent cannot be told"
                );
                return None;
            }
            _ => {}
        }
    }
    (table == u32::from(RouteHeader::RT_TABLE_MAIN) && !route.device.is_empty()).then_some(route)
}

/// A kernel's route that the guest's kernel would not make: the address it is from has a peer,
/// which the agent's message of an address has no field for.
fn leads_to_peer(message: &RouteMessage) -> bool {
    let (mut to, mut from) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = Some(ip.to_bits()),
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => from = Some(ip.to_bits()),
            _ => {}
        }
    }
    let (Some(to), Some(from)) = (to, from) else {
        return false;
    };
    let host_bits = 32_u32.saturating_sub(message.header.destination_prefix_length.into());
    (to ^ from).checked_shr(host_bits).unwrap_or(0) != 0
}

/// The neighbours that somebody has entered for good.
pub async fn neighbours(
    netlink: &Handle,
    names: &HashMap<u32, String>,
) -> Result<Vec<types::ARPNeighbor>> {
    let list = netlink.neighbours().get().execute().try_collect::<Vec<_>>();
    let messages = rtnl("list neighbours", list).await?;
    Ok(messages
        .iter()
        .filter_map(|message| neighbour(message, names))
        .collect())
}

fn neighbour(
    message: &NeighbourMessage,
    names: &HashMap<u32, String>,
) -> Option<types::ARPNeighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = types::ARPNeighbor {
        device: names.get(&message.header.ifindex)?.clone(),
        state: u16::from(message.header.state).into(),
        flags: message.header.flags.bits().into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(to)) => {
                neighbour.toIPAddress = Some(to_address(IpAddr::V4(*to), "")).into();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(to)) => {
                neighbour.toIPAddress = Some(to_address(IpAddr::V6(*to), "")).into();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.lladdr = sys::mac_text(mac),
            _ => {}
        }
    }
    (neighbour.toIPAddress.is_some() && !neighbour.lladdr.is_empty()).then_some(neighbour)
}

/// An address as the agent's message.
pub fn to_address(ip: IpAddr, mask: &str) -> types::IPAddress {
    types::IPAddress {
        family: family(ip.is_ipv6()),
        address: ip.to_string(),
        mask: mask.to_owned(),
        ..Default::default()
    }
}

fn family(v6: bool) -> protobuf::EnumOrUnknown<types::IPFamily> {
    if v6 {
        types::IPFamily::v6.into()
    } else {
        types::IPFamily::v4.into()
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}
