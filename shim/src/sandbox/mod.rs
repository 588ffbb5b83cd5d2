//! One sandbox: what may happen in which state (`state`) and who makes it happen (`owner`, with
//! what containerd asks of tasks and of pods' sandboxes).

pub mod owner;
mod sandbox_requests;
pub mod state;
mod task_requests;
