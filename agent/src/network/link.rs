//! Interfaces: which one is meant, its name, hardware address, MTU and addresses.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use guest_protocol::protocols::agent::Interfaces;
use guest_protocol::protocols::types::{IPAddress, Interface};

use super::netlink::{Message, Netlink, attributes, number32};
use super::{PUT, family, ip_of, octets, open, parse_ip, parse_length, parse_mac, protocol_family};
use crate::error::{Context, Error, Result};
use crate::guest::pci;
use crate::log::log;

/// Bytes of a `struct ifinfomsg`.
pub(super) const IFINFOMSG: usize = 16;

/// Bytes of a `struct ifaddrmsg`.
const IFADDRMSG: usize = 8;

/// Longest name of an interface.
const MAX_NAME: usize = libc::IFNAMSIZ - 1;

// linux/if.h, whose constants libc has as signed numbers.
const IFF_UP: u32 = 0x1;
const IFF_NOARP: u32 = 0x80;

/// linux/if_link.h
const IFLA_INFO_KIND: u16 = 1;

/// An interface of the guest.
#[derive(Debug, Clone, Default)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    mac: Vec<u8>,
    mtu: u32,
    flags: u32,
    kind: String,
}

/// Gives an interface its name, addresses and so on, and brings it up. A repeated call changes
/// nothing, so routes stay.
///
/// # Errors
/// No such interface in time, text that is not an address, the kernel's refusal.
pub async fn update(wanted: &Interface, hotplug_timeout: Duration) -> Result<()> {
    let mut addresses = Vec::with_capacity(wanted.IPAddresses.len());
    for address in &wanted.IPAddresses {
        let ip = parse_ip(&address.address)?;
        addresses.push((ip, parse_length(&address.mask, ip)?));
    }
    let mac = Some(&wanted.hwAddr)
        .filter(|text| !text.is_empty())
        .map(|text| parse_mac(text))
        .transpose()?;
    if wanted.name.len() > MAX_NAME {
        return Err(Error::Invalid(format!(
            "interface name {:?} is longer than {MAX_NAME} bytes",
            wanted.name
        )));
    }
    let at_path = match wanted.devicePath.as_str() {
        "" => None,
        path => Some(pci::wait_for(path, "network device", hotplug_timeout, net_name).await?),
    };
    let netlink = open()?;
    let links = all(&netlink)?;
    let link = find(&links, wanted, mac.as_deref(), at_path.as_deref())?;
    let name = if wanted.name.is_empty() {
        &link.name
    } else {
        &wanted.name
    };
    let rename = *name != link.name;
    let new_mac = mac.filter(|mac| *mac != link.mac);
    if rename || new_mac.is_some() {
        // Both need an interface that is down, which costs it its routes: not without need.
        set(&netlink, Change::of(link.index).flags(0, IFF_UP))
            .context(|| format!("take {} down", link.name))?;
    }
    let in_the_way = links.iter().find(|other| rename && other.name == *name);
    if let Some(other) = in_the_way {
        // Two requests: in one, the kernel would begin with the name.
        set(&netlink, Change::of(other.index).flags(0, IFF_UP))
            .context(|| format!("take {name} down"))?;
        set(&netlink, Change::of(other.index).name(&temporary(name)))
            .context(|| format!("rename {name} to make room"))?;
    }
    let mut change = Change::of(link.index);
    if let Some(mac) = &new_mac {
        change.0 = change.0.with(libc::IFLA_ADDRESS, mac);
    }
    if rename {
        change = change.name(name);
    }
    if let Ok(mtu) = u32::try_from(wanted.mtu)
        && mtu != 0
        && mtu != link.mtu
    {
        change.0 = change.0.with(libc::IFLA_MTU, &mtu.to_ne_bytes());
    }
    let change = change.flags(IFF_UP | wanted.raw_flags & IFF_NOARP, IFF_UP | IFF_NOARP);
    set(&netlink, change).context(|| format!("set up interface {name}"))?;
    if let Some(other) = in_the_way {
        let change = Change::of(other.index)
            .name(&link.name)
            .flags(other.flags & IFF_UP, IFF_UP);
        set(&netlink, change).context(|| format!("rename what was {name} to {}", link.name))?;
    }
    // Last, because an interface that is taken down loses its IPv6 addresses.
    for (ip, length) in addresses {
        if ip.is_ipv6() && ipv6_is_off(name) {
            log!("{name}: no address {ip}: IPv6 is off");
            continue;
        }
        add_address(&netlink, link.index, ip, length)
            .context(|| format!("add address {ip}/{length} to {name}"))?;
    }
    Ok(())
}

/// All interfaces with their addresses.
///
/// # Errors
/// The kernel's refusal.
pub fn list() -> Result<Interfaces> {
    let netlink = open()?;
    let links = all(&netlink)?;
    let request = Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &[0; IFADDRMSG]);
    let addresses = netlink
        .request(request)
        .context(|| "list addresses".into())?;
    let addresses: Vec<(u32, IPAddress)> = addresses
        .iter()
        .filter_map(|answer| parse_address(answer))
        .collect();
    let interface = |link: Link| Interface {
        device: link.name.clone(),
        name: link.name,
        IPAddresses: addresses
            .iter()
            .filter(|entry| entry.0 == link.index)
            .map(|entry| entry.1.clone())
            .collect(),
        mtu: link.mtu.into(),
        hwAddr: sys::mac_text(&link.mac),
        type_: link.kind,
        raw_flags: link.flags & IFF_NOARP,
        ..Default::default()
    };
    Ok(Interfaces {
        Interfaces: links.into_iter().map(interface).collect(),
        ..Default::default()
    })
}

pub(super) fn all(netlink: &Netlink) -> Result<Vec<Link>> {
    let request = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; IFINFOMSG]);
    let answers = netlink
        .request(request)
        .context(|| "list interfaces".into())?;
    Ok(answers
        .iter()
        .filter_map(|answer| parse_link(answer))
        .collect())
}

pub(super) fn index_of(links: &[Link], name: &str) -> Result<u32> {
    let found = links
        .iter()
        .find(|link| link.name == name)
        .map(|link| link.index);
    found.ok_or_else(|| Error::Failed(format!("the guest has no interface {name:?}")))
}

/// By place, else by hardware address, else by name.
fn find<'a>(
    links: &'a [Link],
    wanted: &Interface,
    mac: Option<&[u8]>,
    at_path: Option<&str>,
) -> Result<&'a Link> {
    if let Some(name) = at_path {
        let index = index_of(links, name)?;
        return links
            .iter()
            .find(|link| link.index == index)
            .ok_or_else(|| Error::Failed(format!("{name} is gone")));
    }
    // A bridge or a VLAN has the address of what it stands on; they were made later. `lo` has one
    // of zeros.
    let mac = mac.filter(|mac| mac.iter().any(|byte| *byte != 0));
    let by_mac = links.iter().filter(|link| Some(&*link.mac) == mac);
    by_mac
        .min_by_key(|link| link.index)
        .or_else(|| links.iter().find(|link| link.name == wanted.name))
        .ok_or_else(|| {
            let Interface { name, hwAddr, .. } = wanted;
            Error::Failed(format!(
                "the guest has no interface with address {hwAddr:?} or name {name:?}"
            ))
        })
}

/// The network interface of a PCI device.
fn net_name(device: &Path) -> Option<String> {
    let direct = || {
        fs::read_dir(device.join("net"))
            .ok()?
            .next()?
            .ok()?
            .file_name()
            .into_string()
            .ok()
    };
    pci::virtio_child(device, "net").or_else(direct)
}

/// The name that an interface has while another takes over its own.
fn temporary(name: &str) -> String {
    const SUFFIX: &str = "_temp";
    let kept: String = name.chars().take(MAX_NAME - SUFFIX.len()).collect();
    kept + SUFFIX
}

/// A change of an interface.
struct Change(Message, [u32; 3]);

impl Change {
    fn of(index: u32) -> Change {
        Change(
            Message::new(libc::RTM_NEWLINK, 0, &[0; IFINFOMSG]),
            [index, 0, 0],
        )
    }

    fn name(mut self, name: &str) -> Change {
        self.0 = self
            .0
            .with(libc::IFLA_IFNAME, format!("{name}\0").as_bytes());
        self
    }

    fn flags(mut self, flags: u32, mask: u32) -> Change {
        self.1[1] = flags;
        self.1[2] = mask;
        self
    }
}

/// Brings a link up or down.
pub(super) fn set_up(netlink: &Netlink, index: u32, up: bool) -> std::io::Result<()> {
    let flags = if up { IFF_UP } else { 0 };
    set(netlink, Change::of(index).flags(flags, IFF_UP))
}

/// Removes a link.
pub(super) fn remove(netlink: &Netlink, index: u32) -> std::io::Result<()> {
    let mut message = Message::new(libc::RTM_DELLINK, 0, &[0; IFINFOMSG]);
    message.fixed(4, &index.to_ne_bytes());
    netlink.request(message).map(|_| ())
}

fn set(netlink: &Netlink, change: Change) -> std::io::Result<()> {
    let Change(mut message, numbers) = change;
    // struct ifinfomsg: four bytes, then these.
    message.fixed(4, &numbers.map(u32::to_ne_bytes).concat());
    netlink.request(message).map(|_| ())
}

fn add_address(netlink: &Netlink, index: u32, ip: IpAddr, length: u8) -> std::io::Result<()> {
    let scope = if ip.is_loopback() {
        libc::RT_SCOPE_HOST
    } else {
        libc::RT_SCOPE_UNIVERSE
    };
    // Duplicate detection takes a second before the address can be used, and is the business of
    // whoever assigned the address.
    let flags = if ip.is_ipv6() { libc::IFA_F_NODAD } else { 0 };
    let mut fixed = vec![
        family(ip),
        length,
        u8::try_from(flags).unwrap_or_default(),
        scope,
    ];
    fixed.extend(index.to_ne_bytes());
    let mut message =
        Message::new(libc::RTM_NEWADDR, PUT, &fixed).with(libc::IFA_ADDRESS, &octets(ip));
    if let IpAddr::V4(v4) = ip {
        message = message.with(libc::IFA_LOCAL, &octets(ip));
        if length < 31 {
            let broadcast = v4.to_bits() | u32::MAX.unbounded_shr(length.into());
            message = message.with(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
    }
    netlink.request(message).map(|_| ())
}

fn ipv6_is_off(name: &str) -> bool {
    let file = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    // Without the file the kernel has no IPv6.
    fs::read_to_string(file).map_or(true, |text| text.trim() != "0")
}

fn parse_link(answer: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: number32(answer, 4)?,
        flags: number32(answer, 8)?,
        ..Default::default()
    };
    for (kind, value) in attributes(answer.get(IFINFOMSG..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_ADDRESS => link.mac = value.to_owned(),
            libc::IFLA_MTU => link.mtu = number32(value, 0)?,
            libc::IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value)
        .trim_end_matches('\0')
        .to_owned()
}

fn parse_address(answer: &[u8]) -> Option<(u32, IPAddress)> {
    let (length, index) = (answer.get(1)?, number32(answer, 4)?);
    let find = |wanted| {
        attributes(answer.get(IFADDRMSG..)?)
            .find(|(kind, _)| *kind == wanted)
            .map(|found| found.1)
    };
    // On a point-to-point interface the other one is the peer's.
    let ip = ip_of(find(libc::IFA_LOCAL).or_else(|| find(libc::IFA_ADDRESS))?)?;
    let address = IPAddress {
        family: protocol_family(ip).into(),
        address: ip.to_string(),
        mask: length.to_string(),
        ..Default::default()
    };
    Some((index, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_address_before_name() {
        let link = |index, name: &str, last| Link {
            index,
            name: name.into(),
            mac: vec![2, 0, 0, 0, 0, last],
            ..Default::default()
        };
        let links = [
            link(4, "br0", 1),
            link(3, "eth1", 1),
            link(2, "eth0", 7),
            Link {
                index: 1,
                mac: vec![0; 6],
                ..Default::default()
            },
        ];
        let find = |name: &str, mac: &[u8], path: Option<&str>| {
            let wanted = Interface {
                name: name.into(),
                ..Default::default()
            };
            super::find(&links, &wanted, Some(mac), path)
                .map(|link| link.index)
                .ok()
        };
        assert_eq!(find("eth0", &[2, 0, 0, 0, 0, 1], None), Some(3));
        assert_eq!(find("eth0", &[2, 0, 0, 0, 0, 9], None), Some(2));
        assert_eq!(find("eth0", &[0; 6], None), Some(2));
        assert_eq!(find("eth0", &[2, 0, 0, 0, 0, 7], Some("br0")), Some(4));
        assert_eq!(find("eth9", &[], None), None);
    }

    #[test]
    fn a_temporary_name_fits() {
        assert_eq!(temporary("eth0"), "eth0_temp");
        assert_eq!(temporary("fifteen-letters").len(), MAX_NAME);
    }
}
