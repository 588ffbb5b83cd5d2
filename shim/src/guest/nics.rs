//! The sandbox's network cards: a NIC for each link of its network namespace, plugged into the
//! machine and set up by the agent. Links may also come between a container's creation and its
//! start: docker and nerdctl make them then.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use guest_protocol::Transport;
use guest_protocol::protocols::agent::{
    ARPNeighbors, AddARPNeighborsRequest, Routes, UpdateInterfaceRequest, UpdateRoutesRequest,
};
use sys::point::{Point, reach};
use tokio::sync::Mutex;
use vmm::{Attached, Device, Machine, Net};

use crate::config::NetnsRules;
use crate::deadlines::UPDATE_NETWORK;
use crate::error::{IoContext, Result};
use crate::from_guest::Agent;
use crate::host::ledger::{Ledger, Resource};
use crate::network::{Endpoint, Forwarder, Netns, Network};

/// The cards. All steps may be taken again: each concerns only what is new since.
#[derive(Debug)]
pub struct Nics {
    netns: Arc<OwnedFd>,
    /// Whether rules of a packet filter in the namespace are let pass.
    ignores_rules: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    network: Network,
    /// Links with a tap, that the guest does not know.
    wired: Vec<Endpoint>,
    /// Where the guest finds the cards of the first of them, which are plugged in.
    plugged: Vec<String>,
    /// Taps live in a machine alone: another one cannot have them.
    handed_over: bool,
}

impl State {
    /// Those that are not plugged in.
    fn cards(&self) -> Result<Vec<Net>> {
        let missing = self.wired.iter().skip(self.plugged.len());
        let card = |endpoint: &Endpoint| {
            let fds = endpoint
                .clone_fds()
                .doing(|| format!("open the queues of {} again", endpoint.name))?;
            Ok(Net {
                name: endpoint.name.clone(),
                taps: fds.taps,
                vhost: fds.vhosts,
                mac: endpoint.mac,
                mtu: u16::try_from(endpoint.mtu).ok(),
            })
        };
        missing.map(card).collect()
    }
}

impl Nics {
    /// None yet, in the namespace at `path`, or in an empty one of the sandbox's own.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: the path is no network namespace, or the host's.
    pub async fn new(path: Option<&Path>, rules: NetnsRules) -> Result<Nics> {
        let netns = match path {
            Some(path) => Netns::open(path)?,
            None => Netns::create().await?,
        };
        let fd = netns
            .fd()
            .try_clone_to_owned()
            .doing(|| "keep the network namespace open".into())?;
        let state = State {
            network: Network::new(netns)?,
            wired: Vec::new(),
            plugged: Vec::new(),
            handed_over: false,
        };
        Ok(Nics {
            netns: Arc::new(fd),
            ignores_rules: rules == NetnsRules::Ignore,
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

    /// Answers on the namespace's loopback for the pod's servers; `None` where the host's kernel
    /// cannot.
    pub async fn forward(&self, transport: &Transport) -> Option<Forwarder> {
        Forwarder::start(self.state.lock().await.network.netns(), transport)
    }

    /// Joins a tap of `queues` queues to each new link.
    ///
    /// # Errors
    /// One line that names the link, or a rule that would not bind the guest.
    pub async fn wire(&self, queues: u32, ledger: &Ledger) -> Result<()> {
        let mut state = self.state.lock().await;
        if !self.ignores_rules {
            state.network.refuse_rules()?;
        }
        let record = |redirect: &_| ledger.record(&Resource::Redirect(Clone::clone(redirect)));
        let new = state.network.connect_new(queues, record).await?;
        state.wired.extend(new);
        Ok(())
    }

    /// A card for each of them, for a machine that boots: what an earlier attempt had plugged in is
    /// gone with its machine.
    ///
    /// # Errors
    /// No more descriptors.
    pub async fn cards(&self) -> Result<Vec<Net>> {
        let mut state = self.state.lock().await;
        state.plugged.clear();
        state.cards()
    }

    /// Notes that these of [`Nics::cards`] are plugged in.
    pub async fn plugged(&self, cards: Vec<Attached>) {
        let paths = cards.into_iter().map(|card| card.pci_path);
        self.state.lock().await.plugged.extend(paths);
    }

    /// Plugs them into a machine that runs. One that is refused leaves those before it plugged in,
    /// and the next call goes on from there.
    pub async fn plug(&self, machine: &Machine) -> Result<()> {
        let mut state = self.state.lock().await;
        for card in state.cards()? {
            let attached = machine.attach(Device::Net(card)).await?;
            state.plugged.push(attached.pci_path);
        }
        Ok(())
    }

    /// Lets the agent set them up as their links are: names, addresses, routes, neighbours.
    /// From now on the taps live in QEMU alone and go with it.
    ///
    /// # Errors
    /// The agent's own words.
    pub async fn set_up(&self, agent: &Agent) -> Result<()> {
        let mut state = self.state.lock().await;
        if state.wired.is_empty() {
            return Ok(());
        }
        for (endpoint, path) in state.wired.iter().zip(&state.plugged) {
            let interface = Some(endpoint.interface(path)).into();
            let request = UpdateInterfaceRequest {
                interface,
                ..Default::default()
            };
            reach(Point::InterfaceSetting).doing(|| format!("set up {}", endpoint.name))?;
            let done = agent.update_interface(&request, UPDATE_NETWORK).await;
            done.map_err(|error| {
                error.context(format!("the guest cannot set up {}", endpoint.name))
            })?;
        }
        let routes = Routes {
            Routes: state.network.routes().await?,
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
            ARPNeighbors: state.network.neighbours().await?,
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
        state.wired.clear();
        state.plugged.clear();
        state.handed_over = true;
        Ok(())
    }
}
