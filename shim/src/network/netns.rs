//! A pod's network namespace: opened or made, and entered by threads that end at once.
//!
//! The shim itself never leaves the host's namespace. A socket keeps the namespace it was made in,
//! so a netlink connection that was opened in there is used from the shim's own thread.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::{LOOPBACK, Netlink, rtnl};
use crate::error::{Error, IoContext, Result};

const HOST: &str = "/proc/self/ns/net";

nix::ioctl_none!(ns_get_nstype, 0xb7, 3);

/// An open network namespace. It exists at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: Option<PathBuf>,
}

impl Netns {
    /// Opens the namespace that somebody else made and bound to `path`.
    ///
    /// # Errors
    /// No such file, or it is something else.
    pub fn open(path: &Path) -> Result<Netns> {
        let doing = || format!("open the network namespace {}", path.display());
        // Not blocking: the path could be a FIFO.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .doing(doing)?;
        if kind(&file).ok() != Some(CloneFlags::CLONE_NEWNET.bits()) {
            return Err(Error::invalid(format!(
                "{} is not a network namespace",
                path.display()
            )));
        }
        Ok(Netns {
            file,
            path: Some(path.to_owned()),
        })
    }

    /// That of a process; it ends with its last user.
    ///
    /// # Errors
    /// No such process.
    pub fn of_process(pid: i32) -> io::Result<Netns> {
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        Ok(Netns { file, path: None })
    }

    /// Makes a namespace that has nothing but its loopback device and ends with its last
    /// descriptor.
    pub async fn create() -> Result<Netns> {
        let file = Netns::in_fresh_one(|| File::open("/proc/thread-self/ns/net"))
            .doing(|| "make a network namespace".into())?;
        let netns = Netns { file, path: None };
        let (_connection, netlink) = netns.netlink()?;
        let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
        rtnl(
            "set the loopback device up",
            netlink.link().set(up).execute(),
        )
        .await?;
        Ok(netns)
    }

    /// Runs `work` on a thread in a namespace that ends with it.
    ///
    /// # Errors
    /// Those of `work`, and the kernel's.
    pub fn in_fresh_one<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// The same namespace once more.
    ///
    /// # Errors
    /// Too many open files.
    pub fn try_clone(&self) -> io::Result<Netns> {
        Ok(Netns {
            file: self.file.try_clone()?,
            path: self.path.clone(),
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where it was opened; `None` for one that was made here.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// What tells this namespace from others that exist.
    pub fn inode(&self) -> Result<u64> {
        Ok(self
            .file
            .metadata()
            .doing(|| "look at a network namespace".into())?
            .ino())
    }

    /// Whether it is the one that this process is in.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn is_host(&self) -> Result<bool> {
        let own = std::fs::metadata(HOST).doing(|| format!("look at {HOST}"))?;
        let other = self
            .file
            .metadata()
            .doing(|| "look at a network namespace".into())?;
        Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
    }

    /// Runs `work` on a thread in the namespace and waits for it: it must not block.
    ///
    /// # Errors
    /// Those of `work`, and the kernel's refusal to enter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_thread(|| {
            setns(self.fd(), CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// A netlink connection of the namespace; it needs the runtime of the calling thread. It lasts
    /// as long as the first of the two.
    pub fn netlink(&self) -> Result<(Netlink, rtnetlink::Handle)> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = self
            .run(|| {
                let _guard = runtime.enter();
                rtnetlink::new_connection()
            })
            .doing(|| "open a netlink socket in the network namespace".into())?;
        Ok((Netlink(tokio::spawn(connection)), handle))
    }
}

fn kind(file: &File) -> nix::Result<i32> {
    // SAFETY: the request takes no argument, and a file that is no namespace answers ENOTTY.
    unsafe { ns_get_nstype(file.as_raw_fd()) }
}

/// Runs `work` on a thread in the namespace of a descriptor and waits for it: it must not block.
///
/// # Errors
/// Those of `work`, and the kernel's refusal to enter.
pub fn in_netns<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    in_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)?;
        thread
            .join()
            .map_err(|_| io::Error::other("the thread in the network namespace panicked"))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_namespace_has_its_loopback_up_and_is_not_the_hosts() {
        let netns = Netns::create().await.unwrap();
        assert!(!netns.is_host().unwrap());
        let dev = netns
            .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))
            .unwrap();
        assert_eq!(
            dev.lines().filter(|line| line.contains(':')).count(),
            dev.matches("lo:").count(),
            "{dev}"
        );
        netns
            .run(|| std::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
    }

    #[test]
    fn the_hosts_namespace_is_told_from_others() {
        assert!(
            Netns::open(Path::new("/proc/self/ns/net"))
                .unwrap()
                .is_host()
                .unwrap()
        );
    }

    #[test]
    fn what_is_no_network_namespace_is_refused_in_one_line() {
        for path in ["/proc/self/ns/pid", "/etc/passwd", "/dev/null", "/proc"] {
            let error = Netns::open(Path::new(path)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("{path} is not a network namespace")
            );
        }
        let error = Netns::open(Path::new("/run/netns/no-such"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("cannot open the network namespace /run/netns/no-such: No such file"),
            "{error}"
        );
    }
}
