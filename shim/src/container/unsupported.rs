//! Fields of a spec that a virtual machine cannot keep, and what their user is told. `docs/
//! oci-fields.md` is the whole table: a field that is not refused here is done, or means nothing
//! inside of a machine, and the table says which.

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxResources, LinuxSeccomp, Spec,
};

use crate::error::{Error, Result};

/// What `linux.resources.unified` may set: limits of a cgroup's own memory, CPU time and processes.
/// The rest names CPUs, disks or huge pages of the host, or decides which processes a cgroup has.
const UNIFIED: [&str; 17] = [
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.uclamp.max",
    "cpu.uclamp.min",
    "cpu.weight",
    "cpu.weight.nice",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.zswap.writeback",
    "pids.max",
];

fn refused(asks: bool, words: &str) -> Result<()> {
    if asks {
        return Err(Error::invalid(words));
    }
    Ok(())
}

/// Whether a list or table was given, and is not empty.
fn given<T>(list: Option<&Vec<T>>) -> bool {
    list.is_some_and(|list| !list.is_empty())
}

/// Refuses what of a spec cannot be kept.
///
/// # Errors
/// `INVALID_ARGUMENT`, in words that follow "the container's spec".
pub fn check_spec(spec: &Spec) -> Result<()> {
    let hooks = spec.hooks().as_ref();
    refused(
        given(hooks.and_then(|hooks| hooks.create_container().as_ref()))
            || given(hooks.and_then(|hooks| hooks.start_container().as_ref())),
        "has hooks createContainer or startContainer, which are programs of the host in the \
         container's namespaces, and these are in the virtual machine: use createRuntime, \
         poststart or poststop, or the runtime runc",
    )?;
    for mount in spec.mounts().iter().flatten() {
        refused(
            given(mount.uid_mappings().as_ref()) || given(mount.gid_mappings().as_ref()),
            &format!(
                "maps the users of the mount {} (uidMappings, gidMappings), which volumes of a \
                 virtual machine cannot: leave that out",
                mount.destination().display()
            ),
        )?;
    }
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    refused(
        linux
            .time_offsets()
            .as_ref()
            .is_some_and(|all| !all.is_empty()),
        "shifts its clocks (linux.timeOffsets), which the guest does not do: leave that out",
    )?;
    refused(
        linux.intel_rdt().is_some(),
        "asks for a share of the host's caches (linux.intelRdt), which a virtual machine does not \
         hand on: leave that out",
    )?;
    refused(
        linux.memory_policy().is_some(),
        "asks for memory of certain NUMA nodes (linux.memoryPolicy), and the guest has one: leave \
         that out",
    )?;
    refused(
        linux
            .net_devices()
            .as_ref()
            .is_some_and(|all| !all.is_empty()),
        "moves network devices of the host into the container (linux.netDevices), which a virtual \
         machine cannot take: use a link in the pod's network namespace",
    )?;
    let personality = linux.personality().as_ref();
    refused(
        given(personality.and_then(|personality| personality.flags().as_ref())),
        "has flags of linux.personality, of which runtimes know none: leave them out",
    )?;
    linux.seccomp().as_ref().map_or(Ok(()), check_seccomp)?;
    linux.resources().as_ref().map_or(Ok(()), check_resources)
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<()> {
    refused(
        seccomp.listener_path().is_some(),
        "has a seccomp profile with a listener on the host (listenerPath), which no process of a \
         guest can have: leave it out",
    )
}

/// Refuses what of the resources of a spec or an update cannot be kept.
///
/// # Errors
/// As [`check_spec`].
pub fn check_resources(resources: &LinuxResources) -> Result<()> {
    resources.memory().as_ref().map_or(Ok(()), check_memory)?;
    resources.cpu().as_ref().map_or(Ok(()), check_cpu)?;
    resources
        .block_io()
        .as_ref()
        .map_or(Ok(()), check_block_io)?;
    resources.network().as_ref().map_or(Ok(()), check_network)?;
    for huge in resources.hugepage_limits().iter().flatten() {
        // The kubelet says 0 for each size that the node has.
        refused(
            huge.limit() != 0,
            &format!(
                "asks for huge pages of {} (hugepageLimits), which the guest has none of: leave \
                 them out, or run it with the runtime runc",
                huge.page_size()
            ),
        )?;
    }
    refused(
        resources.rdma().as_ref().is_some_and(|all| !all.is_empty()),
        "limits RDMA devices of the host (linux.resources.rdma), which a virtual machine does not \
         have: leave that out",
    )?;
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (key, value) in unified {
        // As for `hugepageLimits`.
        let no_huge_pages = key.starts_with("hugetlb.") && value == "0";
        refused(
            !UNIFIED.contains(&key.as_str()) && !no_huge_pages,
            &format!(
                "sets linux.resources.unified[{key:?}], which is not a limit of memory, CPU time \
                 or processes: leave it out"
            ),
        )?;
    }
    Ok(())
}

fn check_memory(memory: &LinuxMemory) -> Result<()> {
    refused(
        memory.disable_oom_killer() == Some(true),
        "disables the OOM killer (memory.disableOOMKiller), which cgroup v2 cannot: leave that out",
    )
}

fn check_cpu(cpu: &LinuxCpu) -> Result<()> {
    refused(
        cpu.realtime_runtime().unwrap_or_default() != 0
            || cpu.realtime_period().unwrap_or_default() != 0,
        "asks for realtime CPU time (cpu.realtimeRuntime, cpu.realtimePeriod), which cgroup v2 \
         does not divide: leave that out",
    )
}

fn check_block_io(block_io: &LinuxBlockIo) -> Result<()> {
    let throttles = [
        block_io.throttle_read_bps_device(),
        block_io.throttle_write_bps_device(),
        block_io.throttle_read_iops_device(),
        block_io.throttle_write_iops_device(),
    ];
    refused(
        throttles.into_iter().any(|list| given(list.as_ref()))
            || given(block_io.weight_device().as_ref()),
        "limits single disks of the host (blockIO.throttle…Device, weightDevice), which the guest \
         does not see: leave that out",
    )
}

fn check_network(network: &LinuxNetwork) -> Result<()> {
    refused(
        network.class_id().unwrap_or_default() != 0 || given(network.priorities().as_ref()),
        "has classes or priorities of network traffic (linux.resources.network), which cgroup v2 \
         has not: leave that out",
    )
}

#[cfg(test)]
mod tests;
