//! The guest as a machine: what PID 1 does that no container asks for.
//!
//! ```text
//!  power on ── kernel ──> PID 1
//!    boot      mounts, root, log, limits               boot::boot
//!    reaper    collects every child that exits         before the first child
//!    ready     dials the host: "ready", gets the key   the host may connect from here on
//!    boot      cgroup controllers, sysctls, loopback   boot::finish_boot
//!     ⋮
//!    pci       waits for what the host plugs in        for storages, devices, network cards
//!    settings  CPUs, memory, random numbers, clock     the host's calls
//!    metrics   figures of agent and machine as text       the host's call
//!     ⋮
//!    boot      sync, power off                         boot::power_off
//! ```
//!
//! As an ordinary process, for tests, the agent isolates itself instead of booting
//! (`boot::isolate`), so that nothing here touches the machine it runs on.
//!
//! Rules that a change must not break:
//!
//! * What runs before the ready notice is what a user waits for at each start. Only what a
//!   connection from the host needs belongs there.
//! * PID 1 collects orphans that it has never heard of; the exit of a child that somebody waits for
//!   is registered before anything is awaited after the clone.
//! * A PID 1 that returns is a kernel panic: every way out of `main` powers off.
//! * The kernel command line belongs to the kernel too. Parameters that the agent does not know, or
//!   cannot read, are left alone.

pub mod boot;
pub mod metrics;
pub mod pci;
pub mod ready;
pub mod reaper;
pub mod settings;
