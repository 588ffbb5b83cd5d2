//! One sandbox: all its state, in one place, changed by one task.
//!
//! ```text
//!  service ──Request──▶ owner ──▶ state        may it be? which exits are told now?
//!                       │  ▲  └─▶ runtime      what is kept of a process, of a container
//!            begins     │  │
//!            work       ▼  │ Outcome
//!       host_calls, guest::calls, hooks         what takes time
//! ```
//!
//! * `request`: every message by name. A `Request` carries the `Reply` that answers it; an
//!   `Outcome` says what has become of work. Both are `Debug` and logged, without what is secret.
//! * `state`: pure. No IO, no clock; a request that may not be is a `Refusal`, an event that has
//!   come too early waits. containerd's event rules are kept here and nowhere else.
//! * `owner`: the loop, the two `match`es, the machine that comes up with the first container.
//!   `create_task`, `task_requests` and `sandbox_requests` have a function for each request and,
//!   beside it, one for its outcome; `ends` has exits, kills and the machine's death.
//! * `runtime`: the only collections that are keyed by id. What is removed there is gone.
//! * `host_calls`, and `guest::calls` below: the seams. In tests both are the `double`, which
//!   answers when and as a test wants.
//!
//! Rules that a change must keep:
//!
//! * The owner never waits. What waits is begun with `begin`, and comes back as an outcome; between
//!   the two anything may have happened, so an outcome asks the state again (is the machine alive,
//!   is the process still there) before it does anything.
//! * Everything begun is in one of two sets: `work`, which the sandbox's end waits for, and
//!   `clocks`, which it does not. Nothing is spawned beside them but what ends with the guest.
//! * An event is published where the state says so, before the answer that follows from it.
//! * Each reply is answered exactly once, or dropped with the owner, which the service tells as the
//!   sandbox's end.
//!
//! `owner_orders` and `state_orders` hold all of this against containerd's rules, in orders made by
//! chance; a new request belongs into both.

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
