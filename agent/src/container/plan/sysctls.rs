//! Which sysctls a container may set.

use std::path::{Component, Path};

use crate::error::{Error, Result};

/// The path below /proc/sys, and the value. Only what belongs to a namespace of the container or of
/// its sandbox may be set.
pub fn sysctl(key: &str, value: &str) -> Result<(String, String)> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    // Slashes and dots may be swapped, as in sysctl(8): net/ipv4/conf/eth0.1/forwarding.
    let separator = key.chars().find(|c| matches!(c, '.' | '/')).unwrap_or('.');
    let path: String = if separator == '.' {
        key.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect()
    } else {
        key.to_owned()
    };
    let dotted = path.replace('/', ".");
    let allowed = IPC.contains(&dotted.as_str())
        || path.starts_with("fs/mqueue/")
        || path.starts_with("net/")
        || dotted == "kernel.domainname";
    let plain = Path::new(&path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !allowed || !plain {
        return Err(Error::Invalid(format!(
            "sysctl {key:?} is not in a separate kernel namespace"
        )));
    }
    Ok((path, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_sysctls_are_taken() {
        let good = |key| sysctl(key, "1").unwrap().0;
        assert_eq!(good("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            good("net/ipv4/conf/eth0.1/forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            good("net.ipv4.conf.eth0/1.forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(good("kernel.shmmax"), "kernel/shmmax");
        for bad in [
            "kernel.panic",
            "vm.swappiness",
            "net/../kernel/panic",
            "fs.file-max",
            "kernel.shm",
            "",
        ] {
            assert!(sysctl(bad, "1").is_err(), "{bad:?}");
        }
    }
}
