//! The services that are no part of the protocol of Kata Containers' agent: the time of day, memory
//! that grows with its use, and the network as the host has it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use guest_protocol::protocols::clock::{Correction, TimeOfDay};
use guest_protocol::protocols::clock_ttrpc::{Clock, create_clock};
use guest_protocol::protocols::memory::{MemoryNeed, MemoryState};
use guest_protocol::protocols::memory_ttrpc::{Memory, create_memory};
use guest_protocol::protocols::network::{ListeningPorts, NetworkState};
use guest_protocol::protocols::network_ttrpc::{Network, create_network};
use protobuf::well_known_types::empty::Empty;
use sys::socket_table::{self, Waiting};
use tokio::sync::{Mutex, Notify};
use ttrpc::r#async::{Service, TtrpcContext};

use super::Reply;
use crate::cgroup::growth;
use crate::error::Context;
use crate::guest::settings;
use crate::network::Mirror;
use crate::relay::loopback::Servers;
use crate::sandbox::Sandbox;

/// The services, for a ttrpc server.
pub fn services(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    let own = Arc::new(Own {
        sandbox,
        memory_asked: Notify::new(),
        network: Mutex::default(),
    });
    let mut services = create_clock(own.clone());
    services.extend(create_memory(own.clone()));
    services.extend(create_network(own));
    services
}

struct Own {
    sandbox: Arc<Sandbox>,
    /// A call is there that makes the one before it useless.
    memory_asked: Notify,
    network: Mutex<(Mirror, Servers)>,
}

#[async_trait]
impl Clock for Own {
    async fn read(&self, _: &TtrpcContext, _: Empty) -> Reply<TimeOfDay> {
        Ok(TimeOfDay {
            nanoseconds: settings::read_clock()?,
            ..Default::default()
        })
    }

    async fn correct(&self, _: &TtrpcContext, by: Correction) -> Reply<Empty> {
        settings::correct_clock(by.nanoseconds, by.slowly)?;
        Ok(Empty::new())
    }
}

#[async_trait]
impl Memory for Own {
    async fn wait(&self, _: &TtrpcContext, state: MemoryState) -> Reply<MemoryNeed> {
        self.memory_asked.notify_waiters();
        let mib = tokio::select! {
            // First: what this call would set is no longer right.
            biased;
            () = self.memory_asked.notified() => 0,
            mib = growth::need(&self.sandbox.cgroups, &state) => mib?,
        };
        Ok(MemoryNeed {
            mib,
            ..Default::default()
        })
    }
}

#[async_trait]
impl Network for Own {
    async fn set(&self, _: &TtrpcContext, state: NetworkState) -> Reply<Empty> {
        let mut network = self.network.lock().await;
        let (mirror, servers) = &mut *network;
        mirror.set(&state)?;
        servers.set(&state.servers, state.servers_port, &self.sandbox.host);
        Ok(Empty::new())
    }

    async fn listening(&self, _: &TtrpcContext, _: Empty) -> Reply<ListeningPorts> {
        let all = socket_table::waiting().context(|| "read the tables of sockets".into())?;
        let tcp = all.iter().filter(|one| !one.udp);
        let is_private = |one: &&Waiting| one.address.to_canonical().is_loopback();
        let (private, others): (Vec<&Waiting>, Vec<&Waiting>) = tcp.partition(is_private);
        // A connection to the loopback has to lead to the one who listens at all addresses.
        let is_reached = |one: &&Waiting| {
            one.address.is_unspecified() && !private.iter().any(|other| other.port == one.port)
        };
        let others = others.into_iter().filter(is_reached);
        let ports: BTreeSet<u32> = others.map(|one| one.port.into()).collect();
        Ok(ListeningPorts {
            tcp: ports.into_iter().collect(),
            ..Default::default()
        })
    }
}
