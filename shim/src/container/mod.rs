//! A container on its way into the guest: its OCI spec, its root file system and volumes, and the request to the agent.

pub mod create;
pub mod exit_file;
mod rootfs;
pub mod spec;
pub mod to_proto;
mod volumes;
