//! A container on its way into the guest: its OCI spec, its root file system and volumes, and the
//! request to the agent.

pub mod create;
pub mod devices;
pub mod exit_file;
pub mod hooks;
pub mod pod;
mod rootfs;
pub mod shares;
pub mod spec;
pub mod to_proto;
pub mod volumes;
