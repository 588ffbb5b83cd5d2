//! Routes of the main table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use guest_protocol::protocols::agent::Routes;
use guest_protocol::protocols::types::{IPFamily, Route};

use super::netlink::{Message, Netlink, attribute, attributes, number32};
use super::{PUT, family, ip_of, link, octets, open, parse_ip, parse_length};
use crate::error::{Context, Error, Result};

/// Bytes of a `struct rtmsg`.
const RTMSG: usize = 12;

// linux/rtnetlink.h
const RTNH_F_ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
const RTAX_MTU: u16 = 2;
const RTA_VIA: u16 = 18;

/// Adds routes or replaces them; those without a gateway come first, because gateways are reached
/// over them.
///
/// # Errors
/// Text that is not an address or a prefix, an unknown device, the kernel's refusal.
pub fn update(routes: &Routes) -> Result<()> {
    let netlink = open()?;
    let links = link::all(&netlink)?;
    let (direct, over): (Vec<&Route>, Vec<&Route>) = routes
        .Routes
        .iter()
        .partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(over) {
        put(&netlink, &links, route)?;
    }
    Ok(())
}

/// The routes of the main table.
///
/// # Errors
/// The kernel's refusal.
pub fn list() -> Result<Routes> {
    let netlink = open()?;
    let links = link::all(&netlink)?;
    let request = Message::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &[0; RTMSG]);
    let answers = netlink.request(request).context(|| "list routes".into())?;
    let routes = answers
        .iter()
        .filter_map(|answer| parse(answer, &links))
        .collect();
    Ok(Routes {
        Routes: routes,
        ..Default::default()
    })
}

fn put(netlink: &Netlink, links: &[link::Link], route: &Route) -> Result<()> {
    let (target, length) = destination(route)?;
    // struct rtmsg
    let scope = u8::try_from(route.scope)
        .map_err(|_| Error::Invalid(format!("{} is no scope of a route", route.scope)))?;
    let fixed = [
        family(target),
        length,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_BOOT,
        scope,
        libc::RTN_UNICAST,
    ];
    // The others are states, which the kernel does not take.
    let flags = (route.flags & RTNH_F_ONLINK).to_ne_bytes();
    let mut message = Message::new(
        libc::RTM_NEWROUTE,
        PUT,
        &[fixed.as_slice(), &flags].concat(),
    );
    if length != 0 {
        message = message.with(libc::RTA_DST, &octets(target));
    }
    if !route.device.is_empty() {
        message = message.with(
            libc::RTA_OIF,
            &link::index_of(links, &route.device)?.to_ne_bytes(),
        );
    }
    if !route.gateway.is_empty() {
        let gateway = parse_ip(&route.gateway)?;
        message = if gateway.is_ipv4() == target.is_ipv4() {
            message.with(libc::RTA_GATEWAY, &octets(gateway))
        } else {
            // struct rtvia: the gateway is of the other family.
            let family = u16::from(family(gateway)).to_ne_bytes();
            message.with(RTA_VIA, &[family.as_slice(), &octets(gateway)].concat())
        };
    }
    if !route.source.is_empty() {
        message = message.with(libc::RTA_PREFSRC, &octets(parse_ip(&route.source)?));
    }
    if route.mtu != 0 {
        message = message.with(
            libc::RTA_METRICS,
            &attribute(RTAX_MTU, &route.mtu.to_ne_bytes()),
        );
    }
    let attempt = || {
        let Route {
            gateway, device, ..
        } = route;
        let over = if gateway.is_empty() {
            String::new()
        } else {
            format!(" over {gateway}")
        };
        format!("add route {target}/{length}{over} on {device:?}")
    };
    netlink.request(message).context(attempt).map(|_| ())
}

/// `address/length`, an address alone, or nothing for the default route. Bits behind the prefix are
/// cleared: the kernel refuses them.
fn destination(route: &Route) -> Result<(IpAddr, u8)> {
    if matches!(route.dest.as_str(), "" | "default") {
        let gateway = if route.gateway.is_empty() {
            None
        } else {
            Some(parse_ip(&route.gateway)?)
        };
        // Shims that leave the family out say v4 by that.
        let v6 = route.family.enum_value_or_default() == IPFamily::v6
            || gateway.is_some_and(|ip| ip.is_ipv6());
        return Ok((
            if v6 {
                Ipv6Addr::UNSPECIFIED.into()
            } else {
                Ipv4Addr::UNSPECIFIED.into()
            },
            0,
        ));
    }
    let (ip, length) = match route.dest.split_once('/') {
        Some((ip, length)) => {
            let ip = parse_ip(ip)?;
            (ip, parse_length(length, ip)?)
        }
        None => {
            let ip = parse_ip(&route.dest)?;
            (ip, if ip.is_ipv4() { 32 } else { 128 })
        }
    };
    let ip = match ip {
        IpAddr::V4(ip) => {
            Ipv4Addr::from_bits(ip.to_bits() & !u32::MAX.unbounded_shr(length.into())).into()
        }
        IpAddr::V6(ip) => {
            Ipv6Addr::from_bits(ip.to_bits() & !u128::MAX.unbounded_shr(length.into())).into()
        }
    };
    Ok((ip, length))
}

fn parse(answer: &[u8], links: &[link::Link]) -> Option<Route> {
    let &[family, length, _, _, table, _, scope, _] = answer.first_chunk()?;
    let flags = number32(answer, 8)?;
    let family = match i32::from(family) {
        libc::AF_INET => IPFamily::v4,
        libc::AF_INET6 => IPFamily::v6,
        _ => return None,
    };
    if table != libc::RT_TABLE_MAIN || flags & RTM_F_CLONED != 0 {
        return None;
    }
    let mut route = Route {
        scope: scope.into(),
        family: family.into(),
        flags: flags & RTNH_F_ONLINK,
        ..Default::default()
    };
    for (kind, value) in attributes(&answer[RTMSG..]) {
        let ip = || ip_of(value).map(|ip| ip.to_string());
        match kind {
            libc::RTA_DST => route.dest = format!("{}/{length}", ip()?),
            libc::RTA_GATEWAY => route.gateway = ip()?,
            RTA_VIA => route.gateway = ip_of(value.get(2..)?)?.to_string(),
            libc::RTA_PREFSRC => route.source = ip()?,
            libc::RTA_OIF => {
                let index = number32(value, 0)?;
                route.device = links.iter().find(|link| link.index == index)?.name.clone();
            }
            libc::RTA_METRICS => {
                let mtu = attributes(value).find(|(kind, _)| *kind == RTAX_MTU);
                route.mtu = mtu
                    .and_then(|(_, value)| number32(value, 0))
                    .unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(route)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_cleaned() {
        let read = |dest: &str, family: IPFamily, gateway: &str| {
            let route = Route {
                dest: dest.into(),
                family: family.into(),
                gateway: gateway.into(),
                ..Default::default()
            };
            destination(&route)
                .map(|(ip, length)| format!("{ip}/{length}"))
                .ok()
        };
        for (dest, family, gateway, expected) in [
            ("", IPFamily::v4, "10.0.0.1", "0.0.0.0/0"),
            ("", IPFamily::v6, "", "::/0"),
            ("", IPFamily::v4, "fe80::1", "::/0"),
            ("10.1.2.3/16", IPFamily::v4, "", "10.1.0.0/16"),
            ("10.1.2.3/0", IPFamily::v4, "", "0.0.0.0/0"),
            ("10.1.2.3", IPFamily::v4, "", "10.1.2.3/32"),
            ("fd00:1::5/32", IPFamily::v6, "", "fd00:1::/32"),
        ] {
            assert_eq!(read(dest, family, gateway).as_deref(), Some(expected));
        }
        for bad in ["10.0.0.0/33", "here", "fd00::/129", "10.0.0.0/", "/8"] {
            assert_eq!(read(bad, IPFamily::v4, ""), None, "{bad:?}");
        }
    }
}
