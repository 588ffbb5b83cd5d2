//! What of disks is tried again: the guest is told of those that grow on the host, and is asked again
//! for those that it did not let go of.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Mutex;

use nix::sys::stat::{major, minor};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use vmm::Machine;

use crate::deadlines::{DISK_DETACH, DISK_DETACH_AGAIN, DISK_LOOK};

/// The kernel counts devices in these, whatever their own sectors are (block/genhd.c).
const SECTOR: u64 = 512;

/// The disks of a guest, by their ids.
#[derive(Debug, Default)]
pub struct Disks {
    state: Mutex<State>,
    added: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Block devices of the host.
    growing: HashMap<String, Disk>,
    /// Those of containers that are gone, and when to ask for them again.
    kept: HashMap<String, Instant>,
}

#[derive(Debug)]
struct Disk {
    number: u64,
    /// What the guest has been told.
    bytes: u64,
    /// What it could not be told, and nobody has to hear twice.
    failed: u64,
}

impl Disks {
    /// A disk that the guest has from now on. An image file keeps its size.
    pub fn add(&self, id: &str, path: &Path) {
        let metadata = fs::metadata(path).ok();
        let device = metadata.filter(|metadata| metadata.file_type().is_block_device());
        let number = device.map(|device| device.rdev());
        if let Some((number, bytes)) = number.and_then(|number| Some((number, size(number)?))) {
            let disk = Disk {
                number,
                bytes,
                failed: 0,
            };
            sys::lock(&self.state).growing.insert(id.to_owned(), disk);
            self.added.notify_one();
        }
    }

    /// The guest has let go of it.
    pub fn removed(&self, id: &str) {
        sys::lock(&self.state).growing.remove(id);
    }

    /// The guest keeps it, though nobody has it any more.
    pub fn kept(&self, id: &str) {
        let mut state = sys::lock(&self.state);
        state.growing.remove(id);
        let again = Instant::now() + DISK_DETACH_AGAIN;
        state.kept.insert(id.to_owned(), again);
        self.added.notify_one();
    }

    /// Those that are larger than the guest knows, with their bytes.
    fn grown(&self) -> Vec<(String, u64)> {
        let state = sys::lock(&self.state);
        let grown = |(id, disk): (&String, &Disk)| {
            let bytes = size(disk.number).filter(|bytes| *bytes > disk.bytes)?;
            Some((id.clone(), bytes))
        };
        state.growing.iter().filter_map(grown).collect()
    }

    /// Notes whether the guest knows the size of a disk. Says whether that is news.
    fn told(&self, id: &str, bytes: u64, success: bool) -> bool {
        let mut state = sys::lock(&self.state);
        let Some(disk) = state.growing.get_mut(id) else {
            return false;
        };
        let known = if success {
            &mut disk.bytes
        } else {
            &mut disk.failed
        };
        std::mem::replace(known, bytes) != bytes
    }

    fn due(&self) -> Vec<String> {
        let (state, now) = (sys::lock(&self.state), Instant::now());
        let due = state.kept.iter().filter(|(_, again)| **again <= now);
        due.map(|(id, _)| id.clone()).collect()
    }

    /// Tells the guest of those that grow, and asks for those that it keeps. Never ends.
    pub async fn follow(&self, machine: &Machine) {
        loop {
            let idle = {
                let state = sys::lock(&self.state);
                state.growing.is_empty() && state.kept.is_empty()
            };
            if idle {
                self.added.notified().await;
            }
            sleep(DISK_LOOK).await;
            for (id, bytes) in self.grown() {
                let result = machine.resize_disk(&id, bytes).await;
                let news = self.told(&id, bytes, result.is_ok());
                match result {
                    Ok(()) => tracing::info!(id, bytes, "a disk has grown"),
                    Err(error) if news => tracing::warn!(%error, id,
                        "the guest is not told that a disk has grown; it is tried again"),
                    Err(_) => {}
                }
            }
            for id in self.due() {
                match machine.detach(&id, DISK_DETACH).await {
                    Ok(()) => {
                        tracing::info!(id, "the guest has let go of a disk");
                        sys::lock(&self.state).kept.remove(&id);
                    }
                    Err(_) => self.kept(&id),
                }
            }
        }
    }
}

/// Bytes of a block device.
fn size(number: u64) -> Option<u64> {
    let file = format!("/sys/dev/block/{}:{}/size", major(number), minor(number));
    let sectors: u64 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
    sectors.checked_mul(SECTOR)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_the_guest_keeps_is_asked_for_again_and_again() {
        let disks = Disks::default();
        disks.kept("blk1");
        assert!(disks.due().is_empty());
        for _ in 0..2 {
            sleep(DISK_DETACH_AGAIN + Duration::from_millis(1)).await;
            assert_eq!(disks.due(), ["blk1"]);
            disks.kept("blk1");
            assert!(disks.due().is_empty());
        }
    }

    #[test]
    fn a_size_that_the_guest_is_not_told_is_tried_again_and_said_once() {
        let disks = Disks::default();
        let disk = Disk {
            number: 0,
            bytes: 1,
            failed: 0,
        };
        sys::lock(&disks.state).growing.insert("blk1".into(), disk);
        assert!(disks.told("blk1", 2, false));
        assert!(!disks.told("blk1", 2, false), "said already");
        assert!(disks.told("blk1", 3, false), "another size");
        assert!(disks.told("blk1", 3, true));
        assert_eq!(sys::lock(&disks.state).growing["blk1"].bytes, 3);
    }
}
