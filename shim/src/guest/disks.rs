//! Disks of the host that grow while a container has them: the guest is told.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Mutex;

use nix::sys::stat::{major, minor};
use tokio::sync::Notify;
use tokio::time::sleep;
use vmm::Machine;

use crate::deadlines::DISK_LOOK;

/// The kernel counts devices in these, whatever their own sectors are (block/genhd.c).
const SECTOR: u64 = 512;

/// Block devices of the host that the guest can write to, by the id of their disk.
#[derive(Debug, Default)]
pub struct Disks {
    disks: Mutex<HashMap<String, Disk>>,
    added: Notify,
}

#[derive(Debug)]
struct Disk {
    number: u64,
    bytes: u64,
}

impl Disks {
    /// A disk that the guest has from now on. An image file keeps its size.
    pub fn add(&self, id: &str, path: &Path) {
        let metadata = fs::metadata(path).ok();
        let device = metadata.filter(|metadata| metadata.file_type().is_block_device());
        let number = device.map(|device| device.rdev());
        if let Some((number, bytes)) = number.and_then(|number| Some((number, size(number)?))) {
            sys::lock(&self.disks).insert(id.to_owned(), Disk { number, bytes });
            self.added.notify_one();
        }
    }

    pub fn remove(&self, id: &str) {
        sys::lock(&self.disks).remove(id);
    }

    /// Those that are larger than they were when this was last asked, with their bytes.
    fn grown(&self) -> Vec<(String, u64)> {
        let mut disks = sys::lock(&self.disks);
        let grown = |(id, disk): (&String, &mut Disk)| {
            let bytes = size(disk.number).filter(|bytes| *bytes > disk.bytes)?;
            disk.bytes = bytes;
            Some((id.clone(), bytes))
        };
        disks.iter_mut().filter_map(grown).collect()
    }

    /// Tells the guest of those that grow. Never ends.
    pub async fn follow(&self, machine: &Machine) {
        loop {
            if sys::lock(&self.disks).is_empty() {
                self.added.notified().await;
            }
            sleep(DISK_LOOK).await;
            for (id, bytes) in self.grown() {
                match machine.resize_disk(&id, bytes).await {
                    Ok(()) => tracing::info!(id, bytes, "a disk has grown"),
                    Err(error) => {
                        tracing::warn!(%error, id, "the guest is not told that a disk has grown");
                    }
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
