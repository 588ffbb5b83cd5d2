//! `tmpcopyup`: a new tmpfs begins with what the image has at its place.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstatat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

/// Copies what is in the directory `from` into the directory `to`, with owners and permissions.
pub fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let from = open_dir(from, c".")?;
    let to = open_dir(to, c".")?;
    let mut dir = Dir::from_fd(from.try_clone()?)?;
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = fstatat(&from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        match kind {
            SFlag::S_IFDIR => {
                mkdirat(&to, name, mode)?;
                copy_up(
                    open_dir(from.as_fd(), name)?.as_fd(),
                    open_dir(to.as_fd(), name)?.as_fd(),
                )?;
            }
            SFlag::S_IFREG => {
                let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let mut source =
                    File::from(openat(&from, name, OFlag::O_RDONLY | flags, Mode::empty())?);
                let create = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | flags;
                io::copy(
                    &mut source,
                    &mut File::from(openat(&to, name, create, mode)?),
                )?;
            }
            SFlag::S_IFLNK => symlinkat(readlinkat(&from, name)?.as_os_str(), &to, name)?,
            _ => mknodat(&to, name, kind, mode, stat.st_rdev)?,
        }
        copy_owner(to.as_fd(), name, &stat)?;
    }
    Ok(())
}

fn copy_owner(dir: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &FileStat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(
        dir,
        name,
        Some(uid),
        Some(gid),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    // A symlink has no permissions. A change of owner may have taken some away.
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFLNK {
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        fchmodat(dir, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

fn open_dir(at: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}
