//! Storages: what the host asks to be mounted in the guest, counted by mount point. Beside them,
//! what it copies into the guest (`copied`), wants looked up again in its shares (`shares`), and has
//! of sockets below them (`sockets_below`).
//!
//! [`mount_storage`] makes one, by its driver. [`Storages`] counts the users of each; the last
//! one's release undoes it, unless one of them has asked for a storage that stays as long as the
//! sandbox.

mod copied;
mod ephemeral;
mod shares;
mod sockets_below;
mod watched;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use guest_protocol::protocols::agent::Storage;
use guest_protocol::protocols::csi::volume_usage::Unit;
use guest_protocol::protocols::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage};
use guest_protocol::{GUEST_LAYERS, IMAGE_DRIVER, Transport, UDS_DRIVER, WATCHED_DRIVER};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use sys::loop_device::{Access, attach_all};
use sys::mount::Extent;
use tokio::time::{Instant, sleep};

use crate::deadlines::DEVICE_HOTPLUG_PAUSE;
use crate::error::{Context, Error, Result};
use crate::guest::pci;
use crate::log::log;
use crate::mount_options::Options;
use crate::relay::unix;

pub use copied::copy;
pub use ephemeral::update as update_ephemeral;
pub use shares::look_up_mounts;
pub use sockets_below::SocketsBelow;

/// How a storage is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    Block,
    HostSocket,
    Image,
    Ephemeral,
    Local,
    Overlay,
    VirtioFs,
    WatchableBind,
}

/// Storage drivers by their names on the wire.
const DRIVERS: [(&str, Driver); 8] = [
    ("blk", Driver::Block),
    (UDS_DRIVER, Driver::HostSocket),
    (IMAGE_DRIVER, Driver::Image),
    ("ephemeral", Driver::Ephemeral),
    ("local", Driver::Local),
    ("overlayfs", Driver::Overlay),
    ("virtio-fs", Driver::VirtioFs),
    (WATCHED_DRIVER, Driver::WatchableBind),
];

/// The names of the storage drivers, as GetGuestDetails lists them.
pub fn driver_names() -> Vec<String> {
    DRIVERS.map(|(name, _)| name.to_owned()).into()
}

/// The storages that there are, by mount point.
#[derive(Debug, Default)]
pub struct Storages(HashMap<String, Entry>);

#[derive(Debug)]
struct Entry {
    users: usize,
    cleanup: Cleanup,
    /// Stays until the sandbox goes.
    shared: bool,
}

/// What is to be done when a storage has no user any more.
#[derive(Debug)]
pub enum Cleanup {
    /// Its files stay.
    Nothing,
    Unmount,
    /// Its drop ends the socket.
    CloseSocket(unix::Socket),
    /// Its drop ends the copying.
    StopWatching(watched::Watched),
}

impl Storages {
    /// Counts one more user of a storage that is there. False means that it must be mounted first.
    pub fn reuse(&mut self, storage: &Storage) -> bool {
        let entry = self.0.get_mut(&storage.mount_point);
        entry
            .map(|entry| {
                entry.users += 1;
                entry.shared |= storage.shared;
            })
            .is_some()
    }

    /// Notes a storage that [`mount_storage`] has made, for its first user.
    pub fn add(&mut self, storage: &Storage, cleanup: Cleanup) {
        self.0.insert(
            storage.mount_point.clone(),
            Entry {
                users: 1,
                cleanup,
                shared: storage.shared,
            },
        );
    }

    /// Makes sure that a file system was mounted there as a storage.
    ///
    /// # Errors
    /// It was not.
    pub fn check_mounted(&self, storage: &Storage) -> Result<()> {
        match self.0.get(&storage.mount_point) {
            Some(Entry {
                cleanup: Cleanup::Unmount,
                ..
            }) => Ok(()),
            _ => Err(Error::Invalid(format!(
                "nothing is mounted for a storage at {:?}",
                storage.mount_point
            ))),
        }
    }

    /// One user less; the last one unmounts.
    pub fn release(&mut self, mount_point: &str) {
        let Some(entry) = self.0.get_mut(mount_point) else {
            return;
        };
        entry.users = entry.users.saturating_sub(1);
        if entry.users == 0
            && !entry.shared
            && let Some(entry) = self.0.remove(mount_point)
        {
            clean_up(mount_point, entry.cleanup);
        }
    }

    /// Whether there is one at this mount point.
    pub fn has(&self, mount_point: &str) -> bool {
        self.0.contains_key(mount_point)
    }

    /// Unmounts everything.
    pub fn clear(&mut self) {
        // Deeper ones first.
        let mut all: Vec<(String, Entry)> = self.0.drain().collect();
        all.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        for (path, entry) in all {
            clean_up(&path, entry.cleanup);
        }
    }
}

fn clean_up(mount_point: &str, cleanup: Cleanup) {
    match cleanup {
        Cleanup::Nothing => {}
        Cleanup::Unmount => unmount(mount_point),
        Cleanup::CloseSocket(socket) => drop(socket),
        Cleanup::StopWatching(watched) => {
            drop(watched);
            unmount(mount_point);
        }
    }
}

fn unmount(mount_point: &str) {
    if let Err(error) = umount2(mount_point, MntFlags::MNT_DETACH) {
        log!("unmount {mount_point}: {error}");
    }
    let place = Path::new(mount_point);
    if place.starts_with(GUEST_LAYERS) {
        // The last one takes their directory with it.
        let _ = fs::remove_dir(place);
        let _ = place.parent().map(fs::remove_dir);
    }
}

/// Makes a storage. `host` leads to the unix sockets of the host. Returns what is to be done when
/// the storage has no user any more.
///
/// # Errors
/// An unknown driver, a device that does not come in time, a failed mount.
pub async fn mount_storage(
    storage: &Storage,
    device_deadline: Duration,
    host: &Transport,
) -> Result<Cleanup> {
    let mount_point = &storage.mount_point;
    let plain = Path::new(mount_point)
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !mount_point.starts_with('/') || !plain {
        return Err(Error::Invalid(format!(
            "storage mount point {mount_point:?} is not an absolute, plain path"
        )));
    }
    if storage.fs_group.is_some() {
        return Err(Error::Invalid(format!(
            "fs_group of storage {mount_point} is not supported"
        )));
    }
    match driver_of(storage)? {
        Driver::Local => local(storage).map(|()| Cleanup::Nothing),
        Driver::Ephemeral => ephemeral::make(storage).map(|()| Cleanup::Unmount),
        Driver::VirtioFs => share(storage, device_deadline)
            .await
            .map(|()| Cleanup::Unmount),
        Driver::HostSocket => unix::listen(storage, host.clone()).map(Cleanup::CloseSocket),
        Driver::Image => image(storage).map(|()| Cleanup::Unmount),
        Driver::Overlay => overlay(storage).map(|()| Cleanup::Unmount),
        Driver::WatchableBind => watched::make(storage).await,
        Driver::Block => {
            let device = if storage.source.starts_with("/dev/") {
                storage.source.clone()
            } else {
                block_device(&storage.source, device_deadline).await?
            };
            plain_mount(storage, &device, &storage.options).map(|()| Cleanup::Unmount)
        }
    }
}

fn driver_of(storage: &Storage) -> Result<Driver> {
    let Storage {
        driver,
        mount_point,
        ..
    } = storage;
    let known = DRIVERS.iter().find(|(name, _)| name == driver);
    known.map(|(_, driver)| *driver).ok_or_else(|| {
        Error::Invalid(format!(
            "unknown storage driver {driver:?} for {mount_point}"
        ))
    })
}

/// A share that was just plugged in may not have its driver yet; its tag is unknown until then.
async fn share(storage: &Storage, deadline: Duration) -> Result<()> {
    let end = Instant::now() + deadline;
    loop {
        match plain_mount(storage, &storage.source, &storage.options) {
            Err(Error::Io { source, .. })
                if source.raw_os_error() == Some(libc::EINVAL) && Instant::now() < end =>
            {
                sleep(DEVICE_HOTPLUG_PAUSE).await;
            }
            result => return result,
        }
    }
}

fn plain_mount(storage: &Storage, source: &str, options: &[String]) -> Result<()> {
    let Storage {
        mount_point,
        fstype,
        ..
    } = storage;
    let options = Options::parse(options);
    let mut flags = options.flags;
    let attempt = || format!("mount {source} ({fstype}) on {mount_point}");
    match options.bind {
        Some(extent) => {
            flags |= MsFlags::MS_BIND;
            flags.set(MsFlags::MS_REC, extent == Extent::Tree);
            if !Path::new(source).is_dir() {
                return file_target(mount_point).and_then(|()| {
                    mount(
                        Some(source),
                        mount_point.as_str(),
                        None::<&str>,
                        flags,
                        None::<&str>,
                    )
                    .context(attempt)
                });
            }
        }
        None if fstype.is_empty() => {
            return Err(Error::Invalid(format!(
                "storage {mount_point} has no fstype"
            )));
        }
        None => {}
    }
    fs::create_dir_all(mount_point).context(|| format!("create {mount_point}"))?;
    let data = Some(options.data.as_str()).filter(|data| !data.is_empty());
    mount(
        Some(source),
        mount_point.as_str(),
        Some(fstype.as_str()),
        flags,
        data,
    )
    .context(attempt)
}

fn file_target(path: &str) -> Result<()> {
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)
        .and_then(|()| {
            fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
        })
        .context(|| format!("create {path}"))
        .map(|_| ())
}

fn local(storage: &Storage) -> Result<()> {
    let path = &storage.mount_point;
    let (mode, group, _) = permissions(&storage.options)?;
    fs::create_dir_all(path).context(|| format!("create {path}"))?;
    apply(path, mode, group)
}

/// `mode=` (octal) and `fsgid=`, and what is left.
fn permissions(options: &[String]) -> Result<(Option<u32>, Option<u32>, Vec<&str>)> {
    let (mut mode, mut group, mut rest) = (None, None, Vec::new());
    for option in options {
        if let Some(text) = option.strip_prefix("mode=") {
            let value = u32::from_str_radix(text, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777);
            mode = Some(
                value.ok_or_else(|| Error::Invalid(format!("bad storage option {option:?}")))?,
            );
        } else if let Some(text) = option.strip_prefix("fsgid=") {
            group = Some(
                text.parse()
                    .map_err(|_| Error::Invalid(format!("bad storage option {option:?}")))?,
            );
        } else {
            rest.push(option.as_str());
        }
    }
    Ok((mode, group, rest))
}

fn apply(path: &str, mode: Option<u32>, group: Option<u32>) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let set = || -> io::Result<()> {
        if let Some(mode) = mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        if let Some(group) = group {
            chown(path, None, Some(group))?;
            let mode = fs::metadata(path)?.permissions().mode();
            fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o2070))?;
        }
        Ok(())
    };
    set().context(|| format!("set permissions of {path}"))
}

/// Mounts read-only from files. The devices go with the mount.
fn image(storage: &Storage) -> Result<()> {
    let options: Vec<&str> = storage.options.iter().map(String::as_str).collect();
    let attached = attach_all(&storage.source, &options, Access::ReadDirectly);
    let attached = attached.context(|| "make block devices of a share's files".into())?;
    plain_mount(storage, &attached.source, &attached.options)
}

fn overlay(storage: &Storage) -> Result<()> {
    const CREATE: &str = "io.katacontainers.volume.overlayfs.create_directory=";
    const WRITABLE: &str = "io.katacontainers.fs-opt.overlay-rw";
    for dir in storage
        .driver_options
        .iter()
        .filter_map(|option| option.strip_prefix(CREATE))
    {
        fs::create_dir_all(dir).context(|| format!("create {dir}"))?;
    }
    let mut options: Vec<String> = storage
        .options
        .iter()
        .filter(|option| *option != WRITABLE)
        .cloned()
        .collect();
    if options.len() != storage.options.len() {
        // Beside the mount point, because both need one file system, which must not be an overlay.
        let place = PathBuf::from(format!("{}.rw", storage.mount_point));
        for name in ["upper", "work"] {
            let dir = place.join(name);
            fs::create_dir_all(&dir).context(|| format!("create {}", dir.display()))?;
            options.push(format!("{name}dir={}", dir.display()));
        }
    }
    plain_mount(storage, &storage.source, &options)
}

/// Bytes and inodes of the file system at `path`.
///
/// # Errors
/// A path that does not exist.
pub fn volume_usage(path: &str) -> Result<VolumeStatsResponse> {
    let stat = statvfs(path).context(|| format!("stat file system of {path}"))?;
    let usage = |total: u64, free: u64, available: u64, each: u64, unit: Unit| VolumeUsage {
        available: available.saturating_mul(each),
        total: total.saturating_mul(each),
        used: total.saturating_sub(free).saturating_mul(each),
        unit: unit.into(),
        ..Default::default()
    };
    let bytes = usage(
        stat.blocks(),
        stat.blocks_free(),
        stat.blocks_available(),
        stat.fragment_size(),
        Unit::BYTES,
    );
    let inodes = usage(
        stat.files(),
        stat.files_free(),
        stat.files_available(),
        1,
        Unit::INODES,
    );
    Ok(VolumeStatsResponse {
        usage: vec![bytes, inodes],
        volume_condition: Some(VolumeCondition::default()).into(),
        ..Default::default()
    })
}

/// The node of the virtio-blk device at a PCI path such as `02/01`, once it is there.
///
/// # Errors
/// Text that is not a PCI path, or a device that does not come in time.
pub async fn block_device(pci_path: &str, deadline: Duration) -> Result<String> {
    let node = |device: &Path| {
        let node = format!("/dev/{}", pci::virtio_child(device, "block")?);
        // The kernel makes the node a moment before there is a disk behind it; until then, opening
        // says ENXIO.
        fs::File::open(&node).is_ok().then_some(node)
    };
    pci::wait_for(pci_path, "block device", deadline, node).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted_by_whom_they_are_for() {
        let options: Vec<String> = ["mode=0777", "fsgid=12", "size=1m"]
            .map(str::to_owned)
            .into();
        assert_eq!(
            permissions(&options).unwrap(),
            (Some(0o777), Some(12), vec!["size=1m"])
        );
        assert!(permissions(&["mode=9".into()]).is_err());
        assert!(permissions(&["fsgid=root".into()]).is_err());
    }

    #[tokio::test]
    async fn a_mount_point_cannot_climb_and_a_driver_must_be_known() {
        let storage = |driver: &str, place: &str| Storage {
            driver: driver.into(),
            mount_point: place.into(),
            ..Default::default()
        };
        let host = Transport::Unix {
            path: "/nowhere".into(),
        };
        for bad in ["relative", "/run/../etc", ""] {
            assert!(
                mount_storage(&storage("local", bad), Duration::ZERO, &host)
                    .await
                    .is_err(),
                "{bad:?}"
            );
        }
        let error = mount_storage(&storage("9p", "/x"), Duration::ZERO, &host)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("9p"));
    }

    #[test]
    fn a_storage_is_released_by_its_last_user() {
        let mut storages = Storages::default();
        let storage = Storage {
            mount_point: "/nowhere".into(),
            ..Default::default()
        };
        assert!(!storages.reuse(&storage));
        storages.add(&storage, Cleanup::Nothing);
        assert!(storages.reuse(&storage));
        storages.release("/nowhere");
        assert!(storages.reuse(&storage));
        storages.release("/nowhere");
        storages.release("/nowhere");
        assert!(!storages.reuse(&storage));
    }

    #[test]
    fn a_shared_storage_stays_until_the_sandbox_goes() {
        let mut storages = Storages::default();
        let storage = Storage {
            mount_point: "/nowhere".into(),
            shared: true,
            ..Default::default()
        };
        storages.add(&storage, Cleanup::Nothing);
        storages.release("/nowhere");
        assert!(storages.reuse(&storage));
        storages.release("/nowhere");
        storages.clear();
        assert!(!storages.reuse(&storage));
        // It is enough that one user asks for it.
        storages.add(
            &Storage {
                shared: false,
                ..storage.clone()
            },
            Cleanup::Nothing,
        );
        assert!(storages.reuse(&storage));
        storages.release("/nowhere");
        storages.release("/nowhere");
        assert!(storages.reuse(&storage));
    }
}
