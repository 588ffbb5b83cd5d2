//! OCI resources as cgroup v2 files and values, by the rules that runc uses.

use guest_protocol::protocols::cofferdam::ResourceFields;
use guest_protocol::protocols::oci::{
    LinuxBlockIO, LinuxCPU, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

/// One file and what to write to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name of the file in the cgroup.
    pub file: String,
    /// What to write.
    pub value: String,
    /// A guest that cannot do this still runs the container: it has other CPUs than the host, no
    /// swap, no such disk.
    pub optional: bool,
}

fn must(file: &str, value: impl ToString) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
        optional: false,
    }
}

fn may(file: impl Into<String>, value: impl ToString) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
        optional: true,
    }
}

/// The writes that put `resources` in force. Zero is "not set", because the wire knows no
/// difference. `read` gives the present content of a file, for values that share one.
pub fn settings(resources: &LinuxResources, read: impl Fn(&str) -> String) -> Vec<Setting> {
    let mut out = Vec::new();
    if let Some(memory) = resources.Memory.as_ref() {
        memory_settings(memory, &mut out);
    }
    if let Some(cpu) = resources.CPU.as_ref() {
        cpu_settings(cpu, &read, &mut out);
    }
    match resources.Pids.as_ref().map_or(0, |pids| pids.Limit) {
        0 => {}
        limit => out.push(must("pids.max", limited(limit))),
    }
    if let Some(block) = resources.BlockIO.as_ref() {
        block_settings(block, &mut out);
    }
    for huge in &resources.HugepageLimits {
        // "2MB" and the like; anything else would be a path.
        if !huge.Pagesize.is_empty() && huge.Pagesize.chars().all(|c| c.is_ascii_alphanumeric()) {
            out.push(may(format!("hugetlb.{}.max", huge.Pagesize), huge.Limit));
        }
    }
    if let Some(own) = resources.Own.as_ref() {
        own_settings(own, &mut out);
    }
    out
}

/// What only our host sends. `unified` comes last, because it is what runc writes last.
fn own_settings(own: &ResourceFields, out: &mut Vec<Setting>) {
    if let Some(burst) = own.cpu_burst {
        out.push(must("cpu.max.burst", burst));
    }
    if let Some(idle) = own.cpu_idle {
        if idle != 0 {
            // The kernel gives none to what is idle.
            out.retain(|setting| setting.file != "cpu.weight");
        }
        out.push(must("cpu.idle", idle));
    }
    let mut unified: Vec<_> = own.unified.iter().collect();
    unified.sort();
    out.extend(unified.into_iter().map(|(file, value)| must(file, value)));
}

/// Whether `unified` may set this file: one of the cgroup itself, and none of those that decide
/// which processes and cgroups there are.
pub fn is_unified(file: &str) -> bool {
    let is_name = file
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    let controller = file.split_once('.').map(|(controller, _)| controller);
    is_name && !matches!(controller, None | Some("" | "cgroup"))
}

fn limited(value: i64) -> String {
    if value < 0 {
        "max".into()
    } else {
        value.to_string()
    }
}

fn memory_settings(memory: &LinuxMemory, out: &mut Vec<Setting>) {
    // OCI's swap is memory and swap together, v2's is swap alone.
    let swap = match (memory.Limit, memory.Swap) {
        (_, 0) if memory.Limit < 0 => Some(-1),
        (_, 0) => None,
        (_, swap) if swap < 0 => Some(-1),
        (limit, swap) => Some((swap - limit.max(0)).max(0)),
    };
    if let Some(swap) = swap {
        out.push(may("memory.swap.max", limited(swap)));
    }
    if memory.Limit != 0 {
        out.push(must("memory.max", limited(memory.Limit)));
    }
    if memory.Reservation != 0 {
        out.push(must("memory.low", limited(memory.Reservation)));
    }
}

fn cpu_settings(cpu: &LinuxCPU, read: &impl Fn(&str) -> String, out: &mut Vec<Setting>) {
    if cpu.Shares != 0 {
        out.push(must("cpu.weight", weight_of_shares(cpu.Shares)));
    }
    if cpu.Quota != 0 || cpu.Period != 0 {
        let present = read("cpu.max");
        let mut present = present.split_whitespace();
        let quota = present.next().unwrap_or("max");
        let period = present.next().unwrap_or("100000");
        let quota = if cpu.Quota == 0 {
            quota.to_owned()
        } else {
            limited(cpu.Quota)
        };
        let period = if cpu.Period == 0 {
            period.to_owned()
        } else {
            cpu.Period.to_string()
        };
        out.push(must("cpu.max", format!("{quota} {period}")));
    }
    // The shim clears host CPU numbers; what still comes may not exist in this guest.
    for (file, list) in [("cpuset.cpus", &cpu.Cpus), ("cpuset.mems", &cpu.Mems)] {
        if !list.is_empty() {
            out.push(may(file, list));
        }
    }
}

/// 2..262144 becomes 1..10000, as runc does it.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn block_settings(block: &LinuxBlockIO, out: &mut Vec<Setting>) {
    if block.Weight != 0 {
        // 10..1000 becomes 1..10000.
        let weight = 1 + (u64::from(block.Weight).clamp(10, 1000) - 10) * 9999 / 990;
        out.push(may("io.weight", format!("default {weight}")));
    }
    let mut throttle = |devices: &[LinuxThrottleDevice], key: &str| {
        for device in devices {
            let rate = if device.Rate == 0 {
                "max".into()
            } else {
                device.Rate.to_string()
            };
            out.push(may(
                "io.max",
                format!("{}:{} {key}={rate}", device.Major, device.Minor),
            ));
        }
    };
    throttle(&block.ThrottleReadBpsDevice, "rbps");
    throttle(&block.ThrottleWriteBpsDevice, "wbps");
    throttle(&block.ThrottleReadIOPSDevice, "riops");
    throttle(&block.ThrottleWriteIOPSDevice, "wiops");
}

#[cfg(test)]
mod tests {
    use guest_protocol::protocols::oci::{LinuxHugepageLimit, LinuxPids};

    use super::*;

    fn written(resources: &LinuxResources) -> Vec<(String, String)> {
        let read = |_: &str| "50000 200000".to_owned();
        settings(resources, read)
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    fn memory(limit: i64, swap: i64) -> Vec<(String, String)> {
        let memory = LinuxMemory {
            Limit: limit,
            Swap: swap,
            ..Default::default()
        };
        written(&LinuxResources {
            Memory: Some(memory).into(),
            ..Default::default()
        })
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.into(), value.into())
    }

    #[test]
    fn nothing_set_writes_nothing() {
        assert!(written(&LinuxResources::default()).is_empty());
        let empty = LinuxResources {
            Memory: Some(LinuxMemory::default()).into(),
            CPU: Some(LinuxCPU::default()).into(),
            Pids: Some(LinuxPids::default()).into(),
            BlockIO: Some(LinuxBlockIO::default()).into(),
            ..Default::default()
        };
        assert!(written(&empty).is_empty());
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        assert_eq!(
            memory(1000, 1500),
            [pair("memory.swap.max", "500"), pair("memory.max", "1000")]
        );
        assert_eq!(
            memory(1000, 1000),
            [pair("memory.swap.max", "0"), pair("memory.max", "1000")]
        );
        assert_eq!(
            memory(1000, -1),
            [pair("memory.swap.max", "max"), pair("memory.max", "1000")]
        );
        assert_eq!(
            memory(-1, 0),
            [pair("memory.swap.max", "max"), pair("memory.max", "max")]
        );
        assert_eq!(memory(1000, 0), [pair("memory.max", "1000")]);
    }

    #[test]
    fn shares_become_a_weight() {
        for (shares, weight) in [
            (2, 1),
            (1024, 39),
            (262_144, 10_000),
            (1, 1),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight_of_shares(shares), weight);
        }
    }

    #[test]
    fn a_quota_keeps_the_period_and_the_other_way_round() {
        let cpu = |quota, period| {
            let cpu = LinuxCPU {
                Quota: quota,
                Period: period,
                ..Default::default()
            };
            written(&LinuxResources {
                CPU: Some(cpu).into(),
                ..Default::default()
            })
        };
        assert_eq!(cpu(10_000, 0), [pair("cpu.max", "10000 200000")]);
        assert_eq!(cpu(0, 100_000), [pair("cpu.max", "50000 100000")]);
        assert_eq!(cpu(-1, 100_000), [pair("cpu.max", "max 100000")]);
    }

    #[test]
    fn a_page_size_cannot_name_another_file() {
        let limit = |size: &str| LinuxHugepageLimit {
            Pagesize: size.into(),
            Limit: 4,
            ..Default::default()
        };
        let resources = LinuxResources {
            HugepageLimits: vec![limit("2MB"), limit("../x"), limit("")],
            ..Default::default()
        };
        assert_eq!(written(&resources), [pair("hugetlb.2MB.max", "4")]);
    }

    #[test]
    fn unified_sets_files_of_the_cgroup_and_of_no_other() {
        let unified = [("memory.oom.group", "1"), ("memory.high", "max")]
            .map(|(file, value)| (file.to_owned(), value.to_owned()));
        let own = ResourceFields {
            unified: unified.into(),
            cpu_idle: Some(1),
            ..Default::default()
        };
        let resources = LinuxResources {
            Own: Some(own).into(),
            ..Default::default()
        };
        assert_eq!(
            written(&resources),
            [
                pair("cpu.idle", "1"),
                pair("memory.high", "max"),
                pair("memory.oom.group", "1")
            ]
        );
        for good in ["memory.oom.group", "hugetlb.2MB.max", "cpu.weight"] {
            assert!(is_unified(good), "{good}");
        }
        for bad in [
            "",
            "x",
            ".",
            "../memory.max",
            "cgroup.procs",
            "cgroup.freeze",
            ".max",
            "a.b/c",
        ] {
            assert!(!is_unified(bad), "{bad}");
        }
    }

    #[test]
    fn throttles_name_their_device() {
        let device = LinuxThrottleDevice {
            Major: 8,
            Minor: 16,
            Rate: 1000,
            ..Default::default()
        };
        let block = LinuxBlockIO {
            Weight: 10,
            ThrottleReadBpsDevice: vec![device],
            ..Default::default()
        };
        let resources = LinuxResources {
            BlockIO: Some(block).into(),
            ..Default::default()
        };
        assert_eq!(
            written(&resources),
            [
                pair("io.weight", "default 1"),
                pair("io.max", "8:16 rbps=1000")
            ]
        );
    }
}
