//! A container's root file system, as containerd's snapshotter says: mounted on the host under the
//! shared directory, or where it is a disk (devmapper, blockfile, erofs), plugged into the guest
//! and mounted there.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use sys::loop_device::{self, Access};

use crate::container::layers::{self, Directory, Filled, Layers};
use crate::error::{Error, IoContext, Result};
use crate::host::dir::Dir;
use crate::host::mounts::{self, Bind};

/// What mount(2) takes at most for its data, in bytes: one page.
const MAX_DATA: usize = 4095;

/// Name of the mount point in a container's directory.
pub const NAME: &str = "rootfs";

/// Mounts the root file system in a container's directory, as [`NAME`].
///
/// With an empty list the client prepared a directory itself: the spec's `root.path`, relative to
/// the bundle.
///
/// # Errors
/// One line that names the mount; whoever removes the directory takes off what is mounted.
pub fn mount_all(list: &[Mount], root_path: &Path, dir: &Dir) -> Result<()> {
    let target = dir.make(NAME)?;
    if list.is_empty() {
        let bound = mounts::bind_clients(root_path, &target, Bind::RECURSIVE);
        return match bound {
            Err(error) if error.kind() == ErrorKind::NotADirectory => Err(Error::invalid(format!(
                "root file system {} is not a directory",
                root_path.display()
            ))),
            bound => bound.doing(|| format!("share the root file system {}", root_path.display())),
        };
    }
    // Those that are mounted already; later ones may name them.
    let (mut points, mut held) = (Vec::new(), Vec::new());
    for (index, entry) in list.iter().enumerate() {
        let mounted = mount_next(entry, dir, &points);
        let root = mounted.map_err(|e| e.context(format!("root file system mount {index}")))?;
        points.push(root.fd_path().display().to_string());
        held.push(root);
    }
    Ok(())
}

/// Mounts an entry over those before it; gives its root.
fn mount_next(entry: &Mount, dir: &Dir, points: &[String]) -> Result<Dir> {
    let Filled { mount, directories } = layers::fill(entry, points)?;
    for directory in directories {
        make_directory(&directory)?;
    }
    mount_one(&mount, &place(dir.get(NAME)?, &mount.target)?)?;
    dir.get(NAME)
}

fn make_directory(directory: &Directory) -> Result<()> {
    let mut maker = DirBuilder::new();
    match maker.mode(directory.mode).create(&directory.path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).doing(|| format!("make the directory {}", directory.path))
        }
        _ => Ok(()),
    }
}

/// Where in the root file system an entry is mounted. What is there already is the image's, so its
/// links are followed inside the root only, and once.
fn place(root: Dir, target: &str) -> Result<OwnedFd> {
    let target = target.trim_start_matches('/');
    if target.is_empty() {
        return Ok(root.into());
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(&root, target, how).doing(|| format!("find {target} in the root file system"))
}

/// Whether nobody but the container changes the root file system while it lives: a mount of the
/// snapshotter's that this process makes, and whose layers the kernel forbids to change below it.
pub fn is_exclusive_overlay(list: &[Mount]) -> bool {
    let is_over_all = |top: &Mount| top.type_.rsplit('/').next() == Some("overlay");
    let is_bind = |entry: &Mount| {
        let of_bind = |option: &String| option == "bind" || option == "rbind";
        entry.type_.ends_with("bind") || entry.options.iter().any(of_bind)
    };
    list.last().is_some_and(is_over_all)
        && list
            .iter()
            .all(|entry| entry.target.is_empty() && !is_bind(entry))
}

/// File systems that the guest's kernel has too.
const ON_DISK: [&str; 3] = ["ext4", "xfs", "erofs"];

/// A root file system on a block device or in an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The device or file.
    pub path: PathBuf,
    pub fstype: String,
    /// Nothing is written to it.
    pub read_only: bool,
    /// Mount options for the guest.
    pub options: Vec<String>,
}

/// What a root file system is for the guest.
#[derive(Debug)]
pub enum Root {
    /// A directory in the share.
    Directory,
    Disk(Disk),
    /// Mounted by the guest of several.
    Layers(Layers),
}

impl Root {
    /// By the snapshotter's list.
    ///
    /// # Errors
    /// A mount that nobody knows.
    pub fn of(list: &[Mount]) -> Result<Root> {
        Ok(match disk(list) {
            Some(disk) => Root::Disk(disk),
            None => Layers::of(list)?.map_or(Root::Directory, Root::Layers),
        })
    }
}

/// The disk, if the root file system is nothing else.
pub fn disk(list: &[Mount]) -> Option<Disk> {
    let [entry] = list else { return None };
    let path = PathBuf::from(&entry.source);
    let kind = std::fs::metadata(&path).ok()?.file_type();
    if !ON_DISK.contains(&entry.type_.as_str()) || !(kind.is_block_device() || kind.is_file()) {
        return None;
    }
    let has = |option: &str| entry.options.iter().any(|other| other == option);
    let mut options: Vec<String> = entry
        .options
        .iter()
        .filter(|option| *option != "loop")
        .cloned()
        .collect();
    if entry.type_ == "xfs" && !has("nouuid") {
        // Snapshots of one file system have one id, which xfs takes for the same disk twice.
        options.push("nouuid".to_owned());
    }
    let read_only = has("ro") || entry.type_ == "erofs";
    Some(Disk {
        path,
        fstype: entry.type_.clone(),
        read_only,
        options,
    })
}

fn mount_one(entry: &Mount, place: &OwnedFd) -> Result<()> {
    let (flags, data) = flags(&entry.options);
    let flags = flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    let doing = || {
        format!(
            "mount the root file system ({} from {})",
            entry.type_, entry.source
        )
    };
    if flags.contains(MsFlags::MS_BIND) || matches!(entry.type_.as_str(), "bind" | "rbind") {
        let how = Bind {
            recursive: flags.contains(MsFlags::MS_REC) || entry.type_ == "rbind",
            read_only: flags.contains(MsFlags::MS_RDONLY),
            ..Bind::default()
        };
        return mounts::hold(Path::new(&entry.source))
            .and_then(|source| mounts::bind(&source, place, how))
            .doing(doing);
    }
    let target = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    if data.contains(&"loop") {
        return mount_files(entry, flags, &data, &target).doing(doing);
    }
    let joined = data.join(",");
    if joined.len() > MAX_DATA && entry.type_ == "overlay" {
        return mount_long_overlay(entry, flags, &data, &target).doing(doing);
    }
    mount(
        Some(entry.source.as_str()),
        &target,
        Some(entry.type_.as_str()),
        flags,
        Some(joined.as_str()),
    )
    .doing(doing)
}

/// Mounts a file system from its files. The loop devices go with the mount.
fn mount_files(entry: &Mount, flags: MsFlags, data: &[&str], target: &Path) -> std::io::Result<()> {
    let access = match flags.contains(MsFlags::MS_RDONLY) {
        true => Access::Read,
        false => Access::Write,
    };
    let data: Vec<&str> = data.iter().copied().filter(|one| *one != "loop").collect();
    let attached = loop_device::attach_all(&entry.source, &data, access)?;
    Ok(mount(
        Some(attached.source.as_str()),
        target,
        Some(entry.type_.as_str()),
        flags,
        Some(attached.options.join(",").as_str()),
    )?)
}

/// Options of mount(8) that are flags of mount(2); the rest is the file system's own.
fn flags(options: &[String]) -> (MsFlags, Vec<&str>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "" | "defaults" => {}
            other => data.push(other),
        }
    }
    (flags, data)
}

/// An image of many layers has more options than fit a page: the layers' common directory becomes
/// the working directory, and their names become relative. The working directory belongs to a
/// thread of its own for that.
fn mount_long_overlay(
    entry: &Mount,
    flags: MsFlags,
    data: &[&str],
    target: &Path,
) -> std::io::Result<()> {
    let (directory, data) =
        shorten(data).ok_or_else(|| std::io::Error::from_raw_os_error(libc::E2BIG))?;
    let (source, target) = (entry.source.clone(), target.to_owned());
    let worker = std::thread::spawn(move || -> std::io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(Path::new(&directory))?;
        Ok(mount(
            Some(source.as_str()),
            &target,
            Some("overlay"),
            flags,
            Some(data.as_str()),
        )?)
    });
    worker
        .join()
        .map_err(|_| std::io::Error::other("the mounting thread ended"))?
}

/// The layers' common parent directory and the options with it taken out, if that is enough.
fn shorten(data: &[&str]) -> Option<(String, String)> {
    let layers: Vec<&str> = data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?
        .split(':')
        .collect();
    let mut common = layers.first()?.rfind('/').map(|end| &layers[0][..end])?;
    while !layers.iter().all(|layer| {
        layer
            .strip_prefix(common)
            .is_some_and(|rest| rest.starts_with('/'))
    }) {
        common = &common[..common.rfind('/')?];
    }
    if common.is_empty() {
        return None;
    }
    let relative: Vec<&str> = layers
        .iter()
        .map(|layer| &layer[common.len() + 1..])
        .collect();
    let options: Vec<String> = data
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                format!("lowerdir={}", relative.join(":"))
            } else {
                (*option).to_owned()
            }
        })
        .collect();
    let joined = options.join(",");
    (joined.len() <= MAX_DATA).then(|| (common.to_owned(), joined))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_many_layers_fits_a_page() {
        let layers: Vec<String> = (0..120)
            .map(|n| {
                format!(
                    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"
                )
            })
            .collect();
        let lower = format!("lowerdir={}", layers.join(":"));
        let data = ["index=off", "workdir=/w", "upperdir=/u", &lower];
        assert!(data.join(",").len() > MAX_DATA);
        let (directory, data) = shorten(&data).unwrap();
        assert_eq!(
            directory,
            "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots"
        );
        assert!(data.starts_with("index=off,workdir=/w,upperdir=/u,lowerdir=0/fs:1/fs:"));
    }

    #[test]
    fn layers_without_a_common_directory_are_left_alone() {
        assert_eq!(shorten(&["lowerdir=/a:/b"]), None);
        assert_eq!(shorten(&["upperdir=/a"]), None);
        assert_eq!(
            shorten(&["lowerdir=/a/x:/a/xy"]),
            Some(("/a".into(), "lowerdir=x:xy".into()))
        );
    }

    #[test]
    fn a_link_in_an_image_leads_nowhere_outside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("inside")).unwrap();
        std::os::unix::fs::symlink(dir.path(), root.join("absolute")).unwrap();
        std::os::unix::fs::symlink("../..", root.join("up")).unwrap();
        std::os::unix::fs::symlink("/inside", root.join("link")).unwrap();
        let is_at = |target| {
            let place = place(Dir::open(&root).unwrap(), target).unwrap();
            std::fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd())).unwrap()
        };
        assert_eq!(is_at("/inside"), root.join("inside"));
        assert_eq!(is_at("link"), root.join("inside"));
        assert_eq!((is_at("up"), is_at("../..")), (root.clone(), root.clone()));
        assert_eq!(is_at("/"), root);
        assert!(place(Dir::open(&root).unwrap(), "absolute").is_err());
    }

    #[test]
    fn an_image_file_is_plugged_in_and_a_directory_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mount = |kind: &str, source: &Path, options: &[&str]| Mount {
            type_: kind.into(),
            source: source.to_string_lossy().into_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        };
        let found = disk(&[mount("ext4", file.path(), &["loop", "ro"])]).unwrap();
        assert_eq!(
            (found.read_only, found.options),
            (true, vec!["ro".to_owned()])
        );
        assert_eq!(
            disk(&[mount("xfs", file.path(), &["loop"])])
                .unwrap()
                .options,
            ["nouuid"]
        );
        assert_eq!(disk(&[mount("ext4", Path::new("/"), &[])]), None);
        assert_eq!(disk(&[mount("overlay", file.path(), &[])]), None);
        assert_eq!(disk(&[]), None);
    }

    #[test]
    fn options_are_flags_or_the_file_systems_own() {
        let options = ["ro", "nosuid", "index=off", "defaults"].map(str::to_owned);
        let (flags, data) = flags(&options);
        assert_eq!(
            (flags, data),
            (MsFlags::MS_RDONLY | MsFlags::MS_NOSUID, vec!["index=off"])
        );
    }
}
