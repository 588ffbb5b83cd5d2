//! The undo ledger: what a sandbox made on the host that the kernel does not take back by itself.
//!
//! A file of JSON lines in the sandbox's state directory. An entry is written before its resource
//! is made (a process: before it is used), and undoing is idempotent, so an entry without a
//! resource does no harm. The file is not synced: everything it names ends with the running kernel,
//! and what was written before a crash of the shim is in the page cache. Mounts need no entry: they
//! live in the sandbox's own mount namespace and go with its last process.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sys::point::{Point, reach};
use vmm::process::Identity;

use crate::deadlines::{LEDGER_BEGIN, PROCESS_GONE, SANDBOX_LOCK_TO_UNDO};
use crate::error::{Error, IoContext, Result};
use crate::host::cgroup;
use crate::host::dir::Dir;
use crate::host::sandbox_lock::SandboxLock;
use crate::network::Redirect;

const NAME: &str = "ledger";

/// Something on the host that somebody has to undo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// The server itself. While it lives, undoing is its own business first.
    Server(Identity),
    /// QEMU or a helper.
    Process(Identity),
    /// A directory of a cgroup hierarchy.
    Cgroup { path: PathBuf },
    /// A cgroup that systemd made for the sandbox.
    Scope { unit: String },
    /// What sends a link's packets to the virtual machine, in a network namespace that may outlive
    /// the sandbox.
    Redirect(Redirect),
    /// A file or socket outside the state directory.
    File { path: PathBuf },
}

impl Resource {
    /// What it is, for a user.
    fn kind(&self) -> &'static str {
        match self {
            Resource::Server(_) | Resource::Process(_) => "a process",
            Resource::Cgroup { .. } | Resource::Scope { .. } => "a cgroup",
            Resource::Redirect(_) => "a network link",
            Resource::File { .. } => "a file",
        }
    }
}

/// The writing end, held by the server.
#[derive(Debug)]
pub struct Ledger {
    dir: PathBuf,
    file: Mutex<File>,
}

impl Ledger {
    /// Makes the state directory and its ledger.
    ///
    /// # Errors
    /// One line that names the directory.
    pub fn create(dir: &Path) -> Result<Ledger> {
        let doing = || format!("make the sandbox's state directory {}", dir.display());
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .doing(doing)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join(NAME))
            .doing(doing)?;
        Ok(Ledger {
            dir: dir.to_owned(),
            file: Mutex::new(file),
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Records a resource. Only after that may it be made.
    ///
    /// # Errors
    /// One line; a full disk is the likely reason.
    pub fn record(&self, resource: &Resource) -> Result<()> {
        let doing = || {
            format!(
                "record {} in {}",
                resource.kind(),
                self.dir.join(NAME).display()
            )
        };
        // On a line of its own also after one that a full disk has torn.
        let mut line = vec![b'\n'];
        serde_json::to_writer(&mut line, resource)
            .map_err(std::io::Error::other)
            .doing(doing)?;
        line.push(b'\n');
        let mut file = self
            .file
            .lock()
            .map_err(|_| Error::internal("the ledger's lock is poisoned"))?;
        file.write_all(&line).doing(doing)
    }
}

/// Undoes all that the ledger in `dir` names, newest first, then removes the directory. A server
/// that still lives is given `server_deadline` to do so itself. Nothing there is success.
///
/// # Errors
/// One line that names the first thing that could not be undone; the rest is undone all the same.
pub fn undo(dir: &Path, server_deadline: Duration) -> Result<()> {
    reach(Point::DeleteWaits).doing(|| format!("read {}", dir.display()))?;
    if let Some(server) = newest_server(&read(dir)?) {
        wait_until_gone(&server, server_deadline);
    }
    reach(Point::DeleteKills).doing(|| format!("undo {}", dir.display()))?;
    // Only now: the server needs the lock for its own end. A sweep may be at it too, begun by the
    // `delete` of another member of the group.
    let _lock = SandboxLock::take_within(dir, SANDBOX_LOCK_TO_UNDO);
    undo_all(dir, &read(dir)?)
}

/// The server that has the directory: one that could not be undone may have been used again.
fn newest_server(resources: &[Resource]) -> Option<Identity> {
    resources.iter().rev().find_map(|resource| match resource {
        Resource::Server(identity) => Some(*identity),
        _ => None,
    })
}

/// What the server itself does at its end: everything but its own process. Nothing, if another one
/// has the directory by now.
pub fn undo_own(dir: &Path) -> Result<()> {
    let mut resources = read(dir)?;
    let own = std::process::id().cast_signed();
    if newest_server(&resources).is_some_and(|server| server.pid != own && server.is_alive()) {
        return Ok(());
    }
    resources.retain(|resource| !matches!(resource, Resource::Server(_)));
    undo_all(dir, &resources)
}

/// Looks into all state directories below `root`, until `deadline` is over, for what dead servers
/// left whose own `delete` was killed (containerd gives it 5 s) or never ran.
pub fn sweep(root: &Path, deadline: Duration) {
    let end = Instant::now() + deadline;
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let dir = entry.path();
        if Instant::now() >= end || !dir.join(NAME).exists() {
            continue;
        }
        // What is read here must not become a new server's before it is undone. A sandbox that
        // somebody else has is in good hands; what fails, the next sweep tries again.
        if let Ok(Some(_lock)) = SandboxLock::try_take(&dir) {
            let _ = undo_abandoned(&dir);
        }
    }
}

/// As [`undo`], if the server is dead.
pub fn undo_abandoned(dir: &Path) -> Result<()> {
    let resources = read(dir)?;
    if is_abandoned(&resources) || is_old_beginning(dir, &resources) {
        undo_all(dir, &resources)
    } else {
        Ok(())
    }
}

/// Whether the server of a sandbox is there.
pub fn server_lives(dir: &Path) -> bool {
    let resources = read(dir).unwrap_or_default();
    let mut servers = resources.iter().filter_map(|resource| match resource {
        Resource::Server(identity) => Some(identity),
        _ => None,
    });
    servers.any(Identity::is_alive)
}

/// Whether a server was killed long ago before it wrote its first line.
fn is_old_beginning(dir: &Path, resources: &[Resource]) -> bool {
    let modified = std::fs::metadata(dir.join(NAME)).and_then(|ledger| ledger.modified());
    resources.is_empty()
        && modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LEDGER_BEGIN))
}

/// Whether the server has come and gone. Its socket is asked too: in another pid namespace its
/// number says nothing.
fn is_abandoned(resources: &[Resource]) -> bool {
    let mut servers = 0;
    let gone = resources.iter().all(|resource| match resource {
        Resource::Server(identity) => {
            servers += 1;
            !identity.is_alive()
        }
        Resource::File { path } => UnixStream::connect(path).is_err(),
        _ => true,
    });
    servers > 0 && gone
}

/// Lines that do not parse (a full disk tears the last one) are passed over.
pub(crate) fn parse(text: &[u8]) -> Vec<Resource> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

fn read(dir: &Path) -> Result<Vec<Resource>> {
    let path = dir.join(NAME);
    match std::fs::read(&path) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error).doing(|| format!("read {}", path.display())),
    }
}

fn undo_all(dir: &Path, resources: &[Resource]) -> Result<()> {
    // Processes first, the server before its children so that it starts no more of them.
    let (servers, others): (Vec<_>, Vec<_>) = resources
        .iter()
        .partition(|r| matches!(r, Resource::Server(_)));
    let (processes, files): (Vec<_>, Vec<_>) = others
        .into_iter()
        .partition(|r| matches!(r, Resource::Process(_)));
    let mut result = Ok(());
    for resource in servers
        .into_iter()
        .chain(processes.into_iter().rev())
        .chain(files.into_iter().rev())
    {
        if let Err(error) = undo_one(resource) {
            tracing::warn!(%error, "left behind");
            result = result.and(Err(error));
        }
    }
    let half = reach(Point::UndoHalfDone).doing(|| format!("remove {}", dir.display()));
    result.and(half).and(remove(dir))
}

fn remove(dir: &Path) -> Result<()> {
    match (dir.parent(), dir.file_name().and_then(OsStr::to_str)) {
        (Some(parent), Some(name)) if parent.exists() => Dir::open(parent)?.remove(name),
        _ => Ok(()),
    }
}

fn undo_one(resource: &Resource) -> Result<()> {
    match resource {
        Resource::Server(identity) | Resource::Process(identity) => {
            identity.kill_and_wait(PROCESS_GONE).map_err(Error::from)
        }
        Resource::Cgroup { path } => {
            cgroup::remove(path).doing(|| format!("remove cgroup {}", path.display()))
        }
        Resource::Scope { unit } => cgroup::systemd::undo(unit),
        Resource::Redirect(redirect) => redirect.undo(),
        Resource::File { path } => match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).doing(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        },
    }
}

fn wait_until_gone(server: &Identity, deadline: Duration) {
    let end = Instant::now() + deadline;
    while server.is_alive() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_undone_and_twice_does_no_harm() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        let outside = root.path().join("socket");
        let ledger = Ledger::create(&dir).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let identity = Identity::of(child.id().cast_signed()).unwrap();
        ledger.record(&Resource::Process(identity)).unwrap();
        ledger
            .record(&Resource::File {
                path: outside.clone(),
            })
            .unwrap();
        ledger
            .record(&Resource::Cgroup {
                path: root.path().join("no-such-cgroup"),
            })
            .unwrap();
        ledger
            .record(&Resource::Scope {
                unit: "cofferdam-no-such.scope".into(),
            })
            .unwrap();
        std::fs::write(&outside, "").unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        undo(&dir, Duration::ZERO).unwrap();
        assert!(!reaper.join().unwrap().success());
        assert!(!outside.exists() && !dir.exists());
        undo(&dir, Duration::ZERO).unwrap();
    }

    #[test]
    fn another_process_with_a_recycled_pid_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        let ledger = Ledger::create(&dir).unwrap();
        let own = Identity::of(std::process::id().cast_signed()).unwrap();
        ledger
            .record(&Resource::Process(Identity {
                start_time: own.start_time + 1,
                ..own
            }))
            .unwrap();
        undo(&dir, Duration::ZERO).unwrap();
    }

    #[test]
    fn a_torn_ledger_is_read_as_far_as_it_goes() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        let outside = root.path().join("file");
        let ledger = Ledger::create(&dir).unwrap();
        ledger
            .record(&Resource::File {
                path: outside.clone(),
            })
            .unwrap();
        std::fs::write(&outside, "").unwrap();
        let mut file = OpenOptions::new()
            .append(true)
            .open(dir.join(NAME))
            .unwrap();
        file.write_all(b"\xff\xfe{\n{\"kind\":\"proce").unwrap();
        undo(&dir, Duration::ZERO).unwrap();
        assert!(!outside.exists() && !dir.exists());
    }

    #[test]
    fn a_sweep_takes_what_dead_servers_left_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let own = Identity::of(std::process::id().cast_signed()).unwrap();
        let dead = Identity {
            start_time: own.start_time + 1,
            ..own
        };
        let (socket, outside) = (root.path().join("socket"), root.path().join("file"));
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::fs::write(&outside, "").unwrap();
        let file = |path: &Path| Resource::File {
            path: path.to_owned(),
        };
        let sandboxes = [
            (
                "abandoned",
                vec![Resource::Server(dead), file(&outside)],
                false,
            ),
            ("alive", vec![Resource::Server(own)], true),
            (
                "elsewhere",
                vec![Resource::Server(dead), file(&socket)],
                true,
            ),
            ("begins", vec![], true),
            ("began", vec![], false),
        ];
        for (name, resources, _) in &sandboxes {
            let ledger = Ledger::create(&root.path().join(name)).unwrap();
            resources
                .iter()
                .for_each(|resource| ledger.record(resource).unwrap());
        }
        let began = File::options()
            .append(true)
            .open(root.path().join("began").join(NAME));
        let long_ago = std::time::SystemTime::now() - LEDGER_BEGIN * 2;
        began.unwrap().set_modified(long_ago).unwrap();
        std::fs::create_dir(root.path().join("cache")).unwrap();
        sweep(root.path(), Duration::from_secs(1));
        for (name, _, stays) in sandboxes {
            assert_eq!(root.path().join(name).exists(), stays, "{name}");
        }
        assert!(!outside.exists() && root.path().join("cache").exists());
    }

    #[test]
    fn a_full_disk_is_named() {
        let ledger = Ledger {
            dir: "/dev".into(),
            file: Mutex::new(File::options().write(true).open("/dev/full").unwrap()),
        };
        let message = ledger
            .record(&Resource::File { path: "/x".into() })
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("No space left") && message.contains("/dev/ledger"),
            "{message}"
        );
    }
}
