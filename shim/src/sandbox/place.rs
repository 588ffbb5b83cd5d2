//! Where QEMU and the helpers are among the host's processes: their cgroup, its limits, and who is killed first when
//! memory runs out.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::timeout;
use vmm::process::Identity;

use super::ledger::{Ledger, Resource};
use super::sizing::Sizing;
use crate::cgroup::{self, limits};
use crate::error::{Error, IoContext, Result};

/// The kernel may have to take memory back before a limit holds.
const SET_DEADLINE: Duration = Duration::from_secs(10);

/// How many generations below what we started: a launcher's child, virtiofsd's, and one to spare.
const GENERATIONS: usize = 4;

/// The sandbox's cgroup, one directory for each hierarchy.
#[derive(Debug)]
pub struct Place {
    directories: Vec<PathBuf>,
    /// Those that this sandbox made. Nobody else's is limited: its maker has.
    own: Vec<PathBuf>,
    kvm: bool,
    /// Kills that were before.
    kills: u64,
    now: Mutex<Option<limits::Limits>>,
}

impl Place {
    /// Makes what there is not yet of the cgroup that a spec names.
    ///
    /// # Errors
    /// One line that names the directory.
    pub fn join(cgroups_path: &str, kvm: bool, ledger: &Ledger) -> Result<Place> {
        let directories = cgroup::directories(cgroups_path);
        let mut own = Vec::new();
        for directory in &directories {
            let missing = cgroup::missing(directory);
            if missing.last() == Some(directory) {
                own.push(directory.clone());
            }
            for path in missing {
                ledger.record(&Resource::Cgroup { path })?;
            }
            cgroup::make(directory).doing(|| format!("make cgroup {}", directory.display()))?;
        }
        let kills = limits::oom_kills(&directories);
        Ok(Place { directories, own, kvm, kills, now: Mutex::default() })
    }

    /// The files by which a process enters.
    pub fn procs(&self) -> Vec<PathBuf> {
        self.directories.iter().map(|dir| dir.join("cgroup.procs")).collect()
    }

    /// Makes room for this size beside what there is.
    ///
    /// # Errors
    /// The kernel's own.
    pub async fn raise(self: &Arc<Self>, to: Sizing) -> Result<()> {
        self.set(to, true).await
    }

    /// Allows this size and no more. What cannot be taken back is logged.
    pub async fn settle(self: &Arc<Self>, to: Sizing) {
        if let Err(error) = self.set(to, false).await {
            tracing::warn!(%error, "the sandbox keeps a limit that is wider than it should be");
        }
    }

    async fn set(self: &Arc<Self>, to: Sizing, raise: bool) -> Result<()> {
        let place = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let mut now = place.now.lock().unwrap_or_else(PoisonError::into_inner);
            let limits = limits::Limits::of(to.memory_mib, to.milli_cpus, place.kvm);
            let limits = if raise { now.map_or(limits, |now| now.max(limits)) } else { limits };
            limits::set(&place.own, &mut now, limits)
        });
        let late = |_| Error::deadline("the kernel did not set the limits of the sandbox's cgroup within 10 s");
        timeout(SET_DEADLINE, work).await.map_err(late)?.map_err(|error| Error::internal(error.to_string()))?
    }

    /// Whether the kernel has killed one of its processes because memory ran out: where, and what the limit was.
    pub fn out_of_memory(&self) -> Option<String> {
        (limits::oom_kills(&self.directories) > self.kills).then(|| limits::lack_of_memory(&self.directories))
    }
}

/// Gives these processes, and what descends from them, another `oom_score_adj`. To lower it takes CAP_SYS_RESOURCE: who
/// lacks that leaves it as it is.
pub fn set_oom_score(processes: &[Identity], score: i32) {
    let mut generation: Vec<i32> = processes.iter().filter(|one| one.is_alive()).map(|one| one.pid).collect();
    for _ in 0..GENERATIONS {
        let mut children = Vec::new();
        for pid in &generation {
            if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
                tracing::debug!(%error, pid, score, "oom_score_adj stays as it is");
            }
            let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            children.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        }
        generation = children;
    }
}
