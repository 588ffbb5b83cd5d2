//! The network as the host has it: messages of the host's rtnetlink, given to the guest's kernel
//! with the guest's numbers of links. What is set here and asked for no longer goes again; what
//! containers have set stays.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path};

use guest_protocol::protocols::network::{NetworkLink, NetworkState};

use super::link::{self, Link};
use super::netfilter;
use super::netlink::{Message, Netlink, attribute, attributes, number16, number32};
use super::{PUT, ip_of, open};
use crate::error::{Context, Error, Result};
use crate::log::log;

/// The loopback's number, in every namespace.
const LOOPBACK: u32 = 1;

/// What is written first: it resets others.
const FORWARDING: &str = "ipv4/ip_forward";

// linux/rtnetlink.h and linux/fib_rules.h
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const IFLA_LINK: u16 = 5;
const RTNEXTHOP: usize = 8;
const RTNH_F_ONLINK: u32 = 4;

/// What there can be any number of, each a message that adds it and one that removes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Address,
    Neighbour,
    Route,
    Rule,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Address => "address",
            Kind::Neighbour => "neighbour",
            Kind::Route => "route",
            Kind::Rule => "rule of routing",
        }
    }

    /// The numbers of both messages, and the flags of the first.
    fn messages(self) -> (u16, u16, i32) {
        match self {
            Kind::Address => (libc::RTM_NEWADDR, libc::RTM_DELADDR, PUT),
            Kind::Neighbour => (libc::RTM_NEWNEIGH, libc::RTM_DELNEIGH, PUT),
            // Routes may differ in their next hop alone.
            Kind::Route => (
                libc::RTM_NEWROUTE,
                libc::RTM_DELROUTE,
                libc::NLM_F_CREATE | libc::NLM_F_APPEND,
            ),
            Kind::Rule => (
                libc::RTM_NEWRULE,
                libc::RTM_DELRULE,
                libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            ),
        }
    }

    /// Bytes of the fixed part, and the attribute that says best which one it is.
    fn shape(self) -> (usize, u16) {
        match self {
            Kind::Address => (8, libc::IFA_ADDRESS),
            Kind::Neighbour => (12, super::NDA_DST),
            Kind::Route => (12, libc::RTA_DST),
            // FRA_SRC
            Kind::Rule => (12, 2),
        }
    }

    /// The message with the guest's numbers of links. None: it is about a link that the guest has
    /// not, or no such message.
    fn translate(self, bytes: &[u8], numbers: &HashMap<u32, u32>) -> Option<Vec<u8>> {
        let mut message = bytes.to_owned();
        match self {
            Kind::Address | Kind::Neighbour => {
                let number = numbers.get(&number32(bytes, 4)?)?;
                message
                    .get_mut(4..8)?
                    .copy_from_slice(&number.to_ne_bytes());
            }
            Kind::Route => {
                message.truncate(self.shape().0);
                for (kind, value) in attributes(bytes.get(self.shape().0..)?) {
                    let value = match kind {
                        RTA_OIF | RTA_IIF => {
                            numbers.get(&number32(value, 0)?)?.to_ne_bytes().to_vec()
                        }
                        RTA_MULTIPATH => next_hops(value, numbers)?,
                        _ => value.to_owned(),
                    };
                    message.extend(attribute(kind, &value));
                }
            }
            // Its links are names.
            Kind::Rule => {}
        }
        (message.len() >= self.shape().0).then_some(message)
    }

    /// As a user would call it.
    fn describe(self, message: &[u8]) -> String {
        let (fixed, key) = self.shape();
        let mut found = attributes(message.get(fixed..).unwrap_or_default());
        let ip = found.find(|(kind, _)| *kind == key);
        let ip = ip.and_then(|(_, value)| ip_of(value));
        let length = message.get(1).copied().unwrap_or_default();
        match (self, ip) {
            (Kind::Neighbour, Some(ip)) => format!("{} {ip}", self.name()),
            (Kind::Rule, Some(ip)) => format!("{} from {ip}", self.name()),
            (_, Some(ip)) => format!("{} {ip}/{length}", self.name()),
            (Kind::Route, None) => "default route".to_owned(),
            (_, None) => self.name().to_owned(),
        }
    }
}

/// The next hops of a route, `struct rtnexthop` each.
fn next_hops(mut bytes: &[u8], numbers: &HashMap<u32, u32>) -> Option<Vec<u8>> {
    let mut translated = Vec::with_capacity(bytes.len());
    while !bytes.is_empty() {
        let length = usize::from(number16(bytes, 0)?);
        let hop = bytes.get(..length).filter(|hop| hop.len() >= RTNEXTHOP)?;
        let number = numbers.get(&number32(hop, 4)?)?;
        translated.extend(&hop[..4]);
        translated.extend(number.to_ne_bytes());
        translated.extend(&hop[RTNEXTHOP..]);
        let whole = length.next_multiple_of(4);
        translated.resize(translated.len() + whole - length, 0);
        bytes = bytes.get(whole..).unwrap_or_default();
    }
    Some(translated)
}

/// What the host has asked for and the guest has.
#[derive(Debug, Default)]
pub struct Mirror {
    links: HashMap<String, NetworkLink>,
    /// In the order in which they are set: routes need the addresses that their gateways are in.
    lists: [Vec<Vec<u8>>; 4],
    sysctls: BTreeMap<String, String>,
    /// A link has lost what the kernel drops with it, and the lists are not through since.
    renewed: bool,
    filter: netfilter::Filter,
}

const KINDS: [Kind; 4] = [Kind::Address, Kind::Neighbour, Kind::Route, Kind::Rule];

impl Mirror {
    /// Makes the network what the host asks for, in an order in which no step needs a later one.
    ///
    /// # Errors
    /// What the kernel refuses. What came before it is set, and the next call goes on from there.
    pub fn set(&mut self, state: &NetworkState) -> Result<()> {
        let netlink = open()?;
        self.set_links(&netlink, &state.links)?;
        self.set_sysctls(&state.sysctls);
        let numbers = numbers(&netlink, &state.links)?;
        let asked = [
            &state.addresses,
            &state.neighbours,
            &state.routes,
            &state.rules,
        ];
        let mut forgotten = self.renewed;
        for ((kind, asked), has) in KINDS.into_iter().zip(asked).zip(&mut self.lists) {
            let wanted: Vec<Vec<u8>> = asked
                .iter()
                .filter_map(|message| kind.translate(message, &numbers))
                .collect();
            if forgotten {
                // The kernel has dropped what depended on a link or an address.
                has.retain(|message| !wanted.contains(message));
            }
            forgotten |= change(&netlink, kind, has, &wanted)?;
        }
        self.renewed = false;
        self.filter.set(&state.nftables, &state.iptables)
    }

    /// Makes links that are no cards, and brings links up and down. One that is new or has changed
    /// has lost routes, addresses and sysctls.
    fn set_links(&mut self, netlink: &Netlink, links: &[NetworkLink]) -> Result<()> {
        for link in links {
            let known = self.links.get(&link.name);
            if known == Some(link) {
                continue;
            }
            let there = link::all(netlink)?;
            let found = there.iter().find(|other| other.name == link.name);
            if found.is_none() && !link.make.is_empty() {
                let message = made(&link.make, &numbers(netlink, links)?);
                let message = message.ok_or_else(|| {
                    Error::Invalid(format!("no message that makes a link: {}", link.name))
                })?;
                let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
                netlink
                    .request(Message::new(libc::RTM_NEWLINK, flags, &message))
                    .context(|| format!("make the link {}", link.name))?;
            }
            let number = match found {
                Some(found) => found.index,
                None => link::index_of(&link::all(netlink)?, &link.name)?,
            };
            link::set_up(netlink, number, link.up)
                .context(|| format!("bring {} up or down", link.name))?;
            self.links.insert(link.name.clone(), link.clone());
            self.renewed = true;
            let own = format!("/conf/{}/", link.name);
            self.sysctls.retain(|name, _| !name.contains(&own));
        }
        self.links.retain(|name, link| {
            let stays = links.iter().any(|wanted| wanted.name == *name);
            if !stays && !link.make.is_empty() {
                let removed = link::all(netlink)
                    .and_then(|there| link::index_of(&there, name))
                    .and_then(|number| {
                        link::remove(netlink, number).context(|| format!("remove the link {name}"))
                    });
                removed.unwrap_or_else(|error| log!("{error}"));
            }
            stays
        });
        Ok(())
    }

    /// Writes those that have changed. One that this kernel has not, or does not take, is left.
    fn set_sysctls(&mut self, wanted: &HashMap<String, String>) {
        self.sysctls.retain(|name, _| wanted.contains_key(name));
        let changed: BTreeMap<_, _> = wanted
            .iter()
            .filter(|(name, value)| self.sysctls.get(*name) != Some(*value))
            .collect();
        let first = changed.get_key_value(&FORWARDING.to_owned());
        let others = changed
            .iter()
            .filter(|(name, _)| name.as_str() != FORWARDING);
        for (name, value) in first.into_iter().chain(others) {
            let path = Path::new("/proc/sys/net").join(name.as_str());
            let mut parts = Path::new(name.as_str()).components();
            let written = if parts.all(|part| matches!(part, Component::Normal(_))) {
                fs::write(&path, value.as_bytes())
            } else {
                Err(std::io::ErrorKind::InvalidInput.into())
            };
            if let Err(error) = written {
                log!("net/{name} stays as it is, not {value:?}: {error}");
            }
            self.sysctls.insert((*name).clone(), (*value).clone());
        }
    }
}

/// The guest's numbers of links by the host's.
fn numbers(netlink: &Netlink, links: &[NetworkLink]) -> Result<HashMap<u32, u32>> {
    let there: Vec<Link> = link::all(netlink)?;
    let pairs = links.iter().filter_map(|link| {
        let found = there.iter().find(|other| other.name == link.name)?;
        Some((link.index, found.index))
    });
    Ok(pairs.chain([(LOOPBACK, LOOPBACK)]).collect())
}

/// The message that makes a link, with the guest's number of the one that it stands on.
fn made(bytes: &[u8], numbers: &HashMap<u32, u32>) -> Option<Vec<u8>> {
    let mut message = bytes.get(..link::IFINFOMSG)?.to_owned();
    for (kind, value) in attributes(bytes.get(link::IFINFOMSG..)?) {
        let value = match kind {
            IFLA_LINK => numbers.get(&number32(value, 0)?)?.to_ne_bytes().to_vec(),
            _ => value.to_owned(),
        };
        message.extend(attribute(kind, &value));
    }
    Some(message)
}

/// Makes a list what is wanted. Says whether anything of it was removed.
fn change(
    netlink: &Netlink,
    kind: Kind,
    has: &mut Vec<Vec<u8>>,
    wanted: &[Vec<u8>],
) -> Result<bool> {
    let (new, del, flags) = kind.messages();
    let mut removed = false;
    let mut remove_gone = |has: &mut Vec<Vec<u8>>| {
        has.retain(|message| {
            let stays = wanted.contains(message);
            if !stays {
                removed = true;
                // It may have gone with what it depended on.
                let _ = netlink.request(Message::new(del, 0, message));
            }
            stays
        });
    };
    // Of two addresses in one network the order counts, and one with another prefix is in the way;
    // a route that is replaced should not be missing in between.
    if kind == Kind::Address {
        remove_gone(has);
    }
    let mut missing: Vec<&Vec<u8>> = wanted.iter().filter(|one| !has.contains(one)).collect();
    let mut last = false;
    while !missing.is_empty() {
        let (before, mut first) = (missing.len(), Ok(()));
        missing.retain(|message| {
            let request = |message: &[u8]| netlink.request(Message::new(new, flags, message));
            let set = match request(message) {
                // The way to the gateway has been taken away since, as the CNI plug-in `ptp` does.
                Err(error) if kind == Kind::Route && is_unreachable(&error) && last => {
                    request(&on_link(message)).map_err(|_| error)
                }
                set => set,
            };
            let set = set.map(|_| ()).or_else(|error| refusal(error, message));
            let set = set.context(|| format!("set {}", kind.describe(message)));
            if set.is_ok() {
                has.push((*message).clone());
                return false;
            }
            if first.is_ok() {
                first = set;
            }
            true
        });
        // A route may lead to a gateway that a later one of the list leads to.
        if missing.len() == before {
            if last {
                first?;
            }
            last = true;
        }
    }
    remove_gone(has);
    Ok(removed)
}

fn is_unreachable(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH)
    )
}

/// The same route, for a gateway that is taken for a neighbour.
fn on_link(message: &[u8]) -> Vec<u8> {
    let fixed = Kind::Route.shape().0;
    let mut changed = message[..fixed].to_vec();
    changed[8..].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    for (kind, value) in attributes(&message[fixed..]) {
        let mut value = value.to_owned();
        if kind == RTA_MULTIPATH {
            let mut at = 0;
            while let Some(length) = number16(&value, at).filter(|length| *length > 0) {
                if let Some(flags) = value.get_mut(at + 2) {
                    *flags |= RTNH_F_ONLINK as u8;
                }
                at += usize::from(length).next_multiple_of(4);
            }
        }
        changed.extend(attribute(kind, &value));
    }
    changed
}

/// The error, if the kernel has not already what was asked for, or could not have it at all.
fn refusal(error: std::io::Error, message: &[u8]) -> std::io::Result<()> {
    let v6 = message.first().map(|family| i32::from(*family)) == Some(libc::AF_INET6);
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(()),
        // The administrator of the guest's kernel has turned IPv6 off.
        Some(libc::EACCES | libc::EAFNOSUPPORT | libc::EOPNOTSUPP) if v6 => {
            log!("IPv6 is off: {error}");
            Ok(())
        }
        _ => Err(error),
    }
}
