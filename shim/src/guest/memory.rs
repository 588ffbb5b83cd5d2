//! Memory that grows and shrinks with what containers without a memory limit use.
//!
//! The agent sees how much is used, and slows such containers down before nothing is left; the shim
//! decides. A guest can ask for anything: it gets what the configuration allows to any pod without a
//! memory limit, and not more often than [`MEMORY_CHANGE_PAUSE`] lets it.

use tokio::time::{Instant, sleep};
use ttrpc::Code;

use crate::deadlines::{MEMORY_CHANGE_PAUSE, MEMORY_GROW_AGAIN, MEMORY_NEED, MEMORY_SHRINK_AFTER};
use crate::guest::machine_size::WantedSize;
use crate::guest::running::RunningGuest;

/// Ends with the agent's connection.
pub async fn follow(guest: &RunningGuest, wanted: &WantedSize) {
    let mut sizes = guest.size.has_mib.subscribe();
    let mut changed = Instant::now();
    // After a failure the containers are not slowed down for a while: nothing would come of it.
    let mut grows_from = changed;
    loop {
        let mut state = wanted.growth();
        state.can_grow &= Instant::now() >= grows_from;
        sizes.mark_unchanged();
        let need = tokio::select! {
            need = guest.agent.memory_need(&state, MEMORY_NEED) => need,
            // What the agent counts with is no longer true.
            _ = sizes.changed() => continue,
            () = wanted.limits_changed() => continue,
            _ = guest.agent.failed() => return,
        };
        let failure = match need {
            // A machine that stands still.
            Err(error) if error.code() == Code::DEADLINE_EXCEEDED => None,
            // The agent is gone.
            Err(error) if error.code() == Code::UNAVAILABLE => return,
            Err(error) => Some(error),
            Ok(0) => None,
            Ok(mib) if mib < 0 && changed.elapsed() < MEMORY_SHRINK_AFTER => None,
            Ok(mib) => {
                changed = Instant::now();
                guest.change_memory(wanted, mib).await.err()
            }
        };
        if let Some(error) = failure {
            tracing::warn!(%error, "the virtual machine does not grow with its use of memory");
            grows_from = Instant::now() + MEMORY_GROW_AGAIN;
            if !state.can_grow {
                sleep(MEMORY_GROW_AGAIN).await;
            }
        }
        sleep(MEMORY_CHANGE_PAUSE).await;
    }
}
