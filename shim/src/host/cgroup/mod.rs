//! The sandbox's cgroup on the host: QEMU and its helpers are accounted where containerd says the
//! container is.
//!
//! Those that the shim makes itself, or systemd for it ([`systemd`]), are limited by what is in the
//! sandbox ([`limits`]); others are their maker's.

pub mod limits;
pub mod systemd;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::deadlines::CGROUP_REMOVE;
use crate::host::identity::STATE_ROOT;
use crate::host::mount_table::{self, Mounted};

/// The v1 hierarchies that processes are put in. Not cpuset: a new cgroup there takes no process
/// until it is set up.
const V1_CONTROLLERS: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "freezer"];

/// What the sandbox's cgroup shall have where there is the unified hierarchy.
const V2_CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The controllers that a cgroup's children have.
const HANDED_DOWN: &str = "cgroup.subtree_control";

/// Whether the host has the unified hierarchy only. containerd's metrics collector wants stats of
/// the host's version.
pub fn host_is_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// The directories that make up the cgroup named by a spec's `linux.cgroupsPath`, one for each
/// hierarchy of the host. A path of systemd's form (`slice:prefix:name`) stands for the directory
/// that systemd would make.
///
/// # Errors
/// The mount table cannot be read.
pub fn directories(cgroups_path: &str) -> io::Result<Vec<PathBuf>> {
    let relative = systemd::Name::parse(cgroups_path).map_or_else(
        || cgroups_path.trim_start_matches('/').to_owned(),
        |name| name.directory(),
    );
    if relative.is_empty()
        || Path::new(&relative)
            .components()
            .any(|part| part.as_os_str() == "..")
    {
        return Ok(Vec::new());
    }
    let hierarchies = hierarchies(&mount_table::read()?);
    Ok(hierarchies
        .into_iter()
        .map(|hierarchy| hierarchy.join(&relative))
        .collect())
}

/// Where the hierarchies are that processes are put in.
fn hierarchies(mounts: &[Mounted]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for mount in mounts {
        let mut controllers = mount.options.split(',');
        let wanted = match mount.kind.as_str() {
            "cgroup2" => mount.point == Path::new("/sys/fs/cgroup"),
            // Not those of a directory of the host that is bound for a container, with all that is
            // mounted below.
            "cgroup" if !mount.point.starts_with(STATE_ROOT) => {
                controllers.any(|name| V1_CONTROLLERS.contains(&name))
            }
            _ => false,
        };
        if wanted && !found.contains(&mount.point) {
            found.push(mount.point.clone());
        }
    }
    found
}

/// The directory and those of its parents that do not exist yet, outermost first: what `make` will
/// make.
pub fn missing(directory: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> = directory
        .ancestors()
        .take_while(|dir| !dir.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

/// Makes a cgroup, in which memory and CPU are counted.
///
/// # Errors
/// The file system's own.
pub fn make(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    hand_down_controllers(directory);
    Ok(())
}

/// In the unified hierarchy a cgroup has the controllers that its parent hands down, and by itself
/// none does. A parent that has processes of its own cannot; what is below it is then counted
/// there.
fn hand_down_controllers(directory: &Path) {
    let mut parents: Vec<&Path> = directory
        .ancestors()
        .skip(1)
        .filter(|dir| dir.join(HANDED_DOWN).exists())
        .collect();
    parents.reverse();
    for parent in parents {
        let read = |file| fs::read_to_string(parent.join(file)).unwrap_or_default();
        let (all, handed_down) = (read("cgroup.controllers"), read(HANDED_DOWN));
        let has = |name: &&str| all.split_whitespace().any(|one| one == *name);
        let new = |name: &&str| handed_down.split_whitespace().all(|one| one != *name);
        for name in V2_CONTROLLERS.iter().copied().filter(has).filter(new) {
            // One by one: a controller that cannot be must not keep the others away.
            if let Err(error) = fs::write(parent.join(HANDED_DOWN), format!("+{name}")) {
                tracing::debug!(%error, cgroup = %parent.display(), name,
                    "the cgroup does not hand the controller down");
            }
        }
    }
}

/// Removes a cgroup that this sandbox made. One that others use by now (a parent with siblings in
/// it) stays.
///
/// # Errors
/// Processes that are still in it after a second.
pub fn remove(directory: &Path) -> io::Result<()> {
    let end = Instant::now() + CGROUP_REMOVE;
    loop {
        match fs::remove_dir(directory) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                if procs.trim().is_empty() && has_children(directory) {
                    return Ok(());
                }
                if Instant::now() > end {
                    return Err(error);
                }
                // The kernel has no notice for v1; v2's would need a watch for what takes a few
                // milliseconds.
                sleep(Duration::from_millis(5));
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                return Ok(());
            }
            result => return result,
        }
    }
}

fn has_children(directory: &Path) -> bool {
    fs::read_dir(directory)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().is_dir()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hierarchy_is_found_once() {
        let mounted = |point: &str, kind: &str, options: &str| Mounted {
            point: point.into(),
            kind: kind.into(),
            options: options.into(),
        };
        let v1 = [
            mounted("/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
            mounted("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
            mounted("/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,name=systemd"),
            mounted("/sys/fs/cgroup/unified", "cgroup2", "rw"),
        ];
        let wanted = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu,cpuacct"].map(PathBuf::from);
        assert_eq!(hierarchies(&v1), wanted);
        let shared = "/run/cofferdam/0/share/.volumes/2/sys/fs/cgroup/memory";
        assert!(hierarchies(&[mounted(shared, "cgroup", "rw,memory")]).is_empty());
        let v2 = [mounted("/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")];
        assert_eq!(hierarchies(&v2), [PathBuf::from("/sys/fs/cgroup")]);
    }

    #[test]
    fn a_path_that_leaves_the_hierarchy_is_no_path() {
        assert!(directories("../../etc").unwrap().is_empty());
        assert!(directories("../etc:cri:web").unwrap().is_empty());
        assert!(directories("").unwrap().is_empty());
    }

    #[test]
    fn every_parent_hands_down_what_it_has_and_does_not_yet() {
        let dir = tempfile::tempdir().unwrap();
        let (root, slice) = (dir.path(), dir.path().join("slice"));
        fs::create_dir(&slice).unwrap();
        for (parent, has, handed_down) in [
            (root, "cpuset cpu memory", "memory"),
            (&slice, "memory hugetlb", ""),
        ] {
            fs::write(parent.join("cgroup.controllers"), has).unwrap();
            fs::write(parent.join(HANDED_DOWN), handed_down).unwrap();
        }
        make(&slice.join("pod")).unwrap();
        let wrote = |parent: &Path| fs::read_to_string(parent.join(HANDED_DOWN)).unwrap();
        assert_eq!(
            (wrote(root), wrote(&slice)),
            ("+cpu".to_owned(), "+memory".to_owned())
        );
        assert!(
            !slice.join("pod").join(HANDED_DOWN).exists(),
            "the sandbox's own cgroup has processes: it hands nothing down"
        );
    }

    #[test]
    fn removing_twice_is_the_same_as_once() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("a/b");
        assert_eq!(missing(&cgroup), [dir.path().join("a"), cgroup.clone()]);
        make(&cgroup).unwrap();
        remove(&dir.path().join("a")).unwrap();
        assert!(cgroup.exists(), "a cgroup with others in it stays");
        remove(&cgroup).unwrap();
        remove(&cgroup).unwrap();
        assert!(!cgroup.exists());
    }
}
