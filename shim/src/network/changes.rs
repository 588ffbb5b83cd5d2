//! What rtnetlink tells of a network namespace as it changes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::netns::Netns;
use crate::error::{IoContext, Result};

/// linux/rtnetlink.h: links, neighbours, and of both families addresses, routes, rules and
/// configurations.
const GROUPS: [u32; 10] = [1, 3, 5, 7, 8, 9, 11, 19, 24, 25];

/// Events of a namespace: that something has changed, not what. A namespace is small, and looked at
/// anew. The guest can cause events without an end, by its cards: they wait in the kernel, which
/// has room for few, and are thrown away unread.
#[derive(Debug)]
pub struct Changes(Option<AsyncFd<OwnedFd>>);

impl Changes {
    /// From now on; it needs the runtime of the calling thread.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no socket made.
    pub fn watch(netns: &Netns) -> Result<Changes> {
        let open = || {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let protocol = SockProtocol::NetlinkRoute;
            let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
            let groups = GROUPS.iter().fold(0, |all, group| all | 1 << (group - 1));
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
            Ok(socket)
        };
        let doing = || "watch the network namespace".to_owned();
        let socket = netns.run(open).doing(doing)?;
        // SAFETY: the descriptor is owned by the value, and closed after it is deregistered.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        Ok(Changes(Some(
            registered.map_err(io::Error::from).doing(doing)?,
        )))
    }

    /// Drops those that are there by now: who reads the namespace anew has seen what they tell.
    pub fn forget(&mut self) {
        // As many as the kernel keeps, or a little more.
        const MOST: usize = 1024;
        if let Some(socket) = &self.0 {
            for _ in 0..MOST {
                match recv(socket.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT) {
                    Ok(_) | Err(nix::errno::Errno::ENOBUFS) => {}
                    Err(_) => return,
                }
            }
        }
    }

    /// The events, for whoever follows them; what stays here has none.
    pub fn take(&mut self) -> Changes {
        Changes(self.0.take())
    }

    /// Waits for one, and drops all that are there.
    pub async fn next(&mut self) {
        let Some(socket) = &self.0 else {
            return std::future::pending().await;
        };
        match socket.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => return std::future::pending().await,
        }
        self.forget();
    }

    /// Waits until there has been none for so long: whoever sets up a link takes several steps.
    pub async fn calm(&mut self, pause: Duration) {
        while timeout(pause, self.next()).await.is_ok() {
            // A storm is looked at in pauses.
            tokio::time::sleep(pause / 2).await;
        }
    }
}
