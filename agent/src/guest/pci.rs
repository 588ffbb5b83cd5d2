//! PCI paths, by which the host names a device that it has plugged in, and the wait for one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::deadlines::DEVICE_HOTPLUG_PAUSE;
use crate::error::{Error, Result};

const ROOT: &str = "/sys/devices/pci0000:00";

/// Waits until `find` finds what it wants in the sysfs directory of the device at `pci_path`, such
/// as `02/01`.
///
/// # Errors
/// Text that is not a PCI path, or a device that does not come in time.
pub async fn wait_for<T>(
    pci_path: &str,
    device_kind: &str,
    deadline: Duration,
    find: impl Fn(&Path) -> Option<T>,
) -> Result<T> {
    let elements = parse(pci_path)?;
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = device(Path::new(ROOT), &elements).and_then(|dir| find(&dir)) {
            return Ok(found);
        }
        if Instant::now() >= end {
            return Err(Error::Failed(format!(
                "no {device_kind} at PCI path {pci_path} within {deadline:?}"
            )));
        }
        sleep(DEVICE_HOTPLUG_PAUSE).await;
    }
}

/// The name of the `class` device (`block`, `net`) of the virtio device in a PCI device's
/// directory.
pub fn virtio_child(device: &Path, class: &str) -> Option<String> {
    let virtio = fs::read_dir(device).ok()?.flatten().find(|entry| {
        entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with("virtio"))
    })?;
    fs::read_dir(virtio.path().join(class))
        .ok()?
        .next()?
        .ok()?
        .file_name()
        .into_string()
        .ok()
}

/// `SS` or `SS.F` in hexadecimal, joined by slashes.
fn parse(path: &str) -> Result<Vec<(u8, u8)>> {
    let element = |text: &str| {
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let slot = u8::from_str_radix(slot, 16)
            .ok()
            .filter(|slot| *slot < 32 && text.len() >= 2)?;
        let function = u8::from_str_radix(function, 16)
            .ok()
            .filter(|function| *function < 8)?;
        Some((slot, function))
    };
    path.split('/')
        .map(element)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| Error::Invalid(format!("{path:?} is no PCI path")))
}

/// Follows the elements from the root bus through one bridge each.
fn device(root: &Path, elements: &[(u8, u8)]) -> Option<PathBuf> {
    let mut at = root.to_owned();
    let mut bus = "0000:00".to_owned();
    for (index, (slot, function)) in elements.iter().enumerate() {
        at.push(format!("{bus}:{slot:02x}.{function}"));
        if index + 1 < elements.len() {
            bus = fs::read_dir(at.join("pci_bus"))
                .ok()?
                .next()?
                .ok()?
                .file_name()
                .into_string()
                .ok()?;
        }
    }
    at.is_dir().then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_paths_are_hexadecimal_slots() {
        assert_eq!(parse("02/01").unwrap(), [(2, 0), (1, 0)]);
        assert_eq!(parse("1f.3").unwrap(), [(31, 3)]);
        for bad in ["", "2", "0x2/01", "20", "01.8", "../01", "02/"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_disk_is_found_behind_its_bridge() {
        let sysfs = tempfile::tempdir().unwrap();
        let bridge = sysfs.path().join("0000:00:02.0");
        fs::create_dir_all(bridge.join("pci_bus/0000:01")).unwrap();
        fs::create_dir_all(bridge.join("0000:01:00.0/virtio5/block/vdb")).unwrap();
        let disk = device(sysfs.path(), &[(2, 0), (0, 0)]).unwrap();
        assert_eq!(virtio_child(&disk, "block").as_deref(), Some("vdb"));
        assert_eq!(virtio_child(&disk, "net"), None);
        assert!(device(sysfs.path(), &[(3, 0)]).is_none());
    }
}
