//! How many CPUs and how much memory a machine has, changed while it runs, between what it was
//! started with and the most that it was made for; and how large its disks are.

use std::time::Duration;

use serde_json::{Value, json};
use sys::point::{Point, reach};
use tokio::time::{Instant, sleep};

use super::Vm;
use crate::deadlines::{MEMORY_LOOK_AGAIN, MEMORY_STEP};
use crate::devices::{Device, block, memory};
use crate::error::{Doing, Error, Result};
use crate::qmp::commands::{
    BlockResize, DeviceAdd, HotpluggableCpu, QomGet, QomSet, QueryHotpluggableCpus,
};

/// Ids of added CPUs are this and how many CPUs there were before.
const CPU: &str = "/machine/peripheral/cpu";

/// What a machine began with, and the most it can have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub vcpus: u32,
    pub max_vcpus: u32,
    pub memory_mib: u64,
    pub max_memory_mib: u64,
    /// Whether CPUs can go again. Not emulated ones: QEMU 7.2 keeps what it had for each of them
    /// and has room for no more than the most there can be at once, so the next ones that come
    /// corrupt its memory.
    pub vcpus_can_go: bool,
}

impl Vm {
    /// Brings the number of virtual CPUs as near to `wanted` as it can: never more than the machine
    /// was made for, never less than it began with, and only those leave that the running guest
    /// lets go, under emulation none. Returns how many there are now. The guest sees added CPUs as
    /// offline until somebody in it sets them online.
    ///
    /// # Errors
    /// QEMU's own, or its death. Some CPUs may have come or gone.
    pub async fn resize_vcpus(&self, wanted: u32, timeout: Duration) -> Result<u32> {
        let _alone = self.resizing.lock().await;
        let wanted = wanted.clamp(self.limits.vcpus, self.limits.max_vcpus) as usize;
        let until = Instant::now() + timeout;
        let resized = async {
            let mut cpus = self.qmp.execute(&QueryHotpluggableCpus {}).await?;
            cpus.sort_by_key(HotpluggableCpu::place);
            let (present, free): (Vec<_>, Vec<_>) =
                cpus.into_iter().partition(|cpu| cpu.qom_path.is_some());
            let mut count = present.len();
            for cpu in free.into_iter().take(wanted.saturating_sub(count)) {
                let mut arguments = cpu.props;
                arguments.insert("driver".into(), json!(cpu.driver));
                arguments.insert("id".into(), json!(format!("cpu{count}")));
                self.qmp.execute(&DeviceAdd(arguments)).await?;
                count += 1;
            }
            let added = |cpu: &HotpluggableCpu| {
                cpu.qom_path
                    .as_deref()?
                    .strip_prefix(CPU)?
                    .parse::<u32>()
                    .ok()
            };
            let removable = present.iter().filter(|_| self.limits.vcpus_can_go);
            let mut added: Vec<u32> = removable.filter_map(added).collect();
            added.sort_unstable();
            while count > wanted
                && let Some(last) = added.pop()
            {
                match self
                    .unplug(
                        &format!("cpu{last}"),
                        until.saturating_duration_since(Instant::now()),
                    )
                    .await
                {
                    Ok(()) => count -= 1,
                    // Refused by the guest, or by QEMU while the guest has not come so far that it
                    // could be asked.
                    Err(
                        error @ (Error::Deadline { .. }
                        | Error::Unsupported(_)
                        | Error::Refused { .. }),
                    ) => {
                        tracing::warn!(%error, wanted, "the guest keeps more CPUs than wanted");
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(u32::try_from(count).unwrap_or(u32::MAX))
        };
        match resized.await {
            Ok(count) => Ok(count),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Brings the guest's memory as near to `wanted_mib` as it can, in steps of 2 MiB (rounded up):
    /// never more than the machine was made for, never less than it began with. Waits until the
    /// guest is done, makes no progress any more or the time is over, and returns how many MiB it
    /// has now: a guest that shrinks keeps what it cannot free, and goes on trying. The first
    /// growth takes a PCI slot.
    ///
    /// # Errors
    /// No free PCI slot, QEMU's own, or its death.
    pub async fn resize_memory(&self, wanted_mib: u64, timeout: Duration) -> Result<u64> {
        reach(Point::MachineResizing)
            .doing(|| format!("resize the machine to {wanted_mib} MiB"))?;
        let _alone = self.resizing.lock().await;
        let Limits {
            memory_mib,
            max_memory_mib,
            ..
        } = self.limits;
        let until = Instant::now() + timeout;
        let wanted = wanted_mib.clamp(memory_mib, max_memory_mib) - memory_mib;
        let wanted = (wanted << 20).next_multiple_of(memory::BLOCK);
        let id = match self.memory_device() {
            None if wanted == 0 => return Ok(memory_mib),
            None => {
                let size = memory::region_mib(memory_mib, max_memory_mib) << 20;
                self.attach(Device::Memory(memory::Memory {
                    size,
                    requested: wanted,
                }))
                .await?
                .id
            }
            Some(id) => id,
        };
        match self.settle_memory(&id, wanted, until).await {
            Ok(size) => Ok(memory_mib + (size >> 20)),
            Err(error) => Err(self.explained(error).await),
        }
    }

    fn memory_device(&self) -> Option<String> {
        let devices = self.devices();
        let mut ids = devices.attached.keys();
        ids.find(|id| id.starts_with(memory::KIND)).cloned()
    }

    /// How many MiB of memory the guest has now.
    ///
    /// # Errors
    /// QEMU's own, or its death.
    pub async fn memory_mib(&self) -> Result<u64> {
        let added = match self.memory_device() {
            Some(id) => match self.added_memory(&id).await {
                Ok(added) => added,
                Err(error) => return Err(self.explained(error).await),
            },
            None => 0,
        };
        Ok(self.limits.memory_mib + (added >> 20))
    }

    /// Bytes that the guest has of the memory device.
    async fn added_memory(&self, id: &str) -> Result<u64> {
        let size = QomGet {
            path: format!("/machine/peripheral/{id}"),
            property: "size".into(),
        };
        let reply = self.qmp.execute(&size).await?;
        reply.as_u64().ok_or_else(|| not_understood(&reply))
    }

    /// Tells the guest that a disk it can write to has as many bytes now as the host's device has.
    ///
    /// # Errors
    /// No such disk, another size than the host's, or QEMU's own.
    pub async fn resize_disk(&self, id: &str, bytes: u64) -> Result<()> {
        let resize = BlockResize {
            node_name: block::node(id),
            size: bytes,
        };
        match self.qmp.execute(&resize).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Asks the guest for another size of the memory device, and waits for what comes of it.
    async fn settle_memory(&self, id: &str, wanted: u64, until: Instant) -> Result<u64> {
        let request = QomSet {
            path: format!("/machine/peripheral/{id}"),
            property: "requested-size".into(),
            value: json!(wanted),
        };
        self.qmp.execute(&request).await?;
        let (mut size, mut moved) = (None, Instant::now());
        loop {
            let now = self.added_memory(id).await?;
            if now == wanted {
                return Ok(now);
            }
            if size.replace(now) != Some(now) {
                moved = Instant::now();
            }
            if Instant::now() >= until.min(moved + MEMORY_STEP) {
                tracing::warn!(
                    wanted,
                    size = now,
                    "the guest did not change its memory as far as wanted"
                );
                return Ok(now);
            }
            sleep(MEMORY_LOOK_AGAIN).await;
        }
    }
}

fn not_understood(reply: &Value) -> Error {
    Error::Unsupported(format!(
        "QEMU's size of the memory device is not understood: {reply}"
    ))
}
