//! The way to the guest's agent: which vsock it is, and how the agent is reached over it after the
//! boot.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use guest_protocol::{AGENT_PORT, Key, Listener, READY_PORT, Transport};
use sys::point::{Point, reach};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use vmm::Vm;

use crate::config::VsockDevice as VsockChoice;
use crate::error::{Error, IoContext, Result};

/// A running agent answers a plain call within this time.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// One attempt to reach an agent that does not say when it is ready.
const DIAL_DEADLINE: Duration = Duration::from_secs(1);

/// Before an agent that is there is dialled again.
const REDIAL_PAUSE: Duration = Duration::from_millis(5);

/// Between two attempts.
const DIAL_INTERVAL: Duration = Duration::from_millis(50);

/// An agent that has not said that it is ready this long after the guest got its vsock driver never
/// will.
const NOTICE_GRACE: Duration = Duration::from_secs(1);

/// The same, counted from the machine's start, where QEMU cannot tell when the guest got its driver.
const BOOT_GRACE: Duration = Duration::from_secs(10);

/// Directory of vhost-device-vsock's sockets below the state directory.
pub const SOCKETS: &str = "vsock";

/// Name of the host's side there.
pub const SOCKET_NAME: &str = "vm";

/// Where a guest will be, before there is one.
pub struct Address {
    /// The way to it.
    pub transport: Transport,
    /// Where its ready notice arrives.
    pub ready: Listener,
    /// The port that the guest dials for that.
    pub port: u32,
    /// The host kernel's vsock device, if it is the way.
    pub kernel: Option<vmm::vsock::KernelVsock>,
}

/// Chooses the way, and listens on it.
///
/// # Errors
/// The device that is insisted on is not there; a socket that cannot be made.
pub fn address(choice: VsockChoice, dir: &Path) -> Result<Address> {
    let kernel = match choice {
        VsockChoice::VhostUser => None,
        VsockChoice::Vhost => Some(vmm::vsock::open_kernel()?),
        VsockChoice::Auto => match vmm::vsock::open_kernel() {
            Ok(kernel) => Some(kernel),
            Err(error) => {
                tracing::info!(%error, "no kernel vsock, vhost-device-vsock instead");
                None
            }
        },
    };
    let transport = match &kernel {
        Some(kernel) => Transport::Vsock { cid: kernel.cid },
        None => Transport::Hybrid {
            path: dir.join(SOCKETS).join(SOCKET_NAME),
        },
    };
    if kernel.is_none() {
        let dir = dir.join(SOCKETS);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.doing(|| format!("make directory {}", dir.display()))?;
    }
    let doing = || "listen for the guest's ready notice".to_owned();
    let ready = listen(&transport, READY_PORT).doing(doing)?;
    let port = ready.port(READY_PORT).doing(doing)?;
    Ok(Address {
        transport,
        ready,
        port,
        kernel,
    })
}

/// Listens for what the guest dials. A vsock daemon that is not root must be able to reach the
/// socket; only it and root can enter the directory.
///
/// # Errors
/// The socket's own.
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
    vm: &Vm,
    vsock: &str,
) -> Result<(guest_protocol::Stream, Transport)> {
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
            timeout(CALL_DEADLINE, exchange)
                .await
                .map_err(|_| Error::deadline("the guest's ready notice is incomplete"))?
                .doing(doing)?;
            let transport = Transport::Keyed { way: Box::new(transport.clone()), key };
            // vhost-device-vsock now and then drops a first connection.
            let end = Instant::now() + CALL_DEADLINE;
            loop {
                match transport.dial(AGENT_PORT, CALL_DEADLINE).await {
                    Err(error) if Instant::now() < end => {
                        tracing::debug!(%error, "dialling the agent again");
                        sleep(REDIAL_PAUSE).await;
                    }
                    result => {
                        reach(Point::AgentDialled).doing(doing)?;
                        return result.doing(doing).map(|stream| (stream, transport));
                    }
                }
            }
        }
        stream = dial_silent_agent(transport, vm, vsock) => {
            if matches!(transport, Transport::Vsock { .. }) {
                tracing::warn!("this guest agent takes no key: every local user can talk to it over vsock");
            }
            stream.map(|stream| (stream, transport.clone()))
        }
    }
}

async fn dial_silent_agent(
    transport: &Transport,
    vm: &Vm,
    vsock: &str,
) -> Result<guest_protocol::Stream> {
    let grace = loop {
        match vm.driver_ok(vsock).await? {
            Some(true) => break NOTICE_GRACE,
            Some(false) => sleep(DIAL_INTERVAL).await,
            None => break BOOT_GRACE,
        }
    };
    sleep(grace).await;
    loop {
        if let Ok(stream) = transport.dial(AGENT_PORT, DIAL_DEADLINE).await {
            return Ok(stream);
        }
        sleep(DIAL_INTERVAL).await;
    }
}
