//! The way to the guest's agent: which vsock it is, and how the agent is reached over it after the
//! boot.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use guest_protocol::{AGENT_PORT, AgentClient, Key, Listener, READY_PORT, Transport};
use sys::point::{Point, reach};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use vmm::Machine;
use vmm::boot::Vsock;

use crate::config::{Config, VsockDevice, find_program};
use crate::deadlines::{
    AGENT_CALL, AGENT_DIAL, AGENT_DIAL_AGAIN, AGENT_FIRST_ANSWER, AGENT_NOTICE_AFTER_DRIVER,
    AGENT_NOTICE_AFTER_START, AGENT_REDIAL,
};
use crate::error::{Error, IoContext, Result};
use crate::from_guest::Agent;

/// Directory of vhost-device-vsock's sockets below the state directory.
const SOCKETS: &str = "vsock";

/// Name of the host's side there.
const SOCKET_NAME: &str = "vm";

/// Where a guest will be, before there is one.
pub struct Address {
    /// The way to it.
    pub transport: Transport,
    /// Where its ready notice arrives.
    pub ready: Listener,
    /// The port that the guest dials for that.
    pub port: u32,
    /// The machine's end of it.
    pub vsock: Vsock,
}

/// Chooses the way, and listens on it.
///
/// # Errors
/// The device that is insisted on is not there; a socket that cannot be made.
pub fn address(config: &Config, dir: &Path) -> Result<Address> {
    let kernel = match config.vsock {
        VsockDevice::VhostUser => None,
        VsockDevice::Vhost => Some(vmm::vsock::open_kernel()?),
        VsockDevice::Auto => match vmm::vsock::open_kernel() {
            Ok(kernel) => Some(kernel),
            Err(error) => {
                tracing::info!(%error, "no kernel vsock, vhost-device-vsock instead");
                None
            }
        },
    };
    let (transport, vsock) = match kernel {
        Some(kernel) => (Transport::Vsock { cid: kernel.cid }, Vsock::Kernel(kernel)),
        None => {
            let binary = find_program(&config.vhost_device_vsock, "vhost_device_vsock")?;
            let dir = dir.join(SOCKETS);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.doing(|| format!("make directory {}", dir.display()))?;
            let path = dir.join(SOCKET_NAME);
            let name = SOCKET_NAME.to_owned();
            (
                Transport::Hybrid { path },
                Vsock::Daemon { binary, dir, name },
            )
        }
    };
    let doing = || "listen for the guest's ready notice".to_owned();
    let ready = listen(&transport, READY_PORT).doing(doing)?;
    let port = ready.port(READY_PORT).doing(doing)?;
    Ok(Address {
        transport,
        ready,
        port,
        vsock,
    })
}

/// Listens for what the guest dials. A vsock daemon that is not root must be able to reach the
/// socket; only it and root can enter the directory.
pub fn listen(transport: &Transport, port: u32) -> std::io::Result<Listener> {
    let listener = transport.listen(port)?;
    if let Listener::Unix { path, .. } = &listener {
        std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    }
    Ok(listener)
}

/// Our agent says when it is ready. Any other is dialled once the guest has a vsock driver: a
/// connection made before that is swallowed by vhost-device-vsock, which may not recover from it.
///
/// Our agent gets a key for this boot as the answer to its notice, which the returned transport
/// shows it from then on.
///
/// # Errors
/// The agent is not reached; the machine has ended.
pub async fn agent(
    transport: &Transport,
    ready: &Listener,
    machine: &Machine,
) -> Result<(Agent, Transport)> {
    let doing = || "reach the guest agent".to_owned();
    tokio::select! {
        notice = ready.accept() => {
            // Kept until the agent has answered: a connection that ends may take along what it
            // still carries.
            let mut notice = notice.doing(doing)?;
            let key = Key::random().doing(|| "make a key for the guest agent".into())?;
            let exchange = async {
                notice.read_exact(&mut [0; 6]).await?;
                notice.write_all(key.line()).await
            };
            timeout(AGENT_CALL, exchange)
                .await
                .map_err(|_| Error::deadline("the guest's ready notice is incomplete"))?
                .doing(doing)?;
            let transport = Transport::Keyed { way: Box::new(transport.clone()), key };
            let end = Instant::now() + AGENT_CALL;
            loop {
                match dial(&transport).await {
                    Err(error) if Instant::now() < end => {
                        tracing::debug!(%error, "dialling the agent again");
                        sleep(AGENT_REDIAL).await;
                    }
                    result => {
                        reach(Point::AgentDialled).doing(doing)?;
                        return result.map(|agent| (agent, transport));
                    }
                }
            }
        }
        agent = dial_silent_agent(transport, machine) => {
            if matches!(transport, Transport::Vsock { .. }) {
                tracing::warn!("this guest agent takes no key: every local user can talk to it over vsock");
            }
            agent.map(|agent| (agent, transport.clone()))
        }
    }
}

/// A connection over which the agent has answered. One that was taken may still be dropped, with
/// what it carried: vhost-device-vsock does that to a first one now and then.
async fn dial(transport: &Transport) -> Result<Agent> {
    let dialled = transport.dial(AGENT_PORT, AGENT_DIAL).await;
    let stream = dialled.doing(|| "reach the guest agent".to_owned())?;
    let agent = Agent::new(AgentClient::new(stream));
    agent.ping(AGENT_FIRST_ANSWER).await?;
    Ok(agent)
}

async fn dial_silent_agent(transport: &Transport, machine: &Machine) -> Result<Agent> {
    let grace = loop {
        match machine.has_vsock_driver().await? {
            Some(true) => break AGENT_NOTICE_AFTER_DRIVER,
            Some(false) => sleep(AGENT_DIAL_AGAIN).await,
            None => break AGENT_NOTICE_AFTER_START,
        }
    };
    sleep(grace).await;
    loop {
        if let Ok(agent) = dial(transport).await {
            return Ok(agent);
        }
        sleep(AGENT_DIAL_AGAIN).await;
    }
}
