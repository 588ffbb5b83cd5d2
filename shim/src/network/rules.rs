//! Rules of a packet filter (nftables, iptables) that somebody has put into a pod's network
//! namespace: meshes and policy agents do. They do not bind a guest, whose packets pass below them,
//! so whoever made them must be told.
//!
//! docker's rules for its DNS server on 127.0.0.11 are let pass: they concern loopback only, which
//! the guest has itself.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// Chains that docker makes for its DNS.
const DOCKER: [&str; 2] = ["DOCKER_OUTPUT", "DOCKER_POSTROUTING"];

/// Chains of the kernel's hooks that docker's are called from, once each.
const CALLERS: [&str; 2] = ["OUTPUT", "POSTROUTING"];

// linux/netfilter/nfnetlink.h and nf_tables.h.
const SUBSYSTEM: u16 = 10 << 8;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const GET_RULE: u16 = SUBSYSTEM | 7;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_POLICY: u16 = 5;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// A table and a chain.
type Place = (String, String);

/// The first rule that would bind the pod's packets in the calling thread's namespace, in words.
///
/// # Errors
/// The kernel's answers cannot be read.
pub fn first() -> io::Result<Option<String>> {
    if let Some(found) = nftables()? {
        return Ok(Some(found));
    }
    for (file, family, level) in [
        ("ip_tables_names", AddressFamily::Inet, libc::IPPROTO_IP),
        ("ip6_tables_names", AddressFamily::Inet6, libc::IPPROTO_IPV6),
    ] {
        // No such file: this kernel has no iptables of the old kind.
        let tables =
            fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        for table in tables.lines() {
            let legacy = Legacy::read(table, family, level)?;
            if legacy.binds() {
                return Ok(Some(format!("iptables table {table} ({family:?})")));
            }
        }
    }
    Ok(None)
}

fn nftables() -> io::Result<Option<String>> {
    let rules = dump(GET_RULE, NEW_RULE, |attributes| {
        Some((text(attributes, RULE_TABLE)?, text(attributes, RULE_CHAIN)?))
    })?;
    let chains = dump(GET_CHAIN, NEW_CHAIN, |attributes| {
        // NF_DROP is 0.
        let drops = attribute(attributes, CHAIN_POLICY)? == [0; 4];
        drops.then_some((
            text(attributes, CHAIN_TABLE)?,
            text(attributes, CHAIN_NAME)?,
        ))
    })?;
    if let Some((table, chain)) = chains.first() {
        return Ok(Some(format!(
            "nftables chain {chain} of table {table}, which drops by default"
        )));
    }
    Ok(binding(&rules).map(|(table, chain)| format!("nftables chain {chain} of table {table}")))
}

/// The first rule that is not one of docker's.
fn binding(rules: &[Place]) -> Option<&Place> {
    let is_dockers = |(_, chain): &Place| DOCKER.contains(&chain.as_str());
    let has_docker = rules.iter().any(is_dockers);
    let calls = |place: &Place| {
        let same = rules.iter().filter(|other| *other == place).count();
        has_docker && place.0 == "nat" && CALLERS.contains(&place.1.as_str()) && same == 1
    };
    rules.iter().find(|rule| !is_dockers(rule) && !calls(rule))
}

/// Asks for all objects of a kind and takes what `read` makes of their attributes.
fn dump(get: u16, new: u16, read: impl Fn(&[u8]) -> Option<Place>) -> io::Result<Vec<Place>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let mut request = Vec::new();
    request.extend(20_u32.to_ne_bytes());
    request.extend(get.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.extend([0; 8]);
    // struct nfgenmsg: every family.
    request.extend([0; 4]);
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
                DONE => return Ok(found),
                ERROR => {
                    let errno = message
                        .first_chunk::<4>()
                        .map_or(0, |code| -i32::from_ne_bytes(*code));
                    return match errno {
                        // A kernel without nftables has no rules of it.
                        0 | libc::ENOENT | libc::EOPNOTSUPP | libc::EINVAL => Ok(found),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                kind if kind == new => found.extend(message.get(4..).and_then(&read)),
                _ => {}
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    // The upper two bits say how the value is encoded.
    const KIND: u16 = 0x3fff;
    while let Some((header, _)) = rest.split_first_chunk::<4>() {
        let size = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = rest.get(4..size)?;
        if u16::from_ne_bytes([header[2], header[3]]) & KIND == wanted {
            return Some(value);
        }
        rest = rest.get(size.next_multiple_of(4)..)?;
    }
    None
}

fn text(attributes: &[u8], wanted: u16) -> Option<String> {
    let value = attribute(attributes, wanted)?;
    Some(String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned())
}

/// A table of the old iptables.
#[derive(Debug)]
struct Legacy {
    /// Entries beside one for each hook and the last one.
    entries: u32,
    /// Names of chains that are not the kernel's.
    chains: Vec<String>,
    /// Whether what no rule decides is dropped.
    drops: bool,
}

/// struct ipt_getinfo of linux/netfilter_ipv4/ip_tables.h; ip6t_getinfo is the same.
#[repr(C)]
struct Info {
    name: [u8; 32],
    hooks: u32,
    entries_of_hooks: [u32; 5],
    policies: [u32; 5],
    entries: u32,
    size: u32,
}

const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// Entries that docker's DNS makes: two chains with two rules, a head and an end each, and two
/// calls.
const DOCKER_ENTRIES: u32 = 10;
/// -NF_DROP - 1.
const DROP: i32 = -1;

impl Legacy {
    fn read(table: &str, family: AddressFamily, level: libc::c_int) -> io::Result<Legacy> {
        // SAFETY: socket(2) with integers only.
        let fd = unsafe {
            libc::socket(
                family as i32,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::IPPROTO_RAW,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
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
        let mut length = size_of::<Info>() as libc::socklen_t;
        // SAFETY: the kernel reads and writes an Info of the given length.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                GET_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        // struct ipt_get_entries: name, size, and the entries at a multiple of eight.
        const HEAD: usize = 40;
        let size = usize::try_from(info.size).map_err(io::Error::other)?;
        let mut blob = vec![0_u64; (HEAD + size).div_ceil(8)];
        let bytes: &mut [u8] =
            // SAFETY: the bytes of a vector of integers, which any bytes may be.
            unsafe { std::slice::from_raw_parts_mut(blob.as_mut_ptr().cast(), HEAD + size) };
        bytes[..32].copy_from_slice(&info.name);
        bytes[32..36].copy_from_slice(&info.size.to_ne_bytes());
        let mut length = (HEAD + size) as libc::socklen_t;
        // SAFETY: the kernel reads and writes so many bytes.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                GET_ENTRIES,
                bytes.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        // Where struct ipt_entry and ip6t_entry have the offsets of their target and of the next
        // entry.
        let offsets = if family == AddressFamily::Inet {
            88
        } else {
            140
        };
        Ok(Legacy::parse(&info, &bytes[HEAD..], offsets))
    }

    fn parse(info: &Info, entries: &[u8], offsets: usize) -> Legacy {
        let half = |at: usize| {
            entries
                .get(at..at + 2)
                .map(|two| usize::from(u16::from_ne_bytes([two[0], two[1]])))
        };
        let target = |entry: usize| Some(entry + half(entry + offsets)?);
        let word = |at: usize| {
            entries
                .get(at..at + 4)
                .and_then(|four| four.try_into().ok())
                .map(i32::from_ne_bytes)
        };
        let string = |at: usize, most: usize| {
            let bytes = entries
                .get(at..at + most)?
                .split(|byte| *byte == 0)
                .next()?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        // struct xt_entry_target: size, name of 29 bytes, revision; then what the target itself
        // has.
        let drops = (0..5)
            .filter(|hook| info.hooks & (1 << hook) != 0)
            .any(|hook| {
                let verdict =
                    target(info.policies[hook] as usize).and_then(|target| word(target + 32));
                verdict == Some(DROP)
            });
        let mut chains = Vec::new();
        let mut entry = 0;
        while let Some(next) = half(entry + offsets + 2).filter(|next| *next > 0) {
            if let Some(target) = target(entry)
                && string(target + 2, 29).as_deref() == Some("ERROR")
            {
                chains.extend(string(target + 32, 30));
            }
            entry += next;
        }
        // The last one of all is an error too.
        chains.pop();
        let own = info.hooks.count_ones() + 1;
        Legacy {
            entries: info.entries.saturating_sub(own),
            chains,
            drops,
        }
    }

    fn binds(&self) -> bool {
        let is_dockers = !self.chains.is_empty()
            && self
                .chains
                .iter()
                .all(|chain| DOCKER.contains(&chain.as_str()));
        self.drops || (self.entries > 0 && !(is_dockers && self.entries <= DOCKER_ENTRIES))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::Netns;
    use super::*;

    /// What is found after these commands in a namespace of their own; none where a program is not
    /// installed.
    async fn after(commands: &[&str]) -> Option<Option<String>> {
        let netns = Netns::create().await.unwrap();
        for command in commands {
            let mut words = command.split(' ');
            let mut process = Command::new(words.next().unwrap());
            process.args(words);
            match netns.run(|| process.output()) {
                Ok(output) => assert!(output.status.success(), "{command}: {output:?}"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
                Err(error) => panic!("{command}: {error}"),
            }
        }
        Some(netns.run(first).unwrap())
    }

    #[tokio::test]
    async fn an_empty_namespace_has_no_rules_and_an_unused_table_is_none() {
        assert_eq!(after(&[]).await, Some(None));
        for program in ["iptables", "iptables-legacy", "ip6tables-legacy"] {
            let found = after(&[&format!("{program} -t nat -L")]).await;
            assert!(matches!(found, None | Some(None)), "{program}: {found:?}");
        }
    }

    #[tokio::test]
    async fn a_redirection_and_a_policy_that_drops_are_found_in_every_kind_of_table() {
        for program in [
            "iptables-nft",
            "iptables-legacy",
            "ip6tables-nft",
            "ip6tables-legacy",
        ] {
            for rule in [
                "-t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001",
                "-A INPUT -j DROP",
                "-P INPUT DROP",
            ] {
                if let Some(found) = after(&[&format!("{program} {rule}")]).await {
                    assert!(found.is_some(), "{program} {rule}");
                }
            }
        }
    }

    #[tokio::test]
    async fn dockers_rules_for_its_dns_bind_nobody_and_a_meshs_beside_them_do() {
        for program in ["iptables-nft", "iptables-legacy"] {
            let rule = |text: &str| format!("{program} -t nat {text}");
            let docker = [
                rule("-N DOCKER_OUTPUT"),
                rule("-N DOCKER_POSTROUTING"),
                rule("-A OUTPUT -d 127.0.0.11 -j DOCKER_OUTPUT"),
                rule("-A POSTROUTING -d 127.0.0.11 -j DOCKER_POSTROUTING"),
                rule(
                    "-A DOCKER_OUTPUT -d 127.0.0.11 -p tcp --dport 53 -j DNAT --to-destination \
                     127.0.0.11:4000",
                ),
                rule(
                    "-A DOCKER_OUTPUT -d 127.0.0.11 -p udp --dport 53 -j DNAT --to-destination \
                     127.0.0.11:4000",
                ),
                rule(
                    "-A DOCKER_POSTROUTING -s 127.0.0.11 -p tcp --sport 4000 -j SNAT --to-source \
                     :53",
                ),
                rule(
                    "-A DOCKER_POSTROUTING -s 127.0.0.11 -p udp --sport 4000 -j SNAT --to-source \
                     :53",
                ),
            ];
            let mut commands: Vec<&str> = docker.iter().map(String::as_str).collect();
            let Some(found) = after(&commands).await else {
                continue;
            };
            assert_eq!(found, None, "{program}");
            let mesh = rule("-A OUTPUT -p tcp -j REDIRECT --to-ports 15001");
            commands.push(&mesh);
            assert!(after(&commands).await.unwrap().is_some(), "{program}");
        }
    }
}
