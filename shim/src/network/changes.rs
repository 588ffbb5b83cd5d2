//! What rtnetlink tells of a network namespace as it changes.

use std::time::Duration;

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use tokio::time::timeout;

use super::Netlink;
use super::netns::Netns;
use crate::error::{IoContext, Result};

const GROUPS: [MulticastGroup; 10] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Ipv4Netconf,
    MulticastGroup::Ipv6Netconf,
];

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Events of a namespace: that something has changed, not what. A namespace is small, and looked at
/// anew.
#[derive(Debug)]
pub struct Changes(Option<(Netlink, Messages)>);

impl Changes {
    /// From now on; it needs the runtime of the calling thread.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no socket made.
    pub fn watch(netns: &Netns) -> Result<Changes> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, _, messages) = netns
            .run(|| {
                let _guard = runtime.enter();
                rtnetlink::new_multicast_connection(&GROUPS)
            })
            .doing(|| "watch the network namespace".into())?;
        Ok(Changes(Some((Netlink(tokio::spawn(connection)), messages))))
    }

    /// Drops those that are there by now: who reads the namespace anew has seen what they tell.
    pub fn forget(&mut self) {
        if let Some((_, messages)) = &mut self.0 {
            while messages.try_recv().is_ok() {}
        }
    }

    /// The events, for whoever follows them; what stays here has none.
    pub fn take(&mut self) -> Changes {
        Changes(self.0.take())
    }

    /// Waits for one. Never ends where the kernel has closed the socket.
    pub async fn next(&mut self) {
        if let Some((_, messages)) = &mut self.0
            && messages.next().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }

    /// Waits until there has been none for so long: whoever sets up a link takes several steps.
    pub async fn calm(&mut self, pause: Duration) {
        while timeout(pause, self.next()).await.is_ok() {}
    }
}
