//! Loop devices: a file as a block device, for as long as something is mounted from it.
//!
//! Structures and numbers are those of linux/loop.h.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use crate::check;

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
/// Since Linux 5.8.
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often another process may be quicker to take a free device.
const ATTEMPTS: usize = 64;

/// `struct loop_config`, of which only the first number and the flags are not zero.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    numbers: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    /// Two names, a key, two more numbers, and eight that are reserved.
    rest: [u64; 30],
}

/// A device that exists as long as this, or a mount of it, does.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _open: File,
}

/// What is to be mounted from files, with devices in their places.
#[derive(Debug)]
pub struct Attached {
    /// The node of the first.
    pub source: String,
    /// The options, each `device=FILE` with a node.
    pub options: Vec<String>,
    /// To be dropped when it is mounted.
    pub devices: Vec<LoopDevice>,
}

/// Makes devices of a file system's file, and of those that its options name (`device=`, erofs).
///
/// # Errors
/// A file that cannot be opened; those of [`attach`]. The text names the file.
pub fn attach_all(source: &str, options: &[&str], access: Access) -> io::Result<Attached> {
    let mut devices = Vec::new();
    let mut node = |path: &str| {
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::Write)
            .open(path);
        let device = file.and_then(|file| attach(&file, access));
        let device = device.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?;
        let node = device.path.display().to_string();
        devices.push(device);
        io::Result::Ok(node)
    };
    let source = node(source)?;
    let options = options
        .iter()
        .map(|option| match option.strip_prefix("device=") {
            Some(path) => Ok(format!("device={}", node(path)?)),
            None => Ok((*option).to_owned()),
        });
    let options = options.collect::<io::Result<_>>()?;
    Ok(Attached {
        source,
        options,
        devices,
    })
}

/// How a file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only, and past the page cache: what is mounted has its own.
    ReadDirectly,
    /// Read only.
    Read,
    /// Read and written.
    Write,
}

/// Makes a device of a file.
///
/// # Errors
/// A kernel without loop devices, or one that has no more of them.
fn attach(file: &File, access: Access) -> io::Result<LoopDevice> {
    let control = File::open("/dev/loop-control")?;
    let mut flags = LO_FLAGS_AUTOCLEAR;
    if access != Access::Write {
        flags |= LO_FLAGS_READ_ONLY;
    }
    if access == Access::ReadDirectly {
        flags |= LO_FLAGS_DIRECT_IO;
    }
    let config = Config {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: 0,
        numbers: [0; 5],
        number: 0,
        encryption: [0; 2],
        flags,
        rest: [0; 30],
    };
    for _ in 0..ATTEMPTS {
        // SAFETY: the request has no argument.
        let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) }.into())?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new()
            .read(true)
            .write(access == Access::Write)
            .open(&path)?;
        // SAFETY: the kernel reads a `struct loop_config`, which `config` is laid out as.
        let set = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        match check(set.into()) {
            Ok(_) => {
                return Ok(LoopDevice {
                    path,
                    _open: device,
                });
            }
            // Somebody else has it by now.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_the_kernels_size() {
        // 8 for the first two, 232 for `struct loop_info64`, 64 reserved.
        assert_eq!(size_of::<Config>(), 304);
        assert_eq!(std::mem::offset_of!(Config, flags), 8 + 52);
    }
}
