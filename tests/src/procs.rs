//! Processes of this test run: by a mark in their environment that children inherit, and where a
//! parent gives its children a clean environment, by the files of the run that they name and by the
//! cgroup they are in.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::daemon::namespace;
use crate::{PATIENCE, eventually};

/// Name of the environment variable that marks every process a suite starts.
pub const MARK: &str = "COFFERDAM_SUITE";

/// The mark of this run.
pub fn mark() -> &'static str {
    static VALUE: OnceLock<String> = OnceLock::new();
    VALUE.get_or_init(|| {
        format!(
            "{}-{}",
            std::process::id(),
            start_time(std::process::id()).unwrap_or(0)
        )
    })
}

/// A process seen in /proc.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Proc {
    /// Its pid.
    pub pid: u32,
    /// Base name of its program.
    pub program: String,
    /// Its arguments, joined by blanks.
    pub args: String,
}

impl Proc {
    /// Kills it with SIGKILL; one that is gone is fine.
    pub fn kill9(&self) {
        let _ = kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
    }

    /// Stops it with SIGSTOP: it is there and does nothing.
    pub fn stop(&self) {
        kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGSTOP).unwrap();
    }

    /// Lets it go on with SIGCONT.
    pub fn resume(&self) {
        kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGCONT).unwrap();
    }

    /// Whether it still runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        state(self.pid).is_some_and(|state| state != 'Z' && state != 'X')
            && program(self.pid).as_deref() == Some(&self.program)
    }
}

fn stat(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.to_owned())
}

fn state(pid: u32) -> Option<char> {
    stat(pid)?.chars().next()
}

/// A numbered field of /proc/PID/stat, counted as in proc(5).
fn field(pid: u32, number: usize) -> Option<u64> {
    stat(pid)?.split(' ').nth(number - 3)?.parse().ok()
}

/// In clock ticks since boot.
pub fn start_time(pid: u32) -> Option<u64> {
    field(pid, 22)
}

/// The shim that was started for `id`, and what descends from it: QEMU and the helpers.
pub fn family(id: &str) -> Vec<u32> {
    let all = ours();
    let shim = |process: &&Proc| {
        process.program.starts_with("containerd-shim") && process.args.contains(id)
    };
    let mut family = vec![all.iter().find(shim).expect("the shim of the sandbox").pid];
    // Children, and their children.
    for _ in 0..2 {
        let is_child = |process: &&Proc| {
            let parent = field(process.pid, 4);
            !family.contains(&process.pid)
                && family.iter().any(|pid| Some(u64::from(*pid)) == parent)
        };
        let children: Vec<u32> = all
            .iter()
            .filter(is_child)
            .map(|process| process.pid)
            .collect();
        family.extend(children);
    }
    assert!(
        family.len() >= 3,
        "the shim, QEMU and virtiofsd at least: {family:?}"
    );
    family
}

/// Whether the parent of a process runs a program of this name.
pub fn is_child_of(pid: u32, parent: &str) -> bool {
    let parents = field(pid, 4).and_then(|pid| program(u32::try_from(pid).ok()?));
    parents.is_some_and(|program| program.starts_with(parent))
}

/// Waits until a process is in this state (proc(5): `T` stopped, `S` waiting), or is gone.
#[track_caller]
pub fn wait_for_state(pid: u32, wanted: char) {
    eventually(&format!("process {pid} is {wanted}"), PATIENCE, || {
        let now = state(pid);
        (now.is_none() || now == Some(wanted)).then_some(())
    });
}

/// Waits until these processes use a fiftieth of a CPU at most, all together.
pub fn come_to_rest(pids: &[u32]) {
    // There are 100 ticks a second.
    let ticks = || {
        let used = |pid: &u32| Some(field(*pid, 14)? + field(*pid, 15)?);
        pids.iter().filter_map(used).sum::<u64>()
    };
    eventually(
        "two seconds in which the processes use a fiftieth of a CPU at most",
        PATIENCE,
        || {
            let before = ticks();
            sleep(Duration::from_secs(2));
            (ticks().saturating_sub(before) <= 4).then_some(())
        },
    );
}

fn program(pid: u32) -> Option<String> {
    let exe: PathBuf = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = exe.file_name()?.to_string_lossy().into_owned();
    Some(name.trim_end_matches(" (deleted)").to_owned())
}

fn in_our_cgroup(pid: u32) -> bool {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    cgroups.contains(&format!("/{}/", namespace()))
}

/// A program of the tested prefix, or QEMU, that sees the suite's own /run: the daemons'
/// directories are there.
fn helper_of_ours(pid: u32) -> bool {
    let relevant = [
        "qemu-system",
        "virtiofsd",
        "vhost-device",
        "containerd-shim",
    ];
    let helper =
        program(pid).is_some_and(|program| relevant.iter().any(|name| program.starts_with(name)));
    // The tmpfs on the suite's /run has a device number of its own, in every mount namespace made
    // from ours.
    let device = |path: &str| fs::metadata(path).map(|meta| meta.dev()).ok();
    helper && device(&format!("/proc/{pid}/root/run")) == device("/run")
}

/// All living processes with this run's mark, but for this one.
pub fn ours() -> Vec<Proc> {
    let wanted = format!("{MARK}={}", mark());
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut found: Vec<Proc> = pids
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid: u32| {
            let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
            let args = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let args = String::from_utf8_lossy(&args)
                .trim_end_matches('\0')
                .replace('\0', " ");
            let marked = environ
                .split(|byte| *byte == 0)
                .any(|pair| pair == wanted.as_bytes());
            if !(marked || in_our_cgroup(pid) || helper_of_ours(pid)) {
                return None;
            }
            Some(Proc {
                pid,
                program: program(pid)?,
                args,
            })
        })
        .filter(Proc::is_alive)
        .collect();
    found.sort();
    found
}

/// The processes whose program's name begins with `program`.
pub fn named(program: &str) -> Vec<Proc> {
    ours()
        .into_iter()
        .filter(|process| process.program.starts_with(program))
        .collect()
}

/// Proportional share of memory of a process, in KiB.
pub fn pss_kib(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find(|line| line.starts_with("Pss:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}
