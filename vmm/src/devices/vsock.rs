//! The socket family between host and guest: the kernel's device where the host has it, else a
//! helper's.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use serde_json::json;

use super::{Plug, Undo};
use crate::error::{Doing, Error, Result};
use crate::qemu::capabilities::{VHOST_USER_VSOCK, VHOST_VSOCK};

const DEVICE: &str = "/dev/vhost-vsock";

// linux/vhost.h: _IOW(0xAF, 0x60, __u64).
const VHOST_VSOCK_SET_GUEST_CID: libc::Ioctl = 0x4008_AF60;

/// How many numbers are tried before a host counts as full.
const CID_TRIES: u32 = 64;

/// A way to the guest.
#[derive(Debug)]
pub enum VsockDevice {
    /// The host kernel's.
    Kernel(KernelVsock),
    /// vhost-device-vsock's ([`crate::helpers::VsockDaemon::connect`]).
    User {
        /// Connected to the helper.
        connection: OwnedFd,
    },
}

/// The host kernel's device with a guest address that is reserved for as long as it is open.
#[derive(Debug)]
pub struct KernelVsock {
    /// `/dev/vhost-vsock`.
    pub fd: OwnedFd,
    /// Address of the guest.
    pub cid: u32,
}

impl VsockDevice {
    pub(super) async fn plug(self, plug: &mut Plug<'_>) -> Result<()> {
        match self {
            VsockDevice::Kernel(KernelVsock { fd, cid }) => {
                let name = format!("{}-fd", plug.id);
                plug.qmp.pass_fd(&name, fd).await?;
                plug.undo.push(Undo::CloseFd(name.clone()));
                plug.device_add(VHOST_VSOCK, json!({"guest-cid": cid, "vhostfd": name}))
                    .await?;
                plug.undo.pop();
                Ok(())
            }
            VsockDevice::User { connection } => {
                let chardev = plug.vhost_user(connection).await?;
                plug.device_add(VHOST_USER_VSOCK, json!({"chardev": chardev}))
                    .await
            }
        }
    }
}

/// Opens the kernel's device and takes a free guest address, which nobody else can take while the
/// device is open.
///
/// # Errors
/// The device is not there or may not be opened; the line says what to do.
pub fn open_kernel() -> Result<KernelVsock> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Unsupported(format!(
                "{DEVICE} is not there: load the module vhost_vsock"
            )),
            _ => Error::Io {
                doing: format!("open {DEVICE}"),
                source: error,
            },
        })?;
    for _ in 0..CID_TRIES {
        let cid = random_cid()?;
        let wide = u64::from(cid);
        // SAFETY: the ioctl reads eight bytes at the address of a local variable.
        let set = unsafe {
            libc::ioctl(
                device.as_raw_fd(),
                VHOST_VSOCK_SET_GUEST_CID,
                &raw const wide,
            )
        };
        match Errno::result(set) {
            Ok(_) => {
                return Ok(KernelVsock {
                    fd: device.into(),
                    cid,
                });
            }
            Err(Errno::EADDRINUSE) => {}
            Err(errno) => return Err(errno).doing(|| format!("set the guest address of {DEVICE}")),
        }
    }
    Err(Error::Unsupported(format!(
        "{DEVICE}: {CID_TRIES} random guest addresses are all taken"
    )))
}

/// 0 to 2 are the hypervisor's and the host's, the largest one means any.
fn random_cid() -> Result<u32> {
    let mut bytes = [0; 4];
    // SAFETY: writes at most four bytes into a local array.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    Errno::result(got).doing(|| "get a random number".into())?;
    Ok(3 + u32::from_ne_bytes(bytes) % (u32::MAX - 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_addresses_are_never_reserved_ones() {
        assert!(
            (0..1000)
                .map(|_| random_cid().unwrap())
                .all(|cid| (3..u32::MAX).contains(&cid))
        );
    }

    #[test]
    fn a_host_without_the_module_is_told_what_to_load() {
        match open_kernel() {
            Ok(vsock) => assert!(vsock.cid >= 3),
            Err(error) => assert!(error.to_string().contains(DEVICE), "{error}"),
        }
    }
}
