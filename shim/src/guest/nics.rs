//! The sandbox's network in its guest: a NIC for each link of the namespace, plugged into the
//! machine and set up by the agent, and all else that the namespace has.
//!
//! ```text
//!  boot:   wire ──▶ cards, plugged ──▶ set_up   taps while QEMU starts, NICs before it runs
//!  later:  follow ─ rtnetlink's events ─▶ catch_up  links come, change and go; then as set_up
//!          a container's start ─────────▶ catch_up  docker and nerdctl make links then
//! ```
//!
//! Our own agent is told the whole state, each time it has changed, and makes the difference.
//! Another agent is told of links, routes and neighbours, and of nothing that goes.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use guest_protocol::Transport;
use guest_protocol::protocols::agent::{
    ARPNeighbors, AddARPNeighborsRequest, Routes, UpdateInterfaceRequest, UpdateRoutesRequest,
};
use guest_protocol::protocols::network::{LoopbackServer, NetworkState};
use guest_protocol::protocols::types::Interface;
use sys::point::{Point, reach};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use vmm::{Attached, Device, Machine, Net};

use crate::config::NetnsRules;
use crate::deadlines::{
    AGENT_CALL, LINK_UNPLUG, NETWORK_CALM, NETWORK_LONGEST_STORM, NETWORK_LOOK, UPDATE_NETWORK,
};
use crate::error::{Error, IoContext, Result};
use crate::from_guest::Agent;
use crate::guest::host_sockets::{HostSockets, random_name};
use crate::host::ledger::{Ledger, Resource};
use crate::network::{
    Changes, Endpoint, Forwarder, HostPorts, Link, Netns, Network, Others, Server, UserMode,
};

/// To look at changes that are none takes at most one part of so many of the shim's time.
const SHARE_OF_TIME: u32 = 20;

/// The network. All steps may be taken again: each concerns only what is new since.
#[derive(Debug)]
pub struct Nics {
    netns: Arc<OwnedFd>,
    rules: NetnsRules,
    /// Where the network is the host's own.
    user_mode: Option<UserMode>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    network: Network,
    /// What happens in the namespace.
    changes: Changes,
    /// Links with a tap, that the guest does not know.
    wired: Vec<Endpoint>,
    /// The cards of the first of them, which are plugged in.
    plugged: Vec<Attached>,
    /// The cards that the guest knows, by their links.
    cards: HashMap<u32, Card>,
    /// Taps live in a machine alone: another one cannot have them.
    handed_over: bool,
    /// What our own agent was told last.
    told: NetworkState,
    /// Servers on the namespace's loopback by the names that the guest has for them.
    servers: BTreeMap<Server, String>,
    /// Ports of the loopback that are the shim's own.
    own_ports: Vec<u16>,
    /// Where the network is the host's own.
    host_ports: Option<HostPorts>,
}

#[derive(Debug)]
struct Card {
    attached: Attached,
    told: Interface,
    /// The largest MTU that it can have: that of its link when it was plugged in.
    mtu: u32,
}

/// What the steps need of a running guest.
#[derive(Clone, Copy)]
pub struct Guest<'a> {
    pub machine: &'a Machine,
    pub agent: &'a Agent,
    /// The agent has [`guest_protocol::FEATURE_NETWORK`].
    pub is_own: bool,
    /// By which the guest reaches servers of the host.
    pub sockets: Option<&'a HostSockets>,
}

impl State {
    /// Those that are not plugged in.
    fn cards(&self) -> Result<Vec<Net>> {
        let missing = self.wired.iter().skip(self.plugged.len());
        let card = |endpoint: &Endpoint| {
            let fds = endpoint
                .clone_fds()
                .doing(|| format!("open the queues of {} again", endpoint.link.name))?;
            Ok(Net {
                name: endpoint.link.name.clone(),
                taps: fds.taps,
                vhost: fds.vhosts,
                mac: endpoint.link.mac,
                mtu: u16::try_from(endpoint.link.mtu).ok(),
            })
        };
        missing.map(card).collect()
    }
}

impl Nics {
    /// None yet, in this namespace.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: the namespace is the host's.
    pub fn new(netns: Netns, rules: NetnsRules, user_mode: Option<UserMode>) -> Result<Nics> {
        let fd = netns
            .fd()
            .try_clone_to_owned()
            .doing(|| "keep the network namespace open".into())?;
        // Before anything is looked for, so that nothing is missed.
        let changes = Changes::watch(&netns)?;
        let state = State {
            network: Network::new(netns, user_mode.is_some())?,
            changes,
            wired: Vec::new(),
            plugged: Vec::new(),
            cards: HashMap::new(),
            handed_over: false,
            told: NetworkState::default(),
            servers: BTreeMap::new(),
            own_ports: Vec::new(),
            host_ports: None,
        };
        Ok(Nics {
            netns: Arc::new(fd),
            rules,
            user_mode,
            state: Mutex::new(state),
        })
    }

    pub fn netns(&self) -> Arc<OwnedFd> {
        self.netns.clone()
    }

    /// Whether a machine has taps for good, so that a second one would come up without them.
    pub async fn are_handed_over(&self) -> bool {
        self.state.lock().await.handed_over
    }

    /// Waits until the network has ended, without which the guest has none; gives the reason.
    pub async fn lost(&self) -> String {
        match &self.user_mode {
            Some(user_mode) => user_mode.ended().await,
            None => std::future::pending().await,
        }
    }

    /// Answers on the namespace's loopback for the pod's servers; `None` where the host's kernel
    /// cannot.
    pub async fn forward(&self, transport: &Transport) -> Option<Forwarder> {
        let mut state = self.state.lock().await;
        state.host_ports = self.user_mode.as_ref().map(|_| HostPorts::new(transport));
        let forwarder = Forwarder::start(state.network.netns(), transport)?;
        state.own_ports.clone_from(&forwarder.ports);
        Some(forwarder)
    }

    /// Joins a tap of `queues` queues to each new link.
    ///
    /// # Errors
    /// One line that names the link, or a rule that would not bind the guest.
    pub async fn wire(&self, queues: u32, ledger: &Ledger) -> Result<()> {
        let mut state = self.state.lock().await;
        state
            .wire(self.rules, queues, Others::Refused, ledger)
            .await
    }

    /// A card for each of them, for a machine that boots: what an earlier attempt had plugged in is
    /// gone with its machine.
    ///
    /// # Errors
    /// No more descriptors.
    pub async fn cards(&self) -> Result<Vec<Net>> {
        let mut state = self.state.lock().await;
        state.plugged.clear();
        // What another guest has been told.
        state.told = NetworkState::default();
        state.servers.clear();
        state.cards()
    }

    /// Notes that these of [`Nics::cards`] are plugged in.
    pub async fn plugged(&self, cards: Vec<Attached>) {
        self.state.lock().await.plugged.extend(cards);
    }

    /// Lets the agent set up what was plugged in, and all that the namespace has beside.
    /// From now on the taps live in QEMU alone and go with it.
    ///
    /// # Errors
    /// The agent's own words; a rule that a guest cannot have.
    pub async fn set_up(&self, guest: Guest<'_>) -> Result<()> {
        let mut state = self.state.lock().await;
        self.tell(&mut state, guest).await.map(drop)
    }

    /// Brings the guest to what the namespace has by now. Links that cannot be cards are as
    /// `others` says. Says whether anything was new.
    ///
    /// # Errors
    /// One line that names the link; all else is done, and the next call goes on from there.
    pub async fn catch_up(
        &self,
        guest: Guest<'_>,
        others: Others,
        ledger: &Ledger,
    ) -> Result<bool> {
        let mut state = self.state.lock().await;
        state.network.read_sysctls().await?;
        let removed = state.remove_lost(guest).await;
        state.wire(self.rules, 1, others, ledger).await?;
        state.plug(guest.machine).await?;
        let told = self.tell(&mut state, guest).await?;
        removed.map(|()| told)
    }

    /// Does so whenever something has changed, as long as it is polled. Servers on the loopback
    /// tell nobody that they come: they are looked for.
    pub async fn follow(&self, guest: Guest<'_>, ledger: &Ledger) {
        let mut changes = self.state.lock().await.changes.take();
        // What was seen last, and what is wrong with it.
        let mut seen = (self.look(guest).await, None);
        // A guest can cause events without an end.
        let mut looked = Instant::now();
        loop {
            let changed = timeout(NETWORK_LOOK, changes.next()).await.is_ok();
            if changed {
                let _ = timeout(NETWORK_LONGEST_STORM, changes.calm(NETWORK_CALM)).await;
            }
            let now = self.look(guest).await;
            if looked.elapsed() >= NETWORK_LOOK {
                looked = Instant::now();
                if let Err(error) = self.lead_from_host(guest).await {
                    tracing::debug!(%error, "the guest's servers are not known");
                }
            }
            if !changed && now == seen.0 && seen.1.is_none() {
                continue;
            }
            let began = Instant::now();
            let done = self.catch_up(guest, Others::LeftOut, ledger).await;
            // A guest can cause events without an end.
            if !matches!(done, Ok(true)) {
                sleep(began.elapsed() * SHARE_OF_TIME).await;
            }
            let wrong = done.err().map(|error| error.to_string());
            if let Some(error) = &wrong {
                // It is tried again and again, and said once.
                if seen.1.as_ref() != Some(error) {
                    tracing::warn!(error, "the guest's network is not what its namespace has");
                }
                sleep(NETWORK_LOOK).await;
            }
            seen = (now, wrong);
        }
    }

    /// Lets the guest's servers be reached at the host's addresses.
    async fn lead_from_host(&self, guest: Guest<'_>) -> Result<()> {
        if self.user_mode.is_none() || !guest.is_own {
            return Ok(());
        }
        let listening = guest.agent.listening(AGENT_CALL).await?;
        if let Some(ports) = &mut self.state.lock().await.host_ports {
            ports.set(&listening);
        }
        Ok(())
    }

    /// What changes without an event, cheaply.
    async fn look(&self, guest: Guest<'_>) -> Option<(BTreeSet<Server>, Option<u32>)> {
        let state = self.state.lock().await;
        let look = guest.is_own.then(|| state.network.look());
        look?.ok()
    }

    /// Tells the agent what has changed. Says whether anything has.
    async fn tell(&self, state: &mut State, guest: Guest<'_>) -> Result<bool> {
        let links = state.tell_of_links(guest).await?;
        if guest.is_own {
            return Ok(self.tell_all(state, guest).await? || links);
        }
        if self.rules == NetnsRules::Carry {
            // This agent cannot be given them.
            state.network.refuse_rules()?;
        }
        state.network.refuse_made().await?;
        if links {
            state.tell_of_routes(guest.agent).await?;
        }
        Ok(links)
    }

    async fn tell_all(&self, state: &mut State, guest: Guest<'_>) -> Result<bool> {
        // One of our own, into which nobody has put anything.
        if state.network.is_untouched() {
            return Ok(false);
        }
        state.changes.forget();
        let mut now = state.network.state(self.rules == NetnsRules::Carry).await?;
        if let Some(sockets) = guest.sockets {
            state.find_servers(&self.netns, sockets)?;
            now.servers_port = sockets.port;
            now.servers = state.servers.iter().map(message).collect();
        }
        if now == state.told {
            return Ok(false);
        }
        let told = guest.agent.set_network(&now, UPDATE_NETWORK).await;
        told.map_err(|error| error.context("the guest cannot set up the pod's network"))?;
        state.told = now;
        Ok(true)
    }
}

fn message((server, name): (&Server, &String)) -> LoopbackServer {
    LoopbackServer {
        address: server.address.to_string(),
        port: server.port.into(),
        udp: server.udp,
        name: name.clone(),
        ..Default::default()
    }
}

impl State {
    async fn wire(
        &mut self,
        rules: NetnsRules,
        queues: u32,
        others: Others,
        ledger: &Ledger,
    ) -> Result<()> {
        if rules == NetnsRules::Refuse {
            self.network.refuse_rules()?;
        }
        let record = |redirect: &_| ledger.record(&Resource::Redirect(Clone::clone(redirect)));
        // What has happened until now is seen by this.
        self.changes.forget();
        let new = self.network.connect_new(queues, others, record).await?;
        if !new.is_empty() {
            self.network.read_sysctls().await?;
        }
        self.wired.extend(new);
        Ok(())
    }

    /// Plugs them into a machine that runs. One that is refused leaves those before it plugged in,
    /// and the next call goes on from there.
    async fn plug(&mut self, machine: &Machine) -> Result<()> {
        for card in self.cards()? {
            let attached = machine.attach(Device::Net(card)).await?;
            self.plugged.push(attached);
        }
        Ok(())
    }

    /// Pulls out the cards of links that have gone. One that the guest keeps is tried again by the
    /// next call.
    async fn remove_lost(&mut self, guest: Guest<'_>) -> Result<()> {
        let links = self.network.links().await?;
        let is_there = |index: u32| links.iter().any(|link| link.index == index);
        let mut lost: Vec<u32> = self.cards.keys().copied().collect();
        lost.retain(|index| !is_there(*index));
        let mut kept = Ok(());
        for index in lost {
            let Some(card) = self.cards.get(&index) else {
                continue;
            };
            let (id, name) = (&card.attached.id, &card.told.name);
            match guest.machine.detach(id, LINK_UNPLUG).await {
                Ok(()) => {
                    tracing::info!(link = name, "a link of the pod has gone");
                    self.cards.remove(&index);
                }
                Err(error) => {
                    let doing = format!("cannot take {name} out of the guest");
                    kept = Err(Error::from(error).context(doing));
                }
            }
        }
        kept
    }

    /// Tells the agent of links that are new or have changed. Says whether there were any.
    async fn tell_of_links(&mut self, guest: Guest<'_>) -> Result<bool> {
        let mut any = false;
        for (endpoint, attached) in self
            .wired
            .drain(..self.plugged.len().min(self.wired.len()))
            .zip(self.plugged.drain(..))
        {
            let told = Interface::default();
            let card = Card {
                attached,
                told,
                mtu: endpoint.link.mtu,
            };
            self.cards.insert(endpoint.link.index, card);
            self.handed_over = true;
        }
        if self.cards.is_empty() {
            return Ok(false);
        }
        for link in self.network.links().await? {
            let Some(card) = self.cards.get_mut(&link.index) else {
                continue;
            };
            let interface = interface(&link, card, guest.is_own);
            if interface == card.told {
                continue;
            }
            let request = UpdateInterfaceRequest {
                interface: Some(interface.clone()).into(),
                ..Default::default()
            };
            reach(Point::InterfaceSetting).doing(|| format!("set up {}", link.name))?;
            let done = guest.agent.update_interface(&request, UPDATE_NETWORK).await;
            done.map_err(|error| error.context(format!("the guest cannot set up {}", link.name)))?;
            card.told = interface;
            any = true;
        }
        Ok(any)
    }

    /// For an agent that cannot be told all.
    async fn tell_of_routes(&self, agent: &Agent) -> Result<()> {
        let routes = Routes {
            Routes: self.network.routes().await?,
            ..Default::default()
        };
        if !routes.Routes.is_empty() {
            let request = UpdateRoutesRequest {
                routes: Some(routes).into(),
                ..Default::default()
            };
            let done = agent.update_routes(&request, UPDATE_NETWORK).await;
            done.map_err(|error| error.context("the guest cannot set up the pod's routes"))?;
        }
        let neighbours = ARPNeighbors {
            ARPNeighbors: self.network.neighbours().await?,
            ..Default::default()
        };
        if !neighbours.ARPNeighbors.is_empty() {
            let request = AddARPNeighborsRequest {
                neighbors: Some(neighbours).into(),
                ..Default::default()
            };
            let done = agent.add_arp_neighbors(&request, UPDATE_NETWORK).await;
            done.map_err(|error| error.context("the guest cannot set up the pod's neighbours"))?;
        }
        Ok(())
    }

    /// Lets the guest reach the servers that are there, and no others any more.
    fn find_servers(&mut self, netns: &Arc<OwnedFd>, sockets: &HostSockets) -> Result<()> {
        let mut found = self
            .network
            .servers()
            .doing(|| "look for servers in the network namespace".into())?;
        found.retain(|server| server.udp || !self.own_ports.contains(&server.port));
        self.servers.retain(|server, name| {
            let stays = found.contains(server);
            if !stays {
                sockets.sockets.remove(name);
            }
            stays
        });
        for server in found {
            if let Entry::Vacant(new) = self.servers.entry(server) {
                let name = new.insert(random_name()?);
                sockets.sockets.add_server(name, netns.clone(), server);
            }
        }
        Ok(())
    }
}

/// How the guest is to have a link. Our own agent learns its addresses with all others.
fn interface(link: &Link, card: &Card, is_own: bool) -> Interface {
    let mut interface = link.interface(&card.attached.pci_path);
    interface.mtu = interface.mtu.min(card.mtu.into());
    if is_own {
        interface.IPAddresses.clear();
    }
    interface
}
