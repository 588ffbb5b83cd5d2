//! Volumes of configuration that programs watch: a change that the host makes in a share raises no
//! inotify event in the guest, so these are copied into a tmpfs, and copied again when they change.
//!
//! They have the layout in which the kubelet writes ConfigMaps, Secrets, projected volumes and the
//! downward API: the files are in a directory with a new name for each change, the link `..data`
//! leads to it, and a link for each name at its top leads through `..data`. To rename a new `..data`
//! into place is the change. The copy is changed in the same steps, so that a reader finds the old
//! files or the new ones, and gets the events that it would get on the host.
//!
//! The host's `..data` is looked at every [`WATCHED_VOLUME_PAUSE`]. What has another layout, or is
//! large, is bound as it is.
//!
//! A container may have the tmpfs mounted: as in `copied`, no path is walked in there.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, fchown};
use std::path::{Component, Path};

use guest_protocol::protocols::agent::Storage;
use nix::fcntl::{OFlag, readlinkat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::task::{AbortHandle, yield_now};
use tokio::time::sleep;

use super::copied::{self, DIRECTORY, Owner};
use super::{Cleanup, plain_mount};
use crate::deadlines::WATCHED_VOLUME_PAUSE;
use crate::error::{Context, Result};
use crate::log::log;

/// The link by which the kubelet swaps old for new.
const DATA: &str = "..data";

/// What is larger, in bytes or in number of files, is not copied. An object of Kubernetes has 1 MiB
/// at most; a projected volume is made of several.
const MOST: Budget = Budget {
    bytes: 8 << 20,
    files: 1024,
};

/// Copies a volume as long as this is there.
#[derive(Debug)]
pub struct Watched(AbortHandle);

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Copies a volume to its mount point, and goes on to do so; or binds it there.
///
/// # Errors
/// A source that is not there, or a failed mount.
pub async fn make(storage: &Storage) -> Result<Cleanup> {
    let (from, to) = (&storage.source, &storage.mount_point);
    let attempt = || format!("copy the volume {from}");
    let source = fs::metadata(from)
        .and_then(|metadata| metadata.is_dir().then(|| File::open(from)).transpose())
        .context(attempt)?;
    let Some((source, data)) =
        source.and_then(|source| data(&source).ok().map(|data| (source, data)))
    else {
        return bind(storage);
    };
    fs::create_dir_all(to).context(|| format!("create {to}"))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(
        Some("tmpfs"),
        to.as_str(),
        Some("tmpfs"),
        flags,
        None::<&str>,
    )
    .context(|| format!("mount tmpfs on {to}"))?;
    let mut copy = match File::open(to) {
        Ok(target) => Copy {
            source,
            target,
            data: None,
        },
        Err(error) => {
            let _ = umount2(to.as_str(), MntFlags::MNT_DETACH);
            return Err(error).context(attempt);
        }
    };
    if let Err(error) = copy.follow(&data).await {
        log!("volume {from} is not copied, and its changes raise no events: {error}");
        umount2(to.as_str(), MntFlags::MNT_DETACH).context(|| format!("unmount {to}"))?;
        return bind(storage);
    }
    let task = tokio::spawn(copy.go_on(from.clone())).abort_handle();
    Ok(Cleanup::StopWatching(Watched(task)))
}

fn bind(storage: &Storage) -> Result<Cleanup> {
    let options = ["rbind".to_owned()];
    plain_mount(storage, &storage.source, &options).map(|()| Cleanup::Unmount)
}

/// The name of the directory to which the link leads: in the same directory.
fn data(volume: &impl AsFd) -> io::Result<OsString> {
    let name = readlinkat(volume.as_fd(), DATA)?;
    let mut parts = Path::new(&name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only != DATA => Ok(name),
        _ => Err(io::Error::other(format!(
            "{DATA} leads to {}",
            name.display()
        ))),
    }
}

/// How much may still be copied.
#[derive(Clone, Copy)]
struct Budget {
    bytes: u64,
    files: usize,
}

struct Copy {
    source: File,
    target: File,
    /// What the target's `..data` leads to.
    data: Option<OsString>,
}

impl Copy {
    async fn go_on(mut self, from: String) {
        let mut complaint = String::new();
        loop {
            sleep(WATCHED_VOLUME_PAUSE).await;
            let followed = match data(&self.source) {
                Ok(data) if self.data.as_ref() == Some(&data) => continue,
                Ok(data) => self.follow(&data).await,
                Err(error) => Err(error),
            };
            // It may be gone because it has changed once more.
            match followed {
                Ok(()) => complaint.clear(),
                Err(error) if error.to_string() != complaint => {
                    complaint = error.to_string();
                    log!("volume {from} has changed, and its copy has not: {error}");
                }
                Err(_) => {}
            }
        }
    }

    /// Makes the copy like the source, whose files are in this directory.
    async fn follow(&mut self, data: &OsStr) -> io::Result<()> {
        let target = self.target.as_fd();
        remove_tree(&self.target, data)?;
        if let Err(error) = copy_tree(&self.source, &self.target, data).await {
            let _ = remove_tree(&self.target, data);
            return Err(error);
        }
        let metadata = self.source.metadata()?;
        let owner = Owner::of(&metadata);
        fchown(target, Some(owner.uid), Some(owner.gid))?;
        copied::set_mode(target, metadata.mode())?;
        let root = Owner { uid: 0, gid: 0 };
        copied::make_link(target, DATA.as_ref(), data.as_bytes(), root)?;
        self.data = Some(data.to_owned());
        let names = names(&copied::open(target, data.as_ref(), DIRECTORY)?)?;
        for name in &names {
            let leads_to = [DATA.as_bytes(), b"/", name.as_bytes()].concat();
            let now = readlinkat(target, name.as_os_str()).ok();
            if now.is_none_or(|now| now.as_bytes() != leads_to) {
                remove_tree(&self.target, name)?;
                copied::make_link(target, name, &leads_to, root)?;
            }
        }
        let of_today = |name: &OsString| names.contains(name) || name == data || name == DATA;
        for name in self::names(&self.target)?
            .iter()
            .filter(|name| !of_today(name))
        {
            remove_tree(&self.target, name)?;
        }
        Ok(())
    }
}

/// Copies the directory of this name, and all below.
async fn copy_tree(source: &File, target: &File, name: &OsStr) -> io::Result<()> {
    let mut budget = MOST;
    let mut directories = vec![copy_directory(source, target, name)?];
    while let Some((source, target)) = directories.pop() {
        for name in names(&source)? {
            // The agent has one thread.
            yield_now().await;
            directories.extend(copy_entry(&source, &target, &name, &mut budget)?);
        }
    }
    Ok(())
}

/// Makes a directory like another, without what is in it. Returns both.
fn copy_directory(from: &File, to: &File, name: &OsStr) -> io::Result<(File, File)> {
    let source = File::from(copied::open(from, name.as_ref(), DIRECTORY)?);
    let metadata = source.metadata()?;
    copied::make_directory(to.as_fd(), name, metadata.mode(), Owner::of(&metadata))?;
    let target = copied::open(to, name.as_ref(), DIRECTORY)?;
    Ok((source, target.into()))
}

/// Copies a file or a link. Of a directory, the contents are still to be copied.
fn copy_entry(
    source: &File,
    target: &File,
    name: &OsStr,
    budget: &mut Budget,
) -> io::Result<Option<(File, File)>> {
    let Some(left) = budget.files.checked_sub(1) else {
        return Err(io::Error::other(format!("more than {} files", MOST.files)));
    };
    budget.files = left;
    let place = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let found = File::from(copied::open(source, name.as_ref(), place)?);
    let metadata = found.metadata()?;
    let owner = Owner::of(&metadata);
    if metadata.is_dir() {
        return copy_directory(source, target, name).map(Some);
    }
    if metadata.is_symlink() {
        let leads_to = readlinkat(source, name)?.into_vec();
        copied::make_link(target.as_fd(), name, &leads_to, owner)?;
        return Ok(None);
    }
    if !metadata.is_file() {
        return Err(io::Error::other(format!("{} is no file", name.display())));
    }
    let Some(left) = budget.bytes.checked_sub(metadata.len()) else {
        return Err(io::Error::other(format!("more than {} bytes", MOST.bytes)));
    };
    budget.bytes = left;
    let mut bytes = Vec::new();
    File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?
        .take(metadata.len())
        .read_to_end(&mut bytes)?;
    let new = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let file = File::from(copied::open_with_mode(target, name.as_ref(), new, 0o600)?);
    file.write_all_at(&bytes, 0)?;
    fchown(&file, Some(owner.uid), Some(owner.gid))?;
    copied::set_mode(&file, metadata.mode())?;
    Ok(None)
}

fn names(directory: &impl AsRawFd) -> io::Result<Vec<OsString>> {
    let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
    entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect()
}

/// Removes what has this name, a directory with all that is in it.
fn remove_tree(directory: &File, name: &OsStr) -> io::Result<()> {
    let path = Path::new("/proc/self/fd")
        .join(directory.as_raw_fd().to_string())
        .join(name);
    let removed = match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path),
        Ok(_) => fs::remove_file(&path),
        Err(error) => Err(error),
    };
    removed.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}
