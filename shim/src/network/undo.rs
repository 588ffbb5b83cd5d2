//! What of a pod's network is left on the host after its descriptors: a filter, and perhaps its
//! qdisc, on each link of a namespace that outlives the pod.

use std::io;
use std::path::PathBuf;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use serde::{Deserialize, Serialize};

use super::netns::Netns;
use super::{rtnl, tc};
use crate::error::{Error, Result};

/// A link whose traffic was, or was about to be, redirected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    pub netns: PathBuf,
    /// Its inode: a path can come to mean another namespace.
    pub inode: u64,
    pub link: String,
    pub index: u32,
    /// The qdisc is ours as well.
    pub qdisc: bool,
}

impl Redirect {
    /// Takes it away. A namespace or link that is gone, or is another by now, is as good.
    pub fn undo(&self) -> Result<()> {
        let Ok(netns) = Netns::open(&self.netns) else {
            return Ok(());
        };
        if netns.is_host()? || netns.inode()? != self.inode {
            return Ok(());
        }
        // The caller may have a runtime or none; a thread of its own can have one in any case.
        let result = netns.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(self.remove()))
        });
        let doing = format!(
            "cannot take back the redirection of {} in {}",
            self.link,
            self.netns.display()
        );
        result
            .map_err(|error: io::Error| Error::internal(error.to_string()))
            .flatten()
            .map_err(|e| e.context(doing))
    }

    /// Runs in the namespace.
    async fn remove(&self) -> Result<()> {
        let (connection, netlink, _) =
            rtnetlink::new_connection().map_err(|e| Error::internal(e.to_string()))?;
        tokio::spawn(connection);
        let list = netlink
            .link()
            .get()
            .execute()
            .try_collect::<Vec<LinkMessage>>();
        let same = |link: &LinkMessage| {
            link.header.index == self.index
                && link
                    .attributes
                    .iter()
                    .any(|a| matches!(a, LinkAttribute::IfName(name) if *name == self.link))
        };
        if !rtnl("list links", list).await?.iter().any(same) {
            return Ok(());
        }
        tc::remove(&netlink, self.index, self.qdisc).await
    }
}
