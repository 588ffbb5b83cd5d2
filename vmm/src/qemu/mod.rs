//! The QEMU binary: what it can do, which accelerator it gets, and the command line of our machine.

pub(crate) mod accel;
mod args;
pub mod capabilities;
mod check;
mod machine;

pub use machine::MachineConfig;
pub(crate) use machine::{Inherited, Place, arguments, place, places};
