//! A container on its way into the guest: its OCI spec, its root file system and volumes, and the
//! request to the agent.

pub mod create;
pub mod devices;
pub mod hooks;
pub mod role;
mod rootfs;
pub mod shared_volumes;
pub mod spec;
pub mod volumes;
