//! The guest's time of day is the host's.
//!
//! A guest that boots reads the host's clock in whole seconds, and then counts by itself. So it is
//! asked for its time before its first container runs, again and again later, because no two clocks
//! go alike and a machine may have been stopped, and at once when somebody sets the host's clock or
//! the host wakes from sleep: the kernel tells of both through a timer.
//!
//! ```text
//!  host   before ──────── middle ──────── after      the answer is taken for one of the middle,
//!  guest            its time ^                        wrong by half of the call at most
//! ```
//!
//! A small difference goes away by a clock that is a little faster or slower for a while: no time
//! comes twice. CLOCK_MONOTONIC never jumps.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use guest_protocol::protocols::agent::SetGuestDateTimeRequest;
use guest_protocol::protocols::clock::Correction;
use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{
    ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags,
};
use nix::time::{ClockId, clock_gettime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

use crate::deadlines::{AGENT_CALL, CLOCK_LOOK_AGAIN};
use crate::error::Result;
use crate::from_guest::Agent;

/// A difference that is not worth a change.
const SMALL: Duration = Duration::from_micros(200);

/// From here on the clock is set instead of sped up or slowed down, which moves it by half a
/// millisecond in a second (adjtime(3)).
const LARGE: Duration = Duration::from_millis(100);

/// How long a call may take to be good enough, and how often one is tried for that.
const QUICK: Duration = Duration::from_millis(2);
const TRIES: usize = 5;

/// A time that does not come, in seconds since 1970, and that the kernel can count to.
const NEVER: i64 = 1 << 33;

/// The clock of one guest.
#[derive(Clone)]
pub struct GuestClock {
    agent: Agent,
    /// It can say what its time is.
    can_tell: bool,
}

/// How the guest's time differs from the host's, in nanoseconds; above zero it is late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Difference {
    late: i64,
    /// How wrong that may be.
    error: Duration,
}

impl GuestClock {
    /// Not asked yet.
    pub fn new(agent: Agent, can_tell: bool) -> GuestClock {
        GuestClock { agent, can_tell }
    }

    /// Sets it, before anything in the guest can see that.
    pub async fn set_first(&self) {
        if let Err(error) = self.set(true).await {
            tracing::warn!(%error, "the guest's clock is not set");
        }
    }

    /// Keeps it. Runs until it is dropped.
    pub async fn follow(self) {
        let steps = HostSteps::new();
        if let Err(error) = &steps {
            tracing::warn!(%error, "the guest's clock follows steps of the host's late");
        }
        let steps = steps.ok();
        loop {
            let stepped = async {
                match &steps {
                    Some(steps) => steps.next().await,
                    None => std::future::pending().await,
                }
            };
            let has_stepped = timeout(CLOCK_LOOK_AGAIN, stepped).await.is_ok();
            if has_stepped {
                tracing::info!("the host's clock was set, or it slept: the guest's follows");
            }
            if !has_stepped && !self.can_tell {
                continue;
            }
            if let Err(error) = self.set(false).await {
                tracing::debug!(%error, "the guest's clock is not set");
                // A machine that is stopped answers nobody; its timer comes again.
                sleep(AGENT_CALL).await;
            }
        }
    }

    async fn set(&self, first: bool) -> Result<()> {
        if !self.can_tell {
            let now = now();
            let request = SetGuestDateTimeRequest {
                Sec: now.div_euclid(1_000_000_000),
                Usec: now.rem_euclid(1_000_000_000) / 1000,
                ..Default::default()
            };
            return self.agent.set_guest_date_time(&request, AGENT_CALL).await;
        }
        let difference = self.difference().await?;
        match difference.correction(first) {
            Some(by) => {
                tracing::debug!(?difference, by.slowly, "the guest's clock is corrected");
                self.agent.correct_clock(&by, AGENT_CALL).await
            }
            None => Ok(()),
        }
    }

    /// The best of some answers.
    async fn difference(&self) -> Result<Difference> {
        let mut best: Option<Difference> = None;
        for _ in 0..TRIES {
            let before = now();
            let guest = self.agent.read_clock(AGENT_CALL).await?;
            let one = Difference::of(before, guest, now());
            if best.is_none_or(|best| one.error < best.error) {
                best = Some(one);
            }
            if one.error * 2 <= QUICK {
                break;
            }
        }
        Ok(best.unwrap_or(Difference {
            late: 0,
            error: Duration::MAX,
        }))
    }
}

impl Difference {
    fn of(before: i64, guest: i64, after: i64) -> Difference {
        let took = after.saturating_sub(before).max(0);
        Difference {
            late: before.saturating_add(took / 2).saturating_sub(guest),
            error: Duration::from_nanos(took.unsigned_abs() / 2),
        }
    }

    /// What is to be done about it. The first time whatever the answer says is better than what the
    /// guest has; later a difference that may be none stays.
    fn correction(self, first: bool) -> Option<Correction> {
        let size = Duration::from_nanos(self.late.unsigned_abs());
        let doubtful = size < SMALL || size < self.error;
        if !first && doubtful {
            return None;
        }
        Some(Correction {
            nanoseconds: self.late,
            slowly: !first && size < LARGE,
            ..Default::default()
        })
    }
}

/// The host's time of day in nanoseconds since 1970.
fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap_or(TimeSpec::new(0, 0));
    now.tv_sec()
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec())
}

/// Tells when the host's clock was set, or the host has slept.
struct HostSteps(AsyncFd<Timer>);

struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl HostSteps {
    fn new() -> std::io::Result<HostSteps> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = Timer(TimerFd::new(TimerClock::CLOCK_REALTIME, flags)?);
        // SAFETY: the timer is owned by the value, and closed after it is deregistered.
        Ok(HostSteps(unsafe { AsyncFd::register(timer) }?))
    }

    async fn next(&self) {
        let asked = self.0.get_ref().0.set(
            Expiration::OneShot(TimeSpec::new(NEVER, 0)),
            TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET,
        );
        match asked {
            Ok(()) => {}
            // Since it was last asked.
            Err(Errno::ECANCELED) => return,
            Err(_) => std::future::pending().await,
        }
        let mut number = [0; 8];
        let cancelled = self.0.async_io(Interest::READABLE, |timer| {
            Ok(nix::unistd::read(&timer.0, &mut number)?)
        });
        match cancelled.await {
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
            _ => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    #[test]
    fn an_answer_is_one_of_the_middle_of_the_call() {
        let seen = Difference::of(1000 * MS, 300 * MS, 1004 * MS);
        assert_eq!(seen.late, 702 * MS);
        assert_eq!(seen.error, Duration::from_millis(2));
        // A guest may say anything, and the host's clock may be set meanwhile.
        Difference::of(i64::MAX, i64::MIN, 0);
        Difference::of(0, i64::MAX, i64::MAX);
    }

    #[test]
    fn a_clock_is_set_at_the_start_and_nudged_later() {
        let seen = |late, error| Difference {
            late,
            error: Duration::from_millis(error),
        };
        let set = |late, error, first| {
            let by = seen(late, error).correction(first)?;
            Some((by.nanoseconds, by.slowly))
        };
        assert_eq!(set(-3 * MS, 1, true), Some((-3 * MS, false)));
        assert_eq!(set(3 * MS, 1, false), Some((3 * MS, true)));
        assert_eq!(set(-3000 * MS, 1, false), Some((-3000 * MS, false)));
        assert_eq!(set(3 * MS, 9, false), None, "it may be none");
        assert_eq!(set(MS / 10, 0, false), None);
    }

    #[tokio::test]
    async fn nothing_is_heard_of_a_clock_that_nobody_sets() {
        let steps = HostSteps::new().unwrap();
        let heard = timeout(Duration::from_millis(20), steps.next()).await;
        assert!(heard.is_err());
        assert!(now() > 1_000_000_000 * 1_000_000_000);
    }
}
