//! From containerd's `start` to a running server, and from its `delete` to nothing left.

pub mod delete;
mod group;
mod reply;
pub mod serve;
pub mod start;
