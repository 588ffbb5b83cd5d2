//! The cgroup of one container: made before its first process, removed after its last.

pub mod devices;
mod limits;
pub mod stats;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_protocol::protocols::oci::LinuxResources;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout};

use crate::error::{Error, Result, What};
use crate::log::log;

/// How long the kernel may take to freeze or to let go of killed processes.
const SETTLE: Duration = Duration::from_secs(10);

/// A container's cgroup. The directory stays until [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup of container `id` below `parent`. The prefix keeps ids apart from the
    /// kernel's own files.
    ///
    /// # Errors
    /// The failed system call; an existing cgroup is an error too.
    pub fn create(parent: &Path, id: &str) -> Result<Cgroup> {
        Cgroup::create_named(parent, &format!("ctr-{id}"))
    }

    /// Makes a cgroup for what is no container.
    ///
    /// # Errors
    /// As [`Cgroup::create`].
    pub fn create_named(parent: &Path, name: &str) -> Result<Cgroup> {
        let path = parent.join(name);
        fs::create_dir(&path).what(|| format!("create cgroup {}", path.display()))?;
        let dir = File::open(&path)
            .what(|| format!("open cgroup {}", path.display()))?
            .into();
        Ok(Cgroup { path, dir })
    }

    /// The directory, for `CLONE_INTO_CGROUP` and for BPF.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Applies the limits that are set; those not set (zero or absent) stay as they are.
    ///
    /// # Errors
    /// A limit that the kernel refuses, by file and value.
    pub fn limit(&self, resources: &LinuxResources) -> Result<()> {
        let read = |name: &str| fs::read_to_string(self.file(name)).unwrap_or_default();
        for setting in limits::settings(resources, read) {
            let file = self.file(&setting.file);
            match fs::write(&file, &setting.value) {
                Ok(()) => {}
                Err(error) if setting.optional || !file.exists() => {
                    log!(
                        "{} = {} not applied: {error}",
                        file.display(),
                        setting.value
                    );
                }
                Err(error) => {
                    return Err(error)
                        .what(|| format!("set {} to {:?}", setting.file, setting.value));
                }
            }
        }
        Ok(())
    }

    /// Kills every process in the cgroup and below, at once.
    pub fn kill(&self) {
        // It may have been removed already, with everything in it.
        if let Err(error) = fs::write(self.file("cgroup.kill"), "1")
            && error.kind() != io::ErrorKind::NotFound
        {
            log!("kill {}: {error}", self.path.display());
        }
    }

    /// Sends a signal to every process in the cgroup and below.
    ///
    /// # Errors
    /// A signal that does not exist.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            directories.extend(
                entries
                    .map(|entry| entry.path())
                    .filter(|path| path.is_dir()),
            );
            let processes = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            for pid in processes
                .lines()
                .filter_map(|line| line.parse::<i32>().ok())
                .filter(|pid| *pid > 0)
            {
                // SAFETY: kill(2) takes two numbers.
                if unsafe { libc::kill(pid, signal) } < 0 {
                    let error = io::Error::last_os_error();
                    // One that has ended meanwhile needs no signal.
                    if error.raw_os_error() != Some(libc::ESRCH) {
                        return Err(error)
                            .what(|| format!("send signal {signal} to process {pid}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Freezes or thaws, and waits until the kernel has done it.
    ///
    /// # Errors
    /// When it takes longer than ten seconds; then a freeze is taken back.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        let control = self.file("cgroup.freeze");
        fs::write(&control, value).what(|| format!("write {}", control.display()))?;
        if self.wait_event("frozen", frozen).await? {
            return Ok(());
        }
        if frozen {
            let _ = fs::write(&control, "0");
        }
        let verb = if frozen { "freeze" } else { "thaw" };
        Err(Error::Failed(format!(
            "the kernel did not {verb} the container within {SETTLE:?}"
        )))
    }

    /// A number of `memory.events`, such as `oom_kill`.
    pub fn memory_event(&self, key: &str) -> u64 {
        let events = fs::read_to_string(self.file("memory.events")).unwrap_or_default();
        flat(&events)
            .find(|(name, _)| *name == key)
            .map_or(0, |(_, value)| value)
    }

    /// Kills what is left, waits until nothing runs in it, and removes the directory with all below
    /// it.
    ///
    /// # Errors
    /// When a process does not die, or the kernel keeps the directory busy, for ten seconds.
    pub async fn remove(&self) -> Result<()> {
        self.kill();
        let _ = fs::write(self.file("cgroup.freeze"), "0");
        if !self.wait_event("populated", false).await? {
            return Err(Error::Failed(format!(
                "a process in {} does not die",
                self.path.display()
            )));
        }
        let deadline = Instant::now() + SETTLE;
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
                {
                    sleep(Duration::from_millis(2)).await;
                }
                Err(error) => {
                    return Err(error).what(|| format!("remove cgroup {}", self.path.display()));
                }
            }
        }
    }

    /// Waits until `key` of cgroup.events is `value`; false after the deadline.
    async fn wait_event(&self, key: &str, value: bool) -> Result<bool> {
        let path = self.file("cgroup.events");
        let file = match watch(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            result => result.what(|| format!("watch {}", path.display()))?,
        };
        let reached = async {
            loop {
                let events = fs::read_to_string(&path)?;
                if flat(&events).any(|(name, number)| name == key && (number == 1) == value) {
                    return io::Result::Ok(());
                }
                file.ready(Interest::PRIORITY).await?.clear_ready();
            }
        };
        match timeout(SETTLE, reached).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) => Err(error).what(|| format!("watch {}", path.display())),
            Err(_) => Ok(false),
        }
    }
}

/// Watches one of the kernel's event files: each change is a priority event of poll(2), its removal
/// too.
///
/// # Errors
/// The failed open.
pub fn watch(path: &Path) -> io::Result<AsyncFd<File>> {
    let file = File::open(path)?;
    // SAFETY: a File keeps one descriptor open until it is dropped, and nothing closes it behind
    // its back.
    Ok(unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?)
}

/// The pairs of a flat keyed file.
pub fn flat(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// Removes a cgroup and what its processes made below it. Only directories count: the files are the
/// kernel's.
fn remove_tree(path: &Path) -> io::Result<()> {
    if fs::remove_dir(path).is_ok() {
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
