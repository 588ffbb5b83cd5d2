//! How large a virtual machine is: what it needs itself, and what the containers in it may use.
//!
//! A machine starts with what is known of its pod by then (the sandbox's annotations, or the limits
//! of its first container), so that most pods are never resized, and follows its containers from
//! there.

use std::sync::{Arc, Mutex};

use guest_protocol::protocols::memory::MemoryState;
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::Notify;
use vmm::Accelerator;

use crate::config::Config;
use crate::container::role::is_from_containerd;

/// What the guest's kernel and agent need beside containers that all have limits, in MiB. A pod's
/// cgroup on the host has room for the limits and the RuntimeClass's overhead, so a machine must
/// not be larger than those.
const OWN_MIB: u64 = 128;

/// Less than this is not worth a growth: a guest may not be able to take it.
const LEAST_GROWTH_MIB: u64 = 64;

/// More CPUs a machine has only if its configuration or its containers' limits say so.
const MOST_VCPUS: u32 = 8;

/// A limit beyond this is how some clients write "none", in bytes.
const NO_LIMIT: u64 = 1 << 54;

/// The kernel's default period of CPU quotas, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// Annotations of containerd's CRI on a pod's sandbox: the sums of its containers' limits.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// CRI-O's for the same.
const POD_RESOURCES: &str = "io.kubernetes.cri-o.PodLinuxResources";

/// What one container, or a whole pod, may use. Zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// Memory limit in bytes.
    pub memory: u64,
    /// CPU time in microseconds …
    pub quota: u64,
    /// … of each so many.
    pub period: u64,
    /// How many CPUs of the host it may run on. What counts where there is no quota.
    pub cpus: u32,
    /// `oom_score_adj` of its process.
    pub oom_score_adj: i32,
}

impl ResourceLimits {
    /// By the resources of a container's spec.
    pub fn of_container(spec: &Spec) -> ResourceLimits {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let process = spec.process().as_ref();
        let none = ResourceLimits {
            oom_score_adj: process
                .and_then(|process| process.oom_score_adj())
                .unwrap_or(0),
            ..ResourceLimits::default()
        };
        resources.map_or(none, |resources| none.updated(resources))
    }

    /// By the annotations of a pod's sandbox.
    pub fn of_pod(spec: &Spec) -> ResourceLimits {
        let annotations = spec.annotations().as_ref();
        let of_crio = annotations.and_then(|all| all.get(POD_RESOURCES));
        if let Some(json) = of_crio.filter(|_| !is_from_containerd()) {
            return ResourceLimits::of_crio(json);
        }
        let number = |key| {
            annotations
                .and_then(|all| all.get(key))
                .and_then(|text| text.parse().ok())
                .unwrap_or(0)
        };
        ResourceLimits {
            memory: limit(number(POD_MEMORY)),
            quota: limit(number(POD_QUOTA)),
            period: limit(number(POD_PERIOD)),
            cpus: 0,
            // Every pause container has -998, also that of a pod that is the first to go: its
            // containers decide.
            oom_score_adj: 0,
        }
    }

    /// By CRI's message LinuxContainerResources as JSON. What cannot be read is no limit.
    fn of_crio(json: &str) -> ResourceLimits {
        let resources: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
        let number = |key: &str| limit(resources[key].as_i64().unwrap_or(0));
        ResourceLimits {
            memory: number("memory_limit_in_bytes"),
            quota: number("cpu_quota"),
            period: number("cpu_period"),
            ..ResourceLimits::default()
        }
    }

    /// After an update, which may name only a part of it. What `unified` says is the last word, as
    /// with runc.
    pub fn updated(self, resources: &LinuxResources) -> ResourceLimits {
        let cpu = resources.cpu().as_ref();
        let new = |given: Option<i64>, old| {
            given.map_or(old, |value| if value == 0 { old } else { limit(value) })
        };
        let unified = |key| resources.unified().as_ref().and_then(|all| all.get(key));
        let updated = ResourceLimits {
            memory: new(
                resources
                    .memory()
                    .as_ref()
                    .and_then(|memory| memory.limit()),
                self.memory,
            ),
            quota: new(cpu.and_then(|cpu| cpu.quota()), self.quota),
            period: cpu
                .and_then(|cpu| cpu.period())
                .filter(|period| *period > 0)
                .unwrap_or(self.period),
            cpus: cpu
                .and_then(|cpu| cpu.cpus().as_deref())
                .map_or(self.cpus, cpu_count),
            ..self
        };
        let (quota, period) = unified("cpu.max").map_or((updated.quota, updated.period), |text| {
            let mut words = text.split_whitespace();
            let mut number = || words.next().and_then(|word| word.parse().ok());
            // "max" is no number and no limit.
            let quota = number().map_or(0, limit);
            (quota, number().map_or(updated.period, limit))
        });
        ResourceLimits {
            memory: unified("memory.max").map_or(updated.memory, |text| bytes(text)),
            quota,
            period,
            ..updated
        }
    }

    fn milli_cpus(self) -> u64 {
        let period = if self.period == 0 {
            DEFAULT_PERIOD
        } else {
            self.period
        };
        match self.quota {
            0 => u64::from(self.cpus) * 1000,
            quota => quota.saturating_mul(1000).div_ceil(period),
        }
    }
}

/// How many CPUs a list such as `0-3,7` names. One that cannot be read names none: the kernel would
/// refuse it.
fn cpu_count(list: &str) -> u32 {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<u32>().ok();
        number(last)?.checked_sub(number(first)?)?.checked_add(1)
    };
    let parts = list.trim().split(',').filter(|part| !part.is_empty());
    parts
        .map(range)
        .try_fold(0_u32, |sum, count| sum.checked_add(count?))
        .unwrap_or_default()
}

/// A number of bytes as the files of a cgroup take it; "max" is no limit.
fn bytes(text: &str) -> u64 {
    let text = text.trim();
    let unit = text.chars().last().map(|unit| unit.to_ascii_uppercase());
    let shift = match unit {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        Some('T') => 40,
        _ => 0,
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number = digits.parse::<u64>().ok();
    let number = number.and_then(|number| number.checked_mul(1 << shift));
    number.filter(|bytes| *bytes < NO_LIMIT).unwrap_or_default()
}

fn limit(value: i64) -> u64 {
    u64::try_from(value)
        .ok()
        .filter(|value| *value < NO_LIMIT)
        .unwrap_or_default()
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What it may grow to with its use, in MiB: more only with a container without a memory limit.
    pub most_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What its containers may use of CPUs, in thousandths of one, if all of them have a limit.
    pub milli_cpus: Option<u64>,
    /// How gladly the kernel kills its processes when memory runs out (`oom_score_adj`): as its
    /// best protected container.
    pub oom_score_adj: i32,
}

impl MachineSize {
    /// The memory that its containers may use, and as many CPUs as their quotas can use, or without
    /// one the CPUs that they are bound to. A pod's own sums count where they are more. The
    /// machine's own need comes on top, or with a container that has no limit, the configured size.
    pub fn of(config: &Config, pod: ResourceLimits, containers: &[ResourceLimits]) -> MachineSize {
        let memory = containers
            .iter()
            .fold(0_u64, |sum, need| sum.saturating_add(need.memory))
            .max(pod.memory);
        let limited = if containers.is_empty() {
            pod.memory > 0
        } else {
            containers.iter().all(|need| need.memory > 0)
        };
        let own = if limited {
            config.memory_mib.min(OWN_MIB)
        } else {
            config.memory_mib
        };
        let milli_cpus = containers
            .iter()
            .map(|need| need.milli_cpus())
            .sum::<u64>()
            .max(pod.milli_cpus());
        let has_limits = if containers.is_empty() {
            pod.milli_cpus() > 0
        } else {
            containers.iter().all(|need| need.milli_cpus() > 0)
        };
        let least = match (config.vcpus, has_limits) {
            (Some(configured), _) => configured,
            (None, true) => 1,
            (None, false) => config.vcpus_without_limit,
        };
        let most = u64::from(host_cpus());
        let vcpus = milli_cpus.div_ceil(1000).max(least.into()).min(most);
        let memory_mib = (own + memory.div_ceil(1 << 20))
            .next_multiple_of(2)
            .min(host_memory_mib());
        let share = host_memory_mib() / 100 * config.max_memory_percent;
        MachineSize {
            memory_mib,
            most_mib: if limited {
                memory_mib
            } else {
                memory_mib.max(share)
            },
            vcpus: u32::try_from(vcpus).unwrap_or(least),
            milli_cpus: (!containers.is_empty() && containers.iter().all(|need| need.quota > 0))
                .then_some(milli_cpus),
            oom_score_adj: containers
                .iter()
                .map(|need| need.oom_score_adj)
                .min()
                .unwrap_or(pod.oom_score_adj),
        }
    }

    /// The larger of both in each respect.
    pub fn max(self, other: MachineSize) -> MachineSize {
        MachineSize {
            memory_mib: self.memory_mib.max(other.memory_mib),
            most_mib: self.most_mib.max(other.most_mib),
            vcpus: self.vcpus.max(other.vcpus),
            milli_cpus: self
                .milli_cpus
                .zip(other.milli_cpus)
                .map(|(one, other)| one.max(other)),
            oom_score_adj: self.oom_score_adj.min(other.oom_score_adj),
        }
    }
}

/// The size that a machine should have by now. Whoever changes the machine reads it then: what it
/// was when a request came may be another one's past.
#[derive(Clone, Debug)]
pub struct WantedSize {
    wanted: Arc<Mutex<Wanted>>,
    limits_changed: Arc<Notify>,
}

#[derive(Debug)]
struct Wanted {
    /// By the containers' limits.
    size: MachineSize,
    /// MiB beyond that, which containers without a limit use.
    grown_mib: u64,
}

impl Wanted {
    fn room_mib(&self) -> u64 {
        self.size.most_mib.saturating_sub(self.size.memory_mib)
    }

    fn grown_mib(&self) -> u64 {
        self.grown_mib.min(self.room_mib())
    }
}

impl WantedSize {
    /// Of a machine that is to be made with this size.
    pub fn new(size: MachineSize) -> WantedSize {
        WantedSize {
            wanted: Arc::new(Mutex::new(Wanted { size, grown_mib: 0 })),
            limits_changed: Arc::default(),
        }
    }

    pub fn get(&self) -> MachineSize {
        let wanted = sys::lock(&self.wanted);
        MachineSize {
            memory_mib: wanted.size.memory_mib + wanted.grown_mib(),
            ..wanted.size
        }
    }

    /// Changes what the limits ask for, and says whether it did.
    pub fn set(&self, size: MachineSize) -> bool {
        let changed = std::mem::replace(&mut sys::lock(&self.wanted).size, size) != size;
        if changed {
            self.limits_changed.notify_one();
        }
        changed
    }

    /// Waits until the limits ask for something else than before; one caller may.
    pub async fn limits_changed(&self) {
        self.limits_changed.notified().await;
    }

    /// Changes what containers without a limit have beyond that, as far as it may be changed, of a
    /// machine that has so much in all: returns by how many MiB it did. A machine that has kept more
    /// than it should grows from there.
    pub fn grow_by(&self, mib: i64, has_mib: u64) -> i64 {
        let mut wanted = sys::lock(&self.wanted);
        let before = wanted.grown_mib();
        let from = if mib > 0 {
            before.max(has_mib.saturating_sub(wanted.size.memory_mib))
        } else {
            before
        };
        let after = from.saturating_add_signed(mib).min(wanted.room_mib());
        wanted.grown_mib = after & !1;
        wanted.grown_mib.cast_signed() - before.cast_signed()
    }

    /// What can change, as the agent is told it.
    pub fn growth(&self) -> MemoryState {
        let wanted = sys::lock(&self.wanted);
        let grown = wanted.grown_mib();
        MemoryState {
            can_grow: grown + LEAST_GROWTH_MIB <= wanted.room_mib(),
            can_shrink_mib: grown,
            ..Default::default()
        }
    }
}

/// The most CPUs that make sense.
pub fn host_cpus() -> u32 {
    std::thread::available_parallelism()
        .ok()
        .and_then(|count| u32::try_from(count.get()).ok())
        .unwrap_or(1)
}

/// The CPUs of a machine with a container that has no CPU limit, where none are configured. Each
/// costs a start under KVM about 0.4 % of the guest's boot. Under emulation it is more than a tenth,
/// and several emulated CPUs gain little.
pub fn vcpus_without_limit(accelerator: Accelerator) -> u32 {
    match accelerator.resolve() {
        Ok(resolved) if resolved.kvm => host_cpus().min(MOST_VCPUS),
        _ => 1,
    }
}

/// The most memory that makes sense, in MiB: what the host has.
pub fn host_memory_mib() -> u64 {
    let info = nix::sys::sysinfo::sysinfo();
    info.map_or(u64::MAX, |info| info.ram_total() >> 20) & !1
}

#[cfg(test)]
mod tests;
