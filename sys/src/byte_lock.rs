//! Locks by number: one byte of an empty file for each thing that only one process may have
//! (fcntl(2), open file description locks). A lock ends with its descriptor, so with its process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A file whose bytes are locks.
#[derive(Debug)]
pub struct ByteLocks(File);

impl ByteLocks {
    /// Opens the file, and makes it if need be. Each of these holds what it took until it is
    /// dropped.
    ///
    /// # Errors
    /// The kernel's, also when the path is a link.
    pub fn open(path: &Path) -> io::Result<ByteLocks> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
        options.open(path).map(ByteLocks)
    }

    /// Takes the lock `number`, below 2^63; says whether nobody else has it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_take(&self, number: u64) -> io::Result<bool> {
        // SAFETY: all zero is a valid flock.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = libc::F_WRLCK as libc::c_short;
        range.l_whence = libc::SEEK_SET as libc::c_short;
        range.l_start = number.cast_signed();
        range.l_len = 1;
        // SAFETY: fcntl(2) reads a local flock.
        match unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } {
            0 => Ok(true),
            _ => match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    Ok(false)
                }
                error => Err(error),
            },
        }
    }
}
