//! Where QEMU and the helpers are among the host's processes: their cgroup, its limits, and who is
//! killed first when memory runs out.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sys::point::{Point, reach};
use tokio::time::timeout;
use vmm::process::Identity;

use crate::deadlines::CGROUP_LIMITS;
use crate::error::{Error, IoContext, Result};
use crate::guest::machine_size::MachineSize;
use crate::host::cgroup::systemd::{self, Name, Scope};
use crate::host::cgroup::{self, limits};
use crate::host::ledger::{Ledger, Resource};

/// How many generations below what we started: a launcher's child, virtiofsd's, and one to spare.
const GENERATIONS: usize = 4;

/// The sandbox's cgroup, one directory for each hierarchy.
#[derive(Debug)]
pub struct HostCgroup {
    directories: Vec<PathBuf>,
    /// Those that this sandbox made. Nobody else's is limited: its maker has.
    own: Vec<PathBuf>,
    /// What systemd made for it.
    scope: Option<Scope>,
    kvm: bool,
    /// Kills that were before.
    kills: u64,
    now: Mutex<Option<limits::Limits>>,
}

/// How a sandbox comes to its cgroup.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// It is made as directories, as far as they are not there.
    Directories,
    /// It is there, and systemd's: nothing is made, on the way to it neither.
    Enter,
    /// systemd makes it.
    Scope(Name),
}

/// systemd makes what has a name of its. A scope with processes in it somebody else made, and it is
/// entered as it is; one without is about to be gone.
fn way(cgroups_path: &str, systemd_runs: bool, is_populated: impl Fn(&str) -> bool) -> Way {
    match Name::parse(cgroups_path) {
        Some(name) if systemd_runs && is_populated(&name.directory()) => Way::Enter,
        Some(name) if systemd_runs => Way::Scope(name),
        _ => Way::Directories,
    }
}

impl HostCgroup {
    /// Makes what there is not yet of the cgroup that a spec names, with room for this size.
    ///
    /// # Errors
    /// One line that names the directory, or systemd's refusal.
    pub async fn join(
        cgroups_path: &str,
        kvm: bool,
        size: MachineSize,
        ledger: &Ledger,
    ) -> Result<Arc<HostCgroup>> {
        let directories =
            cgroup::directories(cgroups_path).doing(|| "read the mount table".into())?;
        let (mut scope, mut now) = (None, None);
        let way = way(cgroups_path, systemd::runs(), systemd::is_populated);
        let by_systemd = way != Way::Directories;
        if let Way::Scope(name) = way {
            let limits = limits::Limits::of(size.memory_mib, size.milli_cpus, kvm);
            scope = Some(make_scope(name, limits, &directories, ledger).await?);
            now = Some(limits);
        }
        let mut own = Vec::new();
        // After systemd: the older hierarchies that it leaves alone.
        for directory in &directories {
            let missing = cgroup::missing(directory);
            if !missing.is_empty() {
                own.push(directory.clone());
            } else if by_systemd {
                continue;
            }
            for path in missing {
                ledger.record(&Resource::Cgroup { path })?;
            }
            reach(Point::CgroupRecorded)
                .doing(|| format!("make cgroup {}", directory.display()))?;
            cgroup::make(directory).doing(|| format!("make cgroup {}", directory.display()))?;
            reach(Point::CgroupMade).doing(|| format!("use cgroup {}", directory.display()))?;
        }
        if let Some(missing) = limits::unavailable(&own).filter(|_| scope.is_none()) {
            tracing::warn!(
                missing,
                cgroups_path,
                "the sandbox's processes have no such limit on the host"
            );
        }
        let kills = limits::oom_kills(&directories);
        let place = Arc::new(HostCgroup {
            directories,
            own,
            scope,
            kvm,
            kills,
            now: Mutex::new(now),
        });
        place.raise(size).await?;
        Ok(place)
    }

    /// The files by which a process enters.
    pub fn procs(&self) -> Vec<PathBuf> {
        self.directories
            .iter()
            .map(|dir| dir.join("cgroup.procs"))
            .collect()
    }

    /// Makes room for this size beside what there is.
    pub async fn raise(self: &Arc<Self>, to: MachineSize) -> Result<()> {
        self.set(to, true).await
    }

    /// Allows this size and no more. What cannot be taken back is logged.
    pub async fn lower(self: &Arc<Self>, to: MachineSize) {
        if let Err(error) = self.set(to, false).await {
            tracing::warn!(%error, "the sandbox keeps a limit that is wider than it should be");
        }
    }

    async fn set(self: &Arc<Self>, to: MachineSize, raise: bool) -> Result<()> {
        let place = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let mut now = sys::lock(&place.now);
            let limits = limits::Limits::of(to.memory_mib, to.milli_cpus, place.kvm);
            let limits = if raise {
                now.map_or(limits, |now| now.max(limits))
            } else {
                limits
            };
            match &place.scope {
                Some(_) if *now == Some(limits) => Ok(()),
                Some(scope) => scope.set(limits).map(|()| *now = Some(limits)),
                None => limits::set(&place.own, &mut now, limits),
            }
        });
        let late =
            |_| Error::deadline("the limits of the sandbox's cgroup were not set within 10 s");
        timeout(CGROUP_LIMITS, work)
            .await
            .map_err(late)?
            .map_err(|error| Error::internal(error.to_string()))?
    }

    /// Whether the kernel has killed one of its processes because memory ran out: where, and what
    /// the limit was.
    pub fn out_of_memory(&self) -> Option<String> {
        (limits::oom_kills(&self.directories) > self.kills)
            .then(|| limits::lack_of_memory(&self.directories))
    }
}

async fn make_scope(
    name: Name,
    limits: limits::Limits,
    directories: &[PathBuf],
    ledger: &Ledger,
) -> Result<Scope> {
    ledger.record(&Resource::Scope {
        unit: name.unit.clone(),
    })?;
    let unit = name.unit.clone();
    let made = tokio::task::spawn_blocking(move || Scope::make(&name, limits)).await;
    let scope = made.map_err(|error| Error::internal(error.to_string()))??;
    ledger.record(&Resource::Process(scope.placeholder()?))?;
    if !directories.iter().any(|directory| directory.exists()) {
        let place = directories
            .first()
            .map(|directory| directory.display().to_string())
            .unwrap_or_default();
        return Err(Error::internal(format!(
            "systemd made {unit}, but there is no {place}"
        )));
    }
    Ok(scope)
}

/// Gives these processes, and what descends from them, another `oom_score_adj`. To lower it takes
/// CAP_SYS_RESOURCE: who lacks that leaves it as it is.
pub fn set_oom_score(processes: &[Identity], score: i32) {
    let mut generation: Vec<i32> = processes
        .iter()
        .filter(|one| one.is_alive())
        .map(|one| one.pid)
        .collect();
    for _ in 0..GENERATIONS {
        let mut children = Vec::new();
        for pid in &generation {
            if let Err(error) =
                std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
            {
                tracing::debug!(%error, pid, score, "oom_score_adj stays as it is");
            }
            let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
                .unwrap_or_default();
            children.extend(
                list.split_ascii_whitespace()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            );
        }
        generation = children;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_makes_what_has_a_name_of_its_where_it_runs() {
        let path = "kubepods-pod1.slice:cri-containerd:web";
        let name = Name::parse(path).unwrap();
        assert_eq!(way(path, true, |_| false), Way::Scope(name.clone()));
        assert_eq!(
            way(path, false, |_| false),
            Way::Directories,
            "without systemd"
        );
        let made = |directory: &str| directory == name.directory();
        assert_eq!(
            way(path, true, made),
            Way::Enter,
            "somebody made it and is in it"
        );
        assert_eq!(way("/kubepods/pod1/web", true, |_| false), Way::Directories);
        assert_eq!(way("", true, |_| false), Way::Directories);
    }
}
