//! Traffic control: everything that comes in on one device leaves by another.
//!
//! The classifier is `u32` with a mask that fits everything, which each kernel with traffic control
//! has, not `matchall`, which some lack.

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Error, Handle};

use super::rtnl;
use crate::error::Result;

/// Tells our filter from others on the same qdisc. Higher than what the kernel picks, so filters
/// that were there first keep their say.
const PRIORITY: u16 = 0xcfda;

const PROTOCOL_ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Parent of filters on what comes in, for the qdiscs `ingress` and `clsact`.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: TcHandle::MIN_INGRESS,
};

/// Whether a device has a qdisc for what comes in.
pub async fn has_ingress(netlink: &Handle, index: u32) -> Result<bool> {
    let qdiscs: Vec<TcMessage> =
        rtnl("list qdiscs", netlink.qdisc().get().execute().try_collect()).await?;
    Ok(qdiscs.iter().any(|qdisc| {
        qdisc.header.index == index.cast_signed()
            && qdisc.attributes.iter().any(|attribute| {
                matches!(attribute,
                    TcAttribute::Kind(kind) if kind == "ingress" || kind == "clsact")
            })
    }))
}

/// Sends what comes in on `from` out by `to`. With `qdisc` the device has no ingress qdisc yet.
///
/// # Errors
/// The kernel's; what was made before stays.
pub async fn redirect(netlink: &Handle, from: u32, to: u32, qdisc: bool) -> Result<()> {
    let index = from.cast_signed();
    if qdisc {
        rtnl(
            "add an ingress qdisc",
            netlink.qdisc().add(index).ingress().execute(),
        )
        .await?;
    } else {
        // Of a pod that died before it could take it away.
        remove_filter(netlink, from).await?;
    }
    let filter = netlink
        .traffic_filter(index)
        .add()
        .ingress()
        .priority(PRIORITY)
        .protocol(PROTOCOL_ALL);
    let doing = "add a filter that redirects (kernel modules cls_u32 and act_mirred)";
    rtnl(doing, async { filter.redirect(to)?.execute().await }).await
}

/// Takes back what [`redirect`] did on a device, however much of it.
pub async fn remove(netlink: &Handle, index: u32, qdisc: bool) -> Result<()> {
    if !has_ingress(netlink, index).await? {
        return Ok(());
    }
    if !qdisc {
        return remove_filter(netlink, index).await;
    }
    let mut request = netlink.qdisc().del(index.cast_signed());
    request.message_mut().header.parent = TcHandle::INGRESS;
    request.message_mut().header.handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    rtnl("remove an ingress qdisc", request.execute()).await
}

/// The crate's own request cannot name a priority: it removes all filters.
async fn remove_filter(netlink: &Handle, index: u32) -> Result<()> {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = INGRESS;
    message.header.info = u32::from(TcHandle {
        major: PRIORITY,
        minor: PROTOCOL_ALL,
    });
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut netlink = netlink.clone();
    rtnl("remove a filter", async move {
        let mut answers = netlink.request(request)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                // Zero is the acknowledgement; a filter that is not there needs no removal.
                NetlinkPayload::Error(error) if ![0, -libc::ENOENT].contains(&error.raw_code()) => {
                    return Err(Error::NetlinkError(error));
                }
                _ => {}
            }
        }
        Ok(())
    })
    .await
}
