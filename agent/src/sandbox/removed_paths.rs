//! Paths below the shares that no container uses any more.
//!
//! The guest's kernel remembers names of a share, and for each of them the host's file server holds
//! a descriptor, until a lookup in the guest finds that the name is gone. The host takes a
//! container's names away after the agent has removed the container, so they are looked up again at
//! the next removal or creation.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use guest_protocol::{GUEST_ROOTFS, GUEST_SHARE};

/// Paths that the guest's kernel may still remember.
#[derive(Debug, Default)]
pub struct RemovedPaths(BTreeSet<PathBuf>);

impl RemovedPaths {
    /// Notes what a removed container used; a path outside of the shares is nothing to forget.
    pub fn extend<'a>(&mut self, used: impl Iterator<Item = &'a str>) {
        self.0
            .extend(used.filter_map(|path| removed_by_host(Path::new(path))));
    }

    /// Keeps the paths of both.
    pub fn append(&mut self, mut others: RemovedPaths) {
        self.0.append(&mut others.0);
    }

    /// Makes the kernel look the paths up again, and keeps those that are still there. This can
    /// wait for the host's file server: no lock may be held.
    pub fn revalidate(&mut self) {
        self.0.retain(|path| is_shared_yet(path));
    }
}

/// The path that the host takes away when nobody uses `path` any more, if that is in a share.
fn removed_by_host(path: &Path) -> Option<PathBuf> {
    let removed = if path.starts_with(GUEST_ROOTFS) {
        path.parent()
    } else {
        path.starts_with(GUEST_SHARE).then_some(path)
    };
    removed.map(PathBuf::from)
}

/// The kernel believes its memory of volumes for a second, and that of root file systems for ever:
/// there it asks the host only before it makes a name. The link that is tried here does not get
/// further than that question, because `/` is another file system.
fn is_shared_yet(path: &Path) -> bool {
    if path.starts_with(GUEST_ROOTFS) {
        fs::hard_link("/", path).is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
    } else {
        fs::symlink_metadata(path).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_the_shares_are_looked_up_again() {
        let mut paths = RemovedPaths::default();
        let root = format!("{GUEST_ROOTFS}/7/rootfs");
        let volume = format!("{GUEST_SHARE}/volumes/1");
        paths.extend([root.as_str(), &volume, "/run/kata-containers/sandbox/shm"].into_iter());
        let noted: Vec<_> = paths.0.iter().map(PathBuf::as_path).collect();
        let parent = format!("{GUEST_ROOTFS}/7");
        assert_eq!(noted, [Path::new(&volume), Path::new(&parent)]);
        // None of them is there.
        paths.revalidate();
        assert!(paths.0.is_empty());
    }
}
