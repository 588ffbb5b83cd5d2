//! A container's cgroup files as the protocol's numbers.

use std::collections::HashMap;
use std::fs;

use guest_protocol::protocols::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData,
    MemoryStats, PidsStats, ThrottlingData,
};

use super::{Cgroup, flat};

/// Reads everything once. Files that are not there count as zero.
pub fn read(cgroup: &Cgroup) -> CgroupStats {
    let file = |name: &str| fs::read_to_string(cgroup.file(name)).unwrap_or_default();
    CgroupStats {
        cpu_stats: Some(cpu(&file("cpu.stat"))).into(),
        memory_stats: Some(memory(file)).into(),
        pids_stats: Some(PidsStats {
            current: number(&file("pids.current")),
            // No limit is zero here, unlike for memory.
            limit: file("pids.max").trim().parse().unwrap_or(0),
            ..Default::default()
        })
        .into(),
        blkio_stats: Some(block(&file("io.stat"))).into(),
        hugetlb_stats: hugetlb(cgroup),
        ..Default::default()
    }
}

/// A number, where "max" is the largest.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        other => other.parse().unwrap_or(0),
    }
}

fn cpu(stat: &str) -> CpuStats {
    let values: HashMap<&str, u64> = flat(stat).collect();
    let count = |key: &str| values.get(key).copied().unwrap_or(0);
    // Microseconds in the kernel, nanoseconds on the wire.
    let nanoseconds = |key: &str| count(key) * 1000;
    CpuStats {
        cpu_usage: Some(CpuUsage {
            total_usage: nanoseconds("usage_usec"),
            usage_in_kernelmode: nanoseconds("system_usec"),
            usage_in_usermode: nanoseconds("user_usec"),
            ..Default::default()
        })
        .into(),
        throttling_data: Some(ThrottlingData {
            periods: count("nr_periods"),
            throttled_periods: count("nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// `stats` holds memory.stat as it is, and low, high, max, oom and oom_kill of memory.events.
fn memory(file: impl Fn(&str) -> String) -> MemoryStats {
    let mut stats: HashMap<String, u64> = flat(&file("memory.stat"))
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    let events: HashMap<String, u64> = flat(&file("memory.events"))
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    let data = |prefix: &str, failures: u64| {
        let data = MemoryData {
            usage: number(&file(&format!("{prefix}.current"))),
            max_usage: number(&file(&format!("{prefix}.peak"))),
            failcnt: failures,
            limit: number(&file(&format!("{prefix}.max"))),
            ..Default::default()
        };
        Some(data).into()
    };
    let usage = data("memory", events.get("max").copied().unwrap_or(0));
    let swap_usage = data("memory.swap", 0);
    let kernel = MemoryData {
        usage: stats.get("kernel").copied().unwrap_or(0),
        ..Default::default()
    };
    let cache = stats.get("file").copied().unwrap_or(0);
    stats.extend(events);
    MemoryStats {
        cache,
        usage,
        swap_usage,
        kernel_usage: Some(kernel).into(),
        use_hierarchy: true,
        stats,
        ..Default::default()
    }
}

fn block(stat: &str) -> BlkioStats {
    let mut out = BlkioStats::default();
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        let Some((major, minor)) = fields.next().and_then(|device| device.split_once(':')) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut out.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut out.io_service_bytes_recursive, "Write"),
                "dbytes" => (&mut out.io_service_bytes_recursive, "Discard"),
                "rios" => (&mut out.io_serviced_recursive, "Read"),
                "wios" => (&mut out.io_serviced_recursive, "Write"),
                "dios" => (&mut out.io_serviced_recursive, "Discard"),
                _ => continue,
            };
            let value = value.parse().unwrap_or(0);
            list.push(BlkioStatsEntry {
                major,
                minor,
                op: op.into(),
                value,
                ..Default::default()
            });
        }
    }
    out
}

fn hugetlb(cgroup: &Cgroup) -> HashMap<String, HugetlbStats> {
    let mut out = HashMap::new();
    for entry in fs::read_dir(cgroup.file(""))
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let size = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"));
        let Some(size) = size.filter(|size| !size.ends_with(".rsvd")) else {
            continue;
        };
        let file = |suffix: &str| {
            fs::read_to_string(cgroup.file(&format!("hugetlb.{size}.{suffix}"))).unwrap_or_default()
        };
        let failures = flat(&file("events"))
            .find(|(key, _)| *key == "max")
            .map_or(0, |(_, count)| count);
        out.insert(
            size.to_owned(),
            HugetlbStats {
                usage: number(&file("current")),
                failcnt: failures,
                ..Default::default()
            },
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_become_nanoseconds() {
        let stats = cpu(
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled \
             2\nthrottled_usec 7\n",
        );
        assert_eq!(stats.cpu_usage.total_usage, 1_500_000);
        assert_eq!(stats.cpu_usage.usage_in_usermode, 1_000_000);
        assert_eq!(stats.throttling_data.throttled_time, 7_000);
        assert_eq!(stats.throttling_data.throttled_periods, 2);
    }

    #[test]
    fn memory_has_its_events_among_its_stats() {
        let stats = memory(|name| {
            match name {
                "memory.stat" => "anon 10\nfile 20\nkernel 5\n",
                "memory.events" => "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n",
                "memory.current" => "4096\n",
                "memory.max" | "memory.swap.max" => "max\n",
                _ => "",
            }
            .into()
        });
        assert_eq!(
            (stats.usage.usage, stats.usage.limit, stats.usage.failcnt),
            (4096, u64::MAX, 3)
        );
        assert_eq!(
            (stats.cache, stats.stats["anon"], stats.stats["oom_kill"]),
            (20, 10, 1)
        );
        assert_eq!(stats.kernel_usage.usage, 5);
    }

    #[test]
    fn io_is_listed_by_device_and_direction() {
        let stats = block("254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\nnonsense\n");
        assert_eq!(stats.io_service_bytes_recursive.len(), 3);
        let write = &stats.io_serviced_recursive[1];
        assert_eq!(
            (write.major, write.minor, write.op.as_str(), write.value),
            (254, 0, "Write", 2)
        );
    }
}
