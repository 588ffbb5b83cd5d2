//! How an end is brought about that the guest may not want. Whatever a guest, its file server or a
//! storage below a volume does, a SIGKILL and the removal after it are over within 15 s; the last
//! resort is always to end the machine, and a machine that has ended is asked nothing.
//!
//! With `kill_timeout_seconds = 10`, counted from the SIGKILL:
//!
//! | step | over by | if not |
//! |---|---|---|
//! | the agent's answer | 5 s ([`signal_deadline`]) | the machine is ended |
//! | the exit of the init | 10 s | the machine is ended |
//! | output read | the delete's end less 2 s, 10.9 s after an exit at 9.9 s ([`DeleteBy::drained`]) | it is lost |
//! | removed in the guest, disks unplugged | 12 s, or 3 s after the delete began ([`DeleteBy::removed`]) | the machine is ended |
//! | the host's mounts taken off | 2 s later ([`MOUNTS_RELEASE`](crate::deadlines::MOUNTS_RELEASE)) | they go when the kernel lets them |
//!
//! A task that ended by itself has the same steps without the first two: 10 s for its output, 12 s
//! in all. The host's poststop hooks, if a client gave it any, come after that and have their own
//! time. A sandbox that is told to stop ends its machine at once: QEMU has 0.3 s to quit and is
//! killed, helpers likewise.

use std::time::Duration;

use tokio::time::Instant;
use ttrpc::Code;

use crate::deadlines::{DELETE, DELETE_AT_LEAST, DELETE_IN_GUEST, SIGNAL_ANSWER};
use crate::error::Result;

/// How long the agent may take to say that a signal is sent: well below the time in which a SIGKILL
/// has to work.
pub fn signal_deadline(kill_timeout: Duration) -> Duration {
    SIGNAL_ANSWER.min(kill_timeout / 2)
}

/// By when which part of a delete is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeleteBy {
    pub drained: Instant,
    pub removed: Instant,
}

impl DeleteBy {
    /// Of a delete that begins now, of a container that got its first SIGKILL at `killed`.
    pub fn from(now: Instant, killed: Option<Instant>) -> DeleteBy {
        let end = now + DELETE;
        let removed = killed.map_or(end, |killed| {
            (killed + DELETE).clamp(now + DELETE_AT_LEAST, end)
        });
        DeleteBy {
            drained: removed - DELETE_IN_GUEST,
            removed,
        }
    }
}

/// What comes of a SIGKILL to a container, by the agent's answer to it: `Some` says why the machine
/// has to end now. An agent that knows of no such process has to have told its exit, so that is for
/// the clock.
pub fn refuses_to_kill(answer: &Result<()>) -> Option<String> {
    match answer {
        Err(error) if error.code() != Code::NOT_FOUND => Some(format!(
            "the guest did not obey a SIGKILL, and so was ended: {error}"
        )),
        _ => None,
    }
}

/// Why a machine ends whose guest has taken a SIGKILL and does not let the process go.
pub fn overdue(container: &str, kill_timeout: Duration) -> String {
    format!(
        "task {container} did not end within {} s of a SIGKILL, so the virtual machine was ended: \
         its processes, its \
         file server or a storage below a volume hangs",
        kill_timeout.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadlines::MOUNTS_RELEASE;
    use crate::error::Error;

    #[tokio::test(start_paused = true)]
    async fn kill_and_delete_are_over_in_15_s() {
        let killed = Instant::now();
        let timeout = Duration::from_secs(10);
        assert!(signal_deadline(timeout) < timeout);
        for tenths in 0..=110 {
            let begun = killed + Duration::from_millis(100) * tenths;
            let by = DeleteBy::from(begun, Some(killed));
            assert!(
                by.removed + MOUNTS_RELEASE <= killed + Duration::from_secs(16),
                "begun after {tenths}/10 s"
            );
            assert!(begun < by.drained && by.drained < by.removed);
        }
        let last = DeleteBy::from(killed + timeout, Some(killed));
        assert!(last.removed + MOUNTS_RELEASE <= killed + Duration::from_secs(15));
        let by_itself = DeleteBy::from(killed, None);
        assert!(by_itself.removed + MOUNTS_RELEASE < killed + Duration::from_secs(15));
        assert_eq!(DeleteBy::from(killed, Some(killed)), by_itself);
    }

    #[test]
    fn a_short_time_for_a_sigkill_has_room_for_the_answer() {
        assert_eq!(
            signal_deadline(Duration::from_secs(1)),
            Duration::from_millis(500)
        );
        assert_eq!(
            signal_deadline(Duration::from_secs(3600)),
            Duration::from_secs(5)
        );
    }

    #[test]
    fn any_answer_but_done_and_gone_ends_the_machine() {
        assert_eq!(refuses_to_kill(&Ok(())), None);
        assert_eq!(
            refuses_to_kill(&Err(Error::not_found("no such process"))),
            None
        );
        for error in [
            Error::invalid("no"),
            Error::internal("no"),
            Error::unimplemented("no"),
            Error::deadline("late"),
        ] {
            assert!(
                refuses_to_kill(&Err(error.clone()))
                    .unwrap()
                    .contains(&error.to_string())
            );
        }
    }
}
