//! Taps: the end of a link that QEMU holds. A tap that was made here vanishes with its last
//! descriptor.
//!
//! Offloads and the size of the virtio-net header are QEMU's to set: it does when it gets the
//! descriptors and again when the guest's driver has said what it can do.

use std::fs::{File, OpenOptions, write};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::net::if_::if_nametoindex;

use super::netns::Netns;
use super::scan::Link;

/// `%d` is the kernel's to fill in.
const TEMPLATE: &str = "vmtap%d";

/// Whether a link is such a tap, of whichever sandbox.
pub fn is_ours(link: &Link) -> bool {
    let number = link.name.strip_prefix("vmtap");
    link.tap && number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// `MAX_TAP_QUEUES` of the kernel.
pub const MAX_QUEUES: u32 = 256;

/// The largest MTU a tap takes: 65535 less the Ethernet header.
pub const MAX_MTU: u32 = 65521;

nix::ioctl_write_int!(tun_set_iff, b'T', 202);

#[derive(Debug)]
pub struct Tap {
    /// Its index in its namespace.
    pub index: u32,
    /// One descriptor for each queue.
    pub queues: Vec<OwnedFd>,
}

/// Makes a tap with `queues` queues in the namespace. It is down.
///
/// # Errors
/// The kernel's refusal; without the `tun` module `NotFound`.
pub fn create(netns: &Netns, queues: u32) -> io::Result<Tap> {
    netns.run(|| {
        let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let (first, name) = attach(TEMPLATE, multi)?;
        let mut fds = vec![first];
        for _ in 1..queues {
            fds.push(attach(&name, multi)?.0);
        }
        // Only the guest talks here: the namespace's own IPv6 must not announce itself to it. Fails
        // without IPv6.
        let _ = write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        Ok(Tap {
            index: if_nametoindex(name.as_str())?,
            queues: fds,
        })
    })
}

/// Opens a tap that somebody else made, with as many of `queues` queues as it takes.
///
/// # Errors
/// `EBUSY`: somebody else has it open.
pub fn open(netns: &Netns, name: &str, queues: u32) -> io::Result<Vec<OwnedFd>> {
    netns.run(|| {
        // Whether it has several queues must be said right, and only this tells.
        let (first, multi) = match attach(name, libc::IFF_MULTI_QUEUE) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (attach(name, 0)?.0, false),
            result => (result?.0, true),
        };
        let mut fds = vec![first];
        while multi && fds.len() < queues as usize {
            fds.push(attach(name, libc::IFF_MULTI_QUEUE)?.0);
        }
        Ok(fds)
    })
}

fn attach(name: &str, flags: libc::c_int) -> io::Result<(OwnedFd, String)> {
    let tun: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request takes a pointer to an ifreq, which outlives the call.
    unsafe {
        tun_set_iff(
            tun.as_raw_fd(),
            std::ptr::from_mut(&mut request).addr() as libc::c_ulong,
        )
    }?;
    let name = request
        .ifr_name
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| char::from(byte.cast_unsigned()));
    Ok((tun.into(), name.collect()))
}

/// A vhost-net descriptor for each of `queues` queues; none where the host has no vhost-net.
pub fn vhosts(queues: usize) -> Vec<OwnedFd> {
    let open = |_| {
        Some(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/vhost-net")
                .ok()?
                .into(),
        )
    };
    (0..queues)
        .map(open)
        .collect::<Option<_>>()
        .unwrap_or_default()
}
