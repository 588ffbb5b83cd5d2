//! The guest as a machine.

pub mod boot;
pub mod pci;
pub mod ready;
pub mod reaper;
pub mod settings;
