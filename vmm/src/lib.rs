//! QEMU, and nothing but QEMU: what this runtime asks of one, with argv, QMP and the helpers beside
//! it hidden behind verbs.
//!
//! ```text
//!   boot::spawn ---> Spawned ---attach(cards)---> Built ---run---> Machine
//!     QEMU, virtiofsd x 2,   devices, NICs          CPUs run     attach, detach, resize,
//!     vhost-device-vsock                                         died, stop
//!
//!   boot, machine     the phases, and the machine that runs: QEMU and its helpers as one thing
//!   vm, devices       one QEMU by itself: ports, devices, sizes, death
//!   qmp, qemu         how it is spoken to; what it can do, and its command line
//!   helpers           the vhost-user back ends
//!   process, confine  children of any kind, and the jail that the crate `launcher` puts them in
//!   deadlines, cache  how long everything waits; what is known of a program between runs
//!   recordings        tests: all of the above held against what each version of QEMU knows
//! ```
//!
//! What a change must not break:
//!
//! * **A drop kills.** Each phase owns its processes, so a boot that fails or is cancelled leaves
//!   none. Every child also dies with the thread that spawned it (`PR_SET_PDEATHSIG`): spawn from a
//!   thread that lives as long as the machine should, inside a tokio runtime.
//! * **A process is told of before it is used**, by the callback of [`boot::spawn`], so that
//!   whoever keeps a ledger has it even if the next line never runs.
//! * **One way for every device**: QMP commands that end in a `device_add` into a free place,
//!   before the CPUs run and after, undone in reverse order if one fails.
//! * **An error says what the dead one said.** QEMU reports a closed socket; its helper's last line
//!   has the reason, and QEMU's own last line has the reason of a closed monitor.
//! * **What QEMU is sent is in a list** ([`qmp::commands`], [`qmp::events`],
//!   [`capabilities::types`]), because a test holds the lists against every recorded QEMU.
//! * **Every wait has a deadline** ([`deadlines`]), and whoever is waited for may be killed.
//!
//! It knows nothing of containerd, containers or the guest agent, and it keeps nothing on disk but
//! a cache of what a binary can do.

pub mod boot;
mod cache;
mod confine;
mod console;
pub mod deadlines;
mod devices;
mod error;
mod helpers;
mod machine;
pub mod process;
mod qemu;
#[cfg(not(fuzzing))]
mod qmp;
#[cfg(fuzzing)]
pub mod qmp;
#[cfg(test)]
mod recordings;
mod vm;

pub use confine::Confinement;
pub use devices::block::Block;
pub use devices::net::Net;
pub use devices::vsock::{self, KernelVsock};
pub use devices::{Attached, Device};
pub use error::{Error, Result};
pub use helpers::FsCache;
pub use machine::Machine;
pub use qemu::accel::Accelerator;
pub use qemu::{MachineConfig, capabilities};

/// The parts of a machine one by one, for this crate's own tests. Everybody else boots a whole one.
#[doc(hidden)]
pub mod parts {
    pub use crate::devices::virtiofs::VirtioFs;
    pub use crate::devices::vsock::VsockDevice;
    pub use crate::helpers::{Virtiofsd, VirtiofsdConfig, VsockDaemon, VsockDaemonConfig};
    pub use crate::vm::{Death, Starting, Vm};
}
