//! Network namespaces and tap devices of tests.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

// linux/if_tun.h: _IOW('T', 202, int).
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A network namespace that nothing else is in; gone with its descriptor.
pub struct Netns(pub OwnedFd);

impl Netns {
    pub fn new() -> Netns {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap().into()
        });
        Netns(made.join().unwrap())
    }

    /// Runs `what` on a thread that is in there.
    pub fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                what()
            });
            inside.join().unwrap()
        })
    }

    /// A tap device with its queues, up, with an address and without IPv6's chatter.
    pub fn tap(&self, name: &str, queues: usize, address: &str) -> Vec<OwnedFd> {
        self.run(|| {
            let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
            let taps = (0..queues).map(|_| queue(name, TAP | several)).collect();
            for arguments in [
                &["addr", "add", address, "dev", name][..],
                &["link", "set", name, "up"],
            ] {
                assert!(
                    Command::new("ip")
                        .args(arguments)
                        .status()
                        .unwrap()
                        .success(),
                    "ip {arguments:?}"
                );
            }
            taps
        })
    }

    pub fn inode(&self) -> u64 {
        File::from(self.0.try_clone().unwrap())
            .metadata()
            .unwrap()
            .ino()
    }
}

/// One queue of a tap device.
pub fn queue(name: &str, flags: i32) -> OwnedFd {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the ioctl reads and writes a local ifreq.
    let set = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) };
    assert_eq!(set, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    tun.into()
}
