//! A machine that runs: QEMU and its helpers as one thing, which ends with whichever part of it
//! ends first. [`crate::boot`] makes it.

use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use crate::deadlines::{HELPER_KILL, MACHINE_LAST_WORDS, QEMU_QUIT};
use crate::devices::{Attached, Device};
use crate::error::Result;
use crate::helpers::{Virtiofsd, VsockDaemon};
use crate::process::Identity;
use crate::vm::Vm;

/// A running machine. Dropping it kills QEMU and the helpers.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vm: Vm,
    pub(crate) file_servers: [Virtiofsd; 2],
    pub(crate) vsock_daemon: Option<VsockDaemon>,
    pub(crate) vsock_id: String,
}

impl Machine {
    /// The process of QEMU, in whose network namespace the machine's cards are.
    pub fn qemu(&self) -> Identity {
        self.vm.process.identity()
    }

    /// QEMU and the helpers.
    pub fn identities(&self) -> Vec<Identity> {
        let servers = self.file_servers.iter().map(|server| &server.process);
        let daemon = self.vsock_daemon.iter().map(|daemon| &daemon.process);
        let all = std::iter::once(&self.vm.process)
            .chain(servers)
            .chain(daemon);
        all.map(|process| process.identity()).collect()
    }

    /// Adds a device. Several may be added side by side. If it fails, nothing of it stays.
    ///
    /// # Errors
    /// No free PCI slot, or QEMU's own.
    pub async fn attach(&self, device: Device) -> Result<Attached> {
        self.vm.attach(device).await
    }

    /// Removes a device. The guest has a say in it: it may refuse, or not answer.
    ///
    /// # Errors
    /// No such device, the guest's refusal, or the deadline; the device is still there then.
    pub async fn detach(&self, id: &str, within: Duration) -> Result<()> {
        self.vm.detach(id, within).await
    }

    /// Lets the guest write through a mount that came read-only at `below` the first shared
    /// directory ([`Virtiofsd::allow_writes`]).
    ///
    /// # Errors
    /// No such mount, one that cannot be written to, or the deadline.
    pub async fn allow_writes(&self, below: &Path, within: Duration) -> Result<()> {
        self.file_servers[0].allow_writes(below, within).await
    }

    /// Brings the number of CPUs as near to `wanted` as it can, and returns how many there are now
    /// ([`Vm::resize_vcpus`]).
    ///
    /// # Errors
    /// QEMU's own, or its death. Some CPUs may have come or gone.
    pub async fn resize_vcpus(&self, wanted: u32, within: Duration) -> Result<u32> {
        self.vm.resize_vcpus(wanted, within).await
    }

    /// Brings the guest's memory as near to `wanted_mib` as it can, and returns how many MiB it has
    /// now ([`Vm::resize_memory`]).
    ///
    /// # Errors
    /// No free PCI slot, QEMU's own, or its death.
    pub async fn resize_memory(&self, wanted_mib: u64, within: Duration) -> Result<u64> {
        self.vm.resize_memory(wanted_mib, within).await
    }

    /// How many MiB of memory the guest has now ([`Vm::memory_mib`]).
    ///
    /// # Errors
    /// QEMU's own, or its death.
    pub async fn memory_mib(&self) -> Result<u64> {
        self.vm.memory_mib().await
    }

    /// Tells the guest that a disk has become larger ([`Vm::resize_disk`]).
    ///
    /// # Errors
    /// No such disk, another size than the host's, or QEMU's own.
    pub async fn resize_disk(&self, id: &str, bytes: u64) -> Result<()> {
        self.vm.resize_disk(id, bytes).await
    }

    /// Whether the guest's vsock driver is up; none if this QEMU cannot tell.
    ///
    /// # Errors
    /// QEMU's death.
    pub async fn has_vsock_driver(&self) -> Result<Option<bool>> {
        self.vm.driver_ok(&self.vsock_id).await
    }

    /// Waits for the end of the first part without which there is no machine, and says in one line
    /// how it came. Any number of callers may wait, at any time.
    pub async fn died(&self) -> String {
        let daemon = async {
            match &self.vsock_daemon {
                Some(daemon) => daemon.process.ended().await,
                None => std::future::pending().await,
            }
        };
        let [first, second] = &self.file_servers;
        let why = tokio::select! {
            death = self.vm.died() => return death.to_string(),
            why = first.process.ended() => why,
            why = second.process.ended() => why,
            why = daemon => why,
        };
        // Helpers end with QEMU's connection, and may be noticed before it: then QEMU's death is
        // the reason.
        match timeout(MACHINE_LAST_WORDS, self.vm.died()).await {
            Ok(death) => death.to_string(),
            Err(_) => why.to_string(),
        }
    }

    /// Ends QEMU, asked first, and then the helpers, which end with it. Waits until all are dead;
    /// what the kernel does not let die is logged. May be called again.
    pub async fn stop(&self) {
        if let Err(error) = self.vm.stop(QEMU_QUIT).await {
            tracing::warn!(%error, "QEMU did not stop in order");
        }
        let daemon = async {
            match &self.vsock_daemon {
                Some(daemon) => daemon.process.kill_and_wait(HELPER_KILL).await.map(drop),
                None => Ok(()),
            }
        };
        let [first, second] = self
            .file_servers
            .each_ref()
            .map(|server| server.stop(HELPER_KILL));
        let (first, second, daemon) = tokio::join!(first, second, daemon);
        for error in [first, second, daemon].into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "a helper did not stop in order");
        }
    }
}
