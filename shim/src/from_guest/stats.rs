//! What a container uses, by its guest: numbers, and nothing of a length or a name that the guest
//! chooses.

use std::collections::BTreeMap;

use guest_protocol::protocols::agent::{BlkioStatsEntry, CgroupStats, MemoryData};

/// Entries of block devices that are kept; a guest has fewer devices than that.
const MAX_IO: usize = 64;

/// CPUs that are kept.
const MAX_CPUS: usize = 1024;

/// What is kept of memory.stat and memory.events, the guest having cgroup v2 only.
const MEMORY: [&str; 26] = [
    "anon",
    "file",
    "kernel_stack",
    "slab",
    "sock",
    "shmem",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "anon_thp",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "slab_reclaimable",
    "slab_unreclaimable",
    "pgfault",
    "pgmajfault",
    "pgrefill",
    "pgscan",
    "pgsteal",
    "pgactivate",
    "pgdeactivate",
    "oom",
    "oom_kill",
];

/// A kind of block IO, named as the kernel's cgroup v1 files name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Read,
    Write,
    /// Either, and waited for.
    Sync,
    /// Either, and not waited for.
    Async,
    /// Given back to the device.
    Discard,
    Total,
}

impl Op {
    const ALL: [Op; 6] = [
        Op::Read,
        Op::Write,
        Op::Sync,
        Op::Async,
        Op::Discard,
        Op::Total,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "Read",
            Op::Write => "Write",
            Op::Sync => "Sync",
            Op::Async => "Async",
            Op::Discard => "Discard",
            Op::Total => "Total",
        }
    }
}

/// A number of one kind for one block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEntry {
    /// The device's major number in the guest.
    pub major: u64,
    /// The device's minor number in the guest.
    pub minor: u64,
    /// What is counted.
    pub op: Op,
    /// How much of it.
    pub value: u64,
}

/// Something that is used up to a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limited {
    pub usage: u64,
    /// The most that was.
    pub max_usage: u64,
    /// How often the limit was met.
    pub failcnt: u64,
    /// The limit; 0 is none.
    pub limit: u64,
}

/// A container's statistics. Times are in nanoseconds, memory in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time in all.
    pub cpu_total: u64,
    /// In the kernel.
    pub cpu_kernel: u64,
    /// In programs.
    pub cpu_user: u64,
    pub cpus: Vec<u64>,
    /// Periods of the CPU limit, how many of them were cut short, and by how much time.
    pub throttling: (u64, u64, u64),
    pub memory: Limited,
    pub swap: Limited,
    /// Memory of the kernel's.
    pub kernel: Limited,
    /// Processes, and their limit.
    pub pids: (u64, u64),
    /// Bytes by block device.
    pub io_bytes: Vec<IoEntry>,
    /// Requests by block device.
    pub io_requests: Vec<IoEntry>,
    memory_stat: BTreeMap<&'static str, u64>,
}

impl Stats {
    /// What is kept of an agent's answer.
    pub fn of(said: &CgroupStats) -> Stats {
        let (cpu, memory) = (&said.cpu_stats, &said.memory_stats);
        let throttling = &cpu.throttling_data;
        Stats {
            cpu_total: cpu.cpu_usage.total_usage,
            cpu_kernel: cpu.cpu_usage.usage_in_kernelmode,
            cpu_user: cpu.cpu_usage.usage_in_usermode,
            cpus: cpu
                .cpu_usage
                .percpu_usage
                .iter()
                .take(MAX_CPUS)
                .copied()
                .collect(),
            throttling: (
                throttling.periods,
                throttling.throttled_periods,
                throttling.throttled_time,
            ),
            memory: limited(&memory.usage),
            swap: limited(&memory.swap_usage),
            kernel: limited(&memory.kernel_usage),
            pids: (said.pids_stats.current, said.pids_stats.limit),
            io_bytes: entries(&said.blkio_stats.io_service_bytes_recursive),
            io_requests: entries(&said.blkio_stats.io_serviced_recursive),
            memory_stat: MEMORY
                .iter()
                .filter_map(|key| Some((*key, *memory.stats.get(*key)?)))
                .collect(),
        }
    }

    /// A number of memory.stat or memory.events; 0 if the guest has not said it.
    pub fn memory_stat(&self, key: &str) -> u64 {
        debug_assert!(MEMORY.contains(&key), "{key} is not kept");
        self.memory_stat.get(key).copied().unwrap_or_default()
    }

    /// Adds another container's, as far as sums mean something.
    pub fn add(&mut self, other: &Stats) {
        let add = |to: &mut u64, more: u64| *to = to.saturating_add(more);
        add(&mut self.cpu_total, other.cpu_total);
        add(&mut self.cpu_kernel, other.cpu_kernel);
        add(&mut self.cpu_user, other.cpu_user);
        add(&mut self.memory.usage, other.memory.usage);
        add(&mut self.pids.0, other.pids.0);
        for (key, value) in &other.memory_stat {
            add(self.memory_stat.entry(key).or_default(), *value);
        }
    }
}

fn limited(said: &MemoryData) -> Limited {
    Limited {
        usage: said.usage,
        max_usage: said.max_usage,
        failcnt: said.failcnt,
        limit: said.limit,
    }
}

fn entries(said: &[BlkioStatsEntry]) -> Vec<IoEntry> {
    let known = |entry: &BlkioStatsEntry| {
        let op = Op::ALL
            .into_iter()
            .find(|op| op.name().eq_ignore_ascii_case(&entry.op))?;
        Some(IoEntry {
            major: entry.major,
            minor: entry.minor,
            op,
            value: entry.value,
        })
    };
    // What comes after these is not even looked at.
    said.iter().take(MAX_IO).filter_map(known).collect()
}

#[cfg(test)]
mod tests {
    use guest_protocol::protocols::agent::{BlkioStats, CpuStats, CpuUsage, MemoryStats};

    use super::*;

    #[test]
    fn lists_and_names_are_the_hosts() {
        let entry = |op: &str, value| BlkioStatsEntry {
            major: 8,
            minor: value,
            op: op.into(),
            value,
            ..Default::default()
        };
        let said = CgroupStats {
            cpu_stats: Some(CpuStats {
                cpu_usage: Some(CpuUsage {
                    percpu_usage: vec![1; 5000],
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            memory_stats: Some(MemoryStats {
                stats: [("anon".to_owned(), 7), ("\u{1b}[31m".to_owned(), 8)].into(),
                ..Default::default()
            })
            .into(),
            blkio_stats: Some(BlkioStats {
                io_service_bytes_recursive: std::iter::once(entry("evil\n", 0))
                    .chain((1..500_000).map(|value| entry("rEAD", value)))
                    .collect(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let stats = Stats::of(&said);
        assert_eq!(
            (stats.cpus.len(), stats.io_bytes.len()),
            (MAX_CPUS, MAX_IO - 1)
        );
        assert_eq!(stats.io_bytes[0].op.name(), "Read");
        assert_eq!(stats.memory_stat.len(), 1);
        assert_eq!(stats.memory_stat("anon"), 7);
    }

    #[test]
    fn sums_have_an_end() {
        let said = CgroupStats {
            memory_stats: Some(MemoryStats {
                stats: [("file".to_owned(), u64::MAX)].into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let one = Stats {
            cpu_total: u64::MAX - 1,
            pids: (3, 0),
            ..Stats::of(&said)
        };
        let mut sum = Stats::default();
        sum.add(&one);
        sum.add(&one);
        assert_eq!(
            (sum.cpu_total, sum.pids.0, sum.memory_stat("file")),
            (u64::MAX, 6, u64::MAX)
        );
    }
}
