//! Files that the host copies into the guest, for volumes without a shared file system.
//!
//! A file comes in pieces, one request each, none larger than a frame of ttrpc. They are gathered
//! beside its place, under its name and [`PARTIAL`], and it takes its place when it is whole.
//!
//! A container may have the directory mounted and change it meanwhile, so nothing in there is
//! trusted: each part of a path is opened from the directory above it and through no link, and what
//! is written to was made here or is seen to be a regular file before it is opened.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, fchown};
use std::path::{Component, Path, PathBuf};

use guest_protocol::GUEST_SHARE;
use guest_protocol::protocols::agent::CopyFileRequest;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use crate::error::{Context, Error, Result};

/// Ends the name of a file that is not whole yet, and of a link until it is its owner's. Nothing
/// else has such a name; the key of a ConfigMap may well end with ".tmp".
const PARTIAL: &str = ".cofferdam-partial";

pub(super) const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// Who is to own what is copied. -1 on the wire changes nothing: what is new is the agent's.
#[derive(Clone, Copy)]
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Owner {
    pub fn of(metadata: &fs::Metadata) -> Owner {
        Owner {
            uid: metadata.uid(),
            gid: metadata.gid(),
        }
    }
}

/// Makes a directory or a link, or writes a piece of a file.
///
/// # Errors
/// A path outside of the share or through a link; a piece that does not fit; a failed system call.
pub fn copy(request: &CopyFileRequest) -> Result<()> {
    let path = Path::new(&request.path);
    let attempt = || format!("copy {}", request.path);
    let (parents, name) = place(path)?;
    let owner = Owner {
        uid: request.uid.cast_unsigned(),
        gid: request.gid.cast_unsigned(),
    };
    fs::create_dir_all(GUEST_SHARE).context(|| format!("create {GUEST_SHARE}"))?;
    let mut directory = open(AT_FDCWD, Path::new(GUEST_SHARE), DIRECTORY).context(attempt)?;
    for parent in parents {
        directory = make_parent(directory.as_fd(), parent, request.dir_mode).context(attempt)?;
    }
    let directory = directory.as_fd();
    match request.file_mode & libc::S_IFMT {
        libc::S_IFDIR => make_directory(directory, name, request.file_mode, owner),
        libc::S_IFLNK => make_link(directory, name, &request.data, owner),
        // Kata's agent takes a mode without a type for that of a file.
        libc::S_IFREG | 0 => return write_piece(directory, name, request, owner),
        kind => {
            return Err(Error::Invalid(format!(
                "{} is no file, directory or link: its type is {kind:#o}",
                request.path
            )));
        }
    }
    .context(attempt)
}

/// The names that lead from the share to the file, and its own.
fn place(path: &Path) -> Result<(Vec<&OsStr>, &OsStr)> {
    let below = path.strip_prefix(GUEST_SHARE).ok();
    let names = below.and_then(|below| {
        let names = below.components().map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        names.collect::<Option<Vec<_>>>()
    });
    names
        .and_then(|mut parents| parents.pop().map(|name| (parents, name)))
        .ok_or_else(|| {
            Error::Invalid(format!(
                "{} is no plain path below {GUEST_SHARE}",
                path.display()
            ))
        })
}

/// Opens what is there, through no link.
pub(super) fn open(directory: impl AsFd, name: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    open_with_mode(directory, name, flags, 0)
}

pub(super) fn open_with_mode(
    directory: impl AsFd,
    name: &Path,
    flags: OFlag,
    mode: u32,
) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(Mode::from_bits_truncate(mode))
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(directory, name, how)?)
}

/// A directory on the way, which gets the mode if it has to be made.
fn make_parent(directory: BorrowedFd<'_>, name: &OsStr, mode: u32) -> io::Result<OwnedFd> {
    match mkdirat(directory, name, Mode::S_IRWXU) {
        Ok(()) => {
            let made = open(directory, Path::new(name), DIRECTORY)?;
            set_mode(&made, mode)?;
            Ok(made)
        }
        Err(Errno::EEXIST) => open(directory, Path::new(name), DIRECTORY),
        Err(errno) => Err(errno.into()),
    }
}

pub(super) fn make_directory(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    mode: u32,
    owner: Owner,
) -> io::Result<()> {
    let made = make_parent(directory, name, mode)?;
    fchown(&made, Some(owner.uid), Some(owner.gid))?;
    // The change of the owner takes set-user-ID bits away.
    set_mode(&made, mode)
}

/// A link, in the place of whatever file or link is there.
pub(super) fn make_link(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    target: &[u8],
    owner: Owner,
) -> io::Result<()> {
    let partial = partial(name);
    remove(directory, &partial)?;
    symlinkat(OsStr::from_bytes(target), directory, partial.as_os_str())?;
    let chown = fchownat(
        directory,
        partial.as_os_str(),
        Some(Uid::from_raw(owner.uid)),
        Some(Gid::from_raw(owner.gid)),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    );
    let renamed = chown.and_then(|()| renameat(directory, partial.as_os_str(), directory, name));
    if renamed.is_err() {
        let _ = remove(directory, &partial);
    }
    Ok(renamed?)
}

/// Writes one piece of a file. The first one begins it anew; pieces may be repeated, and none may
/// be left out.
fn write_piece(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    request: &CopyFileRequest,
    owner: Owner,
) -> Result<()> {
    let invalid = |what: String| Error::Invalid(format!("copy {}: {what}", request.path));
    let (Ok(offset), Ok(size)) = (
        u64::try_from(request.offset),
        u64::try_from(request.file_size),
    ) else {
        return Err(invalid("offset or size is negative".into()));
    };
    let data = request.data.as_slice();
    let end = offset.saturating_add(data.len() as u64);
    if end > size {
        return Err(invalid(format!(
            "a piece ends at {end} in a file of {size} bytes"
        )));
    }
    let attempt = || format!("copy {}", request.path);
    let partial = partial(name);
    let opened = if offset == 0 {
        remove(directory, &partial).context(attempt)?;
        let new = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        open_with_mode(directory, &partial, new, 0o600).map(File::from)
    } else {
        reopen(directory, &partial)
    };
    let (file, length) = opened
        .and_then(|file| file.metadata().map(|metadata| (file, metadata.len())))
        .context(attempt)?;
    if length < offset {
        return Err(invalid(format!(
            "a piece begins at {offset}, and only {length} bytes came before"
        )));
    }
    let write = || -> io::Result<()> {
        file.write_all_at(data, offset)?;
        if file.metadata()?.len() == size {
            fchown(&file, Some(owner.uid), Some(owner.gid))?;
            set_mode(&file, request.file_mode)?;
            renameat(directory, partial.as_os_str(), directory, name)?;
        }
        Ok(())
    };
    let written = write();
    if written.is_err() {
        // No memory for it, for example: what is there of it is of no use.
        let _ = remove(directory, &partial);
    }
    written.context(attempt)
}

/// Opens a regular file for writing. The open of a device or a fifo can have consequences, so it is
/// looked at first.
fn reopen(directory: BorrowedFd<'_>, name: &Path) -> io::Result<File> {
    let place = File::from(open(directory, name, OFlag::O_PATH)?);
    if !place.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

fn partial(name: &OsStr) -> PathBuf {
    let mut partial = name.to_owned();
    partial.push(PARTIAL);
    partial.into()
}

fn remove(directory: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

pub(super) fn set_mode(file: impl AsFd, mode: u32) -> io::Result<()> {
    Ok(fchmod(file, Mode::from_bits_truncate(mode & 0o7777))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_plain_and_below_the_share() {
        let path = format!("{GUEST_SHARE}/a/./b/c");
        let (parents, name) = place(Path::new(&path)).unwrap();
        assert_eq!(
            (parents, name),
            (vec!["a".as_ref(), "b".as_ref()], "c".as_ref())
        );
        for bad in [
            "",
            "c",
            "/etc/passwd",
            GUEST_SHARE,
            &format!("{GUEST_SHARE}-else/c"),
            &format!("{GUEST_SHARE}/../c"),
            &format!("{GUEST_SHARE}/a/.."),
        ] {
            assert!(place(Path::new(bad)).is_err(), "{bad:?}");
        }
    }
}
