//! How long everything in this crate waits, in one place. A wait that has another one inside gives
//! up after it: the inner one knows better what is late. The test below holds them to that.
//!
//! Whoever calls bounds a boot as a whole, and says how long a resize and an unplug may take.

use std::time::Duration;

/// QEMU opens its monitor, greets and takes the negotiation within this time, or not at all.
pub const QEMU_MONITOR: Duration = Duration::from_secs(10);

/// vhost-device-vsock listens within this time, or not at all.
pub const VSOCK_DAEMON_SOCKET: Duration = Duration::from_secs(10);

/// QEMU answers a QMP command within this time, where the caller names no other.
pub const QMP_COMMAND: Duration = Duration::from_secs(10);

/// QEMU ends by itself after `quit`; then it is killed.
pub const QEMU_QUIT: Duration = Duration::from_millis(300);

/// The kernel ends QEMU after SIGKILL. Longer means that it hangs in a driver.
pub const QEMU_KILL: Duration = Duration::from_secs(10);

/// virtiofsd notices that QEMU is gone and ends by itself; then the child that serves is killed,
/// and it has as long again to reap that.
pub const VIRTIOFSD_GOODBYE: Duration = Duration::from_millis(200);

/// The kernel ends a helper after SIGKILL.
pub const HELPER_KILL: Duration = Duration::from_millis(300);

/// The end of QEMU comes after a failed command or a closed monitor, or the event that explains it
/// after its end.
pub const QEMU_LAST_WORDS: Duration = Duration::from_millis(500);

/// The end of a helper comes after QEMU has refused its device.
pub const HELPER_LAST_WORDS: Duration = Duration::from_millis(500);

/// QEMU's end comes after that of a helper, which ends with its connection to QEMU and may be
/// noticed first; or any part's end after an error that it has caused.
pub const MACHINE_LAST_WORDS: Duration = Duration::from_millis(300);

/// A binary says over QMP what it can do.
pub const CAPABILITIES: Duration = Duration::from_secs(10);

/// The end of a binary that is no QEMU comes after that of its monitor.
pub const CAPABILITIES_LAST_WORDS: Duration = Duration::from_secs(1);

/// One that was asked takes its `quit`; it is killed in any case.
pub const CAPABILITIES_QUIT: Duration = Duration::from_millis(100);

/// virtiofsd says its version.
pub const VIRTIOFSD_VERSION: Duration = Duration::from_secs(5);

/// The dynamic loader lists a program's libraries.
pub const LIBRARIES_LISTED: Duration = Duration::from_secs(5);

/// A guest that changes its memory makes its next step. One that cannot give back any more tries
/// again only after a minute.
pub const MEMORY_STEP: Duration = Duration::from_secs(3);

/// Between two looks at the size of the memory. QEMU tells it by events too, but not more than one
/// a second.
pub const MEMORY_LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Between two looks whether a device is still there.
pub const UNPLUG_LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Between two looks for the daemon's socket. A look costs 10 µs.
pub const VSOCK_DAEMON_LOOK_AGAIN: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_another_wait_gives_up_after_it() {
        for (inner, outer) in [
            (QMP_COMMAND, 2 * QEMU_MONITOR),
            (QEMU_QUIT, QEMU_KILL),
            (CAPABILITIES_QUIT, CAPABILITIES),
            (CAPABILITIES_LAST_WORDS, CAPABILITIES),
            (MEMORY_LOOK_AGAIN, MEMORY_STEP),
            (UNPLUG_LOOK_AGAIN, QMP_COMMAND),
            (VSOCK_DAEMON_LOOK_AGAIN, VSOCK_DAEMON_SOCKET),
        ] {
            assert!(inner < outer, "{inner:?} within {outer:?}");
        }
    }
}
