//! The guest's numbers in the form that containerd wants: `Metrics` of the host's cgroup version.
//!
//! A type of the other version, or none, breaks the statistics of the whole node, so there are only
//! these two.

use std::collections::BTreeMap;

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;

use crate::error::{Error, Result};
use crate::from_guest::{IoEntry, Limited, Op, Stats};

/// Packs the statistics for a host with the unified hierarchy (`v2`) or without.
pub fn pack(stats: &Stats, host_is_v2: bool) -> Result<Any> {
    if host_is_v2 {
        any(&unified(stats))
    } else {
        any(&legacy(stats))
    }
}

fn any<M: MessageFull>(message: &M) -> Result<Any> {
    let value = message
        .write_to_bytes()
        .map_err(|error| Error::internal(format!("cannot encode metrics: {error}")))?;
    Ok(Any {
        type_url: M::descriptor().full_name().to_owned(),
        value,
        ..Default::default()
    })
}

/// "No limit" as the cgroup file systems write it.
fn limit(value: u64) -> u64 {
    if value == 0 { u64::MAX } else { value }
}

fn unified(stats: &Stats) -> v2::Metrics {
    let stat = |key| stats.memory_stat(key);
    let (periods, throttled, throttled_time) = stats.throttling;
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: stats.pids.0,
            limit: stats.pids.1,
            ..Default::default()
        })
        .into(),
        cpu: Some(v2::CPUStat {
            usage_usec: stats.cpu_total / 1000,
            user_usec: stats.cpu_user / 1000,
            system_usec: stats.cpu_kernel / 1000,
            nr_periods: periods,
            nr_throttled: throttled,
            throttled_usec: throttled_time / 1000,
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
            usage: stats.memory.usage,
            usage_limit: limit(stats.memory.limit),
            max_usage: stats.memory.max_usage,
            swap_usage: stats.swap.usage,
            swap_limit: limit(stats.swap.limit),
            ..Default::default()
        })
        .into(),
        io: Some(v2::IOStat {
            usage: io_entries(stats),
            ..Default::default()
        })
        .into(),
        memory_events: Some(v2::MemoryEvents {
            oom: stat("oom"),
            oom_kill: stat("oom_kill"),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// One entry a device: v2 has reads and writes side by side where the agent sends one line for
/// each.
fn io_entries(stats: &Stats) -> Vec<v2::IOEntry> {
    let mut devices: BTreeMap<(u64, u64), v2::IOEntry> = BTreeMap::new();
    for (list, is_bytes) in [(&stats.io_bytes, true), (&stats.io_requests, false)] {
        for IoEntry {
            major,
            minor,
            op,
            value,
        } in list.iter().copied()
        {
            let new = || v2::IOEntry {
                major,
                minor,
                ..Default::default()
            };
            let entry = devices.entry((major, minor)).or_insert_with(new);
            match (op, is_bytes) {
                (Op::Read, true) => entry.rbytes = value,
                (Op::Write, true) => entry.wbytes = value,
                (Op::Read, false) => entry.rios = value,
                (Op::Write, false) => entry.wios = value,
                (Op::Sync | Op::Async | Op::Discard | Op::Total, _) => {}
            }
        }
    }
    devices.into_values().collect()
}

fn legacy(stats: &Stats) -> v1::Metrics {
    let stat = |key| stats.memory_stat(key);
    let (periods, throttled_periods, throttled_time) = stats.throttling;
    let entry = |from: &Limited| {
        Some(v1::MemoryEntry {
            limit: limit(from.limit),
            usage: from.usage,
            max: from.max_usage,
            failcnt: from.failcnt,
            ..Default::default()
        })
        .into()
    };
    let blkio = |entries: &[IoEntry]| {
        let convert = |from: &IoEntry| v1::BlkIOEntry {
            op: from.op.name().to_owned(),
            major: from.major,
            minor: from.minor,
            value: from.value,
            ..Default::default()
        };
        entries.iter().map(convert).collect()
    };
    v1::Metrics {
        pids: Some(v1::PidsStat {
            current: stats.pids.0,
            limit: stats.pids.1,
            ..Default::default()
        })
        .into(),
        cpu: Some(v1::CPUStat {
            usage: Some(v1::CPUUsage {
                total: stats.cpu_total,
                kernel: stats.cpu_kernel,
                user: stats.cpu_user,
                per_cpu: stats.cpus.clone(),
                ..Default::default()
            })
            .into(),
            throttling: Some(v1::Throttle {
                periods,
                throttled_periods,
                throttled_time,
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
            hierarchical_memory_limit: limit(stats.memory.limit),
            hierarchical_swap_limit: limit(stats.swap.limit),
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
            usage: entry(&stats.memory),
            swap: entry(&stats.swap),
            kernel: entry(&stats.kernel),
            // Counted in the former; CRI-O 1.34 dies of a message without.
            kernel_tcp: Some(v1::MemoryEntry::default()).into(),
            ..Default::default()
        })
        .into(),
        blkio: Some(v1::BlkIOStat {
            io_service_bytes_recursive: blkio(&stats.io_bytes),
            io_serviced_recursive: blkio(&stats.io_requests),
            ..Default::default()
        })
        .into(),
        memory_oom_control: Some(v1::MemoryOomControl {
            oom_kill: stat("oom_kill"),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use guest_protocol::protocols::agent::{
        BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, MemoryStats,
    };
    use protobuf::Message;

    use super::*;

    fn sample() -> Stats {
        let usage = CpuUsage {
            total_usage: 5_000_000,
            ..Default::default()
        };
        let io = |op: &str, value| BlkioStatsEntry {
            major: 8,
            op: op.into(),
            value,
            ..Default::default()
        };
        Stats::of(&CgroupStats {
            cpu_stats: Some(CpuStats {
                cpu_usage: Some(usage).into(),
                ..Default::default()
            })
            .into(),
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
        })
    }

    #[test]
    fn a_unified_host_gets_v2() {
        let any = pack(&sample(), true).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 5_000);
        assert_eq!(
            (metrics.memory.anon, metrics.memory.usage_limit),
            (4096, u64::MAX)
        );
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
        assert_eq!(
            (
                metrics.memory.total_rss,
                metrics.memory_oom_control.oom_kill
            ),
            (4096, 1)
        );
    }
}
