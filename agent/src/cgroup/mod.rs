//! The cgroup of one container: made before its first process, removed after its last.
//!
//! ```text
//!  /sys/fs/cgroup/containers    (as a process: a cgroup of its own)    growth::need
//!    ├─ ctr-<container id>      one for each container          Cgroup::create
//!    │    └─ …                  what the container makes itself
//!    └─ pod-init                PID 1 of a shared pid namespace Cgroup::create_named
//!
//!  limits    OCI resources ──> files and values        Cgroup::limit
//!  devices   OCI device rules ──> a BPF program        devices::restrict
//!  stats     files ──> the protocol's numbers          stats::read
//!  growth    what all of them use ──> a size of the machine
//! ```
//!
//! This file has the cgroup itself: limits, signals to all of its processes, freezing, and the
//! removal. A change that the kernel takes its time for (frozen, empty) is awaited on
//! `cgroup.events`, of which each change is a priority event of poll(2).
//!
//! Rules that a change must not break:
//!
//! * A process is cloned into its cgroup, never moved there, so no instruction of it runs without
//!   limits or device rules.
//! * `cgroup.kill` is what reaches every process of a container. Signals by pid miss what forks.
//! * A write that reclaims memory (`memory.max` below the usage) can block for as long as a file
//!   server or a disk takes: it is done by a child, because the agent has one thread.
//! * A limit that is optional (see `limits`) is tried, and its failure is a line in the log; any
//!   other failure is the caller's.

pub mod devices;
pub mod growth;
mod limits;
pub mod stats;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use guest_protocol::protocols::oci::LinuxResources;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout_at};

use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::guest::boot::CGROUP_ROOT;
use crate::log::log;
use crate::spawn;

/// Memory that the kernel does not take from a cgroup, or only when nothing else is left.
const PROTECTIONS: [&str; 2] = ["memory.low", "memory.min"];

/// What [`Cgroup::freeze`] brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freezer {
    Frozen,
    Thawed,
}

/// A container's cgroup. The directory stays until [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
    /// Held while limits change: a later change must not be overtaken by an earlier one.
    limits: tokio::sync::Mutex<()>,
}

impl Cgroup {
    /// Makes the cgroup of container `id` below `parent`. The prefix keeps ids apart from the
    /// kernel's own files.
    ///
    /// # Errors
    /// The failed system call; an existing cgroup with processes is an error too.
    pub fn create(parent: &Path, id: &str) -> Result<Cgroup> {
        Cgroup::create_named(parent, &format!("ctr-{id}"))
    }

    /// Makes a cgroup that is not a container's.
    ///
    /// # Errors
    /// As [`Cgroup::create`].
    pub fn create_named(parent: &Path, name: &str) -> Result<Cgroup> {
        let path = parent.join(name);
        // One of a container that could not be made may have been busy when it was to go.
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).context(|| format!("create cgroup {}", path.display()))?;
        let dir = File::open(&path)
            .context(|| format!("open cgroup {}", path.display()))?
            .into();
        Ok(Cgroup {
            path,
            dir,
            limits: tokio::sync::Mutex::default(),
        })
    }

    /// The directory, for `CLONE_INTO_CGROUP` and for BPF.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The cgroup in which a process of it is: itself, or one that its processes have made below.
    ///
    /// # Errors
    /// A process that has ended, or is in none of these.
    pub fn of_process(&self, pid: libc::pid_t) -> Result<OwnedFd> {
        let file = format!("/proc/{pid}/cgroup");
        let text = fs::read(&file).context(|| format!("read {file}"))?;
        let mut lines = text.split(|byte| *byte == b'\n');
        let path = lines.find_map(|line| line.strip_prefix(b"0::/"));
        let path = path.map(|path| Path::new(CGROUP_ROOT).join(OsStr::from_bytes(path)));
        let path = path.filter(|path| path.starts_with(&self.path));
        let path = path.ok_or_else(|| {
            Error::Failed(format!("process {pid} is not in {}", self.path.display()))
        })?;
        let dir = File::open(&path).context(|| format!("open cgroup {}", path.display()))?;
        Ok(dir.into())
    }

    /// Applies the limits that are set; those not set (zero or absent) stay as they are.
    ///
    /// # Errors
    /// A limit that the kernel refuses, by file and value; a file that the kernel does not have; a
    /// memory limit below what is used, if that is to be checked. Memory that the kernel cannot bring below
    /// its new limit in time is no error: the limit is in force, and the kernel's to keep.
    pub async fn limit(&self, resources: &LinuxResources) -> Result<()> {
        let _alone = self.limits.lock().await;
        self.check(resources)?;
        let read = |name: &str| fs::read_to_string(self.file(name)).unwrap_or_default();
        for setting in limits::settings(resources, read) {
            let file = self.file(&setting.file);
            if self.reclaims(&setting) {
                self.write_in_child(&setting).await?;
                continue;
            }
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
                        .context(|| format!("set {} to {:?}", setting.file, setting.value));
                }
            }
            if PROTECTIONS.contains(&setting.file.as_str()) {
                self.protect_parent();
            }
        }
        Ok(())
    }

    /// What a container is promised counts only as far as what it is in is promised as much: that
    /// has the sum.
    fn protect_parent(&self) {
        let Some(parent) = self.path.parent() else {
            return;
        };
        for file in PROTECTIONS {
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            let promised = entries.filter_map(|entry| {
                let text = fs::read_to_string(entry.path().join(file)).ok()?;
                Some(text.trim().parse().unwrap_or(u64::MAX))
            });
            let sum = promised.fold(0_u64, u64::saturating_add);
            let value = if sum == u64::MAX {
                "max".into()
            } else {
                sum.to_string()
            };
            // The cgroup of a guest without the memory controller has neither.
            let _ = fs::write(parent.join(file), value);
        }
    }

    /// What has to be known before anything is changed.
    fn check(&self, resources: &LinuxResources) -> Result<()> {
        let own = resources.Own.get_or_default();
        let mut unified: Vec<_> = own.unified.keys().collect();
        unified.sort();
        for name in unified {
            if !limits::is_unified(name) {
                return Err(Error::Invalid(format!(
                    "linux.resources.unified sets {name:?}, which is no limit of a cgroup: leave \
                     it out"
                )));
            }
            if !self.file(name).exists() {
                return Err(Error::Invalid(format!(
                    "linux.resources.unified sets {name:?}, which the cgroups of this guest do \
                     not have: leave it out"
                )));
            }
        }
        let limit = resources.Memory.get_or_default().Limit;
        let used = self.number("memory.current");
        match u64::try_from(limit) {
            Ok(limit) if own.check_before_update && limit > 0 && limit < used => {
                Err(Error::Failed(format!(
                    "the new memory limit of {limit} bytes is below the {used} bytes that the \
                     container uses"
                )))
            }
            _ => Ok(()),
        }
    }

    /// A file that is one number; 0 if it is not.
    fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.file(file)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    /// Whether the kernel has to take memory away before it returns from the write.
    fn reclaims(&self, setting: &limits::Setting) -> bool {
        let below = |limit: u64| limit < self.number("memory.current");
        // What is no plain number may be one with a unit.
        matches!(setting.file.as_str(), "memory.max" | "memory.high")
            && setting.value != "max"
            && setting.value.parse().map_or(true, below)
    }

    async fn write_in_child(&self, setting: &limits::Setting) -> Result<()> {
        let file = self.file(&setting.file);
        let context = format!("set {} to {:?}", setting.file, setting.value);
        let by = Instant::now() + deadlines::MEMORY_RECLAIM;
        spawn::in_child(by, || {
            spawn::step::StepContext::context(fs::write(file, &setting.value), &context)
        })
        .await
        .or_else(|error| {
            // The kernel sets the limit before it takes memory away.
            let now = fs::read_to_string(self.file(&setting.file)).unwrap_or_default();
            if Instant::now() >= by && now.trim() == setting.value {
                log!("{context}: the memory did not get below that in time");
                return Ok(());
            }
            Err(error)
        })
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
                            .context(|| format!("send signal {signal} to process {pid}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Freezes or thaws, and waits until the kernel has done it.
    ///
    /// # Errors
    /// A kernel that does not do it in time; then a freeze is taken back.
    pub async fn freeze(&self, wanted: Freezer) -> Result<()> {
        let (value, verb) = match wanted {
            Freezer::Frozen => (1, "freeze"),
            Freezer::Thawed => (0, "thaw"),
        };
        let control = self.file("cgroup.freeze");
        fs::write(&control, value.to_string())
            .context(|| format!("write {}", control.display()))?;
        let by = Instant::now() + deadlines::CGROUP_FREEZE;
        if self.wait_event("frozen", value, by).await? {
            return Ok(());
        }
        if wanted == Freezer::Frozen {
            let _ = fs::write(&control, "0");
        }
        Err(Error::Failed(format!(
            "the kernel did not {verb} the container within {:?}",
            deadlines::CGROUP_FREEZE
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
    /// A process that does not die, or a directory that the kernel keeps busy, until `by`.
    pub async fn remove(&self, by: Instant) -> Result<()> {
        self.kill();
        let _ = fs::write(self.file("cgroup.freeze"), "0");
        if !self.wait_event("populated", 0, by).await? {
            return Err(Error::Failed(format!(
                "a process in {} does not die",
                self.path.display()
            )));
        }
        loop {
            match remove_tree(&self.path) {
                Ok(()) => {
                    self.protect_parent();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < by =>
                {
                    sleep(deadlines::CGROUP_BUSY_PAUSE).await;
                }
                Err(error) => {
                    return Err(error).context(|| format!("remove cgroup {}", self.path.display()));
                }
            }
        }
    }

    /// Waits until `key` of cgroup.events is `value`, or the cgroup is removed; false at `by`.
    async fn wait_event(&self, key: &str, value: u64, by: Instant) -> Result<bool> {
        let path = self.file("cgroup.events");
        let file = match watch(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            result => result.context(|| format!("watch {}", path.display()))?,
        };
        let reached = async {
            loop {
                let events = fs::read_to_string(&path)?;
                if flat(&events).any(|(name, number)| name == key && number == value) {
                    return io::Result::Ok(());
                }
                file.ready(Interest::PRIORITY).await?.clear_ready();
            }
        };
        match timeout_at(by, reached).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) => Err(error).context(|| format!("watch {}", path.display())),
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

/// The pairs of a flat keyed file, such as cgroup.events.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containers_are_promised_all_of_them_together_are() {
        let parent = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|id| Cgroup::create(parent.path(), id).unwrap());
        let values = [("memory.low", ["16", "32"]), ("memory.min", ["max", "1"])];
        for (file, [first, second]) in values {
            fs::write(one.file(file), first).unwrap();
            fs::write(other.file(file), second).unwrap();
        }
        one.protect_parent();
        let read = |file| fs::read_to_string(parent.path().join(file)).unwrap();
        assert_eq!(read("memory.low"), "48");
        assert_eq!(read("memory.min"), "max");
    }
}
