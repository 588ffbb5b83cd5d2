//! Sysctls of a network namespace that are not the kernel's defaults: those that somebody has set
//! there, as the CNI plug-in `tuning` does, and what each namespace inherits from the host's.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;

use super::netns::Netns;

const ROOT: &str = "/proc/sys/net";

/// Directories with one for each link, and one for links that come later.
const PER_LINK: [&str; 2] = [INHERITED, "ipv6/conf/"];

/// Directories whose files are read.
const DIRECTORIES: [&str; 5] = ["core", "ipv4", "ipv6", "netfilter", "unix"];

/// Of these a new namespace has the host's values (net.core.devconf_inherit_init_net).
const INHERITED: &str = "ipv4/conf/";

/// Files that belong to a kernel, follow from something else, or are orders.
const LEFT_OUT: [&str; 8] = [
    "/mtu",
    "/stable_secret",
    "/flush",
    "/tcp_fastopen_key",
    "/nf_conntrack_max",
    "/nf_conntrack_buckets",
    "/nf_conntrack_expect_max",
    "/optmem_max",
];

/// The namespace's own values by their names below /proc/sys/net, and those that were such
/// `before`.
///
/// # Errors
/// The namespace cannot be entered, or no other one made.
pub fn set_by_somebody(
    netns: &Netns,
    links: &[String],
    before: &HashMap<String, String>,
) -> io::Result<HashMap<String, String>> {
    static FRESH: OnceLock<HashMap<String, String>> = OnceLock::new();
    let fresh = match FRESH.get() {
        Some(fresh) => fresh,
        None => {
            let read = Netns::in_fresh_one(|| Ok(read(&[])))?;
            FRESH.get_or_init(|| read)
        }
    };
    let mut values = netns.run(|| Ok(read(links)))?;
    values.retain(|name, value| {
        if before.contains_key(name) {
            return true;
        }
        let default = match link_of(name) {
            // A new namespace begins with the host's own.
            Some((INHERITED, link, file)) => return value != default_of(link, file),
            // A new namespace has no such link: there, one would begin like this.
            Some((directory, link, file)) if link != "all" => {
                fresh.get(&format!("{directory}default/{file}"))
            }
            _ => fresh.get(name),
        };
        default.is_some_and(|default| default != value)
    });
    Ok(values)
}

/// The kernel's default of a file in [`INHERITED`] (net/ipv4/devinet.c).
fn default_of(link: &str, file: &str) -> &'static str {
    match file {
        "accept_redirects" | "secure_redirects" | "send_redirects" | "shared_media" => "1",
        "arp_evict_nocarrier" => "1",
        "accept_source_route" if link != "all" => "1",
        "igmpv2_unsolicited_report_interval" => "10000",
        "igmpv3_unsolicited_report_interval" => "1000",
        _ => "0",
    }
}

/// Directory, link and file of a value that each link has.
fn link_of(name: &str) -> Option<(&'static str, &str, &str)> {
    PER_LINK.into_iter().find_map(|directory| {
        let (link, file) = name.strip_prefix(directory)?.split_once('/')?;
        Some((directory, link, file))
    })
}

/// The values of the calling thread's namespace, of these links and of those that come later.
fn read(links: &[String]) -> HashMap<String, String> {
    let mut values = HashMap::new();
    for directory in DIRECTORIES {
        read_files(directory, &mut values);
    }
    for directory in PER_LINK {
        let all = ["all", "default"].into_iter();
        for link in all.chain(links.iter().map(String::as_str)) {
            read_files(&format!("{directory}{link}"), &mut values);
        }
    }
    values
}

/// The files of a directory, which this kernel may not have.
fn read_files(directory: &str, values: &mut HashMap<String, String>) {
    let path = Path::new(ROOT).join(directory);
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let name = format!("{directory}/{}", entry.file_name().to_string_lossy());
        if LEFT_OUT.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        // Some are directories, can only be written, or are not there yet.
        if let Ok(value) = fs::read_to_string(entry.path()) {
            values.insert(name, value.trim_end().to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_not_the_default_is_told_and_nothing_else() {
        let netns = Netns::create().await.unwrap();
        let before = set_by_somebody(&netns, &[], &HashMap::new()).unwrap();
        // What the host has set, for all its namespaces.
        assert!(
            before.keys().all(|name| name.starts_with(INHERITED)),
            "{before:?}"
        );
        let set = [
            ("ipv4/ip_local_port_range", "20000\t30000"),
            ("ipv4/conf/all/arp_filter", "1"),
            ("ipv6/conf/default/accept_ra", "0"),
        ];
        let write = || {
            for (name, value) in set {
                fs::write(format!("{ROOT}/{name}"), value)?;
            }
            Ok(())
        };
        netns.run(write).unwrap();
        let wanted = set.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut now = set_by_somebody(&netns, &[], &HashMap::new()).unwrap();
        now.retain(|name, value| before.get(name) != Some(value));
        assert_eq!(now, HashMap::from(wanted));
    }
}
