//! The guest's time of day follows the host's. A guest reads the host's clock once, when it boots;
//! when the host is suspended, or somebody sets its clock, the guest would stay behind for ever.

use std::time::Duration;

use guest_protocol::protocols::agent::SetGuestDateTimeRequest;
use nix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep};

use crate::deadlines::{AGENT_CALL, CLOCK_LOOK_AGAIN};
use crate::error::Result;
use crate::from_guest::Agent;

/// A step of the host's clock that is worth a step of the guest's. What NTP does without steps is
/// less in a minute.
const STEP: Duration = Duration::from_millis(500);

/// Sets the guest's clock after each step of the host's. Runs until it is dropped.
pub async fn follow(agent: Agent) {
    let mut steps = Steps(since_start_of_clock());
    loop {
        sleep(CLOCK_LOOK_AGAIN).await;
        let now = since_start_of_clock();
        if !steps.has_stepped(now) {
            continue;
        }
        let asked = Instant::now();
        match set(&agent).await {
            // One that took its time set a time that was over: it is set again.
            Ok(()) if asked.elapsed() >= STEP => {}
            Ok(()) => {
                tracing::info!("the host's clock was set, or it slept: the guest's follows");
                steps = Steps(now);
            }
            Err(error) => tracing::debug!(%error, "the guest's clock is not set"),
        }
    }
}

/// What the guest's clock was set by.
struct Steps(Duration);

impl Steps {
    fn has_stepped(&self, offset: Duration) -> bool {
        offset.abs_diff(self.0) >= STEP
    }
}

/// The time of day less the time that the host ran: it changes with steps of the clock, and with
/// time in suspend, in which CLOCK_MONOTONIC stands (clock_gettime(2)).
fn since_start_of_clock() -> Duration {
    let clock = |id| clock_gettime(id).map(Duration::from).unwrap_or_default();
    clock(ClockId::CLOCK_REALTIME).saturating_sub(clock(ClockId::CLOCK_MONOTONIC))
}

async fn set(agent: &Agent) -> Result<()> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from);
    let now = now.unwrap_or_default();
    let request = SetGuestDateTimeRequest {
        Sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        Usec: i64::from(now.subsec_micros()),
        ..Default::default()
    };
    agent.set_guest_date_time(&request, AGENT_CALL).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_either_way_is_noticed_and_ntps_corrections_are_not() {
        let steps = Steps(Duration::from_secs(1_000_000));
        for (offset, stepped) in [
            (1_000_000_000, false),
            (1_000_000_400, false),
            (999_999_600, false),
            (1_000_003_000, true),
            (999_997_000, true),
        ] {
            assert_eq!(steps.has_stepped(Duration::from_millis(offset)), stepped);
        }
    }

    #[test]
    fn the_host_has_a_time_of_day() {
        assert!(since_start_of_clock() > Duration::from_secs(1_000_000_000));
    }
}
