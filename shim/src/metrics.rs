//! The guest's numbers in the form that containerd wants: `Metrics` of the host's cgroup version.
//!
//! A type of the other version, or none, breaks the statistics of the whole node, so there are only these two.

use agent_client::protocols::agent::{BlkioStatsEntry, CgroupStats};
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;

use crate::error::{Error, Result};

/// Packs the statistics for a host with the unified hierarchy (`v2`) or without.
///
/// # Errors
/// protobuf's own.
pub fn pack(stats: &CgroupStats, host_is_v2: bool) -> Result<Any> {
    if host_is_v2 { any(&unified(stats)) } else { any(&legacy(stats)) }
}

fn any<M: MessageFull>(message: &M) -> Result<Any> {
    let value = message.write_to_bytes().map_err(|error| Error::internal(format!("cannot encode metrics: {error}")))?;
    Ok(Any { type_url: M::descriptor().full_name().to_owned(), value, ..Default::default() })
}

/// "No limit" as the cgroup file systems write it.
fn limit(value: u64) -> u64 {
    if value == 0 { u64::MAX } else { value }
}

/// Keys of `MemoryStats.stats`: the guest has cgroup v2 only, so they are those of memory.stat and memory.events.
fn stat(stats: &CgroupStats, key: &str) -> u64 {
    stats.memory_stats.stats.get(key).copied().unwrap_or_default()
}

fn unified(stats: &CgroupStats) -> v2::Metrics {
    let (cpu, memory) = (&stats.cpu_stats, &stats.memory_stats);
    let stat = |key| stat(stats, key);
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(v2::CPUStat {
            usage_usec: cpu.cpu_usage.total_usage / 1000,
            user_usec: cpu.cpu_usage.usage_in_usermode / 1000,
            system_usec: cpu.cpu_usage.usage_in_kernelmode / 1000,
            nr_periods: cpu.throttling_data.periods,
            nr_throttled: cpu.throttling_data.throttled_periods,
            throttled_usec: cpu.throttling_data.throttled_time / 1000,
            ..Default::default()
        })
        .into(),
        memory: Some(v2::MemoryStat {
            anon: stat("anon"),
            file: stat("file"),
            kernel_stack: stat("kernel_stack"),
            slab: stat("slab"),
            sock: stat("sock"),
            shmem: stat("shmem"),
            file_mapped: stat("file_mapped"),
            file_dirty: stat("file_dirty"),
            file_writeback: stat("file_writeback"),
            anon_thp: stat("anon_thp"),
            inactive_anon: stat("inactive_anon"),
            active_anon: stat("active_anon"),
            inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            unevictable: stat("unevictable"),
            slab_reclaimable: stat("slab_reclaimable"),
            slab_unreclaimable: stat("slab_unreclaimable"),
            pgfault: stat("pgfault"),
            pgmajfault: stat("pgmajfault"),
            pgrefill: stat("pgrefill"),
            pgscan: stat("pgscan"),
            pgsteal: stat("pgsteal"),
            pgactivate: stat("pgactivate"),
            pgdeactivate: stat("pgdeactivate"),
            usage: memory.usage.usage,
            usage_limit: limit(memory.usage.limit),
            max_usage: memory.usage.max_usage,
            swap_usage: memory.swap_usage.usage,
            swap_limit: limit(memory.swap_usage.limit),
            ..Default::default()
        })
        .into(),
        io: Some(v2::IOStat { usage: io_entries(stats), ..Default::default() }).into(),
        memory_events: Some(v2::MemoryEvents { oom: stat("oom"), oom_kill: stat("oom_kill"), ..Default::default() })
            .into(),
        ..Default::default()
    }
}

/// One entry a device: v2 has reads and writes side by side where the agent sends one line for each.
fn io_entries(stats: &CgroupStats) -> Vec<v2::IOEntry> {
    let mut entries: Vec<v2::IOEntry> = Vec::new();
    let mut add = |from: &BlkioStatsEntry, bytes: bool| {
        let index = entries.iter().position(|entry| (entry.major, entry.minor) == (from.major, from.minor));
        let index = index.unwrap_or_else(|| {
            entries.push(v2::IOEntry { major: from.major, minor: from.minor, ..Default::default() });
            entries.len() - 1
        });
        let entry = &mut entries[index];
        match (from.op.to_ascii_lowercase().as_str(), bytes) {
            ("read", true) => entry.rbytes = from.value,
            ("write", true) => entry.wbytes = from.value,
            ("read", false) => entry.rios = from.value,
            ("write", false) => entry.wios = from.value,
            _ => {}
        }
    };
    stats.blkio_stats.io_service_bytes_recursive.iter().for_each(|entry| add(entry, true));
    stats.blkio_stats.io_serviced_recursive.iter().for_each(|entry| add(entry, false));
    entries
}

fn legacy(stats: &CgroupStats) -> v1::Metrics {
    let (cpu, memory) = (&stats.cpu_stats, &stats.memory_stats);
    let stat = |key| stat(stats, key);
    let entry = |from: &agent_client::protocols::agent::MemoryData| {
        Some(v1::MemoryEntry {
            limit: limit(from.limit),
            usage: from.usage,
            max: from.max_usage,
            failcnt: from.failcnt,
            ..Default::default()
        })
        .into()
    };
    let blkio = |entries: &[BlkioStatsEntry]| {
        let convert = |from: &BlkioStatsEntry| v1::BlkIOEntry {
            op: from.op.clone(),
            major: from.major,
            minor: from.minor,
            value: from.value,
            ..Default::default()
        };
        entries.iter().map(convert).collect()
    };
    v1::Metrics {
        pids: Some(v1::PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(v1::CPUStat {
            usage: Some(v1::CPUUsage {
                total: cpu.cpu_usage.total_usage,
                kernel: cpu.cpu_usage.usage_in_kernelmode,
                user: cpu.cpu_usage.usage_in_usermode,
                per_cpu: cpu.cpu_usage.percpu_usage.clone(),
                ..Default::default()
            })
            .into(),
            throttling: Some(v1::Throttle {
                periods: cpu.throttling_data.periods,
                throttled_periods: cpu.throttling_data.throttled_periods,
                throttled_time: cpu.throttling_data.throttled_time,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        memory: Some(v1::MemoryStat {
            cache: stat("file"),
            rss: stat("anon"),
            mapped_file: stat("file_mapped"),
            dirty: stat("file_dirty"),
            writeback: stat("file_writeback"),
            pg_fault: stat("pgfault"),
            pg_maj_fault: stat("pgmajfault"),
            inactive_anon: stat("inactive_anon"),
            active_anon: stat("active_anon"),
            inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            unevictable: stat("unevictable"),
            hierarchical_memory_limit: limit(memory.usage.limit),
            hierarchical_swap_limit: limit(memory.swap_usage.limit),
            total_cache: stat("file"),
            total_rss: stat("anon"),
            total_mapped_file: stat("file_mapped"),
            total_dirty: stat("file_dirty"),
            total_writeback: stat("file_writeback"),
            total_pg_fault: stat("pgfault"),
            total_pg_maj_fault: stat("pgmajfault"),
            total_inactive_anon: stat("inactive_anon"),
            total_active_anon: stat("active_anon"),
            total_inactive_file: stat("inactive_file"),
            total_active_file: stat("active_file"),
            total_unevictable: stat("unevictable"),
            usage: entry(&memory.usage),
            swap: entry(&memory.swap_usage),
            kernel: entry(&memory.kernel_usage),
            ..Default::default()
        })
        .into(),
        blkio: Some(v1::BlkIOStat {
            io_service_bytes_recursive: blkio(&stats.blkio_stats.io_service_bytes_recursive),
            io_serviced_recursive: blkio(&stats.blkio_stats.io_serviced_recursive),
            ..Default::default()
        })
        .into(),
        memory_oom_control: Some(v1::MemoryOomControl { oom_kill: stat("oom_kill"), ..Default::default() }).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use agent_client::protocols::agent::{BlkioStats, CpuStats, CpuUsage, MemoryStats};
    use protobuf::Message;

    use super::*;

    fn sample() -> CgroupStats {
        let usage = CpuUsage { total_usage: 5_000_000, ..Default::default() };
        let io = |op: &str, value| BlkioStatsEntry { major: 8, op: op.into(), value, ..Default::default() };
        CgroupStats {
            cpu_stats: Some(CpuStats { cpu_usage: Some(usage).into(), ..Default::default() }).into(),
            memory_stats: Some(MemoryStats {
                stats: [("oom_kill".to_owned(), 1), ("anon".to_owned(), 4096)].into(),
                ..Default::default()
            })
            .into(),
            blkio_stats: Some(BlkioStats {
                io_service_bytes_recursive: vec![io("Read", 10), io("Write", 20)],
                io_serviced_recursive: vec![io("Read", 1), io("Write", 2)],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_unified_host_gets_v2() {
        let any = pack(&sample(), true).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 5_000);
        assert_eq!((metrics.memory.anon, metrics.memory.usage_limit), (4096, u64::MAX));
        assert_eq!(metrics.memory_events.oom_kill, 1);
        let io = &metrics.io.usage[0];
        assert_eq!((io.rbytes, io.wbytes, io.rios, io.wios), (10, 20, 1, 2));
    }

    #[test]
    fn a_legacy_host_gets_v1() {
        let any = pack(&sample(), false).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 5_000_000);
        assert_eq!((metrics.memory.total_rss, metrics.memory_oom_control.oom_kill), (4096, 1));
    }
}
