//! Memory that grows and shrinks with what containers without a memory limit use.
//!
//! The agent sees how much is used, and slows such containers down before nothing is left; the shim
//! decides. A guest can ask for anything: it gets what the configuration allows to any pod without a
//! memory limit, and not more often than [`MEMORY_CHANGE_PAUSE`] lets it.

use tokio::time::{Instant, sleep};
use ttrpc::Code;

use crate::deadlines::{MEMORY_CHANGE_PAUSE, MEMORY_GROW_AGAIN, MEMORY_NEED};
use crate::guest::calls::GuestCalls;
use crate::guest::machine_size::WantedSize;
use crate::guest::running::RunningGuest;

/// Ends with the agent's connection, or with an agent that cannot tell.
pub async fn follow(guest: &RunningGuest, wanted: &WantedSize) {
    let mut sizes = guest.size.has_mib.subscribe();
    // After a growth that failed the containers are not slowed down for a while: nothing would come
    // of it.
    let mut grows_from = Instant::now();
    loop {
        let mut state = wanted.growth();
        state.can_grow &= Instant::now() >= grows_from;
        let before = *sizes.borrow_and_update();
        let need = tokio::select! {
            need = guest.agent.memory_need(&state, MEMORY_NEED) => need,
            // What the agent counts with is no longer true.
            _ = sizes.changed() => continue,
            _ = guest.agent.failed() => return,
        };
        let by = match need {
            Ok(mib) => wanted.grow_by(mib),
            // A machine that stands still.
            Err(error) if error.code() == Code::DEADLINE_EXCEEDED => 0,
            // The agent is gone.
            Err(error) if error.code() == Code::UNAVAILABLE => return,
            Err(error) => {
                tracing::warn!(%error, "the virtual machine does not grow with its use of memory");
                return;
            }
        };
        if by != 0 {
            let fitted = guest.fit(wanted).await;
            let now = *guest.size.has_mib.borrow();
            tracing::info!(
                from_mib = before,
                to_mib = now,
                "memory of the virtual machine"
            );
            if by > 0 && now <= before {
                let taken = || "the guest does not take what it is given".to_owned();
                let error = fitted.err().map_or_else(taken, |error| error.to_string());
                tracing::warn!(%error, "the virtual machine does not grow");
                // What others ask for must not fail of it.
                wanted.grow_by(-by);
                grows_from = Instant::now() + MEMORY_GROW_AGAIN;
            }
        }
        sleep(MEMORY_CHANGE_PAUSE).await;
    }
}
