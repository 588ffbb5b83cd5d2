//! Rules of a packet filter (nftables, iptables) that somebody has put into a pod's network
//! namespace: meshes and policy agents do. They do not bind a guest, whose packets pass below them,
//! so whoever made them must be told.
//!
//! docker's rules for its DNS server on 127.0.0.11 are let pass: they concern loopback only, which
//! the guest has itself.

use std::io;

use super::netfilter::{
    CHAIN_NAME, CHAIN_POLICY, CHAIN_TABLE, Info, RULE_CHAIN, RULE_TABLE, Table, attribute, chains,
    old_tables, rules, text,
};

/// Chains that docker makes for its DNS.
const DOCKER: [&str; 2] = ["DOCKER_OUTPUT", "DOCKER_POSTROUTING"];

/// Chains of the kernel's hooks that docker's are called from, once each.
const CALLERS: [&str; 2] = ["OUTPUT", "POSTROUTING"];

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
    for table in old_tables()? {
        if Legacy::of(&table).binds() {
            let family = if table.v6 { "Inet6" } else { "Inet" };
            return Ok(Some(format!("iptables table {} ({family})", table.name)));
        }
    }
    Ok(None)
}

fn nftables() -> io::Result<Option<String>> {
    let place =
        |attributes: &[u8]| Some((text(attributes, RULE_TABLE)?, text(attributes, RULE_CHAIN)?));
    let rules: Vec<Place> = rules()?.iter().filter_map(|rule| place(&rule.1)).collect();
    let drops = |attributes: &[u8]| {
        // NF_DROP is 0.
        (attribute(attributes, CHAIN_POLICY)? == [0; 4]).then_some(())?;
        Some((
            text(attributes, CHAIN_TABLE)?,
            text(attributes, CHAIN_NAME)?,
        ))
    };
    let chains: Vec<Place> = chains()?
        .iter()
        .filter_map(|chain| drops(&chain.1))
        .collect();
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

/// Entries that docker's DNS makes: two chains with two rules, a head and an end each, and two
/// calls.
const DOCKER_ENTRIES: u32 = 10;
/// -NF_DROP - 1.
const DROP: i32 = -1;

impl Legacy {
    fn of(table: &Table) -> Legacy {
        // Where struct ipt_entry and ip6t_entry have the offsets of their target and of the next
        // entry.
        let offsets = if table.v6 { 140 } else { 88 };
        Legacy::parse(&table.info, &table.entries, offsets)
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
