//! What a test run may leave on the host: processes and the memory files that they hold, mounts in
//! any namespace, sockets and other files of the runtime, cgroups, loop devices, network namespaces
//! with their links, taps and filters, and what containerd has of a pod.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::command::run;
use crate::daemon::namespace;
use crate::{PATIENCE, procs};

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
        elsewhere_mounted(&mut found);
        sockets(&mut found);
        memory_files(&mut found);
        loop_devices(&mut found);
        networks(&mut found);
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

/// Mounts of the runtime's in the mount namespaces of other processes, which may outlive the
/// process that made them.
fn elsewhere_mounted(found: &mut BTreeSet<String>) {
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    let mut seen = HashSet::from([own]);
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let dir = process.path();
        let namespace = fs::read_link(dir.join("ns/mnt")).ok();
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
        // One made from ours has our /run.
        if namespace.is_none()
            || !seen.insert(namespace.clone())
            || device(&dir.join("root/run")) != device(Path::new("/run"))
        {
            continue;
        }
        let table = fs::read_to_string(dir.join("mountinfo")).unwrap_or_default();
        for point in table.lines().filter_map(|line| line.split(' ').nth(4)) {
            if point.starts_with("/run/cofferdam") {
                let namespace = namespace.as_deref().unwrap_or(Path::new("")).display();
                found.insert(format!("mount {point} in {namespace}"));
            }
        }
    }
}

/// Bound sockets in the runtime's directories, by the list of the network namespace: their files
/// may be gone. In the host's own there are others'.
fn sockets(found: &mut BTreeSet<String>) {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    if namespace("self") == namespace("1") {
        return;
    }
    let list = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for path in list
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
    {
        if path.starts_with("/run/cofferdam") || path.starts_with("/run/containerd/s") {
            found.insert(format!("socket {path}"));
        }
    }
}

/// Memory files (memfd_create(2)), such as a guest's memory: they live as long as the last process
/// that has them.
fn memory_files(found: &mut BTreeSet<String>) {
    for process in procs::ours() {
        let open = fs::read_dir(format!("/proc/{}/fd", process.pid));
        for file in open.into_iter().flatten().flatten() {
            if fs::read_link(file.path()).is_ok_and(|to| to.starts_with("/memfd:mem")) {
                found.insert(format!(
                    "guest memory in {} {}",
                    process.program, process.pid
                ));
            }
        }
    }
}

/// Loop devices on files of this run's directory: all runs of a machine see all of them.
fn loop_devices(found: &mut BTreeSet<String>) {
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        if file.contains(procs::mark()) {
            found.insert(format!("loop device {} {file}", device.path().display()));
        }
    }
}

/// Links and filters in the named network namespaces.
fn networks(found: &mut BTreeSet<String>) {
    for netns in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = netns.file_name().to_string_lossy().into_owned();
        let tool = |program: &str, args: &[&str]| {
            let mut command = Command::new(program);
            command.args(["-n", &name]).args(args);
            run(command, PATIENCE).text()
        };
        for line in tool("ip", &["-o", "link"]).lines() {
            let Some(link) = line.split(": ").nth(1) else {
                continue;
            };
            let link = link.split('@').next().unwrap_or(link);
            found.insert(format!("link {link} in {name}"));
            for filter in tool("tc", &["filter", "show", "dev", link, "ingress"]).lines() {
                found.insert(format!("filter on {link} in {name}: {filter}"));
            }
        }
        for qdisc in tool("tc", &["qdisc", "show"]).lines() {
            found.insert(format!("qdisc in {name}: {qdisc}"));
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
