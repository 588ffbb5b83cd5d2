//! Rules of packet filters as the host's kernel has them: nf_tables by one transaction, the old
//! tables of iptables as one block each.

use std::io;
use std::os::fd::AsRawFd;

use guest_protocol::protocols::network::{IptablesTable, NftablesMessage};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::netlink::{attribute, attributes, number32};
use crate::deadlines::NETLINK_ANSWER;
use crate::error::{Context, Result};

// linux/netfilter/nfnetlink.h and nf_tables.h
const SUBSYSTEM: u8 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u32 = 0;
const DELETE_TABLE: u32 = 2;
const TABLE_NAME: u16 = 1;
/// Of a netlink header and a struct nfgenmsg.
const HEADER: usize = 20;

// linux/netfilter_ipv4/ip_tables.h, and the same numbers for IPv6.
const SET_REPLACE: i32 = 64;
const GET_INFO: i32 = 64;
const NAME: usize = 32;
const HOOKS: usize = 5;
/// Bytes of a `struct xt_counters`.
const COUNTERS: usize = 16;

/// What the host has asked for and the guest has.
#[derive(Debug, Default)]
pub struct Filter {
    nftables: Vec<NftablesMessage>,
    iptables: Vec<IptablesTable>,
}

impl Filter {
    /// Replaces the rules by these, if they are others.
    ///
    /// # Errors
    /// The first that this kernel does not take, in the host's words; of nf_tables none is set
    /// then.
    pub fn set(&mut self, nftables: &[NftablesMessage], iptables: &[IptablesTable]) -> Result<()> {
        if self.nftables != nftables {
            self.replace(nftables)?;
            nftables.clone_into(&mut self.nftables);
        }
        if self.iptables != iptables {
            for table in iptables {
                let family = if table.ipv6 { "ip6tables" } else { "iptables" };
                set_table(table).context(|| format!("set table {} of {family}", table.name))?;
            }
            iptables.clone_into(&mut self.iptables);
        }
        Ok(())
    }

    /// Replaces the tables that have changed, in one transaction: the guest is never without the
    /// old ones before it has the new ones.
    fn replace(&self, new: &[NftablesMessage]) -> Result<()> {
        let has_changed = |one: &NftablesMessage| {
            let of_table = |all: &[NftablesMessage]| {
                let same = all.iter().filter(|other| table_of(other) == table_of(one));
                same.cloned().collect::<Vec<_>>()
            };
            of_table(&self.nftables) != of_table(new)
        };
        let gone = self.nftables.iter().filter(|one| one.kind == NEW_TABLE);
        let gone = gone.filter(|table| has_changed(table)).flat_map(|table| {
            let named = table_of(table).1;
            let message = |kind| NftablesMessage {
                kind,
                family: table.family,
                attributes: attribute(TABLE_NAME, &named),
                what: format!("the removal of {}", table.what),
                ..Default::default()
            };
            // A container may have removed it, and what is not there cannot be.
            [message(NEW_TABLE), message(DELETE_TABLE)]
        });
        let come = new.iter().filter(|one| has_changed(one)).cloned();
        let all: Vec<NftablesMessage> = gone.chain(come).collect();
        if all.is_empty() {
            return Ok(());
        }
        let refused = transaction(&all).context(|| "set the rules of nf_tables".into())?;
        match refused {
            None => Ok(()),
            Some((index, error)) => {
                let what = all.get(index).map(|one| one.what.clone());
                Err(error).context(|| format!("set {}", what.unwrap_or_default()))
            }
        }
    }
}

/// The table that a message is about: the first attribute of each kind is its name.
fn table_of(message: &NftablesMessage) -> (u32, Vec<u8>) {
    let name = attributes(&message.attributes).find(|(kind, _)| *kind == TABLE_NAME);
    (
        message.family,
        name.map(|(_, name)| name.to_owned()).unwrap_or_default(),
    )
}

/// Sends all of it at once. The kernel's refusal names one by its place.
fn transaction(messages: &[NftablesMessage]) -> io::Result<Option<(usize, io::Error)>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let deadline = i64::try_from(NETLINK_ANSWER.as_millis()).unwrap_or(i64::MAX);
    setsockopt(
        &socket,
        sockopt::ReceiveTimeout,
        &TimeVal::milliseconds(deadline),
    )?;
    let last = messages.len();
    let mut batch = Vec::new();
    put(&mut batch, (BATCH_BEGIN, 0), 0, 0, &[]);
    for (index, message) in messages.iter().enumerate() {
        let kind = u16::from(SUBSYSTEM) << 8 | message.kind as u16 & 0xff;
        let ack = if index + 1 == last {
            libc::NLM_F_ACK
        } else {
            0
        };
        // Rules are kept in the order of the messages.
        let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND | ack;
        let family = u8::try_from(message.family).unwrap_or_default();
        put(
            &mut batch,
            (kind, flags),
            index + 1,
            family,
            &message.attributes,
        );
    }
    put(&mut batch, (BATCH_END, 0), last + 1, 0, &[]);
    // One message of any length, as far as root may.
    setsockopt(
        &socket,
        sockopt::SndBufForce,
        &(batch.len() * 2).max(1 << 18),
    )?;
    send(socket.as_raw_fd(), &batch, MsgFlags::empty())?;
    let mut buffer = vec![0; 32 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(size) = number32(rest, 0) {
            let size = (size as usize).max(16);
            if let (Some(place), Some(error)) = (number32(rest, 8), number32(rest, 16)) {
                let index = (place as usize).saturating_sub(1);
                match error.cast_signed() {
                    0 if index + 1 == last => return Ok(None),
                    0 => {}
                    error => {
                        let error = Errno::from_raw(error.saturating_neg());
                        return Ok(Some((index, error.into())));
                    }
                }
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// Adds a message of nfnetlink.
fn put(batch: &mut Vec<u8>, (kind, flags): (u16, i32), place: usize, family: u8, rest: &[u8]) {
    let length = u32::try_from(HEADER + rest.len()).unwrap_or(u32::MAX);
    let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or_default();
    batch.extend(length.to_ne_bytes());
    batch.extend(kind.to_ne_bytes());
    batch.extend(flags.to_ne_bytes());
    batch.extend(u32::try_from(place).unwrap_or_default().to_ne_bytes());
    batch.extend([0; 4]);
    // struct nfgenmsg: the subsystem is for the messages that frame the others.
    batch.extend([family, 0, 0, SUBSYSTEM]);
    batch.extend(rest);
    batch.resize(batch.len().next_multiple_of(4), 0);
}

/// Replaces a table of iptables.
fn set_table(table: &IptablesTable) -> io::Result<()> {
    let hooks = |list: &[u32]| <[u32; HOOKS]>::try_from(list).ok();
    let (entries, underflows) = hooks(&table.hook_entries)
        .zip(hooks(&table.underflows))
        .filter(|_| table.name.len() < NAME)
        .ok_or_else(|| io::Error::other("the host's message is no table of iptables"))?;
    let (family, level) = if table.ipv6 {
        (AddressFamily::Inet6, libc::IPPROTO_IPV6)
    } else {
        (AddressFamily::Inet, libc::IPPROTO_IP)
    };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut name = [0; NAME];
    name[..table.name.len()].copy_from_slice(table.name.as_bytes());
    // struct ipt_getinfo: name, hooks, entries, underflows, number of entries, size.
    let mut info = [0_u8; NAME + 4 + 4 * HOOKS * 2 + 8];
    info[..NAME].copy_from_slice(&name);
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into a buffer of that size.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(got)?;
    let old = number32(&info, NAME + 4 + 4 * HOOKS * 2).unwrap_or_default();
    let mut counters = vec![0_u8; old as usize * COUNTERS];
    // struct ipt_replace
    let mut replace = name.to_vec();
    replace.extend(table.valid_hooks.to_ne_bytes());
    replace.extend(table.entry_count.to_ne_bytes());
    let size = u32::try_from(table.entries.len()).unwrap_or(u32::MAX);
    replace.extend(size.to_ne_bytes());
    for number in entries.into_iter().chain(underflows).chain([old]) {
        replace.extend(number.to_ne_bytes());
    }
    // The kernel writes the old counters there.
    replace.extend((counters.as_mut_ptr() as usize).to_ne_bytes());
    replace.extend(&table.entries);
    // SAFETY: the kernel reads `replace`, whose pointer leads to room for the counters of as many
    // entries as the structure says; both live until the call is over.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            SET_REPLACE,
            replace.as_ptr().cast(),
            replace.len() as libc::socklen_t,
        )
    };
    Errno::result(set)?;
    Ok(())
}
