//! How long anything is waited for, in one place. A wait that has another one
//! inside gives up after it: the inner one knows better what is late. The test below holds them to
//! that, and to what containerd and the kubelet wait for us.
//!
//! What an administrator may change is in the configuration (`boot_timeout_seconds`,
//! `kill_timeout_seconds`); what QEMU and the helpers take is in [`vmm::deadlines`].

use std::time::Duration;

/// What the agent keeps its own, shorter, deadlines below (`agent/src/deadlines.rs`).
pub use guest_protocol::deadlines::*;

/// A running agent answers a plain call, which only changes something inside the guest.
pub const AGENT_CALL: Duration = Duration::from_secs(10);

/// One attempt to connect to the agent.
pub const AGENT_DIAL: Duration = Duration::from_secs(1);

/// The agent answers over a new connection; the next one may be better.
pub const AGENT_FIRST_ANSWER: Duration = Duration::from_secs(3);

/// Between two such attempts, and between two looks whether the guest has its vsock driver.
pub const AGENT_DIAL_AGAIN: Duration = Duration::from_millis(50);

/// Before an agent that is there is dialled again.
pub const AGENT_REDIAL: Duration = Duration::from_millis(5);

/// An agent that has not said that it is ready this long after the guest got its vsock driver never
/// will.
pub const AGENT_NOTICE_AFTER_DRIVER: Duration = Duration::from_secs(1);

/// The same, counted from the machine's start, where QEMU cannot tell when the guest got its
/// driver.
pub const AGENT_NOTICE_AFTER_START: Duration = Duration::from_secs(10);

/// The end of the machine is noticed after that of the agent's connection, and is the better
/// reason.
pub const AGENT_LAST_WORDS: Duration = Duration::from_secs(1);

/// Before the guest is asked once more to remove a container: an exec of it may be on its way.
pub const CONTAINER_REMOVE_AGAIN: Duration = Duration::from_millis(100);

/// The process of a container's pid has gone with its container. Nobody hears of the container's
/// end before, so it is short.
pub const TASK_PROCESS_GONE: Duration = Duration::from_millis(200);

/// The process of a container's pid is confined. The host's own work, which takes a few
/// milliseconds.
pub const TASK_PROCESS_READY: Duration = Duration::from_secs(5);

/// The guest tells statistics. containerd's collector waits 2 s for those of one shim.
pub const STATS: Duration = Duration::from_secs(2);

/// Growing takes the guest well below a second; what it cannot give back in this time it keeps for
/// now.
pub const MACHINE_RESIZE: Duration = Duration::from_secs(10);

/// Between two looks whether a disk of the host's has grown.
pub const DISK_LOOK: Duration = Duration::from_secs(1);

/// A disk that a guest has not let go of is asked for again after so long.
pub const DISK_DETACH_AGAIN: Duration = Duration::from_secs(10);

/// Between two looks at what of a network namespace no event tells.
pub const NETWORK_LOOK: Duration = Duration::from_secs(2);

/// A network namespace in which nothing has changed for so long is looked at: one link is several
/// events.
pub const NETWORK_CALM: Duration = Duration::from_millis(20);

/// One that does not come to rest is looked at all the same.
pub const NETWORK_LONGEST_STORM: Duration = Duration::from_millis(500);

/// How long a guest may take to let go of a card.
pub const LINK_UNPLUG: Duration = Duration::from_secs(5);

/// Between two changes of a machine's memory that its guest asks for.
pub const MEMORY_CHANGE_PAUSE: Duration = Duration::from_millis(100);

/// A machine does not shrink so soon after its last change.
pub const MEMORY_SHRINK_AFTER: Duration = Duration::from_secs(30);

/// A machine that could not be given more memory is not tried again for so long.
pub const MEMORY_GROW_AGAIN: Duration = Duration::from_secs(60);

/// The kernel may have to take memory back before a cgroup's limit holds; where the limit is
/// systemd's to set, it has as long.
pub const CGROUP_LIMITS: Duration = Duration::from_secs(10);

/// The agent says that a signal is sent, if half of `kill_timeout_seconds` is not less.
pub const SIGNAL_ANSWER: Duration = Duration::from_secs(5);

/// A delete's output and the guest's part of it, in all.
pub const DELETE: Duration = Duration::from_secs(12);

/// The part of that which output leaves to the guest.
pub const DELETE_IN_GUEST: Duration = Duration::from_secs(2);

/// How little a delete has, however late it began after a SIGKILL.
pub const DELETE_AT_LEAST: Duration = Duration::from_secs(3);

/// The host takes off a container's mounts; a storage that hangs keeps them longer.
pub const MOUNTS_RELEASE: Duration = Duration::from_secs(2);

/// Between two looks at the host's clock: so long may the guest's be behind.
pub const CLOCK_LOOK_AGAIN: Duration = Duration::from_secs(60);

/// A volume is searched for sockets of the host before its container is made.
pub const SOCKETS_FIRST_SCAN: Duration = Duration::from_secs(1);

/// From the first change in a directory to the look at it: a server binds its socket, and then
/// says whose it is.
pub const SOCKETS_SETTLE: Duration = Duration::from_millis(10);

/// Between two looks, at least.
pub const SOCKETS_PAUSE: Duration = Duration::from_millis(100);

/// After which the agent is told again what there is: longer than a guest's kernel believes a name
/// (virtiofsd's default is one second).
pub const SOCKETS_CONFIRM: Duration = Duration::from_millis(1500);

/// Between two looks without notice of changes.
pub const SOCKETS_LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The agent sends its line for a socket of the host.
pub const HOST_SOCKET: Duration = Duration::from_secs(10);

/// Between two looks for room in a server's backlog: the kernel has no notice for it.
pub const HOST_SOCKET_LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A listener in the pod's namespace takes a connection that is its own.
pub const FORWARD_LISTENER: Duration = Duration::from_secs(10);

/// The kernel answers over netlink. It waits for other namespaces' changes: one lock is for all of
/// them.
pub const NETLINK: Duration = Duration::from_secs(10);

/// After init's death its execs are killed by the kernel; one that is not heard of by then is taken
/// for dead.
pub const EXECS_AFTER_INIT: Duration = Duration::from_secs(2);

/// The host mounts what a container has of it.
pub const HOST_MOUNTS: Duration = Duration::from_secs(60);

/// The last events of a sandbox. containerd may be away; `delete` makes up for what it misses.
pub const EVENTS_FLUSH: Duration = Duration::from_millis(800);

/// Work that is still running at the sandbox's end: hooks, calls to a guest that has ended.
/// containerd's `delete` begins when `Shutdown` is answered.
pub const WORK_AT_END: Duration = Duration::from_millis(800);

/// A sandbox without a task waits for a request: containerd may have been killed between a task's
/// `Delete` and `Shutdown`.
pub const IDLE_SANDBOX: Duration = Duration::from_secs(60);

/// A server waits for its first request, which containerd makes as soon as it knows the address:
/// the `start` of this server may have been killed before it printed that.
pub const FIRST_REQUEST: Duration = Duration::from_secs(15);

/// Whoever has just got an answer may have another question.
pub const IDLE_AFTER_ANSWER: Duration = Duration::from_secs(5);

/// Between two words of the guest's about memory, once it has said many.
pub const OOM_EVENT_EACH: Duration = Duration::from_millis(100);

/// Before an agent that cannot tell who is out of memory is asked again.
pub const OOM_ASK_AGAIN: Duration = Duration::from_secs(10);

/// Before the next connection is accepted when the process is out of descriptors: each of its
/// connections that ends gives two back.
pub const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// One delivery of an event to containerd.
pub const EVENT_DELIVERY: Duration = Duration::from_secs(5);

/// A client opens its end of a fifo, after the shim. containerd opens its own in the background, so
/// on a busy host a process may be gone before.
pub const FIFO_CLIENT: Duration = Duration::from_secs(3);

/// Between two looks for that client.
pub const FIFO_CLIENT_LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The disk opens a log file.
pub const LOG_FILE_OPEN: Duration = Duration::from_secs(10);

/// Output that nobody has taken for this long is given up when its process is deleted.
pub const OUTPUT_UNREAD: Duration = Duration::from_secs(2);

/// Between two looks how far a log file is written.
pub const LOG_FILE_LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Log files are written to their end when the sandbox ends.
pub const LOG_FILES_AT_END: Duration = Duration::from_millis(500);

/// Whoever undoes what is left of a sandbox waits for another one who does.
pub const SANDBOX_LOCK_TO_UNDO: Duration = Duration::from_secs(1);

/// A logger is ready, as in containerd's own shim.
pub const LOGGER_READY: Duration = Duration::from_secs(10);

/// A logger ends after its input has ended, before it is killed.
pub const LOGGER_END: Duration = Duration::from_secs(3);

/// A client of a polled process takes what there is. One that has not by then may lose what it has
/// not read when the process ends.
pub const CLIENT_READS: Duration = Duration::from_secs(1);

/// Before a stream that was refused is dialled again.
pub const STREAM_REDIAL: Duration = Duration::from_millis(20);

/// A server writes the first line of its ledger. One that has not by then was killed.
pub const LEDGER_BEGIN: Duration = Duration::from_secs(60);

/// A killed process is gone.
pub const PROCESS_GONE: Duration = Duration::from_secs(2);

/// Another `start` of the same sandbox, or a sweep that has come to it, lets go of the lock.
pub const SANDBOX_LOCK: Duration = Duration::from_secs(10);

/// Between two looks whether it has: the kernel tells nobody.
pub const SANDBOX_LOCK_LOOK_AGAIN: Duration = Duration::from_millis(5);

/// systemd makes or changes a scope.
pub const SCOPE_SET: Duration = Duration::from_secs(10);

/// systemd takes a scope away.
pub const SCOPE_UNDO: Duration = Duration::from_secs(2);

/// The process that a scope was made for is gone.
pub const SCOPE_PLACEHOLDER_GONE: Duration = Duration::from_secs(1);

/// The kernel lets go of a cgroup whose processes are dead.
pub const CGROUP_REMOVE: Duration = Duration::from_secs(1);

/// The guest lets go of a disk.
pub const DISK_DETACH: Duration = Duration::from_secs(5);

/// How little it has for that when time is short.
pub const DISK_DETACH_AT_LEAST: Duration = Duration::from_millis(500);

/// pasta has made its network.
pub const USER_MODE_READY: Duration = Duration::from_secs(10);

/// Between two looks whether it has.
pub const USER_MODE_LOOK: Duration = Duration::from_millis(5);

/// A hook that names no time of its own.
pub const HOOK: Duration = Duration::from_secs(30);

/// A new server says its first word.
pub const SERVER_READY: Duration = Duration::from_secs(5);

/// A server ends in order. One that does not ends all the same; `delete` does the rest.
pub const SERVER_END: Duration = Duration::from_secs(10);

/// A living server finishes its own end before `delete` kills it.
pub const SERVER_END_BEFORE_DELETE: Duration = Duration::from_secs(2);

/// A server says that it is there.
pub const SERVER_ANSWER: Duration = Duration::from_secs(1);

/// What other sandboxes left is undone, beside one's own.
pub const SWEEP: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::guest::boot::ATTEMPTS;

    /// The kubelet's `runtimeRequestTimeout`, for each call of the CRI.
    const KUBELET: Duration = Duration::from_secs(120);

    /// containerd's `cleanupTimeout`, for one run of `delete`.
    const CONTAINERD_DELETE: Duration = Duration::from_secs(5);

    #[test]
    fn what_waits_for_another_wait_gives_up_after_it() {
        let config = Config::default();
        let (boot, kill) = (config.boot_deadline(), config.kill_timeout());
        for (inner, outer) in [
            (2 * vmm::deadlines::QEMU_MONITOR, boot),
            (vmm::deadlines::VSOCK_DAEMON_SOCKET, boot),
            (vmm::deadlines::QMP_COMMAND, boot),
            (NETLINK, boot),
            (
                AGENT_NOTICE_AFTER_START + AGENT_DIAL + AGENT_FIRST_ANSWER,
                boot,
            ),
            (AGENT_DIAL + AGENT_FIRST_ANSWER, AGENT_CALL),
            (AGENT_CALL, boot),
            (ATTEMPTS * boot, KUBELET),
            (CREATE_CONTAINER, KUBELET),
            (START_PROCESS, KUBELET),
            (SIGNAL_ANSWER, kill),
            (DELETE_IN_GUEST, DELETE_AT_LEAST),
            (DELETE_AT_LEAST, DELETE),
            (CONTAINER_REMOVE_AGAIN, DELETE_IN_GUEST),
            (vmm::deadlines::MEMORY_STEP, MACHINE_RESIZE),
            (AGENT_DIAL_AGAIN, AGENT_DIAL),
            (AGENT_REDIAL, AGENT_CALL),
            (HOST_SOCKET_LOOK_AGAIN, HOST_SOCKET_CONNECTED),
            (CREATE_SANDBOX, boot),
            (HOST_MOUNTS, KUBELET),
            (REMOVE_CONTAINER, KUBELET - CREATE_CONTAINER),
            (DISK_DETACH_AT_LEAST, DISK_DETACH),
            (DISK_DETACH, DELETE),
            (OUTPUT_UNREAD, DELETE),
            (EXECS_AFTER_INIT, kill),
            (STREAM_REDIAL, STDIO_ACCEPTED),
            (FIFO_CLIENT_LOOK_AGAIN, FIFO_CLIENT),
            (SANDBOX_LOCK_LOOK_AGAIN, SANDBOX_LOCK),
            (SCOPE_PLACEHOLDER_GONE, SCOPE_UNDO),
            (
                WORK_AT_END + EVENTS_FLUSH + LOG_FILES_AT_END / 2,
                SERVER_END_BEFORE_DELETE,
            ),
            (SERVER_END_BEFORE_DELETE + SERVER_ANSWER, CONTAINERD_DELETE),
            (
                SANDBOX_LOCK_TO_UNDO + SERVER_END_BEFORE_DELETE + SWEEP,
                CONTAINERD_DELETE,
            ),
            (LOG_FILE_LOOK_AGAIN, OUTPUT_UNREAD),
            (IDLE_AFTER_ANSWER, FIRST_REQUEST),
            (FIRST_REQUEST, IDLE_SANDBOX),
            (SERVER_READY, FIRST_REQUEST),
        ] {
            assert!(inner < outer, "{inner:?} within {outer:?}");
        }
        // A guest that answers no call in time is not given more for a SIGKILL.
        assert!(AGENT_CALL <= kill);
        // containerd's collector, from its `cgroup` metrics.
        assert!(STATS <= Duration::from_secs(2));
    }
}
