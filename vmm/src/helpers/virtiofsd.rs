//! virtiofsd, which serves a shared directory: the Rust one (1.x). The C one that came with QEMU up
//! to 7.2 has had no upstream since 2022, and is refused.
//!
//! It inherits a listening socket that we are connected to already, so there is nothing to wait
//! for, and no path to find it by: whoever comes later finds no socket.

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, setns, unshare};
use sys::mount::{Attributes, Extent, set_attributes};
use sys::point::{Point, pass, reach};
use tokio::time::timeout;

use crate::cache::FileKey;
use crate::confine::{Confinement, SHARED};
use crate::deadlines::{VIRTIOFSD_GOODBYE, VIRTIOFSD_VERSION};
use crate::error::{Doing, Error, Result};
use crate::process::{Child, Identity, Spawn, stdout_of};

/// How long a guest may believe what it has read of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsCache {
    /// A second, and contents until the file is opened again: for what others change too.
    Auto,
    /// For ever: for what nobody else changes. A program's pages stay over its end, so that it
    /// starts at once next time.
    Always,
}

/// The guest's trusted.* attributes, by which overlayfs there marks its upper directories, have
/// other names on the host: its own ones are for whoever has CAP_SYS_ADMIN, which virtiofsd has
/// not. Under those other names nobody in the guest sees or sets them.
const TRUSTED_ATTRIBUTES: &str = "--xattrmap=:map:trusted.:user.virtiofs.:";

/// What to serve.
#[derive(Clone, Debug)]
pub struct VirtiofsdConfig {
    /// The binary; an absolute path.
    pub binary: PathBuf,
    /// Where it is kept which virtiofsd the binary is.
    pub cache_dir: PathBuf,
    /// A free path in a directory that only root can enter; gone again when it runs.
    pub socket: PathBuf,
    /// The directory; mounts that come below it later are seen if it is a mount point with shared
    /// propagation.
    pub shared_dir: PathBuf,
    /// What the guest keeps of it.
    pub cache: FsCache,
    /// `cgroup.procs` files that it enters before it runs.
    pub cgroup_procs: Vec<PathBuf>,
    /// How gladly the kernel kills it when memory runs out (proc(5)); the caller's own score if
    /// none.
    pub oom_score_adj: Option<i32>,
    /// What it is confined to; by itself to its own namespaces if none.
    pub confinement: Option<Confinement>,
}

impl VirtiofsdConfig {
    /// Whether device nodes can be made: in what is a container's own, not in what the host uses
    /// too.
    fn makes_nodes(&self) -> bool {
        self.cache == FsCache::Always
    }
}

/// A running virtiofsd. Dropping it kills it.
#[derive(Debug)]
pub struct Virtiofsd {
    /// Its outer process; the one that serves is a child of that, in a pid namespace.
    pub process: Child,
    /// Where it sees the shared directory.
    sees: &'static str,
}

impl Virtiofsd {
    /// Starts it, and returns with it the connection for the device. That it serves is seen when
    /// the device is attached, which waits for it; if that fails, its last words say more.
    ///
    /// # Errors
    /// The binary is missing or no virtiofsd, or the socket cannot be made.
    pub async fn spawn(config: &VirtiofsdConfig) -> Result<(Virtiofsd, OwnedFd)> {
        check_version(&config.binary, &config.cache_dir).await?;
        let nodes = config.makes_nodes();
        let jail = match &config.confinement {
            Some(confinement) => {
                let jail = confinement.file_server(
                    &config.binary,
                    &config.cache_dir,
                    &config.shared_dir,
                    nodes,
                );
                Some(jail.await?)
            }
            None => None,
        };
        let (listener, connection) = connected(&config.socket)?;
        let arguments = arguments(config, &listener);
        let process = Child::spawn(Spawn {
            fds: vec![OwnedFd::from(listener)],
            cgroup_procs: config.cgroup_procs.clone(),
            oom_score_adj: config.oom_score_adj,
            jail,
            ..Spawn::new(&config.binary, arguments)
        })?;
        reach(Point::VirtiofsdForked).doing(|| format!("start {}", config.binary.display()))?;
        let sees = match config.confinement {
            Some(_) => SHARED,
            None => "/",
        };
        Ok((Virtiofsd { process, sees }, connection.into()))
    }

    /// The processes that it has forked: without our confinement, the one that serves.
    pub fn children(&self) -> Vec<Identity> {
        let pid = self.process.identity().pid;
        let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let list = list.unwrap_or_default();
        let pids = list.split_ascii_whitespace();
        pids.filter_map(|pid| Identity::of(pid.parse().ok()?).ok())
            .collect()
    }

    /// Lets the guest write through a mount that came read-only at `below` the shared directory. A
    /// server has copies of its parent's mounts, which get no later change of those, so this is
    /// done in the server's mount namespace.
    ///
    /// # Errors
    /// No such mount, or a mount that cannot be written to; the deadline, as the mount's storage
    /// may hang.
    pub async fn allow_writes(&self, below: &Path, within: Duration) -> Result<()> {
        let outer = self.process.identity();
        let serves = self.children().first().copied().unwrap_or(outer);
        let mount = Path::new(self.sees).join(below);
        let doing = format!("let the guest write to {}", mount.display());
        let clearing = tokio::task::spawn_blocking(move || {
            let namespace = File::open(format!("/proc/{}/ns/mnt", serves.pid))?;
            // A thread that ends: it never comes back from there.
            let there = std::thread::spawn(move || clear_read_only(&namespace, &mount));
            there
                .join()
                .unwrap_or_else(|_| Err(ErrorKind::Other.into()))
        });
        let cleared = timeout(within, clearing).await;
        let cleared = cleared.map_err(|_| Error::Deadline {
            doing: doing.clone(),
            timeout: within,
        })?;
        cleared
            .map_err(std::io::Error::other)
            .flatten()
            .doing(|| doing)
    }

    /// Waits until it is dead. It ends by itself when QEMU has, which is why QEMU is stopped first;
    /// if it does not, it is killed. May be called again.
    ///
    /// # Errors
    /// The kernel does not let it die within this time after SIGKILL.
    pub async fn stop(&self, within: Duration) -> Result<()> {
        pass(Point::HelpersEnding);
        if timeout(VIRTIOFSD_GOODBYE, self.process.exited())
            .await
            .is_err()
        {
            // The process that serves, and holds every mount, is a child in a pid namespace; ours
            // ends after it. The other way round nobody would wait for it.
            for child in self.children() {
                let _ = child.kill_and_wait(Duration::ZERO);
            }
            let _ = timeout(VIRTIOFSD_GOODBYE, self.process.exited()).await;
        }
        self.process.kill_and_wait(within).await.map(drop)
    }
}

/// Clears the flag of a mount in another mount namespace, in which the calling thread stays.
fn clear_read_only(namespace: &File, mount: &Path) -> std::io::Result<()> {
    // Root and working directory must be the thread's own (setns(2)).
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let mount = openat2(AT_FDCWD, mount, how)?;
    let writable = Attributes::clear(nix::libc::MOUNT_ATTR_RDONLY);
    set_attributes(mount, &writable, Extent::Mount)
}

/// A listening socket with one connection waiting on it, and that connection. The path is gone when
/// this returns.
fn connected(path: &Path) -> Result<(UnixListener, UnixStream)> {
    let listener =
        UnixListener::bind(path).doing(|| format!("make the socket {}", path.display()))?;
    let connection = UnixStream::connect(path);
    std::fs::remove_file(path).doing(|| format!("remove {}", path.display()))?;
    Ok((
        listener,
        connection.doing(|| format!("connect to {}", path.display()))?,
    ))
}

fn arguments(config: &VirtiofsdConfig, listener: &impl AsRawFd) -> Vec<OsString> {
    let cache = match config.cache {
        FsCache::Auto => "--cache=auto",
        FsCache::Always => "--cache=always",
    };
    // A file handle opens any file of a file system, so it takes a capability that a confined one
    // does not have.
    let (dir, sandbox, handles) = match config.confinement {
        Some(_) => (
            Path::new(SHARED),
            "--sandbox=none",
            "--inode-file-handles=never",
        ),
        None => (
            config.shared_dir.as_path(),
            "--sandbox=namespace",
            "--inode-file-handles=prefer",
        ),
    };
    let mut arguments: Vec<OsString> = vec![format!("--fd={}", listener.as_raw_fd()).into()];
    arguments.extend(["--shared-dir".into(), dir.into()]);
    let fixed = [
        cache,
        sandbox,
        handles,
        "--announce-submounts",
        // File capabilities of a container's programs are extended attributes.
        "--xattr",
        "--posix-acl",
        // Saves the guest's kernel a question before each write.
        "--killpriv-v2",
        TRUSTED_ATTRIBUTES,
        "--log-level=error",
    ];
    arguments.extend(fixed.map(Into::into));
    if config.confinement.is_some() && !config.makes_nodes() {
        // It insists on what it thinks that it needs.
        arguments.push("--modcaps=-mknod".into());
    }
    arguments
}

/// Whether the binary is a virtiofsd that can be used: asked once, then from the cache.
async fn check_version(binary: &Path, cache_dir: &Path) -> Result<()> {
    let key = FileKey::of(binary)?;
    if key.load::<String>(cache_dir, "virtiofsd").is_some() {
        return Ok(());
    }
    let said = stdout_of(binary, &["--version"], VIRTIOFSD_VERSION).await?;
    let said = said.lines().next().unwrap_or_default();
    let mut words = said.split_ascii_whitespace();
    match (words.next(), words.next()) {
        (Some("virtiofsd"), Some(number)) if number.starts_with(|c: char| c.is_ascii_digit()) => {
            key.store(cache_dir, "virtiofsd", &number);
            Ok(())
        }
        (Some("virtiofsd"), Some("version")) => Err(Error::Unsupported(format!(
            "{} is the virtiofsd of old QEMU, which is not maintained: install virtiofsd 1.10 or \
             later",
            binary.display()
        ))),
        _ => Err(Error::Unsupported(format!(
            "{} is no virtiofsd: its version is {said:?}",
            binary.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_virtiofsd_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let error = check_version(Path::new("/bin/true"), cache.path())
            .await
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "/bin/true is no virtiofsd: its version is \"true (GNU coreutils) 9.1\""
        );
        let error = check_version(Path::new("/no/virtiofsd"), cache.path())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("cannot use /no/virtiofsd: "), "{error}");
    }

    #[test]
    fn no_path_is_left_when_the_socket_is_connected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fs.sock");
        let (listener, _connection) = connected(&path).unwrap();
        assert!(!path.exists());
        listener.set_nonblocking(true).unwrap();
        listener.accept().unwrap();
        assert!(listener.accept().is_err(), "one connection, no more");
    }
}
