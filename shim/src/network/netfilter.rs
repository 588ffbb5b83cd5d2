//! Rules of packet filters (nftables, iptables) in a network namespace: what the kernel has, and
//! the same as messages for the guest's kernel. All of it is for a thread in the namespace.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use guest_protocol::protocols::network::{IptablesTable, NftablesMessage};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

// linux/netfilter/nfnetlink.h and nf_tables.h.
const SUBSYSTEM: u16 = 10 << 8;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// A kind of object: the message that makes one, and the one that asks for all. The table's name
/// is attribute 1 of each.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    new: u16,
    get: u16,
    /// Its own name's attribute.
    named: u16,
    /// Attributes that say what it is; the others are its kernel's business.
    kept: &'static [u16],
}

const TABLES: Kind = Kind {
    name: "table",
    new: 0,
    get: 1,
    named: 1,
    // Name, flags, user data.
    kept: &[1, TABLE_FLAGS, 6],
};
const CHAINS: Kind = Kind {
    name: "chain",
    new: 3,
    get: 4,
    named: CHAIN_NAME,
    // Table, name, hook, policy, type, user data.
    kept: &[CHAIN_TABLE, CHAIN_NAME, 4, CHAIN_POLICY, 7, 12],
};
const OBJECTS: Kind = Kind {
    name: "object",
    new: 18,
    get: 19,
    named: 2,
    // Table, name, type, data, user data.
    kept: &[1, 2, 3, 4, 8],
};
const SETS: Kind = Kind {
    name: "set",
    new: 9,
    get: 10,
    named: 2,
    // All but its number for its maker and that of its kernel.
    kept: &[1, 2, SET_FLAGS, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18],
};
const ELEMENTS: Kind = Kind {
    name: "elements of set",
    new: 12,
    get: 13,
    named: 2,
    kept: &[1, 2, 3],
};
const RULES: Kind = Kind {
    name: "rule of chain",
    new: 6,
    get: 7,
    named: RULE_CHAIN,
    // Table, chain, expressions, user data.
    kept: &[RULE_TABLE, RULE_CHAIN, RULE_EXPRESSIONS, 7],
};
const GENERATION: Kind = Kind {
    name: "generation",
    new: 15,
    get: 16,
    named: 1,
    kept: &[],
};
const FLOWTABLES: Kind = Kind {
    name: "flowtable",
    new: 22,
    get: 23,
    named: 2,
    kept: &[],
};

const TABLE_FLAGS: u16 = 2;
pub const RULE_TABLE: u16 = 1;
pub const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_COMPAT: u16 = 5;
pub const CHAIN_TABLE: u16 = 1;
pub const CHAIN_NAME: u16 = 3;
pub const CHAIN_POLICY: u16 = 5;
const SET_FLAGS: u16 = 3;
const SET_ID: u16 = 10;
const NESTED: u16 = 1 << 15;

/// A table that is there and does nothing. The other flags bind it to the program that made it.
const DORMANT: u32 = 1;

/// A set whose name its kernel has chosen.
const ANONYMOUS: u32 = 1;

/// An object: its family of protocols, and its attributes.
pub type Object = (u8, Vec<u8>);

/// All chains of nftables.
///
/// # Errors
/// The kernel's answers cannot be read.
pub fn chains() -> io::Result<Vec<Object>> {
    dump(CHAINS, 0, &[])
}

/// All rules of nftables.
///
/// # Errors
/// As [`chains`].
pub fn rules() -> io::Result<Vec<Object>> {
    dump(RULES, 0, &[])
}

/// How often the rules of nftables have changed; none on a kernel without it.
///
/// # Errors
/// As [`chains`].
pub fn generation() -> io::Result<Option<u32>> {
    let found = ask(GENERATION, 0, &[], 0)?;
    Ok(found
        .first()
        .and_then(|(_, all)| big_endian(attribute(all, 1)?)))
}

/// What nftables has in the namespace, for another kernel.
///
/// # Errors
/// As [`chains`]; `Unsupported` names what cannot be had elsewhere.
pub fn carried() -> io::Result<Vec<NftablesMessage>> {
    let mut messages = Vec::new();
    if let Some((_, flowtable)) = dump(FLOWTABLES, 0, &[])?.first() {
        return Err(unsupported(&format!(
            "{} of nftables cannot be carried into a guest",
            what(FLOWTABLES, flowtable)
        )));
    }
    for kind in [TABLES, CHAINS, OBJECTS, SETS] {
        for object in dump(kind, 0, &[])? {
            let number = messages.len();
            messages.push(message(kind, &object, number)?);
            if kind.new == SETS.new {
                // The elements of one set at a time.
                let of_set = [kept(&object.1, &[1, 2])].concat();
                for elements in dump(ELEMENTS, object.0, &of_set)? {
                    messages.push(message(ELEMENTS, &elements, number)?);
                }
            }
        }
    }
    for rule in rules()? {
        messages.push(message(RULES, &rule, 0)?);
    }
    Ok(messages)
}

fn unsupported(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

fn what(kind: Kind, attributes: &[u8]) -> String {
    let own = text(attributes, kind.named).unwrap_or_default();
    let table = text(attributes, 1).unwrap_or_default();
    if kind.new == TABLES.new {
        return format!("nftables table {table}");
    }
    format!("nftables {} {own} of table {table}", kind.name)
}

/// The message that makes an object. `number` is unique among sets.
fn message(kind: Kind, (family, all): &Object, number: usize) -> io::Result<NftablesMessage> {
    let what = what(kind, all);
    let mut attributes = kept(all, kind.kept);
    match kind.new {
        new if new == TABLES.new => {
            let flags = attribute(all, TABLE_FLAGS)
                .and_then(big_endian)
                .unwrap_or(0);
            attributes = kept(&attributes, &without(kind.kept, TABLE_FLAGS));
            put(
                &mut attributes,
                TABLE_FLAGS,
                &(flags & DORMANT).to_be_bytes(),
            );
        }
        new if new == SETS.new => {
            // Rules find it by its name, which here is as good as any.
            let flags = attribute(all, SET_FLAGS).and_then(big_endian).unwrap_or(0);
            attributes = kept(&attributes, &without(kind.kept, SET_FLAGS));
            put(
                &mut attributes,
                SET_FLAGS,
                &(flags & !ANONYMOUS).to_be_bytes(),
            );
            let number = u32::try_from(number + 1).unwrap_or(u32::MAX);
            put(&mut attributes, SET_ID, &number.to_be_bytes());
        }
        new if new == RULES.new => {
            let expressions = expressions(all);
            if expressions.compares_links() {
                return Err(unsupported(&format!(
                    "{what} compares numbers of links, which are others in a guest"
                )));
            }
            if let Some(compat) = expressions.compat() {
                put(&mut attributes, RULE_COMPAT | NESTED, &compat);
            }
        }
        _ => {}
    }
    Ok(NftablesMessage {
        kind: kind.new.into(),
        family: u32::from(*family),
        attributes,
        what,
        ..Default::default()
    })
}

fn without(kinds: &[u16], one: u16) -> Vec<u16> {
    kinds.iter().copied().filter(|kind| *kind != one).collect()
}

/// The expressions of a rule: name and data.
struct Expressions<'a>(Vec<(&'a [u8], &'a [u8])>);

fn expressions(rule: &[u8]) -> Expressions<'_> {
    let list = attribute(rule, RULE_EXPRESSIONS).unwrap_or_default();
    let parsed = attributes(list).map(|(_, expression)| {
        let name = attribute(expression, 1).unwrap_or_default();
        let name = name.strip_suffix(b"\0").unwrap_or(name);
        (name, attribute(expression, 2).unwrap_or_default())
    });
    Expressions(parsed.collect())
}

impl Expressions<'_> {
    /// Whether a link is compared by its number; that of the loopback is the same everywhere.
    fn compares_links(&self) -> bool {
        // NFTA_META_KEY: NFT_META_IIF and NFT_META_OIF.
        let is_link = |(name, data): &(&[u8], &[u8])| {
            *name == b"meta" && matches!(attribute(data, 2).and_then(big_endian), Some(4 | 5))
        };
        self.0.iter().enumerate().any(|(place, expression)| {
            is_link(expression)
                && self.0.get(place + 1).and_then(compared) != Some(1_u32.to_ne_bytes().as_slice())
        })
    }

    /// What matches of xtables want to know of a rule beside their own part: the protocol that it
    /// is about (`NFTA_RULE_COMPAT`), which the kernel does not tell again.
    fn compat(&self) -> Option<Vec<u8>> {
        self.0
            .iter()
            .find(|(name, _)| matches!(*name, b"match" | b"target"))?;
        // NFT_META_L4PROTO, or the protocol's byte in an IPv4 header.
        let is_protocol = |(name, data): &(&[u8], &[u8])| {
            let number = |kind| attribute(data, kind).and_then(big_endian);
            match *name {
                b"meta" => number(2) == Some(16),
                b"payload" => (number(2), number(3), number(4)) == (Some(1), Some(9), Some(1)),
                _ => false,
            }
        };
        let place = self.0.iter().position(is_protocol)?;
        let compare = self.0.get(place + 1)?;
        let protocol = *compared(compare)?.first()?;
        // NFTA_CMP_OP: NFT_CMP_NEQ.
        let inverted = attribute(compare.1, 2).and_then(big_endian) == Some(1);
        let mut compat = Vec::new();
        put(&mut compat, 1, &u32::from(protocol).to_be_bytes());
        put(&mut compat, 2, &(u32::from(inverted) << 1).to_be_bytes());
        Some(compat)
    }
}

/// What an expression `cmp` compares with.
fn compared<'a>((name, data): &(&[u8], &'a [u8])) -> Option<&'a [u8]> {
    // NFTA_CMP_DATA, NFTA_DATA_VALUE.
    (*name == b"cmp").then(|| attribute(attribute(data, 3)?, 1))?
}

/// All objects of a kind; `only` are attributes that narrow the request.
fn dump(kind: Kind, family: u8, only: &[u8]) -> io::Result<Vec<Object>> {
    ask(kind, family, only, libc::NLM_F_DUMP)
}

fn ask(kind: Kind, family: u8, only: &[u8], flags: i32) -> io::Result<Vec<Object>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let mut request = Vec::new();
    request.extend(
        u32::try_from(20 + only.len())
            .unwrap_or(u32::MAX)
            .to_ne_bytes(),
    );
    request.extend((SUBSYSTEM | kind.get).to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    request.extend([0; 8]);
    // struct nfgenmsg; family 0 is every one.
    request.extend([family, 0, 0, 0]);
    request.extend(only);
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((header, _)) = rest.split_first_chunk::<16>() {
            let size = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let Some(message) = rest.get(16..size) else {
                return Err(io::Error::other("a message of nfnetlink is cut off"));
            };
            match u16::from_ne_bytes([header[4], header[5]]) {
                DONE => {
                    let code = message
                        .first_chunk::<4>()
                        .map_or(0, |code| i32::from_ne_bytes(*code));
                    return match code {
                        0 => Ok(found),
                        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                    };
                }
                ERROR => {
                    let errno = message
                        .first_chunk::<4>()
                        .map_or(0, |code| -i32::from_ne_bytes(*code));
                    return match errno {
                        0 => Ok(found),
                        // A kernel without nftables, or without this kind, has none of it.
                        libc::ENOENT | libc::EOPNOTSUPP | libc::EINVAL if found.is_empty() => {
                            Ok(found)
                        }
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                answer if answer == SUBSYSTEM | kind.new => {
                    if let Some((of, attributes)) = message.split_first_chunk::<4>() {
                        found.push((of[0], attributes.to_owned()));
                    }
                }
                _ => {}
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        if flags & libc::NLM_F_DUMP == 0 {
            return Ok(found);
        }
    }
}

/// The attributes in `rest`; they end at the first one that is not whole.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = rest.split_first_chunk::<4>()?;
        let size = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = rest.get(4..size)?;
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([header[2], header[3]]), value))
    })
}

/// The upper two bits of a kind say how the value is encoded.
const KIND: u16 = 0x3fff;

/// The value of the first attribute of a kind.
pub fn attribute(all: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(all)
        .find(|(kind, _)| kind & KIND == wanted)
        .map(|(_, value)| value)
}

/// The same as text.
pub fn text(all: &[u8], wanted: u16) -> Option<String> {
    let value = attribute(all, wanted)?;
    Some(String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned())
}

fn big_endian(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// Those attributes of some kinds, in their order.
fn kept(all: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(all.len());
    for (kind, value) in attributes(all).filter(|(kind, _)| kinds.contains(&(kind & KIND))) {
        put(&mut kept, kind, value);
    }
    kept
}

fn put(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// A table of the old iptables.
#[derive(Debug)]
pub struct Table {
    pub name: String,
    pub v6: bool,
    pub info: Info,
    pub entries: Vec<u8>,
}

/// struct ipt_getinfo of linux/netfilter_ipv4/ip_tables.h; ip6t_getinfo is the same.
#[repr(C)]
#[derive(Debug)]
pub struct Info {
    pub name: [u8; 32],
    pub hooks: u32,
    pub entries_of_hooks: [u32; 5],
    pub policies: [u32; 5],
    pub entries: u32,
    pub size: u32,
}

const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// Where a verdict "accept" is: in a struct ipt_entry and ip6t_entry, and its standard target.
const ACCEPT: i32 = -2;

/// The tables of the old iptables that the namespace has.
///
/// # Errors
/// The kernel's answers cannot be read.
pub fn old_tables() -> io::Result<Vec<Table>> {
    let mut tables = Vec::new();
    for (file, v6) in [("ip_tables_names", false), ("ip6_tables_names", true)] {
        // No such file: this kernel has no iptables of the old kind.
        let names = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        for name in names.lines() {
            tables.push(Table::read(name, v6)?);
        }
    }
    Ok(tables)
}

impl Table {
    fn read(table: &str, v6: bool) -> io::Result<Table> {
        let (family, level) = if v6 {
            (AddressFamily::Inet6, libc::IPPROTO_IPV6)
        } else {
            (AddressFamily::Inet, libc::IPPROTO_IP)
        };
        let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut info = Info {
            name: [0; 32],
            hooks: 0,
            entries_of_hooks: [0; 5],
            policies: [0; 5],
            entries: 0,
            size: 0,
        };
        let name = table.as_bytes().get(..31).unwrap_or(table.as_bytes());
        info.name[..name.len()].copy_from_slice(name);
        // SAFETY: an Info is integers, which any bytes may be, without padding.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut((&raw mut info).cast::<u8>(), size_of::<Info>())
        };
        get(&socket, level, GET_INFO, bytes)?;
        // struct ipt_get_entries: name, size, and the entries at a multiple of eight.
        const HEAD: usize = 40;
        let size = usize::try_from(info.size).map_err(io::Error::other)?;
        let mut entries = vec![0; HEAD + size];
        entries[..32].copy_from_slice(&info.name);
        entries[32..36].copy_from_slice(&info.size.to_ne_bytes());
        get(&socket, level, GET_ENTRIES, &mut entries)?;
        Ok(Table {
            name: table.to_owned(),
            v6,
            info,
            entries: entries.split_off(HEAD),
        })
    }

    /// Whether there is anything but chains of the kernel's that accept.
    pub fn has_rules(&self) -> bool {
        // struct ipt_entry and ip6t_entry, then struct xt_standard_target.
        let verdict = if self.v6 { 168 } else { 112 } + 32;
        let accepts = |hook: usize| {
            let at = self.info.policies[hook] as usize + verdict;
            let word = self.entries.get(at..at + 4);
            word.and_then(|word| word.try_into().ok())
                .map(i32::from_ne_bytes)
                == Some(ACCEPT)
        };
        let hooks = (0..5).filter(|hook| self.info.hooks & (1 << hook) != 0);
        self.info.entries > self.info.hooks.count_ones() + 1 || !hooks.clone().all(accepts)
    }

    /// The same for another kernel, without what it has counted: that would be a change each time.
    pub fn into_message(mut self) -> IptablesTable {
        // struct ipt_entry and ip6t_entry: the offset of the next one, and the counters.
        let (next, counters) = if self.v6 { (142, 152) } else { (90, 96) };
        let mut at = 0;
        while let Some(length) = self.entries.get(at + next..at + next + 2) {
            let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
            if let Some(counted) = self.entries.get_mut(at + counters..at + counters + 16) {
                counted.fill(0);
            }
            if length == 0 {
                break;
            }
            at += length;
        }
        IptablesTable {
            name: self.name,
            ipv6: self.v6,
            valid_hooks: self.info.hooks,
            hook_entries: self.info.entries_of_hooks.to_vec(),
            underflows: self.info.policies.to_vec(),
            entry_count: self.info.entries,
            entries: self.entries,
            ..Default::default()
        }
    }
}

fn get(socket: &OwnedFd, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `length` bytes of a buffer of that size.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(got).map(drop).map_err(io::Error::from)
}
