//! Mounts of a sandbox: a mount namespace of their own, the shared directories in it, binds, and
//! the mount table.
//!
//! The namespace receives what the host mounts later (it is a slave) and shows the host nothing.
//! The shared directory is a mount of its own that propagates to virtiofsd, which has a namespace
//! below this one.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::{IoContext, Result};
use crate::host::dir::Dir;
use crate::host::mount_table::{self, Mounted};

/// Gives this process a mount namespace of its own. To be called before there is a second thread.
///
/// # Errors
/// One line; without CAP_SYS_ADMIN there is no runtime.
pub fn enter_namespace() -> Result<()> {
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
    set_attributes(&shared, 0, libc::MS_SHARED, false).doing(doing)?;
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
///
/// # Errors
/// The system's own.
pub fn bind(from: &impl AsFd, to: &impl AsFd, how: Bind) -> std::io::Result<()> {
    let recursive = if how.recursive {
        libc::AT_RECURSIVE.cast_unsigned()
    } else {
        0
    };
    let clone = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | libc::AT_EMPTY_PATH.cast_unsigned()
        | recursive;
    // SAFETY: open_tree(2) reads an empty path.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            from.as_fd().as_raw_fd(),
            c"".as_ptr(),
            clone,
        )
    })?;
    let fd = i32::try_from(fd).map_err(std::io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let tree = unsafe { OwnedFd::from_raw_fd(fd) };
    // Device nodes and setuid programs in it are the guest kernel's business, never the host's.
    set_attributes(
        &tree,
        libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
        0,
        true,
    )?;
    if how.read_only {
        set_attributes(&tree, libc::MOUNT_ATTR_RDONLY, 0, how.read_only_below)?;
    }
    if how.private {
        set_attributes(&tree, 0, libc::MS_PRIVATE, true)?;
    }
    let (fd, to, empty) = (tree.as_raw_fd(), to.as_fd().as_raw_fd(), c"".as_ptr());
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: move_mount(2) reads two empty paths.
    check(unsafe { libc::syscall(libc::SYS_move_mount, fd, empty, to, empty, flags) })?;
    Ok(())
}

fn set_attributes(
    tree: &impl AsFd,
    set: u64,
    propagation: u64,
    recursive: bool,
) -> std::io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let (fd, flags) = (
        libc::c_long::from(tree.as_fd().as_raw_fd()),
        libc::c_long::from(flags),
    );
    let size = size_of::<libc::mount_attr>();
    // SAFETY: mount_setattr(2) reads an empty path and attributes of the given size, which outlive
    // the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size,
        )
    })?;
    Ok(())
}

fn check(result: libc::c_long) -> std::io::Result<libc::c_long> {
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
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
///
/// # Errors
/// The system's own.
pub fn hold(path: &Path) -> std::io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let (here, flags) = (libc::AT_FDCWD, libc::OPEN_TREE_CLOEXEC);
    // SAFETY: open_tree(2) reads a C string that outlives the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, here, path.as_ptr(), flags) })?;
    let fd = i32::try_from(fd).map_err(std::io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
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
