//! Unix sockets of the host below the directories that containers have as volumes.
//!
//! To the guest's kernel such a socket is a file of virtio-fs that nobody has bound. So each of
//! them gets a socket of the agent's mounted over it, joined to the host's as a socket that is a
//! mount by itself is (`host_sockets`). They are looked for before a container is made, and again
//! when their directories change: a server that begins anew makes its socket anew.
//!
//! ```text
//!  directory ── inotify ──▶ scan (bounded) ──▶ names for Sockets ──▶ agent: the whole list
//!                  ▲                                                      │ mounts, unmounts
//!                  └── a pause that grows with the cost of a scan ◀───────┘
//! ```
//!
//! * What is looked through is the bind that the guest has, so nothing is found that a container
//!   could not reach under runc. The guest asks by random names only, and a connection walks the
//!   path again from the bind's top: beneath it, through no link, with the rights of the user.
//! * A socket that no process of the host has bound is left alone: a container's own server.
//! * The guest can make names and events without an end. A scan has bounds, and no more than a
//!   twentieth of the time is spent with them.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use guest_protocol::protocols::agent::{Storage, UpdateEphemeralMountsRequest};
use guest_protocol::{UDS_BELOW_DRIVER, UDS_PORT_OPTION};
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::deadlines::{
    AGENT_CALL, SOCKETS_CONFIRM, SOCKETS_FIRST_SCAN, SOCKETS_LOOK_AGAIN, SOCKETS_PAUSE,
    SOCKETS_SETTLE,
};
use crate::error::Result;
use crate::from_guest::Agent;
use crate::guest::host_sockets::{PinnedSocket, Sockets, Users, Walk, random_name};
use crate::host::socket_scan::{FoundSocket, scan};

/// After a scan, this many times what it took passes before the next.
const PAUSE_FACTOR: u32 = 20;

/// Reads of the kernel's notices, of some hundred each, before a scan.
const NOTICES: usize = 100;

/// The directories of one guest that are looked through.
pub struct SocketsBelow {
    agent: Agent,
    sockets: Sockets,
    port: u32,
    live: Mutex<HashMap<String, Weak<WatchedDirectory>>>,
}

/// A directory that is looked through until this is dropped.
pub struct WatchedDirectory {
    task: Mutex<Option<JoinHandle<()>>>,
    /// As whom the processes of its containers speak.
    users: Users,
}

impl std::fmt::Debug for WatchedDirectory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WatchedDirectory({:?})", self.users)
    }
}

impl Drop for WatchedDirectory {
    fn drop(&mut self) {
        if let Some(task) = sys::lock(&self.task).take() {
            task.abort();
        }
    }
}

impl WatchedDirectory {
    /// One more user: of a process in a container that has the directory.
    pub fn runs_as(&self, user: &oci_spec::runtime::User) {
        self.users.add(user);
    }
}

impl SocketsBelow {
    /// None yet. `sockets` serves them at the host's `port`.
    pub fn new(agent: Agent, sockets: Sockets, port: u32) -> SocketsBelow {
        SocketsBelow {
            agent,
            sockets,
            port,
            live: Mutex::default(),
        }
    }

    /// Joins the sockets below a directory, which the guest has at `guest_path`, and goes on with
    /// it. Containers that share the directory share this. What cannot be joined is logged: a
    /// container may live without.
    pub async fn watch(&self, directory: File, guest_path: &str) -> Arc<WatchedDirectory> {
        let watched = {
            let mut live = sys::lock(&self.live);
            live.retain(|_, watched| watched.strong_count() > 0);
            if let Some(watched) = live.get(guest_path).and_then(Weak::upgrade) {
                return watched;
            }
            let watched = Arc::new(WatchedDirectory {
                task: Mutex::default(),
                users: Users::default(),
            });
            live.insert(guest_path.to_owned(), Arc::downgrade(&watched));
            watched
        };
        let changes = match changes() {
            Ok(changes) => Some(changes),
            Err(error) => {
                tracing::warn!(%error, "sockets that come later below a volume are noticed late \
                    (raise fs.inotify.max_user_instances)");
                None
            }
        };
        let mut joined = Joined {
            directory: Arc::new(directory),
            guest_path: guest_path.to_owned(),
            agent: self.agent.clone(),
            sockets: self.sockets.clone(),
            port: self.port,
            users: watched.users.clone(),
            changes,
            known: BTreeMap::new(),
        };
        let first = timeout(SOCKETS_FIRST_SCAN, joined.look()).await;
        let begins = match first {
            Ok(begins) => begins,
            Err(_) => {
                tracing::warn!(
                    guest_path,
                    "a volume is too slow to be searched for sockets"
                );
                None
            }
        };
        let task = tokio::spawn(joined.follow(begins));
        *sys::lock(&watched.task) = Some(task);
        watched
    }
}

fn changes() -> std::io::Result<AsyncFd<Arc<OwnedFd>>> {
    let changes = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    // SAFETY: the value owns its share of the descriptor, and gives it up after it is deregistered.
    Ok(unsafe { AsyncFd::register(Arc::new(changes)) }?)
}

/// One directory, and what of it the guest has.
struct Joined {
    directory: Arc<File>,
    guest_path: String,
    agent: Agent,
    sockets: Sockets,
    port: u32,
    users: Users,
    changes: Option<AsyncFd<Arc<OwnedFd>>>,
    /// The sockets and their names.
    known: BTreeMap<String, (FoundSocket, String)>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        for (_, name) in self.known.values() {
            self.sockets.remove(name);
        }
    }
}

impl Joined {
    /// Looks once, and tells the agent of what is new. When to tell it again: the guest believes
    /// what it knows of names for a second, and what is mounted on an old name goes with that.
    async fn look(&mut self) -> Option<Instant> {
        let (directory, changes) = (
            self.directory.clone(),
            self.changes
                .as_ref()
                .map(|changes| changes.get_ref().clone()),
        );
        let found = spawn_blocking(move || scan(&directory, changes.as_deref())).await;
        let found = found.unwrap_or_default();
        if found.len() == self.known.len()
            && found
                .iter()
                .all(|(path, socket)| self.known.get(path).is_some_and(|(one, _)| one == socket))
        {
            return None;
        }
        self.keep(found);
        if let Err(error) = self.tell().await {
            tracing::debug!(%error, "sockets below a volume are not joined yet");
        }
        Some(Instant::now() + SOCKETS_CONFIRM)
    }

    /// Names for what is there, and none for what is not.
    fn keep(&mut self, found: BTreeMap<String, FoundSocket>) {
        let mut before = std::mem::take(&mut self.known);
        for (path, socket) in found {
            let known = before
                .remove(&path)
                .filter(|(old, _)| old.kind == socket.kind);
            let name = match known {
                Some((_, name)) => name,
                None => {
                    let Ok(name) = random_name() else { continue };
                    let place = PinnedSocket {
                        directory: self.directory.clone(),
                        path: PathBuf::from(&path),
                        walk: Walk::AsUser,
                        kind: socket.kind,
                        users: self.users.clone(),
                    };
                    self.sockets.add(&name, place);
                    tracing::info!(path, kind = %socket.kind, "a socket of the host below a volume");
                    name
                }
            };
            self.known.insert(path, (socket, name));
        }
        for (_, name) in before.values() {
            self.sockets.remove(name);
        }
    }

    async fn tell(&self) -> Result<()> {
        let list = self.known.iter().map(|(path, (socket, name))| {
            let FoundSocket {
                kind,
                mode,
                uid,
                gid,
                ..
            } = socket;
            format!("{name} {kind} {mode:o} {uid} {gid} {path}")
        });
        let storage = Storage {
            driver: UDS_BELOW_DRIVER.to_owned(),
            driver_options: vec![format!("{UDS_PORT_OPTION}{}", self.port)],
            mount_point: self.guest_path.clone(),
            options: list.collect(),
            ..Default::default()
        };
        let request = UpdateEphemeralMountsRequest {
            storages: vec![storage],
            ..Default::default()
        };
        self.agent
            .update_ephemeral_mounts(&request, AGENT_CALL)
            .await
    }

    /// Looks again whenever something changes. Runs until it is dropped.
    async fn follow(mut self, mut confirm: Option<Instant>) {
        loop {
            // Without notice of changes it is looked at now and then.
            let until = match &self.changes {
                Some(_) => confirm,
                None => confirm.or(Some(Instant::now() + SOCKETS_LOOK_AGAIN)),
            };
            let changed = match until {
                Some(until) => timeout_at(until, self.changed()).await.is_ok(),
                None => {
                    self.changed().await;
                    true
                }
            };
            // Also where something changes all the time.
            if confirm.is_some_and(|at| at <= Instant::now()) {
                confirm = None;
                if let Err(error) = self.tell().await {
                    tracing::warn!(%error, "a socket of the host below a volume cannot be reached");
                }
                continue;
            }
            if !changed && self.changes.is_some() {
                continue;
            }
            // A server binds, and then sets the owner.
            sleep(SOCKETS_SETTLE).await;
            self.drain();
            let begun = Instant::now();
            if let Some(again) = self.look().await {
                confirm = Some(again);
            }
            sleep((begun.elapsed() * PAUSE_FACTOR).max(SOCKETS_PAUSE)).await;
        }
    }

    async fn changed(&self) {
        let Some(changes) = &self.changes else {
            return std::future::pending().await;
        };
        match changes.readable().await {
            Ok(mut ready) => ready.retain_ready(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Takes what has been told: the scan sees it all. Events that come meanwhile are for the next.
    fn drain(&self) {
        let Some(changes) = &self.changes else { return };
        let mut notices = [0; 4096];
        for _ in 0..NOTICES {
            let read = changes.try_io(Interest::READABLE, |changes| {
                Ok(nix::unistd::read(changes, &mut notices)?)
            });
            if read.is_err() {
                return;
            }
        }
    }
}
