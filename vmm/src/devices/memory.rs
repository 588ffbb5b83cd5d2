//! Memory that comes and goes while the guest runs (virtio-mem): one device, made at the first
//! growth, whose size the guest follows block by block. [`crate::Machine::resize_memory`] is the
//! only one to make it.

use serde_json::{Map, json};

use super::{Plug, Undo};
use crate::error::Result;
use crate::qemu::capabilities::VIRTIO_MEM;
use crate::qmp::commands::ObjectAdd;

/// First part of the device's id.
pub(crate) const KIND: &str = "mem";

/// Bytes of a step: a huge page, which is QEMU's own choice on this processor.
pub(crate) const BLOCK: u64 = 2 << 20;

/// MiB of the guest's smallest unit of memory; less at the end of a device is of no use to it.
const SECTION_MIB: u64 = 128;

/// The memory device.
#[derive(Debug)]
pub struct Memory {
    /// Bytes that it can have at most.
    pub(crate) size: u64,
    /// Bytes that the guest should take.
    pub(crate) requested: u64,
}

impl Memory {
    pub(super) async fn plug(self, plug: &mut Plug<'_>) -> Result<()> {
        let backend = format!("{}-ram", plug.id);
        // Shared, so that vhost-user helpers see what the guest puts there.
        let arguments = Map::from_iter([
            ("qom-type".to_owned(), json!("memory-backend-memfd")),
            ("id".to_owned(), json!(backend)),
            ("size".to_owned(), json!(self.size)),
            ("share".to_owned(), json!(true)),
        ]);
        plug.qmp.execute(&ObjectAdd(arguments)).await?;
        plug.undo.push(Undo::RemoveObject(backend.clone()));
        // What the guest was not given it cannot touch either: its memory is bounded by more than
        // its good will.
        let properties = json!({"memdev": backend, "block-size": BLOCK,
            "requested-size": self.requested,
            "unplugged-inaccessible": "on"});
        plug.device_add(VIRTIO_MEM, properties).await
    }
}

/// MiB of the device's place in the guest's address space, for a machine between these sizes.
pub(crate) fn region_mib(memory_mib: u64, max_memory_mib: u64) -> u64 {
    max_memory_mib
        .saturating_sub(memory_mib)
        .next_multiple_of(SECTION_MIB)
}
