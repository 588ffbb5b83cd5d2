//! Mounts of a sandbox: a mount namespace of their own, the shared directories in it, binds, and
//! the mount table.
//!
//! The namespace receives what the host mounts later (it is a slave) and shows the host nothing.
//! The shared directory is a mount of its own that propagates to virtiofsd, which has a namespace
//! below this one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use sys::mount::{Attributes, Extent, attach, clone_tree, set_attributes};

use crate::error::{IoContext, Result};
use crate::host::dir::Dir;
use crate::host::mount_table::{self, Mounted};

/// The mount namespace that this process was started in.
static CLIENTS: OnceLock<File> = OnceLock::new();

/// Gives this process a mount namespace of its own. To be called before there is a second thread.
///
/// # Errors
/// One line; without CAP_SYS_ADMIN there is no runtime.
pub fn enter_namespace() -> Result<()> {
    let clients = File::open("/proc/self/ns/mnt").doing(|| "open the mount namespace".into())?;
    let _ = CLIENTS.set(clients);
    unshare(CloneFlags::CLONE_NEWNS).doing(|| "make a mount namespace (is this root?)".into())?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .doing(|| "make / a slave mount".into())
}

/// Makes a directory in which mounts are made for the guest, and a second one that virtiofsd
/// serves: the same directory, read-only at the top. What is mounted in the first appears in the
/// second, as writable as it is, but the guest can change no name and no mount point that the shim
/// makes: a link of the guest's there would lead the shim anywhere.
///
/// # Errors
/// One line that names the directory.
pub fn make_served(state: &Dir, name: &str, served: &str) -> Result<Dir> {
    let shared = make_shared(state, name)?;
    let doing = || format!("serve {}", shared.path().display());
    bind(
        &shared,
        &state.make(served)?,
        Bind {
            read_only: true,
            ..Bind::default()
        },
    )
    .doing(doing)?;
    Ok(shared)
}

/// Makes a directory for a few small files that containers may write to, which must not fill the
/// host's /run.
///
/// # Errors
/// One line that names the directory.
pub fn make_small(state: &Dir, name: &str) -> Result<Dir> {
    state.unmount(name)?;
    let dir = state.make(name)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        &dir.fd_path(),
        Some("tmpfs"),
        flags,
        Some("size=1m,nr_inodes=16,mode=755"),
    )
    .doing(|| format!("mount {}", dir.path().display()))?;
    state.get(name)
}

/// Makes a directory whose mounts propagate to its other binds.
///
/// # Errors
/// One line that names the directory.
pub fn make_shared(state: &Dir, name: &str) -> Result<Dir> {
    let dir = state.make(name)?;
    let doing = || format!("mount {}", dir.path().display());
    bind(&dir, &dir, Bind::default()).doing(doing)?;
    let shared = state.get(name)?;
    set_attributes(
        &shared,
        &Attributes::propagation(libc::MS_SHARED),
        Extent::Mount,
    )
    .doing(doing)?;
    Ok(shared)
}

/// How a file or directory is bound to a second place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bind {
    /// With everything that is mounted below it.
    pub recursive: bool,
    /// Nothing can be written through it. As with mount(8), what is mounted below stays as it is.
    pub read_only: bool,
    /// Nothing can be written through what is mounted below it either.
    pub read_only_below: bool,
    /// What is mounted below the source later does not appear here.
    pub private: bool,
}

impl Bind {
    /// Everything as it is at the source, and as it becomes.
    pub const RECURSIVE: Bind = Bind {
        recursive: true,
        read_only: false,
        read_only_below: false,
        private: false,
    };
}

/// Binds a file or directory onto another, both by their descriptors. The mount gets its attributes
/// before it is attached: what propagates to virtiofsd is a copy of it as it is then, and no later
/// change reaches that copy. Needs Linux 5.12 (mount_setattr(2)).
pub fn bind(from: &impl AsFd, to: &impl AsFd, how: Bind) -> io::Result<()> {
    attach(&detached(from, how)?, to)
}

/// Binds a directory as the client has it. What the client mounts does not always appear in this
/// process's namespace: CRI-O's storage is a private mount.
///
/// # Errors
/// The kernel's; `NotADirectory`.
pub fn bind_clients(path: &Path, to: &impl AsFd, how: Bind) -> io::Result<()> {
    let Some(clients) = CLIENTS.get() else {
        return bind(&hold_directory(path)?, to, how);
    };
    let detach = || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(clients, CloneFlags::CLONE_NEWNS)?;
        detached(&hold_directory(path)?, how)
    };
    let tree = thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, detach)?;
        let panicked = |_| io::Error::other("the thread in the client's namespace panicked");
        thread.join().map_err(panicked)?
    })?;
    attach(&tree, to)
}

fn hold_directory(path: &Path) -> io::Result<File> {
    let held = hold(path)?;
    match held.metadata()?.is_dir() {
        true => Ok(held),
        false => Err(io::ErrorKind::NotADirectory.into()),
    }
}

/// A mount that is nowhere yet.
fn detached(from: &impl AsFd, how: Bind) -> io::Result<OwnedFd> {
    let extent = |recursive| {
        if recursive {
            Extent::Tree
        } else {
            Extent::Mount
        }
    };
    let tree = clone_tree(from, extent(how.recursive))?;
    // Device nodes and setuid programs in it are the guest kernel's business, never the host's.
    let harmless = Attributes::set(libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID);
    set_attributes(&tree, &harmless, Extent::Tree)?;
    if how.read_only {
        let read_only = Attributes::set(libc::MOUNT_ATTR_RDONLY);
        set_attributes(&tree, &read_only, extent(how.read_only_below))?;
    }
    if how.private {
        set_attributes(
            &tree,
            &Attributes::propagation(libc::MS_PRIVATE),
            Extent::Tree,
        )?;
    }
    Ok(tree)
}

/// Whether anything is mounted below a directory, as this namespace has it now. Its path is
/// compared, not walked.
///
/// # Errors
/// The mount table cannot be read.
pub fn has_mounts_below(dir: &Path) -> Result<bool> {
    Ok(below(dir)?.iter().any(|point| point != dir))
}

/// Types of file systems by which a writer changes the host itself, by their names in the mount
/// table: to ask what is mounted there, as is done for a volume's own source, could hang in a
/// storage that is gone.
const OF_THE_KERNEL: [&str; 14] = [
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devtmpfs",
    "efivarfs",
    "proc",
    "pstore",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];

/// Whether the host kernel's own file systems are mounted below a directory, as this namespace has
/// it now.
///
/// # Errors
/// The mount table cannot be read.
pub fn has_kernels_mounts_below(dir: &Path) -> Result<bool> {
    Ok(table()?
        .iter()
        .any(|mount| OF_THE_KERNEL.contains(&mount.kind.as_str()) && mount.point.starts_with(dir)))
}

/// Mount points at or below a directory, without those that go with one above them: to take off the
/// others one by one would be to walk paths in what a container may change.
///
/// # Errors
/// The mount table cannot be read.
pub fn outermost(dir: &Path) -> Result<Vec<PathBuf>> {
    below(dir).map(without_inner)
}

fn without_inner(points: Vec<PathBuf>) -> Vec<PathBuf> {
    let is_inner = |point: &PathBuf| {
        points
            .iter()
            .any(|other| other != point && point.starts_with(other))
    };
    points
        .iter()
        .filter(|point| !is_inner(point))
        .cloned()
        .collect()
}

fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let points = table()?.into_iter().map(|mount| mount.point);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

fn table() -> Result<Vec<Mounted>> {
    mount_table::read().doing(|| "read the mount table".into())
}

/// A file or directory that somebody names, held by a descriptor: all that is asked of it later is
/// asked of what was found. Unlike an open for its path alone this mounts what is to be mounted on
/// demand (autofs), as mount(2) would.
pub fn hold(path: &Path) -> io::Result<File> {
    Ok(open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLOEXEC)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_container_may_rename_is_not_walked_to_be_unmounted() {
        let points = ["/s/1/rootfs/a/b", "/s/1/rootfs", "/s/2", "/s/2", "/s/10"].map(PathBuf::from);
        assert_eq!(
            without_inner(points.to_vec()),
            ["/s/1/rootfs", "/s/2", "/s/2", "/s/10"].map(PathBuf::from)
        );
    }
}
