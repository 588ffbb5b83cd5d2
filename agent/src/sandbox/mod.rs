//! The sandbox: which containers and storages there are. All state is behind one lock that is never
//! held over a wait; there is one thread, so it is never contended.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest_protocol::protocols::agent::{
    CreateContainerRequest, CreateSandboxRequest, Device, Storage,
};
use guest_protocol::protocols::oci;
use guest_protocol::stdio::Header;
use guest_protocol::{GUEST_ROOTFS, GUEST_SANDBOX, GUEST_SHARE, POD_PID_PATH, Stream, Transport};

use crate::cgroup::{Cgroup, devices};
use crate::container::{
    Container, Parts, PodInit, Process, SeccompCache, Started, oom, privileged,
};
use crate::error::{Error, Result, What};
use crate::guest::reaper::Reaper;
use crate::log::log;
use crate::stdio::{Claimed, Parking};
use crate::storage::{Made, Storages, block_device, mount_storage};
use crate::sys::lock;

/// The one sandbox of this guest.
#[derive(Debug)]
pub struct Sandbox {
    /// Where containers' cgroups go.
    cgroups: PathBuf,
    /// How long a hot-plugged device may take to appear.
    pub hotplug_timeout: Duration,
    /// The way to the host.
    host: Transport,
    reaper: Reaper,
    /// OOM kills that nobody has fetched yet.
    pub oom: Arc<oom::Queue>,
    state: Mutex<State>,
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
    /// Paths below the share that no container uses any more.
    gone: BTreeSet<PathBuf>,
    /// The sandbox's own id: a container of this name is its pause container.
    id: String,
}

/// Keeps an id from being used twice at a time.
struct Busy<'a>(&'a Sandbox, &'a str);

impl Drop for Busy<'_> {
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
            pod_init: tokio::sync::Mutex::default(),
        })
    }

    /// Names the guest and mounts what its containers share.
    ///
    /// # Errors
    /// A second sandbox, kernel modules, a hostname or storage that cannot be.
    pub async fn create(&self, request: &CreateSandboxRequest) -> Result<()> {
        if std::mem::replace(&mut lock(&self.state).created, true) {
            return Err(Error::Failed("the sandbox exists already".into()));
        }
        lock(&self.state).id.clone_from(&request.sandbox_id);
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
                .what(|| format!("set hostname {}", request.hostname))?;
        }
        fs::create_dir_all(GUEST_SANDBOX).what(|| format!("create {GUEST_SANDBOX}"))?;
        for storage in &request.storages {
            self.mount(storage).await?;
        }
        if !request.dns.is_empty() {
            let lines: Vec<&str> = request.dns.iter().map(|line| line.trim()).collect();
            let file = format!("{GUEST_SANDBOX}/resolv.conf");
            fs::write(&file, lines.join("\n") + "\n").what(|| format!("write {file}"))?;
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

    /// Steps into a shared volume, which virtio-fs mounts when somebody does. Here and not first in
    /// the container's own namespace: there each container would get a file system of its own, with
    /// sockets, locks and mappings of its own.
    fn enter_volume(&self, path: &str) -> Result<()> {
        let storage = Storage {
            mount_point: path.to_owned(),
            ..Default::default()
        };
        let mut state = lock(&self.state);
        if state.storages.reuse(&storage) {
            return Ok(());
        }
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
        let tried = || format!("open the shared volume {path}");
        let inside = device(Path::new(path)).what(tried)?;
        let outside = Path::new(path)
            .parent()
            .map_or(Ok(inside), device)
            .what(tried)?;
        state.storages.add(
            &storage,
            if inside == outside {
                Made::Files
            } else {
                Made::Mount
            },
        );
        Ok(())
    }

    /// Makes a container; its first process waits for [`Container::start`].
    ///
    /// # Errors
    /// What was wrong; then nothing of it is left.
    pub async fn create_container(
        self: &Arc<Self>,
        mut request: CreateContainerRequest,
    ) -> Result<()> {
        let id = std::mem::take(&mut request.container_id);
        check_id(&id)?;
        let _busy = self.reserve(&id)?;
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
            self.enter_volume(&mount.source)?;
            mounted.push(mount.source.clone());
        }
        let mut numbers = HashMap::new();
        for device in &request.devices {
            let (host, guest) = self.place_device(device, &mut spec).await?;
            numbers.insert(host, guest);
        }
        translate_rules(&mut spec, &numbers);
        let pid_namespace = self
            .pid_namespace(id, request.sandbox_pidns, &mut spec)
            .await?;
        privileged::add_devices(&mut spec);
        let (claimed, seccomp) = {
            let mut state = lock(&self.state);
            let profile = spec.Linux.as_ref().and_then(|linux| linux.Seccomp.as_ref());
            let seccomp = profile
                .map(|profile| state.seccomp.filter(profile))
                .transpose()?;
            (state.parking.claim(id, ""), seccomp)
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
        let created = match restrict(&cgroup, &spec) {
            Ok(()) => Container::create(parts, cgroup).await,
            Err(error) => Err((error, cgroup)),
        };
        let (container, started) = match created {
            Ok(made) => made,
            Err((error, cgroup)) => {
                if let Err(left) = cgroup.remove().await {
                    log!("{id}: {left}");
                }
                return Err(error);
            }
        };
        let container = Arc::new(container);
        lock(&self.state)
            .containers
            .insert(id.to_owned(), container.clone());
        oom::watch(&self.oom, &container);
        self.clone()
            .publish_exit_when_done(container, started, true);
        Ok(())
    }

    /// The pid namespace to join: the pod's, or that of the container which the spec's entry names.
    /// `None` is a new one.
    async fn pid_namespace(
        &self,
        id: &str,
        shared: bool,
        spec: &mut oci::Spec,
    ) -> Result<Option<OwnedFd>> {
        let entries = spec
            .Linux
            .as_mut()
            .map(|linux| linux.Namespaces.as_mut_slice())
            .unwrap_or_default();
        let entry = entries.iter_mut().find(|entry| entry.Type == "pid");
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
        if !shared {
            return Ok(None);
        }
        let pause = {
            let state = lock(&self.state);
            if state.id == id {
                return Ok(None);
            }
            state.containers.get(&state.id).cloned()
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
        copy.what(|| "copy a descriptor".into())
    }

    /// Resolves a device that the host has plugged in, and gives its numbers to the spec's entry
    /// for it. Returns the numbers that it had there, which are the host's, and its own.
    async fn place_device(
        &self,
        device: &Device,
        spec: &mut oci::Spec,
    ) -> Result<(Numbers, Numbers)> {
        let node = match device.type_.as_str() {
            "blk" => block_device(&device.id, self.hotplug_timeout).await?,
            other => {
                return Err(Error::Invalid(format!(
                    "unknown device type {other:?} for {}",
                    device.container_path
                )));
            }
        };
        let number = fs::metadata(&node).what(|| format!("stat {node}"))?.rdev();
        let linux = spec.Linux.mut_or_insert_default();
        let entry = linux
            .Devices
            .iter_mut()
            .find(|entry| entry.Path == device.container_path)
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "device {} is missing in the spec's linux.devices",
                    device.container_path
                ))
            })?;
        let host = (entry.Major, entry.Minor);
        let guest = (
            i64::from(libc::major(number)),
            i64::from(libc::minor(number)),
        );
        entry.Type = "b".into();
        (entry.Major, entry.Minor) = guest;
        Ok((host, guest))
    }

    /// Publishes the exit of a process once it happens, and what belongs to it first.
    fn publish_exit_when_done(
        self: Arc<Self>,
        container: Arc<Container>,
        started: Started,
        init: bool,
    ) {
        tokio::spawn(async move {
            let Started { process, exit } = started;
            let status = exit.await.unwrap_or(255);
            if init {
                // Without a pid namespace of its own, others may have outlived it.
                container.cgroup().kill();
            }
            self.oom.wait_until_fetched(&container).await;
            process.publish(status);
        });
    }

    /// Runs one more process in a container.
    ///
    /// # Errors
    /// What was wrong, in the words of the child if it got that far.
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
        let claimed: Claimed = lock(&self.state).parking.claim(container_id, exec_id);
        let started = container
            .exec(exec_id, process, claimed, &self.reaper)
            .await?;
        self.clone()
            .publish_exit_when_done(container, started, false);
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

    /// A process by container and exec id.
    ///
    /// # Errors
    /// `Invalid` for the container, `NotFound` for the exec.
    pub fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>> {
        self.container(container_id)?.process(exec_id)
    }

    /// Ends a container and all that belongs to it.
    ///
    /// # Errors
    /// An unknown container, or one that does not die; then it stays, and removal can be tried
    /// again.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let _busy = self.reserve_existing(id)?;
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
        state.gone.extend(
            used.filter_map(|path| shared(Path::new(path)))
                .map(PathBuf::from),
        );
        drop(state);
        self.revalidate_removed_paths();
        Ok(())
    }

    /// The guest's kernel remembers what it has seen of a share, and for each file that it
    /// remembers the host's file server holds a descriptor, until somebody looks again and finds
    /// that it is gone. The host takes it away after this removal, so what is still there is looked
    /// at next time.
    fn revalidate_removed_paths(&self) {
        let mut gone = std::mem::take(&mut lock(&self.state).gone);
        gone.retain(|path| is_shared_yet(path));
        lock(&self.state).gone.append(&mut gone);
    }

    /// Ends everything.
    ///
    /// # Errors
    /// The last container that could not be removed; the others are.
    pub async fn destroy(&self) -> Result<()> {
        let ids: Vec<String> = lock(&self.state).containers.keys().cloned().collect();
        let mut result = Ok(());
        for id in ids {
            if let Err(error) = self.remove_container(&id).await {
                result = Err(error);
            }
        }
        if let Some(init) = self.pod_init.lock().await.take() {
            init.stop().await;
        }
        let mut state = lock(&self.state);
        state.storages.clear();
        state.created = false;
        result
    }

    /// Keeps a raw stream until its process is made.
    pub fn park(&self, header: Header, stream: Stream) -> Option<u64> {
        lock(&self.state).parking.park(header, stream)
    }

    /// Drops a raw stream that nobody claimed.
    pub fn expire(&self, header: &Header, ticket: u64) {
        lock(&self.state).parking.expire(header, ticket);
    }

    fn reserve<'a>(&'a self, id: &'a str) -> Result<Busy<'a>> {
        let mut state = lock(&self.state);
        if state.containers.contains_key(id) || !state.busy.insert(id.to_owned()) {
            return Err(Error::Failed(format!("container {id} exists already")));
        }
        Ok(Busy(self, id))
    }

    fn reserve_existing<'a>(&'a self, id: &'a str) -> Result<Busy<'a>> {
        if !lock(&self.state).busy.insert(id.to_owned()) {
            return Err(Error::Failed(format!(
                "container {id} is being removed already"
            )));
        }
        Ok(Busy(self, id))
    }
}

/// What the host takes away when nobody uses `path` any more, if that is in a share.
fn shared(path: &Path) -> Option<&Path> {
    if path.starts_with(GUEST_ROOTFS) {
        path.parent()
    } else {
        path.starts_with(GUEST_SHARE).then_some(path)
    }
}

/// The kernel believes its memory of volumes for a second, and that of root file systems for ever:
/// there it asks the host only before it makes a name. That is as far as this link comes, because
/// `/` is another file system.
fn is_shared_yet(path: &Path) -> bool {
    if path.starts_with(GUEST_ROOTFS) {
        fs::hard_link("/", path).is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
    } else {
        fs::symlink_metadata(path).is_ok()
    }
}

fn pid_namespace_of(container: &Container) -> Result<OwnedFd> {
    let path = format!("/proc/{}/ns/pid", container.init().pid());
    let file = File::open(path)
        .map_err(|_| Error::Failed(format!("container {} is not running", container.id())))?;
    Ok(file.into())
}

/// Limits and device rules, before there is a process.
/// Major and minor.
type Numbers = (i64, i64);

/// Gives the rules about disks of the host the numbers that those have here.
fn translate_rules(spec: &mut oci::Spec, numbers: &HashMap<Numbers, Numbers>) {
    let resources = spec
        .Linux
        .as_mut()
        .and_then(|linux| linux.Resources.as_mut());
    for rule in resources
        .into_iter()
        .flat_map(|resources| &mut resources.Devices)
        .filter(|rule| rule.Type == "b")
    {
        if let Some(guest) = numbers.get(&(rule.Major, rule.Minor)) {
            (rule.Major, rule.Minor) = *guest;
        }
    }
}

fn restrict(cgroup: &Cgroup, spec: &oci::Spec) -> Result<()> {
    let linux = spec.Linux.get_or_default();
    let resources = linux.Resources.get_or_default();
    cgroup.limit(resources)?;
    devices::restrict(cgroup.dir(), &resources.Devices)
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
