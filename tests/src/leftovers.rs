//! What a test run may leave on the host: processes, mounts, files of the runtime, cgroups, network links.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemon::namespace;
use crate::procs;

/// Everything of the kinds that may leak, one line each. The suite's mount namespace and its own /run keep out what
/// other programs of this machine do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// What there is now.
    pub fn take() -> Snapshot {
        let mut found = BTreeSet::new();
        for process in procs::ours() {
            // The test's own tools come and go.
            if process.program != "containerd" && process.program != "ctr" {
                found.insert(format!("process {}: {} {}", process.pid, process.program, process.args));
            }
        }
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            if let Some(point) = line.split(' ').nth(4) {
                found.insert(format!("mount {point}"));
            }
        }
        for dir in ["/run/cofferdam", "/run/containerd/s"] {
            files(Path::new(dir), &mut found);
        }
        for daemon in fs::read_dir("/run").into_iter().flatten().flatten() {
            let bundles = daemon.path().join("s/io.containerd.runtime.v2.task").join(namespace());
            for bundle in fs::read_dir(bundles).into_iter().flatten().flatten() {
                found.insert(format!("bundle {}", bundle.path().display()));
            }
        }
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
        for link in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            found.insert(format!("network link {}", link.file_name().display()));
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
                return Err(format!("left behind after {deadline:?}:\n  {}", more.join("\n  ")));
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

/// Cgroups of containers: `ctr` names them /NAMESPACE/ID.
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
