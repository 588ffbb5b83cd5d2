//! A pod's network and its VM: each link in the pod's network namespace becomes a NIC of the guest.
//!
//! What CNI left in the namespace is the truth, and it stays as it is: a tap is made beside each
//! link, traffic control sends everything that comes in on the one out by the other, and the guest
//! gets the link's addresses. So whatever CNI's plugins do on the host's side of the link keeps
//! working.
//!
//! ```text
//!        the pod's network namespace                          QEMU          guest
//!  veth ── eth0 ──tc ingress: redirect──▶ tap ═══descriptor═══ NIC ───── eth0, same MAC,
//!             ◀──tc ingress: redirect──── tap                              addresses, routes
//!
//!  loopback: sk_lookup program ──▶ listener of the shim ══vsock══ agent ─▶ the guest's loopback
//! ```
//!
//! * `netns` opens or makes the namespace. The shim is never in it: what has to be done there is
//!   done by a thread that enters it and ends.
//! * `scan` finds links, addresses, routes and neighbours by netlink; `tap` makes the taps, `tc`
//!   the redirects.
//! * `local_sockets` leaves out of the redirection what comes for sockets of the namespace,
//!   `no_loopback` what is for the host's own; `classifier` has what both need.
//! * `rules` refuses a namespace whose packet filter would have bound the pod's processes: packets
//!   of the guest pass below it (docs/security.md), unless the configuration lets that be.
//! * `forward` and `sk_lookup` answer on the namespace's loopback for servers in the guest, which
//!   is how containerd forwards ports; `servers` finds those of the namespace, for the other
//!   direction.
//! * `mirror`, `sysctls` and `netfilter` say what the guest's kernel is to have of the namespace's:
//!   our own agent gives it that. Others are told by `routes`.
//! * `user_mode` makes a namespace whose traffic is the host's own, where a pod asks for that.
//! * `undo` takes redirects off a link whose namespace outlives the sandbox; each is in the ledger
//!   before it is set. Taps end with their descriptors.
//!
//! Links are looked for when the machine is made, when a container starts, because docker and
//! nerdctl make theirs in between, and whenever rtnetlink tells of a change.

mod changes;
mod classifier;
mod forward;
mod local_sockets;
mod mirror;
mod netfilter;
mod netns;
mod no_loopback;
mod routes;
mod rules;
mod scan;
mod servers;
mod sk_lookup;
mod sysctls;
mod tap;
mod tc;
#[cfg(test)]
mod tests;
mod undo;
mod user_mode;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;

use guest_protocol::protocols::network::{
    IptablesTable, NetworkLink, NetworkState, NftablesMessage,
};
use guest_protocol::protocols::types;
use rtnetlink::{Handle, LinkUnspec};
use sys::point::{Point, reach};
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use changes::Changes;
pub use forward::{Forwarder, HostPorts};
pub use netns::{Netns, in_netns};
pub use scan::Link;
pub use servers::Server;
pub use undo::Redirect;
pub use user_mode::{Plan, UserMode};

use crate::deadlines::NETLINK;
use crate::error::{Error, IoContext, Result};

/// `lo` of every namespace.
const LOOPBACK: u32 = 1;

/// `IFF_NOARP`, the one link flag that the agent takes.
const NO_ARP: u32 = 0x80;

/// A NIC for the guest.
#[derive(Debug)]
pub struct Endpoint {
    /// The link that it stands for, and looks like.
    pub link: Link,
    /// For QEMU, see [`Endpoint::clone_fds`].
    fds: Fds,
    /// What to undo on failure: whether the qdisc is ours. `None` for a link that is a tap itself.
    redirected: Option<bool>,
}

/// What becomes of links in use that carry no Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// The pod does not start: its processes would miss one.
    Refused,
    /// They came later, and are left out.
    LeftOut,
}

/// Descriptors of a NIC. The tap exists as long as one of its own is open.
#[derive(Debug, Default)]
pub struct Fds {
    /// The tap, once for each queue.
    pub taps: Vec<OwnedFd>,
    /// vhost-net, once for each queue or not at all.
    pub vhosts: Vec<OwnedFd>,
}

impl Endpoint {
    /// The descriptors once more, for QEMU. The tap lives as long as the last of all of them.
    ///
    /// # Errors
    /// Too many open files.
    pub fn clone_fds(&self) -> io::Result<Fds> {
        let again = |list: &[OwnedFd]| {
            list.iter()
                .map(OwnedFd::try_clone)
                .collect::<io::Result<Vec<_>>>()
        };
        Ok(Fds {
            taps: again(&self.fds.taps)?,
            vhosts: again(&self.fds.vhosts)?,
        })
    }
}

impl Link {
    /// The message that sets its NIC up in the guest. `pci_path` may be empty: the agent finds it
    /// by hardware address.
    pub fn interface(&self, pci_path: &str) -> types::Interface {
        let addresses = self
            .addresses
            .iter()
            .map(|a| routes::to_address(a.ip, &a.prefix.to_string()));
        types::Interface {
            device: self.name.clone(),
            name: self.name.clone(),
            IPAddresses: addresses.collect(),
            mtu: self.mtu.into(),
            hwAddr: sys::mac_text(&self.mac),
            devicePath: pci_path.to_owned(),
            type_: self.kind.clone(),
            raw_flags: if self.no_arp { NO_ARP } else { 0 },
            ..Default::default()
        }
    }
}

/// A pod's network namespace and what of it the guest has.
#[derive(Debug)]
pub struct Network {
    netns: Netns,
    /// Links that the guest has, by index.
    links: HashMap<u32, String>,
    /// The namespace is [`UserMode`]'s, whose tap is a link like others.
    user_mode: bool,
    /// Our own taps.
    taps: HashSet<u32>,
    /// See [`Network::read_sysctls`].
    sysctls: HashMap<String, String>,
    /// The rules of nftables that were read last, and their generation.
    carried: (Option<u32>, Vec<NftablesMessage>),
    /// Tables of the old iptables that the guest has.
    old_tables: HashSet<(String, bool)>,
}

impl Network {
    /// Nothing of the namespace is the guest's yet.
    ///
    /// # Errors
    /// The namespace is the host's own.
    pub fn new(netns: Netns, user_mode: bool) -> Result<Network> {
        if netns.is_host()? {
            return Err(Error::invalid(
                "a virtual machine cannot have the host's own network: give the pod one of its own",
            ));
        }
        Ok(Network {
            netns,
            links: HashMap::new(),
            user_mode,
            taps: HashSet::new(),
            sysctls: HashMap::new(),
            carried: (None, Vec::new()),
            old_tables: HashSet::new(),
        })
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Whether it is a namespace of our own in which no link has been found.
    pub fn is_untouched(&self) -> bool {
        self.netns.path().is_none() && self.links.is_empty()
    }

    /// Refuses a namespace with rules of a packet filter, which would not bind the guest.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` that names the rule; the kernel's, if it does not say what rules there
    /// are.
    pub fn refuse_rules(&self) -> Result<()> {
        if self.is_untouched() {
            return Ok(());
        }
        match self
            .netns
            .run(rules::first)
            .doing(|| "read the packet filter of the network namespace".into())?
        {
            None => Ok(()),
            Some(rule) => Err(refused_rule(&io::Error::other(rule))),
        }
    }

    /// Makes a NIC of each link that is not one yet. `record` is told before anything is made that
    /// would outlive both the descriptors and the pod.
    ///
    /// # Errors
    /// The kernel's, or that of `record`; then nothing of this call is left.
    pub async fn connect_new(
        &mut self,
        queues: u32,
        others: Others,
        mut record: impl FnMut(&Redirect) -> Result<()>,
    ) -> Result<Vec<Endpoint>> {
        let (_connection, netlink) = self.netns.netlink()?;
        let queues = queues.clamp(1, tap::MAX_QUEUES);
        let (mut endpoints, mut taps) = (Vec::new(), Vec::new());
        let all = self.all_links(&netlink).await?;
        for link in &all {
            if self.links.contains_key(&link.index) || link.is_made_in_guest(&all) {
                continue;
            }
            if !link.is_ethernet {
                match others {
                    Others::Refused => return Err(no_ethernet(link)),
                    Others::LeftOut => continue,
                }
            }
            let link = link.clone();
            let name = link.name.clone();
            match self.connect(&netlink, link, queues, &mut record).await {
                Ok((endpoint, tap)) => {
                    endpoints.push(endpoint);
                    taps.extend(tap);
                }
                Err(error) => {
                    for endpoint in endpoints {
                        disconnect(&netlink, &endpoint).await;
                    }
                    return Err(
                        error.context(format!("cannot connect {name} to the virtual machine"))
                    );
                }
            }
        }
        self.links.extend(
            endpoints
                .iter()
                .map(|endpoint| (endpoint.link.index, endpoint.link.name.clone())),
        );
        self.taps.extend(taps);
        Ok(endpoints)
    }

    /// All but our own taps.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: another virtual machine has the namespace's links.
    async fn all_links(&self, netlink: &Handle) -> Result<Vec<Link>> {
        let mut links = scan::links(netlink, &self.links).await?;
        links.retain(|link| !self.taps.contains(&link.index));
        for link in &mut links {
            link.tap &= !self.user_mode;
        }
        if let Some(tap) = links.iter().find(|link| tap::is_ours(link)) {
            return Err(Error::precondition(format!(
                "the network namespace is that of another container's virtual machine (its tap \
                 {}), and a link can lead into one only: put both containers into one pod, or give \
                 this one a network of its own, or the runtime runc",
                tap.name
            )));
        }
        Ok(links)
    }

    /// The links that the guest has as NICs, as they are now. One that has gone is forgotten, and
    /// so is one that was away: it may have come back under its number, but without our filter.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn links(&mut self) -> Result<Vec<Link>> {
        let (_connection, netlink) = self.netns.netlink()?;
        let mut links = Vec::new();
        for link in self.all_links(&netlink).await? {
            let is_known = self.links.contains_key(&link.index);
            if is_known && (link.tap || tc::is_redirected(&netlink, link.index).await?) {
                links.push(link);
            }
        }
        self.links = links
            .iter()
            .map(|link| (link.index, link.name.clone()))
            .collect();
        Ok(links)
    }

    /// Reads the sysctls that are not defaults, for the links that the guest has. It takes some
    /// milliseconds.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub async fn read_sysctls(&mut self) -> Result<()> {
        if self.is_untouched() {
            return Ok(());
        }
        let doing = || "read the sysctls of the network namespace".to_owned();
        let netns = self.netns.try_clone().doing(doing)?;
        let names: Vec<String> = self.links.values().cloned().collect();
        let before = self.sysctls.clone();
        let read =
            tokio::task::spawn_blocking(move || sysctls::set_by_somebody(&netns, &names, &before));
        self.sysctls = read
            .await
            .map_err(io::Error::other)
            .flatten()
            .doing(doing)?;
        Ok(())
    }

    /// The whole network as the guest's kernel is to have it, with the sysctls that were read last.
    /// With `carry_rules` also what packet filters have.
    ///
    /// # Errors
    /// The kernel's; `FAILED_PRECONDITION` names a rule that a guest cannot have.
    pub async fn state(&mut self, carry_rules: bool) -> Result<NetworkState> {
        let (_connection, netlink) = self.netns.netlink()?;
        let all = self.all_links(&netlink).await?;
        let guests =
            |link: &&Link| self.links.contains_key(&link.index) || link.is_made_in_guest(&all);
        let mut links: Vec<NetworkLink> = all
            .iter()
            .filter(guests)
            .map(|link| self.message(link))
            .collect();
        // Those that stand on others come last.
        links.sort_by_key(|link| (!link.make.is_empty(), link.index));
        let names = links.iter().map(|link| (link.index, link.name.clone()));
        let names: HashMap<u32, String> = names.collect();
        let state = mirror::state(&netlink, &names).await?;
        let (nftables, iptables) = if carry_rules {
            self.rules().map_err(|error| refused_rule(&error))?
        } else {
            Default::default()
        };
        Ok(NetworkState {
            links,
            sysctls: self.sysctls.clone(),
            nftables,
            iptables,
            ..state
        })
    }

    /// What packet filters have. Those of nftables are read again only if they are others by now:
    /// what rules count and learn is no change.
    fn rules(&mut self) -> io::Result<(Vec<NftablesMessage>, Vec<IptablesTable>)> {
        let (before, carried) = &self.carried;
        let (generation, nftables, tables) = self.netns.run(|| {
            let generation = netfilter::generation()?;
            let nftables = match generation == *before && generation.is_some() {
                true => carried.clone(),
                false => netfilter::carried()?,
            };
            Ok((generation, nftables, netfilter::old_tables()?))
        })?;
        self.carried = (generation, nftables.clone());
        let mut iptables = Vec::new();
        for table in tables {
            // One that was given has to be taken back, too.
            let key = (table.name.clone(), table.v6);
            if table.has_rules() || self.old_tables.contains(&key) {
                self.old_tables.insert(key);
                iptables.push(table.into_message());
            }
        }
        Ok((nftables, iptables))
    }

    /// Refuses links that only our own agent makes in a guest.
    ///
    /// # Errors
    /// `UNIMPLEMENTED` that names one.
    pub async fn refuse_made(&self) -> Result<()> {
        let (_connection, netlink) = self.netns.netlink()?;
        let all = self.all_links(&netlink).await?;
        match all.iter().find(|link| link.is_made_in_guest(&all)) {
            Some(link) => Err(Error::unimplemented(format!(
                "the link {} ({}) of the pod's network namespace needs Cofferdam's own guest agent",
                link.name, link.kind
            ))),
            None => Ok(()),
        }
    }

    /// The servers on the namespace's loopback.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn servers(&self) -> io::Result<BTreeSet<Server>> {
        self.netns.run(servers::all)
    }

    /// The same, and how often the rules of nftables have changed: no event tells of the first, and
    /// rtnetlink of neither.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn look(&self) -> io::Result<(BTreeSet<Server>, Option<u32>)> {
        self.netns
            .run(|| Ok((servers::all()?, netfilter::generation()?)))
    }

    fn message(&self, link: &Link) -> NetworkLink {
        let is_card = self.links.contains_key(&link.index);
        NetworkLink {
            index: link.index,
            name: link.name.clone(),
            up: link.up,
            hardware_address: sys::mac_text(&link.mac),
            mtu: link.mtu,
            make: if is_card { Vec::new() } else { link.message() },
            ..Default::default()
        }
    }

    /// The routes over the links that the guest has.
    pub async fn routes(&self) -> Result<Vec<types::Route>> {
        let (_connection, netlink) = self.netns.netlink()?;
        routes::routes(&netlink, &self.links).await
    }

    /// The permanent neighbours on the links that the guest has.
    pub async fn neighbours(&self) -> Result<Vec<types::ARPNeighbor>> {
        let (_connection, netlink) = self.netns.netlink()?;
        routes::neighbours(&netlink, &self.links).await
    }

    /// The endpoint of a link, and the index of the tap made for it.
    async fn connect(
        &self,
        netlink: &Handle,
        link: Link,
        queues: u32,
        record: &mut impl FnMut(&Redirect) -> Result<()>,
    ) -> Result<(Endpoint, Option<u32>)> {
        let mut endpoint = Endpoint {
            link: link.clone(),
            fds: Fds::default(),
            redirected: None,
        };
        if link.tap {
            endpoint.fds.taps =
                tap::open(&self.netns, &link.name, queues).doing(|| "open the tap".into())?;
            endpoint.fds.vhosts = tap::vhosts(endpoint.fds.taps.len());
            return Ok((endpoint, None));
        }
        let tap =
            tap::create(&self.netns, queues).doing(|| "make a tap with /dev/net/tun".into())?;
        reach(Point::TapMade).doing(|| "use the tap".into())?;
        endpoint.fds = Fds {
            vhosts: tap::vhosts(tap.queues.len()),
            taps: tap.queues,
        };
        let up = LinkUnspec::new_with_index(tap.index)
            .mtu(link.mtu.min(tap::MAX_MTU))
            .up()
            .build();
        rtnl("set the tap up", netlink.link().set(up).execute()).await?;
        tc::redirect(netlink, tap.index, link.index, true).await?;

        if self.user_mode {
            let guard = no_loopback::program().doing(|| "load a BPF program".into())?;
            tc::except(netlink, tap.index, &guard).await?;
        }
        let qdisc = !tc::with_ingress(netlink).await?.contains(&link.index);
        if let Some(path) = self.netns.path() {
            record(&Redirect {
                netns: path.to_owned(),
                inode: self.netns.inode()?,
                link: link.name.clone(),
                index: link.index,
                qdisc,
            })?;
        }
        reach(Point::RedirectRecorded).doing(|| "redirect the link to the tap".into())?;
        endpoint.redirected = Some(qdisc);
        let set = tc::redirect(netlink, link.index, tap.index, qdisc).await;
        let set =
            set.and_then(|()| reach(Point::RedirectSet).doing(|| "use the redirection".into()));
        if let Err(error) = set {
            disconnect(netlink, &endpoint).await;
            return Err(error);
        }
        if let Err(error) = except_local_sockets(netlink, link.index, tap.index).await {
            tracing::warn!(link = link.name, %error,
                "programs of the host in the pod's network namespace get no answers by this link");
        }
        Ok((endpoint, Some(tap.index)))
    }
}

/// What comes for sockets of the namespace stays there.
async fn except_local_sockets(netlink: &Handle, link: u32, tap: u32) -> Result<()> {
    let program = local_sockets::program(tap).doing(|| "load a BPF program".into())?;
    tc::except(netlink, link, &program).await
}

/// Takes the redirection back; the tap goes with its descriptors.
async fn disconnect(netlink: &Handle, endpoint: &Endpoint) {
    if let Some(qdisc) = endpoint.redirected
        && let Err(error) = tc::remove(netlink, endpoint.link.index, qdisc).await
    {
        tracing::warn!(link = endpoint.link.name, %error, "a redirection stays");
    }
}

fn no_ethernet(link: &Link) -> Error {
    Error::precondition(format!(
        "the link {} ({}) of the pod's network namespace carries no Ethernet, so a virtual machine \
         cannot have it: take the link out of the namespace or down, or run the pod with the \
         runtime runc",
        link.name, link.kind
    ))
}

/// An error about a rule that a guest cannot have.
fn refused_rule(error: &io::Error) -> Error {
    Error::precondition(format!(
        "the rules of packet filters in the pod's network namespace do not bind a virtual machine \
         ({error}): take the pod out of the mesh or policy that made them, run it with the runtime \
         runc, or set netns_rules = \"ignore\" in Cofferdam's configuration"
    ))
}

/// A netlink connection; ends with this.
#[derive(Debug)]
pub struct Netlink(JoinHandle<()>);

impl Drop for Netlink {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits for the kernel's answer to a netlink request.
async fn rtnl<T>(
    doing: &str,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T> {
    match timeout(NETLINK, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(rtnetlink::Error::NetlinkError(error))) => {
            Err(error.to_io()).doing(|| doing.to_owned())
        }
        Ok(Err(error)) => Err(Error::internal(format!("cannot {doing}: {error}"))),
        Err(_) => Err(Error::deadline(format!(
            "cannot {doing}: the kernel did not answer within {NETLINK:?}"
        ))),
    }
}
