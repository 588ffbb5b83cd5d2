//! QEMU, and nothing but QEMU: what this runtime asks of one (start, attach a device, run, watch,
//! stop), with argv and QMP hidden behind it, and the two vhost-user helpers that stand beside it.
//!
//! What it never does: it knows nothing of containerd, containers or the guest agent, and it keeps
//! nothing on disk but a cache of what a binary can do.
//!
//! Every child dies with the thread that spawned it (`PR_SET_PDEATHSIG`): spawn from a thread that
//! lives as long as the virtual machine should, and inside a tokio runtime.

mod cache;
mod confine;
mod console;
mod devices;
mod error;
pub mod helpers;
pub mod process;
mod qemu;
#[cfg(not(fuzzing))]
mod qmp;
#[cfg(fuzzing)]
pub mod qmp;
mod vm;

pub use confine::Confinement;
pub use devices::block::Block;
pub use devices::net::Net;
pub use devices::virtiofs::VirtioFs;
pub use devices::vsock::{self, KernelVsock, VsockDevice};
pub use devices::{Attached, Device};
pub use error::{Error, Result};
pub use qemu::accel::Accelerator;
pub use qemu::{MachineConfig, capabilities};
pub use vm::{Death, Starting, Vm};
