//! The guest agent: PID 1 of the virtual machine. The shim on the host tells it over vsock which
//! containers to make; it makes them, runs them, and carries their input and output.
//!
//! This file owns the command line and the order of a boot. The rest lies in folders. An import
//! points down this list or within one folder, never up; a test at the end of this file keeps it
//! so.
//!
//! ```text
//!              the host: shim, containerd's calls
//!                 │ ttrpc 1024   │ stdio 1028   │ port forwarding 1030
//! server          one method for each call of the protocol; raw stdio streams
//! sandbox         all state: which containers and storages there are
//! storage         what the host asks to be mounted, or copies into the guest
//! container       one container: spec, first process, execs, removal
//! stdio           pipes and terminals of processes; streams that wait for theirs
//! relay           connections carried between host and guest: TCP ports, unix sockets
//! network         links, addresses, routes, neighbours, by netlink
//! cgroup          limits, device rules, statistics, freezing, killing
//! spawn           a new process: clone3, and what parent and child say to each other
//! guest           the machine: boot, PCI, ready notice, collecting of exits, CPUs, clock
//! gate            who may connect
//! mount_options   mount options as text, for storage and container
//! deadlines       every time limit
//! log · error · stock (a stand-in for Kata's agent, in tests only)
//! ```
//!
//! Rules that a change must not break:
//!
//! * **One thread.** A process of a container begins as a copy of this one, and in a copy of a
//!   threaded process a lock may be held by nobody. `spawn` refuses if there is a second thread,
//!   so there is no `spawn_blocking` here: a call that may block for long is made by a child
//!   (`spawn::in_child`).
//! * **Nothing of a container is trusted.** Paths inside a container are resolved with its root as
//!   the boundary, and only by the container's own first process (`container/child/rootfs.rs`).
//! * **An exit waits for nobody.** The exit status is reported when the process ends, whether or
//!   not its output is read.
//! * **The key is the agent's alone.** A copy of this process that a container could look into
//!   forgets the key first (`gate::forget`).
//! * **Early is expensive.** What happens before the ready notice is what a user waits for at each
//!   start, under emulation above all; what only containers need comes after it.

mod cgroup;
mod container;
mod deadlines;
mod error;
mod gate;
mod guest;
mod log;
mod mount_options;
mod network;
mod relay;
mod sandbox;
mod server;
mod spawn;
mod stdio;
mod stock;
mod storage;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use guest_protocol::{AGENT_PORT, FORWARD_PORT, Listener, STDIO_PORT, Transport};
use tokio::sync::Notify;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use error::{Context, Error, Result};
use gate::Incoming;
use guest::boot::{self, Mode};
use guest::{ready, reaper};
use log::log;

const USAGE: &str =
    "usage: cofferdam-agent --listen unix:PATH   (without arguments only as PID 1 of a guest)";

fn main() -> ExitCode {
    let mode = if std::process::id() == 1 {
        Mode::Init
    } else {
        Mode::Process
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let listen = match arguments.as_slice() {
        _ if mode == Mode::Init => None,
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
        None if mode == Mode::Process => Err(Error::Invalid(USAGE.into())),
        listen => run(listen),
    };
    if let Err(error) = &result {
        eprintln!("cofferdam-agent: {error}");
        log!("{error}");
    }
    if mode == Mode::Init {
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
        .context(|| "start the runtime".into())?;
    runtime.block_on(serve(listen))
}

async fn serve(listen: Option<PathBuf>) -> Result<()> {
    let mode = if listen.is_none() {
        Mode::Init
    } else {
        Mode::Process
    };
    // A process binds first: afterwards it no longer sees the host's /run.
    let sockets = listen.as_deref().map(|path| -> io::Result<_> {
        let port = |port| unix(format!("{}_{port}", path.display()).into());
        let (stdio, forward) = (port(STDIO_PORT)?, port(FORWARD_PORT)?);
        Ok((unix(path.to_owned())?, stdio, Some(forward)))
    });
    let sockets = sockets.transpose().context(|| "listen".into())?;
    let (parameters, cgroups) = if mode == Mode::Init {
        (boot::boot()?, boot::CONTAINERS.to_owned())
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
        let notice = tokio::spawn(ready::notify_host(port, parameters.admission));
        let _ = tokio::time::timeout(deadlines::READY_NOTICE_HEAD_START, notice).await;
    }
    let admission = parameters.admission;
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
    let shutdown_requested = Arc::new(Notify::new());
    tokio::spawn(server::stdio_streams::serve(
        Incoming::of(stdio, admission),
        sandbox.clone(),
    ));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(ttrpc_listener(Incoming::of(agent, admission)))
        .register_service(server::services(sandbox, shutdown_requested.clone(), mode));
    server
        .start()
        .await
        .map_err(|error| Error::Failed(format!("start the server: {error}")))?;
    if mode == Mode::Init {
        boot::finish_boot();
    }
    // The host asks for ports only once it knows what this agent can do, and the answer to that
    // comes after this.
    let forward = forward.map_or_else(|| vsock(FORWARD_PORT), Ok)?;
    tokio::spawn(relay::tcp::serve(Incoming::of(forward, admission)));
    log!("ready");
    shutdown_requested.notified().await;
    // The answer to the call that ended the sandbox must get out.
    let _ = tokio::time::timeout(deadlines::ANSWERS_BEFORE_POWER_OFF, server.shutdown()).await;
    if mode == Mode::Process {
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

/// Only connections from the host are accepted: containers can open vsock sockets too.
fn vsock(port: u32) -> Result<Listener> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .context(|| format!("listen on vsock port {port}"))?;
    Ok(Listener::Vsock {
        listener,
        cid: VMADDR_CID_HOST,
    })
}

/// The connections as ttrpc takes them.
fn ttrpc_listener(incoming: Incoming) -> ttrpc::r#async::transport::Listener {
    ttrpc::r#async::transport::Listener::new(futures::stream::unfold(
        incoming,
        async |mut incoming| {
            let accepted = incoming.accept().await;
            if accepted.is_err() {
                // Out of descriptors, for example: others must close some first.
                tokio::time::sleep(deadlines::ACCEPT_RETRY_PAUSE).await;
            }
            Some((accepted, incoming))
        },
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    /// The modules in the order of the list above.
    const ORDER: [&str; 16] = [
        "server",
        "sandbox",
        "storage",
        "container",
        "stdio",
        "relay",
        "network",
        "cgroup",
        "spawn",
        "guest",
        "gate",
        "mount_options",
        "deadlines",
        "log",
        "error",
        "stock",
    ];

    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries
            .flat_map(|path| {
                if path.is_dir() {
                    files(&path)
                } else {
                    vec![path]
                }
            })
            .collect()
    }

    #[test]
    fn imports_point_down() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let place = |module: &str| ORDER.iter().position(|name| *name == module);
        for file in files(&src) {
            let inside = file.strip_prefix(&src).unwrap().with_extension("");
            let top = inside.iter().next().unwrap().to_str().unwrap();
            if top == "main" {
                continue;
            }
            let own = place(top).unwrap_or_else(|| panic!("{top} is missing in ORDER"));
            for used in fs::read_to_string(&file).unwrap().split("crate::").skip(1) {
                let used = used
                    .split(|c: char| !c.is_ascii_lowercase() && c != '_')
                    .next();
                let used = used.and_then(place);
                assert!(
                    used.is_none_or(|used| used >= own),
                    "{} imports upwards: {:?}",
                    inside.display(),
                    used.map(|used| ORDER[used])
                );
            }
        }
    }
}
