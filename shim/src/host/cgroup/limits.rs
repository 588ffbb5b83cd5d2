//! What a sandbox's processes may use of the host together: a second line behind the limits inside
//! the guest, which hold only as long as the guest's kernel does.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// Memory that QEMU and the helpers need beside the guest's, in MiB: programs, virtio rings, what
/// virtiofsd knows of open files. Generous: one who needs more is killed.
const OWN_MIB: u64 = 256;

/// The buffer of translated code (128 MiB) and what describes its blocks, under emulation.
const EMULATION_MIB: u64 = 256;

/// For each so much guest memory there is one more of the host's: page tables of every process that
/// maps it (a 512th each), and the inodes that virtiofsd holds as long as the guest remembers them.
const PER_GUEST_MEMORY: u64 = 8;

/// CPU time of QEMU's own threads and the helpers beside what the containers may use, in
/// thousandths.
const OWN_MILLI_CPUS: u64 = 250;

/// Threads of a machine with 240 CPUs, of QEMU's workers (64) and the helpers, rounded up.
const PIDS: u64 = 512;

/// Period of the CPU quota in microseconds, the kernel's default.
const PERIOD: u64 = 100_000;

/// Limits of one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory; as much again of swap in the unified hierarchy, both together in the older
    /// one.
    pub memory: u64,
    /// CPU time in thousandths of a CPU, if it is limited.
    pub milli_cpus: Option<u64>,
}

impl Limits {
    /// For a machine with so much memory, whose containers may use so much CPU time if all of them
    /// have a limit.
    pub fn of(memory_mib: u64, milli_cpus: Option<u64>, kvm: bool) -> Limits {
        let own = OWN_MIB + if kvm { 0 } else { EMULATION_MIB };
        Limits {
            memory: (memory_mib + memory_mib / PER_GUEST_MEMORY + own) << 20,
            milli_cpus: milli_cpus.map(|milli| milli.saturating_add(OWN_MILLI_CPUS)),
        }
    }

    /// The wider of both in each respect.
    pub fn max(self, other: Limits) -> Limits {
        Limits {
            memory: self.memory.max(other.memory),
            milli_cpus: self
                .milli_cpus
                .zip(other.milli_cpus)
                .map(|(one, other)| one.max(other)),
        }
    }

    /// The same for systemd, which rounds nothing and writes them to whatever hierarchy there is.
    pub fn properties(self) -> [String; 4] {
        let quota = self
            .milli_cpus
            .map(|milli| format!("{}.{}%", milli / 10, milli % 10));
        [
            format!("MemoryMax={}", self.memory),
            format!("MemorySwapMax={}", self.memory),
            format!("CPUQuota={}", quota.unwrap_or_default()),
            format!("TasksMax={PIDS}"),
        ]
    }
}

/// Puts limits in force in a sandbox's own cgroups, one for each hierarchy. `now` is what holds,
/// none at first, and holds what does afterwards. A hierarchy without a controller limits nothing
/// of its kind.
///
/// # Errors
/// A limit that the kernel refuses; the other kind is set all the same.
pub fn set(directories: &[PathBuf], now: &mut Option<Limits>, to: Limits) -> Result<()> {
    if now.is_none() {
        for dir in directories {
            write(dir, "pids.max", &PIDS.to_string())?;
        }
    }
    let (mut result, before) = (Ok(()), *now);
    let mut held = before.unwrap_or(Limits {
        memory: u64::MAX,
        milli_cpus: None,
    });
    if held.memory != to.memory {
        let set = directories
            .iter()
            .try_for_each(|dir| memory(dir, to.memory, to.memory > held.memory));
        if set.is_ok() {
            held.memory = to.memory;
        }
        result = set;
    }
    if held.milli_cpus != to.milli_cpus {
        let set = directories
            .iter()
            .try_for_each(|dir| cpu(dir, to.milli_cpus));
        if set.is_ok() {
            held.milli_cpus = to.milli_cpus;
        }
        result = result.and(set);
    }
    *now = Some(held);
    result
}

fn memory(dir: &Path, bytes: u64, raises: bool) -> Result<()> {
    let bytes = bytes.to_string();
    write(dir, "memory.max", &bytes)?;
    write(dir, "memory.swap.max", &bytes)?;
    // Memory and swap together must never be less than memory alone.
    let (memory, both) = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes");
    for file in if raises {
        [both, memory]
    } else {
        [memory, both]
    } {
        write(dir, file, &bytes)?;
    }
    Ok(())
}

fn cpu(dir: &Path, milli_cpus: Option<u64>) -> Result<()> {
    let quota = milli_cpus.map(|milli| milli.saturating_mul(PERIOD / 1000));
    write(
        dir,
        "cpu.max",
        &format!(
            "{} {PERIOD}",
            quota.map_or("max".to_owned(), |quota| quota.to_string())
        ),
    )?;
    write(dir, "cpu.cfs_period_us", &PERIOD.to_string())?;
    match write(
        dir,
        "cpu.cfs_quota_us",
        &quota.map_or("-1".to_owned(), |quota| quota.to_string()),
    ) {
        // The older hierarchy refuses what is more than a parent has: that one's quota holds then.
        Err(error) if error.is_errno(libc::EINVAL) => {
            tracing::debug!(%error, "the parent's CPU quota is less");
            Ok(())
        }
        result => result,
    }
}

fn write(dir: &Path, file: &str, value: &str) -> Result<()> {
    let path = dir.join(file);
    if !path.exists() {
        return Ok(());
    }
    fs::write(&path, value).doing(|| {
        format!(
            "limit the sandbox's cgroup: write {value} to {}",
            path.display()
        )
    })
}

/// Which kinds of limits none of these cgroups can have: their hierarchies have no such controller.
pub fn unavailable(directories: &[PathBuf]) -> Option<String> {
    let kinds = [
        ["memory.max", "memory.limit_in_bytes"],
        ["cpu.max", "cpu.cfs_quota_us"],
        ["pids.max", "pids.max"],
    ];
    let lacks = |files: &&[&str; 2]| {
        !directories
            .iter()
            .any(|dir| files.iter().any(|file| dir.join(file).exists()))
    };
    let kinds: Vec<&str> = kinds
        .iter()
        .filter(lacks)
        .filter_map(|files| files[0].split('.').next())
        .collect();
    (!directories.is_empty() && !kinds.is_empty()).then(|| kinds.join(", "))
}

/// How many processes the kernel has killed in these cgroups because memory ran out.
pub fn oom_kills(directories: &[PathBuf]) -> u64 {
    let count = |dir: &PathBuf, file| {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
    };
    directories
        .iter()
        .filter_map(|dir| count(dir, "memory.events").or_else(|| count(dir, "memory.oom_control")))
        .sum()
}

/// Why somebody was killed there: the cgroup and its limit.
pub fn lack_of_memory(directories: &[PathBuf]) -> String {
    let limit = directories.iter().find_map(|dir| {
        let text = ["memory.max", "memory.limit_in_bytes"]
            .iter()
            .find_map(|file| fs::read_to_string(dir.join(file)).ok());
        text.map(|text| {
            (
                dir,
                text.trim()
                    .parse::<u64>()
                    .map_or("no limit".into(), |n| format!("limit {} MiB", n >> 20)),
            )
        })
    });
    match limit {
        Some((dir, limit)) => {
            format!(
                "killed by the host for lack of memory in the sandbox's cgroup {} ({limit})",
                dir.display()
            )
        }
        None => "killed by the host for lack of memory".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        names
            .iter()
            .for_each(|name| fs::write(dir.path().join(name), "").unwrap());
        dir
    }

    fn read(dir: &tempfile::TempDir, name: &str) -> String {
        fs::read_to_string(dir.path().join(name)).unwrap()
    }

    #[test]
    fn a_sandbox_may_use_its_machine_and_what_that_needs() {
        let limits = Limits::of(1024, Some(500), true);
        assert_eq!(
            limits,
            Limits {
                memory: (1024 + 128 + 256) << 20,
                milli_cpus: Some(750)
            }
        );
        let emulated = Limits::of(1024, None, false);
        assert_eq!(
            emulated,
            Limits {
                memory: (1024 + 128 + 512) << 20,
                milli_cpus: None
            }
        );
        assert_eq!(limits.max(emulated), emulated);
    }

    #[test]
    fn limits_are_written_as_either_hierarchy_has_them() {
        let v2 = files(&["memory.max", "memory.swap.max", "cpu.max", "pids.max"]);
        let memory = files(&["memory.limit_in_bytes"]);
        let cpu = files(&["cpu.cfs_quota_us", "cpu.cfs_period_us"]);
        let dirs = [&v2, &memory, &cpu].map(|dir| dir.path().to_owned());
        let mut now = None;
        set(
            &dirs,
            &mut now,
            Limits {
                memory: 4096,
                milli_cpus: Some(750),
            },
        )
        .unwrap();
        assert_eq!(
            (read(&v2, "memory.max"), read(&v2, "pids.max")),
            ("4096".into(), "512".into())
        );
        assert_eq!(
            (read(&v2, "cpu.max"), read(&cpu, "cpu.cfs_quota_us")),
            ("75000 100000".into(), "75000".into())
        );
        assert_eq!(read(&memory, "memory.limit_in_bytes"), "4096");
        assert!(!memory.path().join("pids.max").exists(), "no file is made");
        set(
            &dirs,
            &mut now,
            Limits {
                memory: 4096,
                milli_cpus: None,
            },
        )
        .unwrap();
        assert_eq!(
            (read(&v2, "cpu.max"), read(&cpu, "cpu.cfs_quota_us")),
            ("max 100000".into(), "-1".into())
        );
    }

    #[test]
    fn a_kind_of_limit_that_cannot_be_had_is_named() {
        let (memory, rest) = (
            files(&["memory.max", "pids.max"]),
            files(&["cpu.cfs_quota_us"]),
        );
        let dirs = [memory.path().to_owned(), rest.path().to_owned()];
        assert_eq!(unavailable(&dirs), None);
        assert_eq!(unavailable(&dirs[..1]).as_deref(), Some("cpu"));
        assert_eq!(unavailable(&dirs[1..]).as_deref(), Some("memory, pids"));
        assert_eq!(unavailable(&[]), None, "somebody else's");
    }

    #[test]
    fn systemd_has_its_own_words_for_limits() {
        let some = Limits {
            memory: 4096,
            milli_cpus: Some(755),
        };
        assert_eq!(
            some.properties(),
            [
                "MemoryMax=4096",
                "MemorySwapMax=4096",
                "CPUQuota=75.5%",
                "TasksMax=512"
            ]
        );
        let none = Limits {
            memory: 4096,
            milli_cpus: None,
        };
        assert_eq!(
            none.properties()[2],
            "CPUQuota=",
            "an empty value takes a quota away"
        );
    }

    #[test]
    fn a_refused_limit_is_named_and_does_not_count() {
        let dir = files(&[]);
        fs::create_dir(dir.path().join("memory.max")).unwrap();
        let old = Limits {
            memory: 1,
            milli_cpus: None,
        };
        let mut now = Some(old);
        let error = set(
            &[dir.path().to_owned()],
            &mut now,
            Limits { memory: 2, ..old },
        )
        .unwrap_err();
        assert!(error.to_string().contains("memory.max"), "{error}");
        assert_eq!(now, Some(old));
    }

    #[test]
    fn kills_are_counted_and_explained() {
        let (v2, v1) = (files(&[]), files(&[]));
        fs::write(
            v2.path().join("memory.events"),
            "oom 3\noom_kill 2\noom_group_kill 0\n",
        )
        .unwrap();
        fs::write(v2.path().join("memory.max"), "1048576\n").unwrap();
        fs::write(
            v1.path().join("memory.oom_control"),
            "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        )
        .unwrap();
        let dirs = [&v2, &v1].map(|dir| dir.path().to_owned());
        assert_eq!(oom_kills(&dirs), 3);
        assert!(lack_of_memory(&dirs).ends_with("(limit 1 MiB)"));
    }
}
