//! What the shim makes on the host, and how it is undone: directories and mounts of its own,
//! cgroups, the record of an exit in a bundle, and the ledger of all that outlives a process.

pub mod cgroup;
pub mod death_signal;
pub mod dir;
pub mod exit_record;
pub mod identity;
pub mod ledger;
pub mod mount_table;
pub mod mounts;
