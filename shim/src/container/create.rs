//! Making one container: its part of the host first, side by side with a guest that may still be
//! booting, then the request to the agent; and the way back.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::types::mount::Mount;
use futures::future::join_all;
use guest_protocol::protocols::agent::{CreateContainerRequest, Device, Storage};
use guest_protocol::{
    GUEST_LAYERS, GUEST_ROOTFS, GUEST_SANDBOX, GUEST_SHARE, POD_PID_PATH, UDS_DRIVER,
    UDS_PORT_OPTION,
};
use oci_spec::runtime::Spec;
use sys::point::{Point, pass, reach};
use tokio::time::{Instant, timeout};
use ttrpc::Code;

use crate::container::devices::{self, Devices};
use crate::container::layers::{self, Part};
use crate::container::role::PidNamespace;
use crate::container::rootfs::{self, Disk, Root};
use crate::container::shared_volumes::SharedVolumes;
use crate::container::volumes::{self, HostSocket, OfPod, Volumes};
use crate::deadlines::{
    DISK_DETACH, DISK_DETACH_AT_LEAST, HOST_MOUNTS, MOUNTS_RELEASE, REMOVE_CONTAINER,
};
use crate::error::{Error, IoContext, Result};
use crate::from_guest::needs_own_agent;
use crate::guest::calls::GuestCalls;
use crate::guest::guest_spec::{self, GuestView};
use crate::guest::host_sockets::{HostSockets, PinnedSocket, Users};
use crate::guest::sockets_below::WatchedDirectory;
use crate::guest::task_process::{TaskProcess, TaskView};
use crate::host::dir::{Dir, Entry};
use crate::host::ledger::Ledger;
use crate::host::mounts::{self, Bind};
use crate::model::Stdio;
use crate::stdio::{GuestIo, HostIo, Pumps};

/// What a client wants to have made.
pub struct CreateContainer {
    pub id: String,
    pub bundle: PathBuf,
    /// Root file system, as containerd's snapshotter gives it.
    pub rootfs: Vec<Mount>,
    pub spec: Spec,
    /// Its input and output.
    pub io: Stdio,
    /// Whose processes it sees.
    pub pid_namespace: PidNamespace,
    /// The container whose first process is the sandbox's, unless the sandbox has none.
    pub first: Option<String>,
    /// Sysctls of its pod.
    pub sysctls: HashMap<String, String>,
    /// Source of the mount that stands for its pod's /dev/shm.
    pub shm: Option<PathBuf>,
    pub pod_uid: Option<String>,
    /// What it writes to its root file system stays in the guest's memory.
    pub root_in_memory: bool,
    /// How large a file system in the guest's memory may become that names no size.
    pub memory_mib: u64,
}

/// Directory in a container's that has the files of its layers.
const LAYERS: &str = "layers";

/// A container's part of the host: what the guest sees of it. Dropping it takes that back.
#[derive(Debug)]
pub struct HostSide {
    /// Held by a mount(2) that is late as well.
    place: Arc<Entry>,
    /// No other container of the sandbox ever has it.
    number: u64,
    /// Where the guest sees the root file system, if it is not on a disk.
    rootfs: String,
    root: Root,
    volumes: Volumes,
    devices: Devices,
}

/// A container that the guest has.
pub struct Container {
    /// The process by whose pid it goes, if the host lets there be one.
    task: Option<TaskProcess>,
    host: HostSide,
    /// Devices plugged in for it, by their ids.
    plugged: Vec<String>,
    /// Names of the host's sockets that it may connect to.
    sockets: Vec<String>,
    /// Its volumes that may have more of them below.
    directories: Vec<Arc<WatchedDirectory>>,
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
        layers::format(&create.rootfs)?;
        let number = shares.next_id();
        let (dir, name, guest_dir) = if rootfs::is_exclusive_overlay(&create.rootfs) {
            // What the guest keeps in its memory has a name that comes only once.
            (&shares.rootfs, number.to_string(), GUEST_ROOTFS)
        } else {
            (&shares.share, create.id.clone(), GUEST_SHARE)
        };
        // From here on the drop of `host` undoes everything.
        let rootfs = format!("{guest_dir}/{name}/{}", rootfs::NAME);
        let (root, volumes) = (Root::of(&create.rootfs)?, Volumes::default());
        let mut host = HostSide {
            place: Entry::new(dir, &name).into(),
            number,
            rootfs,
            root,
            volumes,
            devices,
        };
        match &host.root {
            Root::Directory => host.mount_root(create)?,
            Root::Layers(layers) => {
                let files = dir.make(&name)?.make(LAYERS)?;
                for (number, file) in layers.files().enumerate() {
                    bind_file(file, &files, &number.to_string())?;
                }
            }
            Root::Disk(_) => {}
        }
        reach(Point::RootfsMounted).doing(|| format!("use the root file system of {name}"))?;
        let list = create.spec.mounts().as_deref().unwrap_or_default();
        host.volumes = volumes::prepare(
            list,
            shares,
            OfPod {
                shm: create.shm.as_deref(),
                uid: create.pod_uid.as_deref(),
            },
        )?;
        reach(Point::VolumesBound).doing(|| format!("use the volumes of {name}"))?;
        Ok(host)
    }

    /// Mounts the root file system on the host.
    fn mount_root(&self, create: &CreateContainer) -> Result<()> {
        let of_spec = create.spec.root().as_ref();
        let path = of_spec.map(|root| create.bundle.join(root.path()));
        let dir = self.place.make()?;
        rootfs::mount_all(&create.rootfs, &path.unwrap_or_default(), &dir)
    }

    /// What a process that stands for the container sees of it.
    fn task_view(&self, create: &CreateContainer) -> Result<TaskView> {
        let root = match self.root {
            Root::Directory if !create.root_in_memory => {
                Some(self.place.open()?.get(rootfs::NAME)?.into())
            }
            _ => None,
        };
        let of_spec = create.spec.root().as_ref();
        let process = create.spec.process().as_ref();
        let list = create.spec.mounts().as_deref().unwrap_or_default();
        Ok(TaskView {
            id: create.id.clone(),
            root,
            read_only: of_spec.is_some_and(|root| root.readonly() == Some(true)),
            oom_score_adj: process
                .and_then(|process| process.oom_score_adj())
                .unwrap_or(0),
            mounts: self.volumes.on_host(list)?,
        })
    }
}

/// Asks the guest for the container, its devices plugged in and its stdio connected before.
///
/// # Errors
/// The agent's own words: a missing command, for example. Nothing of the container is left.
pub async fn in_guest(
    guest: &dyn GuestCalls,
    create: &CreateContainer,
    host: HostSide,
    host_io: HostIo,
    ledger: &Ledger,
) -> Result<(Container, Pumps)> {
    let mut container = Container {
        task: None,
        host,
        plugged: Vec::new(),
        sockets: Vec::new(),
        directories: Vec::new(),
        users: Users::default(),
    };
    match container.make(guest, create).await {
        Ok(guest_io) => {
            container.start_task(guest, create, ledger).await;
            Ok((container, Pumps::start(host_io, guest_io)))
        }
        Err(error) => {
            if error.code() == Code::DEADLINE_EXCEEDED {
                // The agent may be at it still.
                let by = Instant::now() + REMOVE_CONTAINER;
                if let Err(error) = guest.remove_container(&create.id, by).await {
                    tracing::warn!(%error, "the guest keeps a container that came too late");
                }
            }
            container.unplug(guest, Instant::now() + DISK_DETACH).await;
            release(vec![container]).await;
            Err(error)
        }
    }
}

impl Container {
    async fn make(&mut self, guest: &dyn GuestCalls, create: &CreateContainer) -> Result<GuestIo> {
        if create
            .spec
            .linux()
            .as_ref()
            .is_some_and(|linux| linux.seccomp().is_some())
            && !guest.features().seccomp
        {
            return Err(needs_own_agent("a seccomp profile"));
        }
        let own_agent = guest.features().pod;
        if !own_agent {
            self.host.volumes.watch_none();
        }
        let mut storages = std::mem::take(&mut self.host.volumes.storages);
        for storage in storages
            .iter_mut()
            .filter(|storage| storage.driver == UDS_DRIVER)
        {
            let port = host_sockets(guest)?.port;
            storage.driver_options = vec![format!("{UDS_PORT_OPTION}{port}")];
        }
        let maps = create
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.uid_mappings().as_ref());
        let has_maps = maps.is_some_and(|maps| !maps.is_empty());
        let first = self.host.volumes.sockets.first();
        if let Some(HostSocket { path, .. }) = first.filter(|_| has_maps) {
            return Err(Error::invalid(format!(
                "mount source {} is a unix socket of the host, and its server would take the \
                 users of a container with a \
                 user namespace (linux.uidMappings) for the host's: leave one of them out",
                path.display()
            )));
        }
        for HostSocket { name, path, kind } in std::mem::take(&mut self.host.volumes.sockets) {
            let doing = || format!("open the directory of the socket {}", path.display());
            let socket = PinnedSocket::mounted(&path, kind, &self.users).doing(doing)?;
            host_sockets(guest)?.sockets.add(&name, socket);
            self.sockets.push(name);
        }
        for volume in self.host.volumes.to_be_writable() {
            guest.allow_writes(volume).await?;
        }
        if !has_maps && let Some(below) = guest.host_sockets().and_then(|host| host.below.as_ref())
        {
            for volume in self.host.volumes.may_have_sockets() {
                let watched = below.watch(volume.open()?, volume.guest_path()).await;
                self.directories.push(watched);
            }
        }
        let process = create.spec.process().as_ref();
        process.inspect(|process| self.runs_as(process.user()));
        let (mut root, rootfs) = self.plug_root(guest, create).await?;
        root.append(&mut storages);
        let (mut storages, mut rootfs) = (root, rootfs);
        if create.root_in_memory {
            rootfs = in_memory(&create.id, create.memory_mib, &rootfs, &mut storages);
        }
        let mut mounts = std::mem::take(&mut self.host.volumes.mounts);
        for mount in mounts.iter_mut().filter(|mount| mount.type_ == "tmpfs") {
            volumes::with_size(&mut mount.options, create.memory_mib);
        }
        let pid_namespace = match &create.pid_namespace {
            PidNamespace::Own => None,
            // A stock agent knows which container was the first.
            PidNamespace::Pod => create.first.as_ref().filter(|_| own_agent),
            PidNamespace::Of(_) if !own_agent => {
                return Err(needs_own_agent("the pid namespace of another container"));
            }
            PidNamespace::Of(id) => Some(id),
        };
        let pid_namespace = pid_namespace.map(|id| format!("{POD_PID_PATH}{id}"));
        let sandbox_pidns = create.pid_namespace == PidNamespace::Pod && pid_namespace.is_none();
        let place = GuestView {
            rootfs,
            mounts,
            devices: std::mem::take(&mut self.host.devices.entries),
            device_rules: std::mem::take(&mut self.host.devices.rules),
            pid_namespace: pid_namespace.unwrap_or_default(),
            sysctls: create.sysctls.clone(),
            cgroup: format!("/cofferdam/{}", create.id),
            seccomp: guest.features().seccomp,
        };
        let request = CreateContainerRequest {
            container_id: create.id.clone(),
            storages,
            devices: self.plug_devices(guest).await?,
            OCI: Some(guest_spec::spec(&create.spec, place)).into(),
            sandbox_pidns,
            ..Default::default()
        };
        let created = guest.create_container(&request, &create.io).await;
        created.map_err(|error| error.context("cannot create the container"))
    }

    /// Starts the process by whose pid the container goes. It has to wait for the guest, which makes
    /// the places of the volumes.
    async fn start_task(
        &mut self,
        guest: &dyn GuestCalls,
        create: &CreateContainer,
        ledger: &Ledger,
    ) {
        let Some(place) = guest.task_place() else {
            return;
        };
        let started = match self.host.task_view(create) {
            Ok(view) => TaskProcess::start(view, &place, ledger).await,
            Err(error) => Err(error),
        };
        match started {
            Ok(task) => self.task = Some(task),
            Err(error) => tracing::warn!(
                %error,
                "/proc/<pid>/root of this container will not be its root file system"
            ),
        }
    }

    /// The process by whose pid it goes.
    pub fn task(&mut self) -> Option<&mut TaskProcess> {
        self.task.as_mut()
    }

    /// What of the root file system the guest mounts itself, and where it is then.
    async fn plug_root(
        &mut self,
        guest: &dyn GuestCalls,
        create: &CreateContainer,
    ) -> Result<(Vec<Storage>, String)> {
        let place = self.host.rootfs.clone();
        let layers = match &self.host.root {
            Root::Directory => return Ok((Vec::new(), place)),
            Root::Disk(disk) => {
                let point = format!("{GUEST_SANDBOX}/rootfs/{}", create.id);
                return Ok((
                    vec![self.plug_disk(guest, disk.clone(), &point).await?],
                    point,
                ));
            }
            Root::Layers(layers) => layers.clone(),
        };
        if !guest.features().images {
            let (list, held) = (create.rootfs.clone(), self.host.place.clone());
            let mounting = move || rootfs::mount_all(&list, Path::new(""), &held.make()?);
            let mounted = timeout(HOST_MOUNTS, tokio::task::spawn_blocking(mounting)).await;
            let late = |_| Error::deadline("the layers were not mounted in time");
            mounted
                .map_err(late)?
                .map_err(|error| Error::internal(error.to_string()))??;
            self.host.root = Root::Directory;
            return Ok((Vec::new(), place));
        }
        let of_this = format!("{GUEST_LAYERS}/{}", self.host.number);
        let points: Vec<String> = (0..layers.len())
            .map(|at| format!("{of_this}/{at}"))
            .collect();
        let files = place.trim_end_matches(rootfs::NAME).to_owned() + LAYERS;
        let mut places = (0..).map(|number: u32| format!("{files}/{number}"));
        let (parts, top) = layers.take_apart(&points)?;
        let mut storages = Vec::new();
        for (part, point) in parts.into_iter().zip(&points) {
            storages.push(match part {
                Part::Disk(disk) => self.plug_disk(guest, disk, point).await?,
                Part::Image {
                    files,
                    fstype,
                    options,
                } => layers::image(places.by_ref().take(files.len()), fstype, options, point),
            });
        }
        let rootfs = layers::on_top(top, format!("{of_this}/root"), &mut storages);
        Ok((storages, rootfs))
    }

    async fn plug_disk(
        &mut self,
        guest: &dyn GuestCalls,
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

    async fn plug_devices(&mut self, guest: &dyn GuestCalls) -> Result<Vec<Device>> {
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
        self.directories.iter().for_each(|one| one.runs_as(user));
    }

    /// Removes the container from the guest, where there still is one, and from the host. The guest
    /// has time until `by`.
    ///
    /// # Errors
    /// The guest may still have it, and what it uses of the host.
    pub async fn remove(
        mut self,
        guest: Option<Arc<dyn GuestCalls>>,
        id: &str,
        by: Instant,
    ) -> Result<()> {
        let mut removed = Ok(());
        if let Some(guest) = guest {
            // Whatever becomes of the guest, the host gets its directories back.
            self.forget_sockets(&*guest);
            removed = guest.remove_container(id, by).await;
            if removed.is_ok() {
                self.unplug(&*guest, by).await;
            }
        }
        release(vec![self]).await;
        removed.map_err(|error| {
            error.context(format!(
                "the guest did not remove the container {id}, so the virtual machine was ended"
            ))
        })
    }

    fn forget_sockets(&mut self, guest: &dyn GuestCalls) {
        self.directories.clear();
        for name in self.sockets.drain(..) {
            if let Some(host) = guest.host_sockets() {
                host.sockets.remove(&name);
            }
        }
    }

    async fn unplug(&mut self, guest: &dyn GuestCalls, by: Instant) {
        self.forget_sockets(guest);
        let time = by
            .saturating_duration_since(Instant::now())
            .clamp(DISK_DETACH_AT_LEAST, DISK_DETACH);
        let detached = self
            .plugged
            .drain(..)
            .map(|id| async move { guest.detach_disk(&id, time).await });
        for error in join_all(detached).await.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "a disk stays in the virtual machine; the guest is asked for it again");
        }
    }
}

/// Gives up containers' parts of the host. umount(2) may wait for a slow disk, which must not hold
/// up other requests, and for one that is gone for ever, which must not hold up this one.
pub async fn release(mut containers: Vec<Container>) {
    // They have the same mounts.
    let tasks = containers.iter_mut().filter_map(|one| one.task.take());
    join_all(tasks.map(TaskProcess::end)).await;
    let released = tokio::task::spawn_blocking(move || {
        pass(Point::Unmounting);
        drop(containers);
    });
    if timeout(MOUNTS_RELEASE, released).await.is_err() {
        tracing::warn!(
            "a storage on the host hangs: a container's mounts stay until it lets go of them"
        );
    }
}

/// Puts a file system in memory over a root file system; returns where that is in the guest.
fn in_memory(id: &str, mib: u64, lower: &str, storages: &mut Vec<Storage>) -> String {
    let (memory, root) = (
        format!("{GUEST_SANDBOX}/memory/{id}"),
        format!("{GUEST_SANDBOX}/root/{id}"),
    );
    let dirs = ["upper", "work"].map(|name| (name, format!("{memory}/{name}")));
    let create = "io.katacontainers.volume.overlayfs.create_directory";
    // The root file system is a mount of its own below the share, which the guest's kernel makes when
    // a path leads through it, not to it.
    let lower = format!("lowerdir={lower}/.");
    let layers = dirs.iter().map(|(name, dir)| format!("{name}dir={dir}"));
    let overlay = Storage {
        driver: "overlayfs".to_owned(),
        source: "overlay".to_owned(),
        fstype: "overlay".to_owned(),
        options: layers.chain([lower]).collect(),
        driver_options: dirs
            .iter()
            .map(|(_, dir)| format!("{create}={dir}"))
            .collect(),
        mount_point: root.clone(),
        ..Default::default()
    };
    let memory = Storage {
        driver: "ephemeral".to_owned(),
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: vec![format!("size={mib}m"), "mode=755".to_owned()],
        mount_point: memory,
        ..Default::default()
    };
    // After a disk that has the root file system.
    storages.extend([memory, overlay]);
    root
}

/// Lets the guest read a file.
fn bind_file(file: &Path, dir: &Dir, name: &str) -> Result<()> {
    let how = Bind {
        read_only: true,
        ..Bind::default()
    };
    dir.make_file(name)?;
    let place = dir.hold(name)?;
    let bound = mounts::hold(file).and_then(|file| mounts::bind(&file, &place, how));
    bound.doing(|| format!("share the layer {}", file.display()))
}

fn host_sockets(guest: &dyn GuestCalls) -> Result<&HostSockets> {
    let missing = || needs_own_agent("a unix socket of the host as a volume");
    guest.host_sockets().ok_or_else(missing)
}
