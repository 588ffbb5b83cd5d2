//! How long the guest and its network are waited for, in one place. A wait that has another one
//! inside gives up after it: the inner one knows better what is late. The test below holds them to
//! that, and to what containerd and the kubelet wait for us.
//!
//! What an administrator may change is in the configuration (`boot_timeout_seconds`,
//! `kill_timeout_seconds`); what QEMU and the helpers take is in [`vmm::deadlines`].

use std::time::Duration;

/// A running agent answers a plain call, which only changes something inside the guest.
pub const AGENT_CALL: Duration = Duration::from_secs(10);

/// One attempt to reach an agent that does not say when it is ready.
pub const AGENT_DIAL: Duration = Duration::from_secs(1);

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

/// The guest makes a container.
pub const CONTAINER_CREATE: Duration = Duration::from_secs(60);

/// The guest starts a process: it includes its reading of the program from the image.
pub const PROCESS_START: Duration = Duration::from_secs(60);

/// Before the guest is asked once more to remove a container: an exec of it may be on its way.
pub const CONTAINER_REMOVE_AGAIN: Duration = Duration::from_millis(100);

/// The guest tells statistics. containerd's collector waits 2 s for those of one shim.
pub const STATS: Duration = Duration::from_secs(2);

/// An agent gives up streams that nobody claims after 30 s; those of a client that takes nearly as
/// long are made again.
pub const STREAMS_HELD: Duration = Duration::from_secs(20);

/// Growing takes the guest well below a second; what it cannot give back in this time it keeps for
/// now.
pub const MACHINE_RESIZE: Duration = Duration::from_secs(10);

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

/// The agent sends its line for a socket of the host, and the server there takes the connection.
pub const HOST_SOCKET: Duration = Duration::from_secs(10);

/// Between two looks for room in a server's backlog: the kernel has no notice for it.
pub const HOST_SOCKET_LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The agent connects to a forwarded port in the guest.
pub const FORWARD_DIAL: Duration = Duration::from_secs(10);

/// The kernel answers over netlink. It waits for other namespaces' changes: one lock is for all of
/// them.
pub const NETLINK: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::guest::boot::ATTEMPTS;

    /// The kubelet's `runtimeRequestTimeout`, for each call of the CRI.
    const KUBELET: Duration = Duration::from_secs(120);

    #[test]
    fn what_waits_for_another_wait_gives_up_after_it() {
        let config = Config::default();
        let (boot, kill) = (config.boot_deadline(), config.kill_timeout());
        for (inner, outer) in [
            (2 * vmm::deadlines::QEMU_MONITOR, boot),
            (vmm::deadlines::VSOCK_DAEMON_SOCKET, boot),
            (vmm::deadlines::QMP_COMMAND, boot),
            (NETLINK, boot),
            (AGENT_NOTICE_AFTER_START + AGENT_DIAL, boot),
            (AGENT_CALL, boot),
            (ATTEMPTS * boot, KUBELET),
            (CONTAINER_CREATE, KUBELET),
            (PROCESS_START, KUBELET),
            (SIGNAL_ANSWER, kill),
            (DELETE_IN_GUEST, DELETE_AT_LEAST),
            (DELETE_AT_LEAST, DELETE),
            (CONTAINER_REMOVE_AGAIN, DELETE_IN_GUEST),
            (vmm::deadlines::MEMORY_STEP, MACHINE_RESIZE),
            (AGENT_DIAL_AGAIN, AGENT_DIAL),
            (AGENT_REDIAL, AGENT_CALL),
            (HOST_SOCKET_LOOK_AGAIN, HOST_SOCKET),
        ] {
            assert!(inner < outer, "{inner:?} within {outer:?}");
        }
        // A guest that answers no call in time is not given more for a SIGKILL.
        assert!(AGENT_CALL <= kill);
        // containerd's collector, from its `cgroup` metrics.
        assert!(STATS <= Duration::from_secs(2));
    }
}
