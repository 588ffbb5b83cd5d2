//! Traffic control: everything that comes in on one device leaves by another.
//!
//! The classifier is `u32` with a mask that fits everything, which each kernel with traffic control
//! has, not `matchall`, which some lack.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use rtnetlink::{Error, Handle};

use super::rtnl;
use crate::error::Result;

/// Tells our filter from others on the same qdisc. Higher than what the kernel picks, so filters
/// that were there first keep their say.
const PRIORITY: u16 = 0xcfda;

/// Of the filter that is asked before it.
const EXCEPTION: u16 = PRIORITY - 1;

const PROTOCOL_ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Parent of filters on what comes in, for the qdiscs `ingress` and `clsact`.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: TcHandle::MIN_INGRESS,
};

/// The devices that have a qdisc for what comes in, by index.
pub async fn with_ingress(netlink: &Handle) -> Result<HashSet<u32>> {
    let is_ingress = |attribute: &TcAttribute| match attribute {
        TcAttribute::Kind(kind) => ["ingress", "clsact"].contains(&kind.as_str()),
        _ => false,
    };
    let qdiscs: Vec<TcMessage> =
        rtnl("list qdiscs", netlink.qdisc().get().execute().try_collect()).await?;
    Ok(qdiscs
        .iter()
        .filter(|qdisc| qdisc.attributes.iter().any(is_ingress))
        .map(|qdisc| qdisc.header.index.cast_unsigned())
        .collect())
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
        remove_filters(netlink, from).await?;
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

/// Lets a BPF program say first what is not to be redirected.
///
/// # Errors
/// The kernel's: it may be one without this classifier.
pub async fn except(netlink: &Handle, from: u32, program: &OwnedFd) -> Result<()> {
    let mut message = filter(from, EXCEPTION);
    let options = [
        TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned()),
        TcFilterBpfOption::ProgName("local_sockets".to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.map(TcOption::Bpf).into()),
    ];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE;
    send(
        netlink,
        "add a filter of BPF (kernel module cls_bpf)",
        request,
    )
    .await
}

/// Whether what comes in on a device is redirected by us.
pub async fn is_redirected(netlink: &Handle, index: u32) -> Result<bool> {
    let filters = netlink.traffic_filter(index.cast_signed()).get().ingress();
    let filters: Vec<TcMessage> = rtnl("list filters", filters.execute().try_collect()).await?;
    Ok(filters
        .iter()
        .any(|filter| TcHandle::from(filter.header.info).major == PRIORITY))
}

/// Takes back what [`redirect`] and [`except`] did on a device, however much of it.
pub async fn remove(netlink: &Handle, index: u32, qdisc: bool) -> Result<()> {
    if !with_ingress(netlink).await?.contains(&index) {
        return Ok(());
    }
    if !qdisc {
        return remove_filters(netlink, index).await;
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
async fn remove_filters(netlink: &Handle, index: u32) -> Result<()> {
    for priority in [PRIORITY, EXCEPTION] {
        let message = RouteNetlinkMessage::DelTrafficFilter(filter(index, priority));
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        send(netlink, "remove a filter", request).await?;
    }
    Ok(())
}

fn filter(index: u32, priority: u16) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = INGRESS;
    message.header.info = u32::from(TcHandle {
        major: priority,
        minor: PROTOCOL_ALL,
    });
    message
}

/// What is to be removed and is not there needs no removal.
async fn send(
    netlink: &Handle,
    doing: &str,
    request: NetlinkMessage<RouteNetlinkMessage>,
) -> Result<()> {
    let mut netlink = netlink.clone();
    rtnl(doing, async move {
        let mut answers = netlink.request(request)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                // Zero is the acknowledgement.
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
