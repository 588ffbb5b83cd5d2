//! A container's devices: which of them a virtual machine can have, and how.
//!
//! A block device of the host is plugged in as a disk. Of a character device only the number
//! travels: the guest has the usual ones (null, fuse, tun, …) under the same numbers. A privileged
//! container gets the guest's devices, which the agent knows, and none of the host's, of which some
//! clients list all.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use crate::error::{Error, Result};

/// A block device of the host that a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDisk {
    /// Its node on the host.
    pub path: PathBuf,
    /// Its number, as stat(2) gives it.
    pub number: u64,
    /// Its node in the container.
    pub container_path: String,
    /// The container may not write.
    pub read_only: bool,
}

/// What becomes of a spec's devices.
#[derive(Debug, Default)]
pub struct Devices {
    /// Entries for the guest; those of `disks` get other numbers there.
    pub entries: Vec<LinuxDevice>,
    /// Disks to plug in.
    pub disks: Vec<HostDisk>,
    /// Rules of access for the guest: the spec's, and after those no block device but `disks`,
    /// whatever the numbers of the host's mean in the guest. Each of `disks` has a rule by its
    /// number on the host, which the guest's agent changes together with the entry.
    pub rules: Vec<LinuxDeviceCgroup>,
}

/// Sorts them.
///
/// # Errors
/// `INVALID_ARGUMENT`: a block device that the host does not have.
pub fn classify(spec: &Spec) -> Result<Devices> {
    let linux = spec.linux().as_ref();
    let list = linux
        .and_then(|linux| linux.devices().as_deref())
        .unwrap_or_default();
    let privileged = is_privileged(spec);
    let mut devices = Devices {
        rules: rules(spec).to_vec(),
        ..Default::default()
    };
    // A privileged container's last rule says it all, and stays the last one.
    if !privileged {
        let mut no_disk = LinuxDeviceCgroup::default();
        no_disk
            .set_typ(Some(LinuxDeviceType::B))
            .set_access(Some("rw".to_owned()));
        devices.rules.push(no_disk);
    }
    for device in list {
        let is_block = device.typ() == LinuxDeviceType::B;
        if privileged && (!is_block || is_hosts_own(device)) {
            continue;
        }
        if is_block {
            let access = access(rules(spec), device);
            devices.disks.push(HostDisk {
                path: node(device)?,
                number: number(device),
                container_path: device.path().to_string_lossy().into_owned(),
                read_only: !access.contains('w'),
            });
            if !privileged && !access.is_empty() {
                let mut rule = LinuxDeviceCgroup::default();
                rule.set_allow(true)
                    .set_typ(Some(LinuxDeviceType::B))
                    .set_access(Some(access));
                rule.set_major(Some(device.major()))
                    .set_minor(Some(device.minor()));
                devices.rules.push(rule);
            }
        }
        devices.entries.push(device.clone());
    }
    Ok(devices)
}

/// Whether the device rules end in "everything": of two that fit, the kernel goes by the later one.
fn is_privileged(spec: &Spec) -> bool {
    let rules = rules(spec);
    let all = rules.iter().rposition(|rule| {
        let access = rule.access().as_deref().unwrap_or_default();
        rule.allow()
            && rule.major().is_none_or(|n| n < 0)
            && rule.minor().is_none_or(|n| n < 0)
            && rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
            && "rwm".chars().all(|letter| access.contains(letter))
    });
    all.is_some_and(|all| rules[all..].iter().all(|rule| rule.allow()))
}

/// Whether the host has this very device at the same path: an entry of a list of all devices.
fn is_hosts_own(device: &LinuxDevice) -> bool {
    std::fs::metadata(device.path()).is_ok_and(|metadata| metadata.rdev() == number(device))
}

fn number(device: &LinuxDevice) -> u64 {
    let part = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
    libc::makedev(part(device.major()), part(device.minor()))
}

/// What the rules allow with a device, of "rwm": for each letter the last rule that fits decides,
/// and without one, no.
fn access(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> String {
    let fits = |rule: &LinuxDeviceCgroup, letter: char| {
        let number = |of_rule: Option<i64>, number: i64| {
            of_rule.is_none_or(|wanted| wanted < 0 || wanted == number)
        };
        let letters = rule.access().as_deref().unwrap_or_default();
        rule.typ()
            .is_none_or(|kind| kind == LinuxDeviceType::A || kind == device.typ())
            && number(rule.major(), device.major())
            && number(rule.minor(), device.minor())
            && (letters.is_empty() || letters.contains(letter))
    };
    let allowed = |letter: &char| {
        rules
            .iter()
            .rfind(|rule| fits(rule, *letter))
            .is_some_and(LinuxDeviceCgroup::allow)
    };
    "rwm".chars().filter(allowed).collect()
}

fn rules(spec: &Spec) -> &[LinuxDeviceCgroup] {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    resources
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default()
}

/// The host's node of a block device: where the client found it, else by the kernel's own name for
/// it.
fn node(device: &LinuxDevice) -> Result<PathBuf> {
    let wanted = number(device);
    let is_it = |path: &Path| {
        std::fs::metadata(path)
            .is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == wanted)
    };
    let uevent = format!(
        "/sys/dev/block/{}:{}/uevent",
        device.major(),
        device.minor()
    );
    let uevent = std::fs::read_to_string(uevent).unwrap_or_default();
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    let known = name.map(|name| Path::new("/dev").join(name));
    known
        .into_iter()
        .chain([device.path().clone()])
        .find(|path| is_it(path))
        .ok_or_else(|| {
            Error::invalid(format!(
                "device {} is block device {}:{}, which this host does not have",
                device.path().display(),
                device.major(),
                device.minor()
            ))
        })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(devices: Value, rules: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0", "root": {"path": "r"},
            "linux": {"devices": devices, "resources": {"devices": rules}}
        }))
        .unwrap()
    }

    /// A loop device is there on every host that can run this at all.
    fn disk(path: &str) -> Value {
        json!({"path": path, "type": "b", "major": 7, "minor": 0})
    }

    #[test]
    fn a_block_device_becomes_a_disk_and_a_character_device_a_number() {
        let fuse = json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229});
        let rules = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b",
            "major": 7, "minor": 0, "access": "r"}]);
        let devices = classify(&spec(json!([disk("/dev/data"), fuse]), rules)).unwrap();
        let wanted = HostDisk {
            path: "/dev/loop0".into(),
            number: libc::makedev(7, 0),
            container_path: "/dev/data".into(),
            read_only: true,
        };
        assert_eq!(devices.disks, [wanted]);
        assert_eq!(devices.entries.len(), 2);
    }

    #[test]
    fn the_last_rule_that_fits_decides_about_a_disk_and_no_other_disk_is_allowed() {
        let access = |rules: Value| {
            let given = rules.as_array().unwrap().len();
            let devices = classify(&spec(json!([disk("/dev/data")]), rules)).unwrap();
            let own: Vec<_> = devices.rules[given..]
                .iter()
                .map(|rule| (rule.allow(), rule.major()))
                .collect();
            assert_eq!(own[0], (false, None), "no block device");
            assert!(
                own.len() <= 2 && own[1..].iter().all(|rule| *rule == (true, Some(7))),
                "{own:?}"
            );
            let last = devices.rules.last().filter(|rule| rule.allow());
            (
                last.and_then(|rule| rule.access().clone())
                    .unwrap_or_default(),
                devices.disks[0].read_only,
            )
        };
        let deny = json!({"allow": false, "access": "rwm"});
        let everything = json!({"allow": true, "access": "rwm"});
        let all = json!({"allow": true, "type": "b", "major": 7, "minor": -1, "access": "rw"});
        let other = json!({"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rwm"});
        let no_writing =
            json!({"allow": false, "type": "b", "major": 7, "minor": 0, "access": "w"});
        assert_eq!(access(json!([deny, all, other])), ("rw".into(), false));
        assert_eq!(access(json!([deny, all, no_writing])), ("r".into(), true));
        assert_eq!(access(json!([everything, no_writing])), ("rm".into(), true));
        assert_eq!(access(json!([deny, other])), (String::new(), true));
        assert_eq!(access(json!([])), (String::new(), true));
    }

    #[test]
    fn a_privileged_container_gets_none_of_the_hosts_devices_but_what_it_asks_for() {
        let listed = json!([disk("/dev/loop0"), disk("/dev/data"), {"path": "/dev/kvm",
            "type": "c", "major": 10, "minor": 232}]);
        let devices = classify(&spec(listed, json!([{"allow": true, "access": "rwm"}]))).unwrap();
        assert_eq!(devices.disks.len(), 1);
        assert_eq!(devices.disks[0].container_path, "/dev/data");
        assert!(!devices.disks[0].read_only);
    }

    #[test]
    fn who_is_denied_something_after_everything_is_not_privileged() {
        let all = json!({"allow": true, "access": "rwm"});
        let disk = json!({"allow": false, "type": "b", "major": 7, "minor": 0, "access": "w"});
        assert!(is_privileged(&spec(json!([]), json!([disk, all]))));
        assert!(!is_privileged(&spec(json!([]), json!([all, disk]))));
        assert!(is_privileged(&spec(json!([]), json!([all, disk, all]))));
    }

    #[test]
    fn a_device_that_the_host_lacks_is_named() {
        let missing = json!([{"path": "/dev/data", "type": "b", "major": 511, "minor": 99}]);
        let error = classify(&spec(missing, json!([]))).unwrap_err();
        assert!(
            error.to_string().contains("/dev/data") && error.to_string().contains("511:99"),
            "{error}"
        );
    }
}
