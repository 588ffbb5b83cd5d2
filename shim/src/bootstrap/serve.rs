//! The server: one for each sandbox, single-threaded, in a mount namespace of its own.
//!
//! One thread, because PR_SET_PDEATHSIG of QEMU and the helpers is tied to the thread that started
//! them, and because threads cost memory in every pod.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource as Limit, getrlimit, setrlimit};
use sys::point::{Point, pass, reach};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use ttrpc::r#async::Server;
use vmm::process::Identity;

use super::start::{LISTENER_FD, READY_FD};
use crate::args::Args;
use crate::deadlines::{LOG_FILES_AT_END, SANDBOX_LOCK_TO_UNDO, SERVER_END};
use crate::error::{Error, IoContext, Result};
use crate::events::Publisher;
use crate::host::identity::SandboxIdentity;
use crate::host::ledger::{self, Ledger, Resource};
use crate::host::mounts;
use crate::host::sandbox_lock::SandboxLock;
use crate::logging;
use crate::sandbox::host_calls::ThisHost;
use crate::sandbox::owner::SandboxOwner;
use crate::sandbox::request::{Request, SandboxHandle};
use crate::service::{self, SandboxService, TaskService};
use crate::stdio::log_file;

/// Runs the server until its sandbox is shut down.
///
/// # Errors
/// What kept it from serving; `start` prints it.
pub fn run(args: &Args) -> Result<()> {
    // SAFETY: `start` passes these two descriptors, and this is the only place that takes them.
    let (listener, mut ready) = unsafe {
        (
            StdUnixListener::from_raw_fd(LISTENER_FD),
            File::from_raw_fd(READY_FD),
        )
    };
    nix::fcntl::fcntl(
        &listener,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .doing(|| "inherit the socket".into())?;
    let identity = SandboxIdentity::new(&args.address, &args.namespace, &args.id);
    let prepared = prepare(args, &identity, &listener).and_then(|ledger| {
        ready
            .write_all(b"+")
            .doing(|| "tell `start` that the server is ready".into())?;
        Ok(ledger)
    });
    let ledger = match prepared {
        Ok(ledger) => ledger,
        Err(error) => {
            let _ = ready.write_all(error.to_string().as_bytes());
            let _ = ledger::undo_own(&identity.state_dir());
            return Err(error);
        }
    };
    drop(ready);
    let state_dir = ledger.dir().to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Each may be stuck in a storage that is gone; one that is idle ends after ten seconds.
        .max_blocking_threads(64)
        .build()
        .doing(|| "make the runtime".into())?;
    let result = runtime.block_on(async {
        let result = serve(args, identity, ledger, listener).await;
        log_file::written(LOG_FILES_AT_END).await;
        result
    });
    // Whatever is still running (a parked wait, a logger) ends with the process.
    runtime.shutdown_background();
    // A start that has come meanwhile has the directory, and the socket.
    let _lock = SandboxLock::take_within(&state_dir, SANDBOX_LOCK_TO_UNDO);
    if let Err(error) = ledger::undo_own(&state_dir) {
        tracing::error!(%error, "something is left on the host");
    }
    result
}

/// Everything that must be there before the first request, and that may fail.
fn prepare(args: &Args, identity: &SandboxIdentity, listener: &StdUnixListener) -> Result<Ledger> {
    logging::start(Path::new("."), &args.id, args.debug);
    raise_descriptor_limit();
    mounts::enter_namespace()?;
    listener
        .set_nonblocking(true)
        .doing(|| "set up the socket".into())?;
    reach(Point::ServerForked).doing(|| "begin".into())?;
    let ledger = Ledger::create(&identity.state_dir())?;
    reach(Point::ServerNotRecorded).doing(|| "name the sandbox".into())?;
    name(&ledger, identity);
    let own = Identity::of(std::process::id().cast_signed())
        .doing(|| "read the server's own start time".into())?;
    ledger.record(&Resource::Server(own))?;
    reach(Point::ServerRecorded).doing(|| "go on".into())?;
    reach(Point::ServerBeforeReady).doing(|| "tell `start` that the server is ready".into())?;
    Ok(ledger)
}

/// Says in the state directory, whose own name is a digest, which sandbox it is of.
fn name(ledger: &Ledger, identity: &SandboxIdentity) {
    let text = format!("namespace={}\nid={}\n", identity.namespace, identity.id);
    if let Err(error) = std::fs::write(ledger.dir().join("sandbox"), text) {
        tracing::debug!(%error, "the sandbox's directory does not say whose it is");
    }
}

/// An exec takes up to nine descriptors. systemd's soft limit of 1024, which a containerd hands on
/// even after it raised its own, would be used up by a hundred of them.
fn raise_descriptor_limit() {
    let raised = getrlimit(Limit::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Limit::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
}

async fn serve(
    args: &Args,
    identity: SandboxIdentity,
    ledger: Ledger,
    listener: StdUnixListener,
) -> Result<()> {
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let events = Publisher::start(&address, &args.namespace);
    let (owner, handle, requests) = SandboxOwner::new(identity, ledger, events, Arc::new(ThisHost));
    let (ended_sender, mut ended) = watch::channel(false);
    let task = TaskService::new(handle.clone(), ended_sender.clone());
    let sandbox = SandboxService::new(handle.clone(), ended_sender);
    let listener = UnixListener::from_std(listener).doing(|| "set up the socket".into())?;
    let mut server = Server::new()
        .add_listener(listener.into())
        .register_service(service::all(task, sandbox));
    server
        .start()
        .await
        .map_err(|error| Error::internal(format!("cannot serve: {error}")))?;
    let mut owner = tokio::spawn(owner.run(requests));
    let mut terminate = signal(SignalKind::terminate()).doing(|| "handle SIGTERM".into())?;
    let mut interrupt = signal(SignalKind::interrupt()).doing(|| "handle SIGINT".into())?;
    let mut over = false;
    tokio::select! {
        _ = ended.wait_for(|ended| *ended) => {}
        result = &mut owner => {
            // It works until it is told to end: without it every call would be refused, and nobody
            // would end the server.
            over = true;
            if let Err(error) = result {
                tracing::error!(%error, "the sandbox's owner has failed");
            }
        }
        _ = terminate.recv() => stop(&handle).await,
        _ = interrupt.recv() => stop(&handle).await,
    }
    pass(Point::ShutdownTaken);
    // No new connection finds the socket, and what is connected still gets its answers.
    if let Some(socket) = &args.socket {
        remove(socket);
    }
    if !over && tokio::time::timeout(SERVER_END, &mut owner).await.is_err() {
        tracing::error!("the sandbox did not end in order within {SERVER_END:?}");
    }
    let _ = tokio::time::timeout(Duration::from_secs(1), server.shutdown()).await;
    Ok(())
}

async fn stop(handle: &SandboxHandle) {
    tracing::info!("told to stop");
    let _ = handle
        .ask(|reply| Request::Shutdown { now: true, reply })
        .await;
}

fn remove(socket: &PathBuf) {
    if let Err(error) = std::fs::remove_file(socket) {
        tracing::debug!(%error, socket = %socket.display(), "socket is gone already");
    }
}
