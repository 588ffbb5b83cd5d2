//! Mounts by descriptor: what was opened is what is mounted, whatever its path means by then.
//!
//! What rustix has of this is called from there; here is what it lacks (mount_setattr(2), Linux
//! 5.12), and the combinations that more than one crate wants. Nothing here allocates or takes a
//! lock, so all of it may be done in a child between its making and its exec.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::check;

/// How far a change or a copy of a mount goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The mount alone.
    Mount,
    /// With everything that is mounted below it.
    Tree,
}

/// A change of a mount (`struct mount_attr`), where zero changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// The propagation type, `MS_SHARED` and the like, or zero.
    pub propagation: u64,
}

impl Attributes {
    /// Sets `MOUNT_ATTR_*` and clears none.
    pub const fn set(set: u64) -> Attributes {
        Attributes {
            set,
            clear: 0,
            propagation: 0,
        }
    }

    /// Clears `MOUNT_ATTR_*` and sets none.
    pub const fn clear(clear: u64) -> Attributes {
        Attributes {
            set: 0,
            clear,
            propagation: 0,
        }
    }

    /// Changes the propagation type only.
    pub const fn propagation(propagation: u64) -> Attributes {
        Attributes {
            set: 0,
            clear: 0,
            propagation,
        }
    }
}

/// A detached copy of the mount that an open file or directory is on, from there on.
///
/// # Errors
/// The kernel's: a mount that is detached itself or of another namespace, or no right to mount.
pub fn clone_tree(from: impl AsFd, extent: Extent) -> io::Result<OwnedFd> {
    let flags = clone_flags(extent) | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(from, c"", flags)?)
}

/// A detached copy of the mount that a path leads to, from there on.
///
/// # Errors
/// As [`clone_tree`], or nothing there.
pub fn clone_tree_at(path: &CStr, extent: Extent) -> io::Result<OwnedFd> {
    Ok(open_tree(CWD, path, clone_flags(extent))?)
}

fn clone_flags(extent: Extent) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match extent {
        Extent::Mount => flags,
        Extent::Tree => flags | OpenTreeFlags::AT_RECURSIVE,
    }
}

/// Mounts a detached tree on an open file or directory.
///
/// # Errors
/// The kernel's: a file on a directory, a place that was removed, or no right to mount.
pub fn attach(tree: impl AsFd, place: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, c"", place, c"", flags)?)
}

/// Changes the mount that a descriptor is the root of. With nothing to change it makes no call.
///
/// # Errors
/// The kernel's: no root of a mount, or an attribute that may not be changed.
pub fn set_attributes(mount: impl AsFd, attributes: &Attributes, extent: Extent) -> io::Result<()> {
    if *attributes == Attributes::default() {
        return Ok(());
    }
    let attributes = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    let recursive = match extent {
        Extent::Mount => 0,
        Extent::Tree => libc::AT_RECURSIVE,
    };
    // SAFETY: mount_setattr(2) reads an empty path and attributes of the given size, which outlive
    // the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of_val(&attributes),
        )
    })?;
    Ok(())
}
