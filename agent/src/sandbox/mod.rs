//! The sandbox: which containers and storages there are.
//!
//! ```text
//!  server ──> Sandbox
//!               ├─ state: Mutex<State>
//!               │    ├─ containers    by id
//!               │    ├─ busy          ids whose container is being made or removed
//!               │    ├─ storages      mounts, counted by their users
//!               │    ├─ parking       stdio streams that came before their process
//!               │    ├─ seccomp       compiled profiles
//!               │    └─ removed       paths of shares to be looked up again (removed_paths)
//!               ├─ pod_init           PID 1 of the shared pid namespace, once it is needed
//!               └─ oom                events that wait for GetOOMEvent
//!
//!  CreateContainer: reserve the id ─ mount storages ─ enter volumes ─ place devices
//!                   ─ pid namespace ─ cgroup with limits ─ Container::create ─ watch OOM, exit
//!  RemoveContainer: reserve the id ─ Container::remove ─ release storages ─ look paths up again
//! ```
//!
//! Each process that is made has a task that waits for its exit and publishes it
//! (`publish_exit_when_done`): first the kill of what the first process leaves behind, then the OOM
//! event, then the exit.
//!
//! Rules that a change must not break:
//!
//! * All state is behind one lock, which is held over no await and no lookup in a share. A lookup,
//!   like the unmount of a share, can wait for the host's file server, and the agent's one thread
//!   waits with it; the host ends a guest that hangs so.
//! * An id is reserved while its container is made or removed, so a request never sees half of one.
//! * A creation that fails releases what it mounted and removes its cgroup.
//! * A removal that fails leaves the container, and can be tried again.
//! * Two containers that use one volume use one mount of it (`enter_volume`).

mod devices;
mod removed_paths;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use guest_protocol::protocols::agent::{CreateContainerRequest, CreateSandboxRequest, Storage};
use guest_protocol::protocols::oci;
use guest_protocol::stdio::Header;
use guest_protocol::{
    GUEST_SANDBOX, GUEST_SHARE, POD_PID_PATH, Stream, Transport, UDS_BELOW_DRIVER,
};
use nix::fcntl::OFlag;
use sys::lock;
use sys::mount::{Attributes, Extent};
use tokio::time::Instant;

use self::removed_paths::RemovedPaths;
use crate::cgroup;
use crate::cgroup::Cgroup;
use crate::container::{
    Container, Parts, PodInit, Process, SeccompCache, Started, oom, privileged,
};
use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::guest::reaper::Reaper;
use crate::log::log;
use crate::stdio::{Claimed, Parking};
use crate::stock::STOCK;
use crate::storage::{Cleanup, SocketsBelow, Storages, mount_storage, update_ephemeral};

/// Which pid namespace a container asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PidNamespace {
    Own,
    /// That of the pod.
    Pod,
}

/// What a process is in its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Init,
    Exec,
}

/// The one sandbox of this guest.
#[derive(Debug)]
pub struct Sandbox {
    /// The cgroup below which those of containers are made.
    pub cgroups: PathBuf,
    /// How long a hot-plugged device may take to appear.
    pub hotplug_timeout: Duration,
    /// For sockets of the host.
    pub host: Transport,
    reaper: Reaper,
    /// OOM kills that nobody has fetched yet.
    pub oom: Arc<oom::Queue>,
    state: Mutex<State>,
    /// Sockets of the host below volumes. Its lock is held over lookups in a share.
    sockets_below: Mutex<SocketsBelow>,
    /// PID 1 of the pid namespace that containers share, once one of them does. Held while it is
    /// made.
    pod_init: tokio::sync::Mutex<Option<PodInit>>,
}

#[derive(Debug, Default)]
struct State {
    created: bool,
    containers: HashMap<String, Arc<Container>>,
    /// Ids whose container is being made or removed.
    busy: HashSet<String>,
    storages: Storages,
    seccomp: SeccompCache,
    parking: Parking,
    removed: RemovedPaths,
    /// The sandbox's own id: a container of this name is its pause container.
    id: Option<String>,
    /// The first container, which is the pause container of a stock agent's sandbox.
    first: Option<String>,
}

/// A container id that no other request can use; given up by its drop.
struct Reservation<'a>(&'a Sandbox, &'a str);

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).busy.remove(self.1);
    }
}

impl Sandbox {
    /// A sandbox without anything in it.
    pub fn new(
        cgroups: PathBuf,
        hotplug_timeout: Duration,
        host: Transport,
        reaper: Reaper,
    ) -> Arc<Sandbox> {
        Arc::new(Sandbox {
            cgroups,
            hotplug_timeout,
            host,
            reaper,
            oom: Arc::default(),
            state: Mutex::default(),
            sockets_below: Mutex::default(),
            pod_init: tokio::sync::Mutex::default(),
        })
    }

    /// Names the guest and mounts what its containers share.
    ///
    /// # Errors
    /// A second sandbox, kernel modules, a hostname or a storage that is refused.
    pub async fn create(&self, request: &CreateSandboxRequest) -> Result<()> {
        if std::mem::replace(&mut lock(&self.state).created, true) {
            return Err(Error::Failed("the sandbox exists already".into()));
        }
        lock(&self.state).id = Some(request.sandbox_id.clone()).filter(|id| !id.is_empty());
        let made = self.set_up(request).await;
        if made.is_err() {
            let mut state = lock(&self.state);
            state.storages.clear();
            state.created = false;
        }
        made
    }

    async fn set_up(&self, request: &CreateSandboxRequest) -> Result<()> {
        if let Some(module) = request.kernel_modules.first() {
            let name = &module.name;
            return Err(Error::Invalid(format!(
                "kernel module {name}: the guest kernel has everything built in"
            )));
        }
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname)
                .context(|| format!("set hostname {}", request.hostname))?;
        }
        fs::create_dir_all(GUEST_SANDBOX).context(|| format!("create {GUEST_SANDBOX}"))?;
        for storage in &request.storages {
            self.mount(storage).await?;
        }
        if !request.dns.is_empty() {
            let lines: Vec<&str> = request.dns.iter().map(|line| line.trim()).collect();
            let file = format!("{GUEST_SANDBOX}/resolv.conf");
            fs::write(&file, lines.join("\n") + "\n").context(|| format!("write {file}"))?;
        }
        Ok(())
    }

    async fn mount(&self, storage: &Storage) -> Result<()> {
        if lock(&self.state).storages.reuse(storage) {
            return Ok(());
        }
        let made = mount_storage(storage, self.hotplug_timeout, &self.host).await?;
        lock(&self.state).storages.add(storage, made);
        Ok(())
    }

    /// Changes options, such as the size, of storages in the guest's memory, and which sockets of
    /// the host there are below a volume.
    ///
    /// # Errors
    /// A storage that is not there or of another kind, or an option that the kernel refuses.
    pub fn update_ephemeral(&self, storages: &[Storage]) -> Result<()> {
        if let [storage] = storages
            && storage.driver == UDS_BELOW_DRIVER
        {
            return lock(&self.sockets_below).update(storage, &self.host);
        }
        {
            let state = lock(&self.state);
            for storage in storages {
                state.storages.check_mounted(storage)?;
            }
        }
        update_ephemeral(storages)
    }

    /// Steps into a shared volume, because virtio-fs mounts the volume's file system at the first
    /// lookup in it. That has to be in the agent's mount namespace: in a container's own, each
    /// container would get a file system of its own, with sockets, locks and mappings of its own.
    fn enter_volume(&self, path: &str) -> Result<()> {
        let storage = Storage {
            mount_point: path.to_owned(),
            ..Default::default()
        };
        if lock(&self.state).storages.reuse(&storage) {
            return Ok(());
        }
        // These ask the host's file server: not under the lock.
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
        let attempt = || format!("open the shared volume {path}");
        let inside = device(Path::new(path)).context(attempt)?;
        let outside = Path::new(path)
            .parent()
            .map_or(Ok(inside), device)
            .context(attempt)?;
        let cleanup = if inside == outside {
            Cleanup::Nothing
        } else {
            // Sockets of the host that are mounted in it later are to appear in containers.
            let shared = Attributes::propagation(libc::MS_SHARED);
            set_attributes_at(Path::new(path), &shared).context(attempt)?;
            Cleanup::Unmount
        };
        lock(&self.state).storages.add(&storage, cleanup);
        Ok(())
    }

    /// Makes a container; its first process waits for [`Container::start`].
    ///
    /// # Errors
    /// The step that failed; then nothing of the container is left.
    pub async fn create_container(
        self: &Arc<Self>,
        mut request: CreateContainerRequest,
    ) -> Result<()> {
        let id = std::mem::take(&mut request.container_id);
        check_id(&id)?;
        let _reservation = self.reserve(&id)?;
        self.revalidate_removed_paths();
        let mut mounted = Vec::with_capacity(request.storages.len());
        let made = self.make_container(&id, &mut request, &mut mounted).await;
        if made.is_err() {
            let mut state = lock(&self.state);
            for mount_point in &mounted {
                state.storages.release(mount_point);
            }
        }
        made
    }

    async fn make_container(
        self: &Arc<Self>,
        id: &str,
        request: &mut CreateContainerRequest,
        mounted: &mut Vec<String>,
    ) -> Result<()> {
        for storage in &request.storages {
            self.mount(storage).await?;
            mounted.push(storage.mount_point.clone());
        }
        let mut spec = request
            .OCI
            .take()
            .ok_or_else(|| Error::Invalid("the request has no OCI spec".into()))?;
        for mount in spec
            .Mounts
            .iter()
            .filter(|mount| Path::new(&mount.source).starts_with(GUEST_SHARE))
        {
            if !STOCK {
                self.enter_volume(&mount.source)?;
                mounted.push(mount.source.clone());
            }
        }
        devices::place(&request.devices, &mut spec, self.hotplug_timeout).await?;
        let pid_namespace = self
            .pid_namespace(
                id,
                if request.sandbox_pidns {
                    PidNamespace::Pod
                } else {
                    PidNamespace::Own
                },
                &mut spec,
            )
            .await?;
        privileged::add_devices(&mut spec);
        let (claimed, seccomp) = {
            let mut state = lock(&self.state);
            let profile = spec.Linux.as_ref().and_then(|linux| linux.Seccomp.as_ref());
            let seccomp = profile
                .map(|profile| state.seccomp.filter(profile))
                .transpose()?;
            (state.parking.claim(id, None), seccomp)
        };
        let cgroup = Cgroup::create(&self.cgroups, id)?;
        let parts = Parts {
            id,
            spec: &spec,
            seccomp,
            pid_namespace: pid_namespace.as_ref(),
            storages: mounted.clone(),
            claimed,
            reaper: &self.reaper,
        };
        let created = match restrict(&cgroup, &spec).await {
            Ok(()) => Container::create(parts, cgroup).await,
            Err(error) => Err((error, cgroup)),
        };
        let (container, started) = match created {
            Ok(made) => made,
            Err((error, cgroup)) => {
                let by = Instant::now() + deadlines::FAILED_CREATE_CLEANUP;
                if let Err(left) = cgroup.remove(by).await {
                    log!("{id}: {left}");
                }
                return Err(error);
            }
        };
        let container = Arc::new(container);
        {
            let mut state = lock(&self.state);
            state.first.get_or_insert_with(|| id.to_owned());
            state.containers.insert(id.to_owned(), container.clone());
        }
        if !STOCK || lock(&self.state).id.as_deref() != Some(id) {
            oom::watch(&self.oom, &container);
        }
        self.clone()
            .publish_exit_when_done(container, started, Role::Init);
        Ok(())
    }

    /// The pid namespace to join: the pod's, or that of the container which the spec's entry names.
    /// `None` is a new one.
    async fn pid_namespace(
        &self,
        id: &str,
        wanted: PidNamespace,
        spec: &mut oci::Spec,
    ) -> Result<Option<OwnedFd>> {
        let entries = spec
            .Linux
            .as_mut()
            .map(|linux| linux.Namespaces.as_mut_slice())
            .unwrap_or_default();
        let entry = entries.iter_mut().find(|entry| entry.Type == "pid");
        if STOCK && entry.is_some() {
            return Err(Error::Failed("no exec could join the pid namespace".into()));
        }
        if let Some(target) = entry
            .as_ref()
            .and_then(|entry| entry.Path.strip_prefix(POD_PID_PATH))
            .map(str::to_owned)
        {
            let namespace = pid_namespace_of(self.container(&target)?.as_ref())?;
            if let Some(entry) = entry {
                entry.Path.clear();
            }
            return Ok(Some(namespace));
        }
        if wanted == PidNamespace::Own {
            return Ok(None);
        }
        let pause = {
            let state = lock(&self.state);
            let pause = if STOCK { &state.first } else { &state.id };
            if pause.as_deref() == Some(id) {
                return Ok(None);
            }
            let pause = pause.as_ref().and_then(|id| state.containers.get(id));
            pause.cloned()
        };
        if let Some(pause) = pause {
            return pid_namespace_of(&pause).map(Some);
        }
        let mut init = self.pod_init.lock().await;
        if init.is_none() {
            *init = Some(PodInit::start(&self.cgroups, &self.reaper).await?);
        }
        let copy = init
            .as_ref()
            .map(|init| init.namespace().try_clone())
            .transpose();
        copy.context(|| "copy a descriptor".into())
    }

    /// Waits for the exit of a process and publishes it, after the OOM event that caused it.
    fn publish_exit_when_done(
        self: Arc<Self>,
        container: Arc<Container>,
        started: Started,
        role: Role,
    ) {
        tokio::spawn(async move {
            let Started { process, exit } = started;
            let status = exit.await.unwrap_or(255);
            if role == Role::Init {
                // In a pid namespace that it shares, other processes of the container outlive it.
                container.cgroup().kill();
            }
            self.oom.wait_until_fetched(&container).await;
            process.publish(status);
        });
    }

    /// Runs one more process in a container.
    ///
    /// # Errors
    /// The step that failed, in the words of the child if it got that far.
    pub async fn exec(
        self: &Arc<Self>,
        container_id: &str,
        exec_id: &str,
        process: &oci::Process,
    ) -> Result<()> {
        check_id(exec_id)?;
        let container = self.container(container_id)?;
        if exec_id == container_id {
            return Err(Error::Invalid(format!(
                "exec id {exec_id} is the container's own"
            )));
        }
        let claimed: Claimed = lock(&self.state).parking.claim(container_id, Some(exec_id));
        let started = container
            .exec(exec_id, process, claimed, &self.reaper)
            .await?;
        self.clone()
            .publish_exit_when_done(container, started, Role::Exec);
        Ok(())
    }

    /// A container by its id.
    ///
    /// # Errors
    /// `Invalid`, as the protocol has it.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = lock(&self.state).containers.get(id).cloned();
        found.ok_or_else(|| Error::Invalid(format!("no container {id}")))
    }

    /// A process by container and exec id; without an exec id the container's first one.
    ///
    /// # Errors
    /// `Invalid` for the container, `NotFound` for the exec.
    pub fn process(&self, container_id: &str, exec_id: Option<&str>) -> Result<Arc<Process>> {
        self.container(container_id)?.process(exec_id)
    }

    /// Ends a container and all that belongs to it.
    ///
    /// # Errors
    /// An unknown container, or one that does not die; then it stays, and removal can be tried
    /// again.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let _reservation = self.reserve_existing(id)?;
        container.remove().await?;
        let mut state = lock(&self.state);
        for mount_point in container.storages() {
            state.storages.release(mount_point);
        }
        state.parking.forget(id);
        state.containers.remove(id);
        let used = container
            .storages()
            .iter()
            .map(String::as_str)
            .chain([container.root()]);
        state.removed.extend(used);
        let gone = |path: &&String| !state.storages.has(path);
        let gone: Vec<&String> = container.storages().iter().filter(gone).collect();
        drop(state);
        for volume in gone {
            lock(&self.sockets_below).forget(volume);
        }
        self.revalidate_removed_paths();
        Ok(())
    }

    /// Lets the guest's kernel forget what removed containers used, see [`RemovedPaths`].
    fn revalidate_removed_paths(&self) {
        let mut removed = std::mem::take(&mut lock(&self.state).removed);
        removed.revalidate();
        lock(&self.state).removed.append(removed);
    }

    /// Removes every container and unmounts every storage.
    ///
    /// # Errors
    /// The first container that could not be removed; the others are.
    pub async fn destroy(&self) -> Result<()> {
        let ids: Vec<String> = lock(&self.state).containers.keys().cloned().collect();
        // Side by side, so that all of them take no longer than one.
        let removed = join_all(ids.iter().map(|id| self.remove_container(id))).await;
        if let Some(init) = self.pod_init.lock().await.take() {
            init.stop().await;
        }
        let mut state = lock(&self.state);
        state.storages.clear();
        state.created = false;
        removed.into_iter().collect()
    }

    /// Whether a raw stream can be kept until its process is made.
    pub fn can_park(&self, header: &Header) -> bool {
        lock(&self.state).parking.has_room(header)
    }

    /// Keeps a raw stream until its process is made.
    pub fn park(&self, header: Header, stream: Stream) -> u64 {
        lock(&self.state).parking.park(header, stream)
    }

    /// Drops a raw stream that nobody claimed.
    pub fn expire(&self, header: &Header, ticket: u64) {
        lock(&self.state).parking.expire(header, ticket);
    }

    fn reserve<'a>(&'a self, id: &'a str) -> Result<Reservation<'a>> {
        let mut state = lock(&self.state);
        if state.containers.contains_key(id) || !state.busy.insert(id.to_owned()) {
            return Err(Error::Failed(format!("container {id} exists already")));
        }
        Ok(Reservation(self, id))
    }

    fn reserve_existing<'a>(&'a self, id: &'a str) -> Result<Reservation<'a>> {
        if !lock(&self.state).busy.insert(id.to_owned()) {
            return Err(Error::Failed(format!(
                "container {id} is being removed already"
            )));
        }
        Ok(Reservation(self, id))
    }
}

/// Changes the mount at a path, which may be made by this lookup.
fn set_attributes_at(path: &Path, attributes: &Attributes) -> std::io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let mount = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())?;
    sys::mount::set_attributes(mount, attributes, Extent::Mount)
}

fn pid_namespace_of(container: &Container) -> Result<OwnedFd> {
    let path = format!("/proc/{}/ns/pid", container.init().pid());
    let file = File::open(path)
        .map_err(|_| Error::Failed(format!("container {} is not running", container.id())))?;
    Ok(file.into())
}

/// Puts limits and device rules in force, before there is a process.
async fn restrict(cgroup: &Cgroup, spec: &oci::Spec) -> Result<()> {
    let linux = spec.Linux.get_or_default();
    let resources = linux.Resources.get_or_default();
    cgroup.limit(resources).await?;
    cgroup::devices::restrict(cgroup.dir(), &resources.Devices)
}

/// Ids become names of directories: the first character is a letter or digit, and there are no
/// separators.
fn check_id(id: &str) -> Result<()> {
    let good = id.len() <= 255 - "ctr-".len()
        && id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    if good {
        Ok(())
    } else {
        Err(Error::Invalid(format!("{id:?} is not an id")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_and_nothing_else() {
        for good in ["a", "7", "ab", "0a", "web-1_x.y", &"a".repeat(251)] {
            check_id(good).unwrap();
        }
        for bad in [
            "",
            ".",
            ".a",
            "-a",
            "a/b",
            "a b",
            "..",
            "a\n",
            "\u{e9}a",
            &"a".repeat(252),
        ] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }
}
