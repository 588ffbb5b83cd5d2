//! The guest agent: PID 1 of the virtual machine, which runs the sandbox's containers for the shim
//! on the host.
//!
//! One thread, on purpose: a process of a container begins as a copy of this one, and a copy of a
//! threaded process may do next to nothing. The order below is the order of a boot.

mod boot;
mod cgroup;
mod container;
mod error;
mod forward;
mod gate;
mod guest;
mod log;
mod netlink;
mod network;
mod oom;
mod pci;
mod privileged;
mod process;
mod ready;
mod reaper;
mod relay;
mod sandbox;
mod server;
mod stats;
mod stdio;
mod storage;
mod uds;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use guest_protocol::{AGENT_PORT, FORWARD_PORT, Listener, STDIO_PORT, Transport};
use tokio::sync::Notify;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use error::{Error, Result, What};
use gate::Arrivals;
use log::log;

const USAGE: &str =
    "usage: cofferdam-agent --listen unix:PATH   (without arguments only as PID 1 of a guest)";

/// How long the notice to the host may go before everything else.
const HEAD_START: Duration = Duration::from_millis(50);

/// How long answers may take to leave before the machine goes off.
const LAST_WORDS: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let init = std::process::id() == 1;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let listen = match arguments.as_slice() {
        _ if init => None,
        [version] if version == "--version" => {
            println!("cofferdam-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        [option, address] if option == "--listen" => {
            address.strip_prefix("unix:").map(PathBuf::from)
        }
        _ => None,
    };
    let result = match listen {
        None if !init => Err(Error::Invalid(USAGE.into())),
        listen => run(listen),
    };
    if let Err(error) = &result {
        eprintln!("cofferdam-agent: {error}");
        log!("{error}");
    }
    if init {
        // A PID 1 that returns is a kernel panic; this says the same with less noise.
        eprintln!("cofferdam-agent: {}", boot::power_off());
    }
    if result.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(listen: Option<PathBuf>) -> Result<()> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder
        .enable_all()
        .build()
        .what(|| "start the runtime".into())?;
    runtime.block_on(serve(listen))
}

async fn serve(listen: Option<PathBuf>) -> Result<()> {
    let init = listen.is_none();
    // A process binds first: afterwards it no longer sees the host's /run.
    let sockets = listen.as_deref().map(|path| -> io::Result<_> {
        let port = |port| unix(format!("{}_{port}", path.display()).into());
        let (stdio, forward) = (port(STDIO_PORT)?, port(FORWARD_PORT)?);
        Ok((unix(path.to_owned())?, stdio, Some(forward)))
    });
    let sockets = sockets.transpose().what(|| "listen".into())?;
    let (parameters, cgroups) = if init {
        (boot::boot()?, boot::CGROUP_ROOT.to_owned())
    } else {
        (boot::Parameters::parse(""), boot::isolate()?)
    };
    let reaper = reaper::Reaper::start()?;
    let (agent, stdio, forward) = match sockets {
        Some(sockets) => sockets,
        None => (vsock(AGENT_PORT)?, vsock(STDIO_PORT)?, None),
    };
    if let Some(port) = parameters.ready_port {
        // What connects from now on waits in the sockets' queues, and the host needs a moment to do
        // so: the rest is made ready in that time.
        let notice = tokio::spawn(ready::tell(port, parameters.keyed));
        let _ = tokio::time::timeout(HEAD_START, notice).await;
    }
    let keyed = parameters.keyed;
    let host = match listen {
        Some(path) => Transport::Unix { path },
        None => Transport::Vsock {
            cid: VMADDR_CID_HOST,
        },
    };
    let sandbox = sandbox::Sandbox::new(
        PathBuf::from(&cgroups),
        parameters.hotplug_timeout,
        host,
        reaper,
    );
    let over = Arc::new(Notify::new());
    tokio::spawn(stdio::serve(Arrivals::of(stdio, keyed), sandbox.clone()));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(incoming(Arrivals::of(agent, keyed)))
        .register_service(server::services(sandbox, over.clone(), init));
    server
        .start()
        .await
        .map_err(|error| Error::Failed(format!("start the server: {error}")))?;
    if init {
        boot::finish_boot();
    }
    // The host asks for ports only once it knows what this agent can do, and the answer to that
    // comes after this.
    let forward = forward.map_or_else(|| vsock(FORWARD_PORT), Ok)?;
    tokio::spawn(forward::serve(Arrivals::of(forward, keyed)));
    log!("ready");
    over.notified().await;
    // The answer to the call that ended the sandbox must get out.
    let _ = tokio::time::timeout(LAST_WORDS, server.shutdown()).await;
    if !init {
        let _ = std::fs::remove_dir(&cgroups);
    }
    Ok(())
}

fn unix(path: PathBuf) -> io::Result<Listener> {
    Ok(Listener::Unix {
        listener: tokio::net::UnixListener::bind(&path)?,
        path,
    })
}

/// Only the host may connect: a container in this guest can open vsock sockets too.
fn vsock(port: u32) -> Result<Listener> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .what(|| format!("listen on vsock port {port}"))?;
    Ok(Listener::Vsock {
        listener,
        cid: VMADDR_CID_HOST,
    })
}

/// The server's connections.
fn incoming(arrivals: Arrivals) -> ttrpc::r#async::transport::Listener {
    ttrpc::r#async::transport::Listener::new(futures::stream::unfold(
        arrivals,
        async |mut arrivals| {
            let accepted = arrivals.accept().await;
            if accepted.is_err() {
                // Out of descriptors, for example: others must close some first.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Some((accepted, arrivals))
        },
    ))
}
