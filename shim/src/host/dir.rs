//! A directory of the shim's own, held by a descriptor: what is made, mounted and removed in it is
//! found from there, beneath it and through no link.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Error, IoContext, Result};
use crate::host::mounts;

#[derive(Debug)]
pub struct Dir(OwnedFd);

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Dir> for OwnedFd {
    fn from(dir: Dir) -> OwnedFd {
        dir.0
    }
}

impl Dir {
    /// One that is there. Its path must lead through no link.
    ///
    /// # Errors
    /// One line that names the directory.
    pub fn open(path: &Path) -> Result<Dir> {
        let how = OpenHow::new()
            .flags(DIRECTORY)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let opened = openat2(nix::fcntl::AT_FDCWD, path, how);
        opened
            .map(Dir)
            .doing(|| format!("open directory {}", path.display()))
    }

    /// Where it is now, for messages and for whoever serves it.
    pub fn path(&self) -> PathBuf {
        std::fs::read_link(self.fd_path()).unwrap_or_default()
    }

    /// A path to this very directory.
    pub fn fd_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    fn beneath(&self, path: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let how = OpenHow::new().flags(flags).mode(mode).resolve(resolve);
        openat2(&self.0, path, how)
    }

    fn doing(&self, what: &str, name: &str) -> String {
        format!("{what} {}", self.path().join(name).display())
    }

    /// A directory in it, made if it is not there.
    ///
    /// # Errors
    /// One line that names the directory; a link of this name is one.
    pub fn make(&self, name: &str) -> Result<Dir> {
        match mkdirat(&self.0, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => self.get(name),
            Err(errno) => Err(errno).doing(|| self.doing("make directory", name)),
        }
    }

    /// A directory in it, or what is mounted there by now.
    ///
    /// # Errors
    /// One line that names the directory.
    pub fn get(&self, name: &str) -> Result<Dir> {
        let opened = self.beneath(Path::new(name), DIRECTORY, Mode::empty());
        opened.map(Dir).doing(|| self.doing("open directory", name))
    }

    /// A file or directory in it, or what is mounted there by now, for its path only.
    ///
    /// # Errors
    /// One line that names it.
    pub fn hold(&self, name: &str) -> Result<File> {
        let opened = self.beneath(Path::new(name), PATH, Mode::empty());
        opened.map(File::from).doing(|| self.doing("open", name))
    }

    /// A new file in it.
    ///
    /// # Errors
    /// One line that names the file; whatever has that name is one.
    pub fn make_file(&self, name: &str) -> Result<File> {
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let made = self.beneath(Path::new(name), flags, Mode::from_bits_truncate(0o644));
        made.map(File::from).doing(|| self.doing("make file", name))
    }

    /// Takes off everything that is mounted at or below a name, in this namespace.
    ///
    /// # Errors
    /// One line that names a mount that stays.
    pub fn unmount(&self, name: &str) -> Result<()> {
        let path = self.path();
        for point in mounts::outermost(&path.join(name))?.iter().rev() {
            let doing = || format!("unmount {}", point.display());
            let parent = point
                .parent()
                .and_then(|parent| parent.strip_prefix(&path).ok());
            let (Some(parent), Some(last)) = (parent, point.file_name()) else {
                continue;
            };
            let parent = if parent == Path::new("") {
                Path::new(".")
            } else {
                parent
            };
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            let parent = self.beneath(parent, DIRECTORY, Mode::empty()).map(Dir);
            match parent.and_then(|parent| umount2(&parent.fd_path().join(last), flags)) {
                // It went by itself.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(errno) => return Err(errno).doing(doing),
            }
        }
        Ok(())
    }

    /// Removes a file or a directory of mount points. What is mounted there is taken off first and
    /// never descended into: it is somebody else's data. Nothing there is success.
    ///
    /// # Errors
    /// One line that names what stays.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.unmount(name)?;
        let doing = || self.doing("remove", name);
        if let Some(point) = mounts::outermost(&self.path().join(name))?.first() {
            return Err(Error::internal(format!(
                "cannot {}: {} is mounted",
                doing(),
                point.display()
            )));
        }
        match unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {}
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno).doing(doing),
        }
        match std::fs::remove_dir_all(self.fd_path().join(name)) {
            // Another sweep may be at it.
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).doing(doing),
            _ => Ok(()),
        }
    }
}

const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);
const DIRECTORY: OFlag = PATH.union(OFlag::O_DIRECTORY);

/// A name in a directory that somebody has for a while. Dropping this removes what is there, and
/// takes off first what is mounted there.
#[derive(Debug)]
pub struct Entry {
    dir: Arc<Dir>,
    name: String,
}

impl Entry {
    /// Of a name that is about to be made.
    pub fn new(dir: &Arc<Dir>, name: impl Into<String>) -> Entry {
        Entry {
            dir: dir.clone(),
            name: name.into(),
        }
    }

    /// Where it is now.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join(&self.name)
    }

    /// The directory of that name, made if it is not there.
    ///
    /// # Errors
    /// One line that names it.
    pub fn make(&self) -> Result<Dir> {
        self.dir.make(&self.name)
    }

    /// The directory of that name.
    ///
    /// # Errors
    /// One line that names it.
    pub fn open(&self) -> Result<Dir> {
        self.dir.get(&self.name)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Err(error) = self.dir.remove(&self.name) {
            tracing::warn!(%error, "what a container had of the host stays until the sandbox ends");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_in_the_place_of_a_name_leads_nowhere() {
        let root = tempfile::tempdir().unwrap();
        let (own, victim) = (root.path().join("own"), root.path().join("victim"));
        std::fs::create_dir(&own).unwrap();
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("file"), "precious").unwrap();
        let dir = Dir::open(&own).unwrap();
        std::os::unix::fs::symlink(&victim, own.join("directory")).unwrap();
        std::os::unix::fs::symlink(victim.join("file"), own.join("file")).unwrap();
        assert!(
            dir.make("directory").is_err()
                && dir.get("directory").is_err()
                && dir.make_file("file").is_err()
        );
        assert!(
            dir.get("..").is_err()
                && dir.get("/").is_err()
                && Dir::open(&own.join("directory")).is_err()
        );
        dir.remove("directory").unwrap();
        dir.remove("file").unwrap();
        assert_eq!(
            std::fs::read_to_string(victim.join("file")).unwrap(),
            "precious"
        );
        assert_eq!(std::fs::read_dir(&own).unwrap().count(), 0);
    }

    #[test]
    fn removing_what_is_not_there_is_done_already() {
        let root = tempfile::tempdir().unwrap();
        Dir::open(root.path()).unwrap().remove("nothing").unwrap();
    }

    #[test]
    fn a_directory_that_was_moved_is_still_the_one_that_is_worked_in() {
        let root = tempfile::tempdir().unwrap();
        let (old, new) = (root.path().join("old"), root.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        let dir = Arc::new(Dir::open(&old).unwrap());
        std::fs::rename(&old, &new).unwrap();
        let entry = Entry::new(&dir, "below");
        dir.make("below").unwrap().make_file("file").unwrap();
        assert!(new.join("below/file").exists() && entry.path() == new.join("below"));
        drop(entry);
        assert!(!new.join("below").exists());
    }
}
