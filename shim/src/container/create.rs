//! Making one container: its part of the host first, side by side with a guest that may still be
//! booting, then the request to the agent; and the way back.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::types::mount::Mount;
use futures::future::join_all;
use guest_protocol::protocols::agent::{
    CreateContainerRequest, Device, RemoveContainerRequest, Storage,
};
use guest_protocol::{
    GUEST_ROOTFS, GUEST_SANDBOX, GUEST_SHARE, POD_PID_PATH, UDS_DRIVER, UDS_PORT_OPTION, deadlines,
};
use oci_spec::runtime::Spec;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::Code;

use crate::container::devices::{self, Devices};
use crate::container::role::PidNamespace;
use crate::container::rootfs::{self, Disk};
use crate::container::shared_volumes::SharedVolumes;
use crate::container::volumes::{self, OfPod, Volumes};
use crate::error::{Error, IoContext, Result};
use crate::guest::boot::Guest;
use crate::guest::ending::RELEASE_DEADLINE;
use crate::guest::guest_spec::{self, GuestView};
use crate::guest::host_sockets::Users;
use crate::host::dir::Entry;
use crate::model::{ProcessId, Stdio};
use crate::stdio::{GuestIo, HostIo, Pumps};

/// Before the guest is asked once more to remove one: an exec of it may be on its way.
const REMOVE_PAUSE: Duration = Duration::from_millis(100);

/// How long the guest may take to let go of a disk, and how little it has when time is short.
const DETACH_DEADLINE: Duration = Duration::from_secs(5);
const LEAST_TO_DETACH: Duration = Duration::from_millis(500);

/// What a client wants to have made.
pub struct CreateContainer {
    /// The container.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Root file system, as containerd's snapshotter gives it.
    pub rootfs: Vec<Mount>,
    /// The OCI spec.
    pub spec: Spec,
    /// Its input and output.
    pub io: Stdio,
    /// Whose processes it sees.
    pub pid_namespace: PidNamespace,
    /// Sysctls of its pod.
    pub sysctls: HashMap<String, String>,
    /// Source of the mount that stands for its pod's /dev/shm.
    pub shm: Option<PathBuf>,
    /// Its pod's uid.
    pub pod_uid: Option<String>,
}

/// A container's part of the host: what the guest sees of it. Dropping it takes that back.
#[derive(Debug)]
pub struct HostSide {
    /// Its directory.
    _place: Entry,
    /// Where the guest sees the root file system, if it is not on a disk.
    rootfs: String,
    disk: Option<Disk>,
    volumes: Volumes,
    devices: Devices,
}

/// A container that the guest has.
pub struct Container {
    host: HostSide,
    /// Devices plugged in for it, by their ids.
    plugged: Vec<String>,
    /// Names of the host's sockets that it may connect to.
    sockets: Vec<String>,
    /// As whom its processes may speak to them.
    users: Users,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Container({:?})", self.host)
    }
}

impl HostSide {
    /// Mounts root file system and volumes where the guest will see them.
    ///
    /// # Errors
    /// One line; nothing stays mounted.
    pub fn prepare(create: &CreateContainer, shares: &SharedVolumes) -> Result<HostSide> {
        let devices = devices::classify(&create.spec)?;
        let (dir, name, guest_dir) = match rootfs::is_exclusive_overlay(&create.rootfs) {
            // What the guest keeps in its memory has a name that comes only once.
            true => (&shares.rootfs, shares.next_id().to_string(), GUEST_ROOTFS),
            false => (&shares.share, create.id.clone(), GUEST_SHARE),
        };
        // From here on the drop of `host` undoes everything.
        let rootfs = format!("{guest_dir}/{name}/{}", rootfs::NAME);
        let (disk, volumes) = (rootfs::disk(&create.rootfs), Volumes::default());
        let mut host = HostSide {
            _place: Entry::new(dir, &name),
            rootfs,
            disk,
            volumes,
            devices,
        };
        if host.disk.is_none() {
            let root = create
                .spec
                .root()
                .as_ref()
                .map(|root| create.bundle.join(root.path()))
                .unwrap_or_default();
            rootfs::mount_all(&create.rootfs, &root, &dir.make(&name)?)?;
        }
        let list = create.spec.mounts().as_deref().unwrap_or_default();
        host.volumes = volumes::prepare(
            list,
            shares,
            OfPod {
                shm: create.shm.as_deref(),
                uid: create.pod_uid.as_deref(),
            },
        )?;
        Ok(host)
    }
}

/// Asks the guest for the container, its devices plugged in and its stdio connected before.
///
/// # Errors
/// The agent's own words: a missing command, for example. Nothing of the container is left.
pub async fn in_guest(
    guest: &Arc<Guest>,
    create: &CreateContainer,
    host: HostSide,
    host_io: HostIo,
) -> Result<(Container, Pumps)> {
    let mut container = Container {
        host,
        plugged: Vec::new(),
        sockets: Vec::new(),
        users: Users::default(),
    };
    match container.make(guest, create).await {
        Ok(guest_io) => Ok((container, Pumps::start(host_io, guest_io))),
        Err(error) => {
            if error.code == Code::DEADLINE_EXCEEDED {
                // The agent may be at it still.
                let by = Instant::now() + deadlines::REMOVE_CONTAINER;
                if let Err(error) = remove_in_guest(guest, &create.id, by).await {
                    tracing::warn!(%error, "the guest keeps a container that came too late");
                }
            }
            container
                .unplug(guest, Instant::now() + DETACH_DEADLINE)
                .await;
            release(vec![container]).await;
            Err(error)
        }
    }
}

impl Container {
    async fn make(&mut self, guest: &Arc<Guest>, create: &CreateContainer) -> Result<GuestIo> {
        let key = ProcessId::new(&create.id, "");
        if create
            .spec
            .linux()
            .as_ref()
            .is_some_and(|linux| linux.seccomp().is_some())
            && !guest.seccomp
        {
            return Err(needs_own_agent("a seccomp profile"));
        }
        create
            .spec
            .process()
            .iter()
            .for_each(|process| self.runs_as(process.user()));
        let mut storages = std::mem::take(&mut self.host.volumes.storages);
        for storage in storages
            .iter_mut()
            .filter(|storage| storage.driver == UDS_DRIVER)
        {
            let port = guest
                .sockets_port
                .ok_or_else(|| needs_own_agent("a unix socket of the host as a volume"))?;
            storage.driver_options = vec![format!("{UDS_PORT_OPTION}{port}")];
        }
        let maps = create
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.uid_mappings().as_ref());
        if let Some((_, path)) = self
            .host
            .volumes
            .sockets
            .first()
            .filter(|_| maps.is_some_and(|maps| !maps.is_empty()))
        {
            return Err(Error::invalid(format!(
                "mount source {} is a unix socket of the host, and its server would take the \
                 users of a container with a \
                 user namespace (linux.uidMappings) for the host's: leave one of them out",
                path.display()
            )));
        }
        for (name, path) in std::mem::take(&mut self.host.volumes.sockets) {
            let doing = || format!("open the directory of the socket {}", path.display());
            guest.sockets.add(&name, &path, &self.users).doing(doing)?;
            self.sockets.push(name);
        }
        let mut rootfs = std::mem::take(&mut self.host.rootfs);
        if let Some(disk) = self.host.disk.clone() {
            rootfs = format!("{GUEST_SANDBOX}/rootfs/{}", create.id);
            storages.insert(0, self.plug_rootfs(guest, disk, &rootfs).await?);
        }
        let place = GuestView {
            rootfs,
            mounts: std::mem::take(&mut self.host.volumes.mounts),
            devices: std::mem::take(&mut self.host.devices.entries),
            device_rules: std::mem::take(&mut self.host.devices.rules),
            pid_namespace: match &create.pid_namespace {
                PidNamespace::Own | PidNamespace::Pod => String::new(),
                PidNamespace::Of(_) if !guest.pod => {
                    return Err(needs_own_agent("the pid namespace of another container"));
                }
                PidNamespace::Of(id) => format!("{POD_PID_PATH}{id}"),
            },
            sysctls: create.sysctls.clone(),
            cgroup: format!("/cofferdam/{}", create.id),
            seccomp: guest.seccomp,
        };
        let request = CreateContainerRequest {
            container_id: create.id.clone(),
            storages,
            devices: self.plug_devices(guest).await?,
            OCI: Some(guest_spec::spec(&create.spec, place)).into(),
            sandbox_pidns: create.pid_namespace == PidNamespace::Pod,
            ..Default::default()
        };
        let raw = match guest.raw_stdio {
            true => Some(GuestIo::raw(&guest.transport, &key, &create.io).await?),
            false => None,
        };
        let created = guest
            .agent
            .create_container(&request, deadlines::CREATE_CONTAINER)
            .await;
        created.map_err(|error| error.context("cannot create the container"))?;
        Ok(raw.unwrap_or_else(|| GuestIo::polled(&guest.agent, &key, &create.io)))
    }

    async fn plug_rootfs(
        &mut self,
        guest: &Guest,
        disk: Disk,
        mount_point: &str,
    ) -> Result<Storage> {
        let attached = guest.attach_disk(&disk.path, None, disk.read_only).await?;
        self.plugged.push(attached.id);
        Ok(Storage {
            driver: "blk".to_owned(),
            source: attached.pci_path,
            fstype: disk.fstype,
            options: disk.options,
            mount_point: mount_point.to_owned(),
            ..Default::default()
        })
    }

    async fn plug_devices(&mut self, guest: &Guest) -> Result<Vec<Device>> {
        let mut devices = Vec::new();
        for disk in std::mem::take(&mut self.host.devices.disks) {
            let attached = guest
                .attach_disk(&disk.path, Some(disk.number), disk.read_only)
                .await?;
            self.plugged.push(attached.id);
            devices.push(Device {
                id: attached.pci_path,
                type_: "blk".to_owned(),
                container_path: disk.container_path,
                ..Default::default()
            });
        }
        Ok(devices)
    }

    /// Lets processes of this user speak to the host's sockets: the container's first or an exec.
    pub fn runs_as(&self, user: &oci_spec::runtime::User) {
        self.users.add(user);
    }

    /// Removes the container from the guest, where there still is one, and from the host. The guest
    /// has time until `by`.
    ///
    /// # Errors
    /// The guest may still have it, and what it uses of the host.
    pub async fn remove(mut self, guest: Option<Arc<Guest>>, id: &str, by: Instant) -> Result<()> {
        let mut removed = Ok(());
        if let Some(guest) = guest {
            // Whatever becomes of the guest, the host gets its directories back.
            self.forget_sockets(&guest);
            removed = remove_in_guest(&guest, id, by).await;
            if removed.is_ok() {
                self.unplug(&guest, by).await;
            }
        }
        release(vec![self]).await;
        removed
    }

    fn forget_sockets(&mut self, guest: &Guest) {
        self.sockets
            .drain(..)
            .for_each(|name| guest.sockets.remove(&name));
    }

    async fn unplug(&mut self, guest: &Guest, by: Instant) {
        self.forget_sockets(guest);
        let time = by
            .saturating_duration_since(Instant::now())
            .clamp(LEAST_TO_DETACH, DETACH_DEADLINE);
        let detached = self
            .plugged
            .drain(..)
            .map(|id| async move { guest.vm.detach(&id, time).await });
        for error in join_all(detached)
            .await
            .into_iter()
            .filter_map(std::result::Result::err)
        {
            tracing::warn!(%error, "a disk stays in the virtual machine until the sandbox ends");
        }
    }
}

async fn remove_in_guest(guest: &Guest, id: &str, by: Instant) -> Result<()> {
    let request = RemoveContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    let asking = async {
        loop {
            let left = by
                .saturating_duration_since(Instant::now())
                .max(REMOVE_PAUSE);
            match guest.agent.remove_container(&request, left).await {
                Err(error) if error.code == Code::NOT_FOUND => return Ok(()),
                Err(error) if Instant::now() + REMOVE_PAUSE < by => {
                    tracing::debug!(%error, id, "the guest is asked again to remove the container");
                    sleep(REMOVE_PAUSE).await;
                }
                result => return result,
            }
        }
    };
    tokio::select! {
        result = asking => result.map_err(|error| {
            error.context(format!("the guest did not remove the container {id}, so the virtual machine was ended"))
        }),
        // That is the end of the machine anyway.
        _ = guest.agent.failed() => Ok(()),
    }
}

/// Gives up containers' parts of the host. umount(2) may wait for a slow disk, which must not hold
/// up other requests, and for one that is gone for ever, which must not hold up this one.
pub async fn release(containers: Vec<Container>) {
    let released = tokio::task::spawn_blocking(move || drop(containers));
    if timeout(RELEASE_DEADLINE, released).await.is_err() {
        tracing::warn!(
            "a storage on the host hangs: a container's mounts stay until it lets go of them"
        );
    }
}

fn needs_own_agent(what: &str) -> Error {
    Error::unimplemented(format!(
        "{what} needs Cofferdam's own guest agent: use the initramfs of this installation"
    ))
}
