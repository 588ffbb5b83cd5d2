//! What a test run may leave on the host: processes, mounts, files of the runtime, cgroups, network
//! namespaces and links, and what containerd has of a pod.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemon::namespace;
use crate::procs;

/// Everything of the kinds that may leak, one line each. The suite's mount namespace and its own
/// /run keep out what other programs of this machine do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// What there is now.
    pub fn take() -> Snapshot {
        let mut found = BTreeSet::new();
        for process in procs::ours() {
            // The test's own tools come and go.
            if process.program != "containerd"
                && process.program != "ctr"
                && process.program != "crictl"
            {
                found.insert(format!(
                    "process {}: {} {}",
                    process.pid, process.program, process.args
                ));
            }
        }
        for line in fs::read_to_string("/proc/self/mountinfo")
            .unwrap_or_default()
            .lines()
        {
            if let Some(point) = line.split(' ').nth(4) {
                found.insert(format!("mount {point}"));
            }
        }
        for dir in ["/run/cofferdam", "/run/containerd/s", "/run/netns"] {
            files(Path::new(dir), &mut found);
        }
        for daemon in fs::read_dir("/run").into_iter().flatten().flatten() {
            for dir in ["io.containerd.runtime.v2.task", "io.containerd.grpc.v1.cri"] {
                below(&daemon.path().join("s").join(dir), 2, &mut found);
            }
            below(&daemon.path().join("ipam"), 2, &mut found);
        }
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
        // Not /sys/class/net: the links there are those of the network namespace that mounted /sys.
        for line in fs::read_to_string("/proc/net/dev")
            .unwrap_or_default()
            .lines()
        {
            if let Some((link, _)) = line.split_once(':') {
                found.insert(format!("network link {}", link.trim()));
            }
        }
        Snapshot(found)
    }

    /// What is there now and was not.
    pub fn more_than(&self) -> Vec<String> {
        Snapshot::take().0.difference(&self.0).cloned().collect()
    }

    /// Waits until nothing is there that was not.
    ///
    /// # Errors
    /// What is still there after `deadline`.
    pub fn wait_gone(&self, deadline: Duration) -> Result<(), String> {
        let end = Instant::now() + deadline;
        loop {
            let more = self.more_than();
            if more.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!(
                    "left behind after {deadline:?}:\n  {}",
                    more.join("\n  ")
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn files(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path() == Path::new("/run/cofferdam/cache") {
            continue; // what is known of QEMU and virtiofsd, kept until the next boot
        }
        found.insert(format!("file {}", entry.path().display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), found);
        }
    }
}

/// What is `depth` directories below `dir`: a bundle, a pod's directory, an address that is given
/// to a pod.
fn below(dir: &Path, depth: usize, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match depth {
            // host-local's own notes are not addresses.
            1 if entry.file_name() == "lock"
                || entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("last_reserved") => {}
            1 => drop(found.insert(format!("file {}", entry.path().display()))),
            _ => below(&entry.path(), depth - 1, found),
        }
    }
}

/// Cgroups of containers: `ctr` names them /NAMESPACE/ID, and a pod's are below the parent it asks
/// for.
fn cgroups(dir: &Path, depth: usize, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if dir.ends_with(namespace()) {
            found.insert(format!("cgroup {}", path.display()));
        }
        if depth < 4 {
            cgroups(&path, depth + 1, found);
        }
    }
}
