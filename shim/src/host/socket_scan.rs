//! Unix sockets of the host below a directory, looked for within bounds: whoever can write there
//! has any number of directories, names and links.
//!
//! Each directory is opened from the first one, beneath it and through no link, and what is found is
//! looked at by descriptor. Broad before deep: servers have their sockets high up.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use guest_protocol::SocketKind;
use nix::dir::{Dir, Type};
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstatat};
use rustix::fs::inotify::{self, WatchFlags};

use super::mount_table;
use super::socket_kind::kind_of;

/// How many directories are between the first one and a socket's own.
const DEPTH: usize = 3;

/// Directories that are read, and watched, and names that are read in all of them.
const DIRECTORIES: usize = 512;
const WATCHES: usize = 128;
const NAMES: usize = 20_000;

/// Sockets.
const SOCKETS: usize = 64;

/// Longest path of a socket from the first directory.
const PATH_BYTES: usize = 512;

/// Types of file systems in which a process of this host may have a socket, and which answer
/// though a network does not.
const WITH_SOCKETS: [&str; 10] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs",
];

/// A socket as it is on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundSocket {
    pub kind: SocketKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Which file it is: one that was made anew is another.
    pub file: (u64, u64),
}

/// What changes in a directory that may be a socket's coming, going, or change of owner.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// The sockets below `top` that a process of this kernel has bound, by their paths from there. The
/// directories on the way are watched from before they are read.
pub fn scan(top: &File, watch: Option<&OwnedFd>) -> BTreeMap<String, FoundSocket> {
    let mut found = BTreeMap::new();
    let Ok(without) = without_sockets(top) else {
        return found;
    };
    let mut queue = VecDeque::from([(PathBuf::from("."), 0)]);
    let (mut directories, mut names) = (0, 0);
    while let Some((path, depth)) = queue.pop_front() {
        directories += 1;
        if without.contains(&path) {
            continue;
        }
        let Some(directory) = open_directory(top, &path) else {
            continue;
        };
        if directories <= WATCHES
            && let Some(watch) = watch
        {
            // By descriptor: the name may be another's by now.
            let name = format!("/proc/self/fd/{}", directory.as_raw_fd());
            let _ = inotify::add_watch(watch, name, CHANGES);
        }
        let Ok(mut entries) = directory
            .try_clone()
            .map_err(drop)
            .and_then(|copy| Dir::from_fd(copy.into()).map_err(drop))
        else {
            continue;
        };
        for entry in entries.iter().flatten() {
            names += 1;
            if names > NAMES {
                return found;
            }
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let child = || {
                let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
                if depth == 0 {
                    name.to_owned()
                } else {
                    path.join(name)
                }
            };
            match entry
                .file_type()
                .or_else(|| type_of(directory.as_fd(), name))
            {
                Some(Type::Directory)
                    if depth < DEPTH && directories + queue.len() < DIRECTORIES =>
                {
                    queue.push_back((child(), depth + 1));
                }
                Some(Type::Socket) if found.len() < SOCKETS => {
                    let child = child().into_os_string().into_string();
                    let child = child.ok().filter(|path| path.len() <= PATH_BYTES);
                    let socket = look_at(directory.as_fd(), name);
                    found.extend(child.zip(socket));
                }
                _ => {}
            }
        }
    }
    found
}

/// Where something is mounted, from `top`, that is not looked into. The mount table is read and
/// nothing is asked of what is mounted: that could hang, or mount something (autofs).
fn without_sockets(top: &File) -> std::io::Result<Vec<PathBuf>> {
    let top = std::fs::read_link(format!("/proc/self/fd/{}", top.as_raw_fd()))?;
    let mut kinds = BTreeMap::new();
    for mount in mount_table::read()? {
        // The last one at a place is seen.
        if let Ok(path) = mount.point.strip_prefix(&top) {
            let top = path.as_os_str().is_empty();
            let path = if top { Path::new(".") } else { path };
            kinds.insert(path.to_owned(), WITH_SOCKETS.contains(&mount.kind.as_str()));
        }
    }
    Ok(kinds
        .into_iter()
        .filter_map(|(path, with)| (!with).then_some(path))
        .collect())
}

fn open_directory(top: &File, path: &Path) -> Option<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOATIME)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(top, path, how).ok().map(File::from)
}

fn type_of(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> Option<Type> {
    let stat = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => Some(Type::Directory),
        SFlag::S_IFSOCK => Some(Type::Socket),
        _ => None,
    }
}

fn look_at(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> Option<FoundSocket> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file = File::from(openat2(directory, name, how).ok()?);
    let metadata = file.metadata().ok()?;
    if !metadata.file_type().is_socket() {
        return None;
    }
    Some(FoundSocket {
        kind: kind_of(&file)?,
        mode: metadata.permissions().mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        file: (metadata.dev(), metadata.ino()),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        scan(&File::open(dir).unwrap(), None).into_keys().collect()
    }

    #[test]
    fn sockets_are_found_at_a_depth_and_through_no_link() {
        let root = tempfile::tempdir().unwrap();
        let (dir, outside) = (root.path().join("dir"), root.path().join("outside"));
        fs::create_dir_all(dir.join("a/b/c/d")).unwrap();
        fs::create_dir(&outside).unwrap();
        let _servers = ["top", "a/one", "a/b/c/three", "a/b/c/d/four"]
            .map(|path| UnixListener::bind(dir.join(path)).unwrap());
        let _log = UnixDatagram::bind(dir.join("log")).unwrap();
        let _outside = UnixListener::bind(outside.join("secret")).unwrap();
        symlink(&outside, dir.join("link")).unwrap();
        symlink("../outside/secret", dir.join("direct")).unwrap();
        drop(UnixListener::bind(dir.join("dead")).unwrap());
        fs::write(dir.join("file"), "").unwrap();
        assert_eq!(names(&dir), ["a/b/c/three", "a/one", "log", "top"]);
        fs::set_permissions(dir.join("log"), fs::Permissions::from_mode(0o620)).unwrap();
        let found = scan(&File::open(&dir).unwrap(), None);
        assert_eq!(found["log"].mode, 0o620);
        assert_eq!(found["log"].kind, SocketKind::Datagram);
    }

    #[test]
    fn a_tree_without_an_end_and_a_crowd_of_sockets_have_one() {
        let root = tempfile::tempdir().unwrap();
        for outer in 0..40 {
            for inner in 0..40 {
                fs::create_dir_all(root.path().join(format!("{outer}/{inner}"))).unwrap();
            }
        }
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let _servers: Vec<_> = (0..100)
            .map(|number| UnixListener::bind(root.path().join(format!("s{number}"))).unwrap())
            .collect();
        let found = scan(&File::open(root.path()).unwrap(), Some(&watch));
        assert_eq!(found.len(), SOCKETS);
        let fdinfo = format!("/proc/self/fdinfo/{}", watch.as_fd().as_raw_fd());
        let watched = fs::read_to_string(fdinfo).unwrap();
        assert_eq!(watched.matches("inotify wd").count(), WATCHES);
    }
}
