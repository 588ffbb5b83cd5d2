//! One sandbox: what it is asked and hears (`request`), what may happen in which state (`state`,
//! pure), and who makes it happen (`owner`, with `create_task`, `task_requests`, `sandbox_requests`
//! and `ends`).

mod create_task;
#[cfg(test)]
mod double;
mod ends;
pub mod host_calls;
pub mod owner;
mod pod;
#[cfg(test)]
mod random;
pub mod request;
mod runtime;
mod sandbox_requests;
pub mod state;
mod task_requests;
