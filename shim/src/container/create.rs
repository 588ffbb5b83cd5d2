//! Making one container: its part of the host first, side by side with a guest that may still be booting, then the
//! request to the agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_client::protocols::agent::{CreateContainerRequest, RemoveContainerRequest};
use agent_client::{GUEST_SHARE, context};
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::to_proto::{self, Place};
use super::{rootfs, volumes};
use crate::error::{Error, IoContext, Result};
use crate::sandbox::launch::Guest;
use crate::sandbox::mounts;
use crate::sandbox::state::{Io, Key};
use crate::stdio::{GuestIo, HostIo, Pumps};

/// How long the guest may take to make a container.
const CREATE_DEADLINE: Duration = Duration::from_secs(60);

/// How long the guest may take to remove one.
const REMOVE_DEADLINE: Duration = Duration::from_secs(10);

/// A container's part of the host: mounts below the shared directory. Dropping it takes them off.
#[derive(Debug)]
pub struct Host {
    dir: PathBuf,
    mounts: Vec<agent_client::protocols::oci::Mount>,
}

/// A container's directory under the share: one level, so that an id is never mistaken for something else there.
fn guest_dir(id: &str) -> String {
    format!("{GUEST_SHARE}/{id}")
}

impl Host {
    /// Mounts root file system and volumes where the guest will see them.
    ///
    /// # Errors
    /// One line; nothing stays mounted.
    pub fn prepare(share: &Path, id: &str, bundle: &Path, rootfs: &[Mount], spec: &Spec) -> Result<Host> {
        let dir = share.join(id);
        std::fs::create_dir_all(&dir).doing(|| format!("make directory {}", dir.display()))?;
        // From here on the drop of `host` undoes everything.
        let mut host = Host { dir, mounts: Vec::new() };
        let root = spec.root().as_ref().map(|root| bundle.join(root.path())).unwrap_or_default();
        rootfs::mount_all(rootfs, &root, &host.dir.join("rootfs"))?;
        let list = spec.mounts().as_deref().unwrap_or_default();
        host.mounts = volumes::share_all(list, &host.dir, &guest_dir(id))?;
        Ok(host)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Err(error) = mounts::remove_tree(&self.dir) {
            tracing::warn!(%error, "a container's mounts are left until the sandbox ends");
        }
    }
}

/// Asks the guest for the container, its stdio connected before.
///
/// # Errors
/// The agent's own words: a missing command, for example.
pub async fn in_guest(
    guest: &Arc<Guest>,
    id: &str,
    host: &mut Host,
    spec: &Spec,
    io: &Io,
    host_io: HostIo,
) -> Result<Pumps> {
    let key = Key::new(id, "");
    if spec.linux().as_ref().is_some_and(|linux| linux.seccomp().is_some()) && !guest.seccomp {
        tracing::warn!("the guest agent has no seccomp: the container's profile is not applied");
    }
    let place = Place {
        rootfs: format!("{}/rootfs", guest_dir(id)),
        mounts: std::mem::take(&mut host.mounts),
        cgroup: format!("/cofferdam/{id}"),
        seccomp: guest.seccomp,
    };
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let shared_pids = namespaces.is_some_and(|list| {
        list.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_some())
    });
    let request = CreateContainerRequest {
        container_id: id.to_owned(),
        OCI: Some(to_proto::spec(spec, place)).into(),
        sandbox_pidns: shared_pids,
        ..Default::default()
    };
    let raw = match guest.raw_stdio {
        true => Some(GuestIo::raw(&guest.transport, &key, io).await?),
        false => None,
    };
    guest
        .agent
        .agent
        .create_container(context(Some(CREATE_DEADLINE)), &request)
        .await
        .map_err(|error| explain(error.into()))?;
    let guest_io = raw.unwrap_or_else(|| GuestIo::polled(&guest.agent, &key, io));
    Ok(Pumps::start(host_io, guest_io))
}

/// The agent answers `INTERNAL` to most things; a command that is not in the image is the client's mistake.
fn explain(error: Error) -> Error {
    Error { message: format!("cannot create the container: {}", error.message), ..error }
}

/// Removes the container from the guest. A guest that is gone has nothing to remove.
pub async fn remove_from_guest(guest: &Guest, id: &str) {
    let request = RemoveContainerRequest { container_id: id.to_owned(), ..Default::default() };
    if let Err(error) = guest.agent.agent.remove_container(context(Some(REMOVE_DEADLINE)), &request).await {
        tracing::warn!(%error, id, "the guest did not remove the container");
    }
}
