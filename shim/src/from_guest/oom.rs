//! Containers that ran out of memory, at a rate that costs the host nothing whatever the guest
//! says.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Agent;
use crate::error::Result;

/// Events that are taken one after the other, and how long after that each of the next waits. A
/// guest that names one without end costs ten questions a second.
const BURST: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

/// Before an agent that gives none is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// So much at once, and then no more than so much at a time.
#[derive(Debug)]
pub struct Bucket {
    burst: u32,
    each: Duration,
    /// When it will be full again.
    full: Instant,
}

impl Bucket {
    /// `burst` at once, then one in `each`.
    pub fn new(burst: u32, each: Duration) -> Bucket {
        Bucket {
            burst,
            each,
            full: Instant::now(),
        }
    }

    /// Whether there is one more now, which is taken.
    pub fn take(&mut self) -> bool {
        self.wait_for().is_zero() && {
            self.full = self.full.max(Instant::now()) + self.each;
            true
        }
    }

    /// Waits until there is one more, and takes it.
    pub async fn next(&mut self) {
        sleep(self.wait_for()).await;
        self.full = self.full.max(Instant::now()) + self.each;
    }

    /// How long until there is one more.
    fn wait_for(&self) -> Duration {
        (self.full + self.each).saturating_duration_since(Instant::now() + self.each * self.burst)
    }
}

/// Asks the agent for containers that ran out of memory until it fails, and tells each that it
/// names: one may be of another sandbox, or none at all.
pub async fn watch_oom(agent: &Agent, tell: &(dyn Fn(String) + Send + Sync)) {
    let mut pace = Bucket::new(BURST, PAUSE);
    loop {
        pace.next().await;
        let event: Result<Option<String>> = agent.oom_event().await;
        match event {
            Ok(Some(container)) => tell(container),
            Ok(None) => sleep(ASK_AGAIN).await,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_a_flood_does_not() {
        let mut bucket = Bucket::new(3, Duration::from_secs(1));
        assert_eq!((0..10).filter(|_| bucket.take()).count(), 3);
        tokio::time::advance(Duration::from_millis(1100)).await;
        assert_eq!((0..10).filter(|_| bucket.take()).count(), 1);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!((0..10).filter(|_| bucket.take()).count(), 3);
        let start = Instant::now();
        for _ in 0..10 {
            bucket.next().await;
        }
        assert_eq!(start.elapsed().as_secs(), 10);
    }
}
