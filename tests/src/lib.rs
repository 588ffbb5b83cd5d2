//! End-to-end test harness: private containerd daemons of several releases, `ctr`, `crictl`,
//! terminals, events, a task API client, and the search for whatever a test left behind. It knows
//! containerd's contract and nothing of the shim's code, so the same suites also run against runc
//! as the control that proves a test right.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

pub mod assets;
pub mod bundle;
pub mod command;
pub mod container;
pub mod cri;
pub mod daemon;
pub mod events;
pub mod leftovers;
pub mod network;
pub mod pod;
pub mod points;
pub mod procs;
pub mod pty;
pub mod random;
pub mod storage;
pub mod suite;
pub mod task;

pub use container::Container;
pub use suite::{Env, Release, Runtime, Suite};

use std::time::{Duration, Instant};

/// How long anything that has to happen may take, on a slow machine in emulation with a second test
/// beside it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `probe` until it gives a value.
///
/// # Panics
/// With `what` after `deadline`.
#[track_caller]
pub fn eventually<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
