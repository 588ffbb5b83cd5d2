//! A disk (virtio-blk) on a raw image file or a block device of the host.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use serde_json::{Value, json};
use sys::point::{Point, reach};

use super::{Plug, Undo};
use crate::error::{Doing, Error, Result};
use crate::qmp::commands::BlockdevAdd;

/// QEMU's drivers, of a file and of a block device.
const FILE: &str = "file";
pub(crate) const HOST_DEVICE: &str = "host_device";

/// A disk.
#[derive(Clone, Debug)]
pub struct Block {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The number that a block device there must have: its path may lead to another one by now.
    pub number: Option<u64>,
    /// The guest cannot write.
    pub read_only: bool,
}

/// The name of a disk's block node.
pub(crate) fn node(id: &str) -> String {
    format!("{id}-raw")
}

impl Block {
    pub(super) async fn plug(self, plug: &mut Plug<'_>) -> Result<()> {
        let shown = self.path.display();
        // Opened once, here: what is looked at is what QEMU gets, which could not open it by
        // itself.
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .open(&self.path);
        let file = file.doing(|| format!("open the disk {shown}"))?;
        let metadata = file.metadata().doing(|| format!("use the disk {shown}"))?;
        let kind = metadata.file_type();
        if self.number.is_some_and(|number| number != metadata.rdev()) {
            return Err(Error::Unsupported(format!(
                "{shown} is not the device any more that it was"
            )));
        }
        let driver = if kind.is_block_device() {
            HOST_DEVICE
        } else {
            FILE
        };
        if !kind.is_block_device() && !kind.is_file() {
            return Err(Error::Unsupported(format!(
                "{shown} is neither a file nor a block device"
            )));
        }
        let set = plug.qmp.add_fd(file.into()).await?;
        plug.undo.push(Undo::RemoveFdSet(set));
        let node = node(&plug.id);
        let file =
            json!({"driver": driver, "filename": format!("/dev/fdset/{set}"), "aio": "threads"});
        let node_arguments = json!({"driver": "raw", "node-name": node,
            "read-only": self.read_only, "file": file,
            "discard": "unmap"});
        let Value::Object(node_arguments) = node_arguments else {
            return Ok(());
        };
        plug.qmp.execute(&BlockdevAdd(node_arguments)).await?;
        plug.undo.push(Undo::RemoveBlockNode(node.clone()));
        reach(Point::DiskHalfPlugged).doing(|| format!("add the disk {shown}"))?;
        // A host's disk that is full or broken is the guest's error, not the end of its time.
        let arguments = json!({"drive": node, "werror": "report", "rerror": "report"});
        plug.device_add("virtio-blk-pci", arguments).await
    }
}
