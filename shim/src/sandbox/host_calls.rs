//! The seam between the sandbox's owner and the host: what takes time there, or root. [`ThisHost`]
//! does it, the double of the owner's tests does what a test wants to happen.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::container::create::{CreateContainer, HostSide};
use crate::container::shared_volumes::SharedVolumes;
use crate::deadlines::HOST_MOUNTS;
use crate::error::{Error, Result};
use crate::guest::boot::{self, BootConfig, ROOTFS, SHARE, served};
use crate::guest::calls::GuestCalls;
use crate::host::dir::Dir;
use crate::host::ledger::Ledger;
use crate::host::mounts;

/// What a sandbox has of the host.
#[async_trait]
pub trait HostCalls: Send + Sync {
    /// Makes the directories that the guest sees, in the sandbox's own.
    ///
    /// # Errors
    /// A directory cannot be made.
    fn share(&self, ledger: &Ledger) -> Result<SharedVolumes>;

    /// Brings a guest up.
    ///
    /// # Errors
    /// One line; nothing that was started is left.
    async fn launch(&self, config: BootConfig, ledger: Arc<Ledger>) -> Result<Arc<dyn GuestCalls>>;

    /// Mounts a container's part of the host where the guest will see it.
    ///
    /// # Errors
    /// One line; nothing stays mounted.
    async fn prepare(
        &self,
        create: CreateContainer,
        shares: Arc<SharedVolumes>,
    ) -> Result<(CreateContainer, HostSide)>;
}

/// The host that the shim runs on.
pub struct ThisHost;

#[async_trait]
impl HostCalls for ThisHost {
    fn share(&self, ledger: &Ledger) -> Result<SharedVolumes> {
        let state = Dir::open(ledger.dir())?;
        let make = |name: &str| {
            // An attempt before this one may have got half-way.
            state
                .unmount(name)
                .and_then(|()| state.unmount(&served(name)))?;
            mounts::make_served(&state, name, &served(name))
        };
        Ok(SharedVolumes::new(make(SHARE)?, make(ROOTFS)?))
    }

    async fn launch(&self, config: BootConfig, ledger: Arc<Ledger>) -> Result<Arc<dyn GuestCalls>> {
        let guest = boot::launch(&config, &ledger).await?;
        Ok(Arc::new(guest))
    }

    async fn prepare(
        &self,
        create: CreateContainer,
        shares: Arc<SharedVolumes>,
    ) -> Result<(CreateContainer, HostSide)> {
        // mount(2) may wait for a slow disk, which must not hold up other requests, and for one
        // that is gone for ever, which must not hold up this one: what it makes so late is undone
        // by its drop.
        let id = create.id.clone();
        let mounting = tokio::task::spawn_blocking(move || {
            HostSide::prepare(&create, &shares).map(|host| (create, host))
        });
        match timeout(HOST_MOUNTS, mounting).await {
            Ok(mounted) => mounted.map_err(|error| Error::internal(error.to_string()))?,
            Err(_) => Err(Error::deadline(format!(
                "the mounts of {id} took longer than {HOST_MOUNTS:?}: a storage on the host \
                 hangs"
            ))),
        }
    }
}
