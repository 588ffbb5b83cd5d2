//! Every time limit of the agent: deadlines, the pauses between attempts that a deadline bounds,
//! and how long something is kept that may never be fetched.
//!
//! A wait inside a call of the host's ends before the host gives up on the call
//! (`guest_protocol::deadlines`), so that the host hears what failed. The test below adds up what
//! one call may wait for.

use std::time::Duration;

// Booting.

/// How long the ready notice has before the rest of the boot goes on beside it. What connects from
/// then on waits in the sockets' queues.
pub const READY_NOTICE_HEAD_START: Duration = Duration::from_millis(50);

/// How long the ready notice is tried: the vsock device may come after the agent, and the host may
/// be busy.
pub const READY_NOTICE: Duration = Duration::from_secs(60);

/// One attempt to dial the host for the ready notice, and the write of its line.
pub const READY_NOTICE_ATTEMPT: Duration = Duration::from_secs(2);

/// Between two attempts. Where there is no vsock device yet, an attempt fails at once.
pub const READY_NOTICE_PAUSE: Duration = Duration::from_millis(5);

/// How long the host may take to answer the ready notice with the key.
pub const KEY_ANSWER: Duration = Duration::from_secs(10);

/// How long a hot-plugged device may take to appear, unless `agent.hotplug_timeout` says otherwise.
pub const DEVICE_HOTPLUG: Duration = Duration::from_secs(3);

/// Between two looks at sysfs for a device.
pub const DEVICE_HOTPLUG_PAUSE: Duration = Duration::from_millis(5);

/// How long plugged-in CPUs may take to come online.
pub const CPUS_ONLINE: Duration = Duration::from_secs(5);

/// Between two looks at sysfs for CPUs.
pub const CPUS_ONLINE_PAUSE: Duration = Duration::from_millis(50);

/// How long the lookups of the mounts below the host's share may take: each asks the host's file
/// server. Only clients of Kata's ask for them; their own limit is 30 s or more.
pub const SHARE_LOOKUPS: Duration = Duration::from_secs(10);

/// Between two looks at a volume whose changes a container shall be told of, as in Kata's agent. The
/// kubelet itself takes up to a minute to write one.
pub const WATCHED_VOLUME_PAUSE: Duration = Duration::from_secs(2);

/// How long the kernel may take to answer a netlink request. It answers before it returns from the
/// request, so this is for a kernel that is broken: the agent's one thread waits.
pub const NETLINK_ANSWER: Duration = Duration::from_secs(5);

// Connections.

/// How long a connection may take to show the key. The host sends it with the connection.
pub const KEY_SHOWN: Duration = Duration::from_secs(5);

/// After a failed accept(2), as for want of descriptors: other connections must end first.
pub const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How long a peer may take to send the line that its stream begins with.
pub const REQUEST_LINE: Duration = Duration::from_secs(5);

/// How long one address of the loopback may take to accept a forwarded connection; there are two.
pub const LOOPBACK_CONNECT: Duration = Duration::from_secs(4);

/// How long a client of a UDP server of the host may wait for an answer. Then its next datagram
/// begins anew.
pub const LOOPBACK_ANSWER: Duration = Duration::from_secs(20);

/// The same for another answer.
pub const LOOPBACK_IDLE: Duration = Duration::from_secs(3);

/// How long a call waits for the machine to need another size. Then the host asks again.
pub const MEMORY_NEED: Duration = Duration::from_secs(60);

/// Between two looks at the memory of containers that are not slowed down.
pub const MEMORY_LOOK: Duration = Duration::from_secs(5);

/// Between two looks at the memory of containers that are.
pub const MEMORY_PAUSE: Duration = Duration::from_millis(50);

/// How long the host may take to accept a connection to the vsock port for its unix sockets.
pub const HOST_DIAL: Duration = Duration::from_secs(5);

/// How long the host may take to connect to its unix socket and say so.
pub const HOST_SOCKET_ANSWER: Duration = Duration::from_secs(12);

/// How long a stdio stream waits for its process to be made. A process that came later would run
/// without it, and nobody would know.
pub const STDIO_STREAM_UNCLAIMED: Duration = Duration::from_secs(90);

// Containers.

/// From the clone of a process to the exec of its program, where the host counts them as one call;
/// for a container's first process, each of the two halves.
pub const PROCESS_SETUP: Duration = Duration::from_secs(55);

/// How long PID 1 of a pod's shared pid namespace may take to be ready: a copy of the agent.
pub const POD_INIT_SETUP: Duration = Duration::from_secs(20);

/// How long PID 1 of a pod's shared pid namespace may take to exit once it was killed.
pub const PROCESS_EXIT_AFTER_SIGKILL: Duration = Duration::from_secs(5);

/// A container's whole removal: its processes' deaths, their collection, its cgroup.
pub const CONTAINER_REMOVAL: Duration = Duration::from_secs(8);

/// The exits of a removed container's processes are told: they are dead by then.
pub const PROCESS_COLLECTED: Duration = Duration::from_secs(1);

/// The removal of a cgroup in which a container could not be made.
pub const FAILED_CREATE_CLEANUP: Duration = Duration::from_secs(10);

/// Between two attempts to remove a cgroup that the kernel still calls busy.
pub const CGROUP_BUSY_PAUSE: Duration = Duration::from_millis(2);

/// How long the kernel may take to freeze or to thaw a container.
pub const CGROUP_FREEZE: Duration = Duration::from_secs(8);

/// How long the kernel may take to bring a container's memory below a new limit.
pub const MEMORY_RECLAIM: Duration = Duration::from_secs(8);

/// How long an exit waits for its OOM event to be fetched, if a caller waits for events.
pub const OOM_EVENT_FETCHED: Duration = Duration::from_millis(200);

/// After its process has exited a polled output that was silent for so long is at its end, though a
/// child may hold it open. Kata's agent says so too.
pub const OUTPUT_AFTER_EXIT: Duration = Duration::from_millis(500);

/// How long output may still be delivered after its container was removed.
pub const OUTPUT_AFTER_REMOVAL: Duration = Duration::from_secs(10);

/// How long answers may take to leave before the machine is powered off.
pub const ANSWERS_BEFORE_POWER_OFF: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use guest_protocol::deadlines as host;

    use super::*;

    #[test]
    fn the_agent_gives_up_before_the_host_does() {
        // The agent mounts two shares.
        assert!(2 * DEVICE_HOTPLUG < host::CREATE_SANDBOX);
        assert!(
            DEVICE_HOTPLUG + POD_INIT_SETUP + PROCESS_SETUP + FAILED_CREATE_CLEANUP
                < host::CREATE_CONTAINER
        );
        assert!(PROCESS_SETUP < host::START_PROCESS);
        assert!(CONTAINER_REMOVAL + PROCESS_COLLECTED < host::REMOVE_CONTAINER);
        assert!(CGROUP_FREEZE < host::CHANGE_CONTAINER);
        assert!(MEMORY_RECLAIM < host::CHANGE_CONTAINER);
        assert!(CPUS_ONLINE < host::ONLINE_CPU_MEM);
        assert!(MEMORY_NEED + MEMORY_LOOK + MEMORY_PAUSE < host::MEMORY_NEED);
        assert!(DEVICE_HOTPLUG + NETLINK_ANSWER < host::UPDATE_NETWORK);
        assert!(REQUEST_LINE < host::STDIO_ACCEPTED);
        // Here the agent is the one who waits for the other.
        assert!(STDIO_STREAM_UNCLAIMED > host::STREAMS_HELD + host::START_PROCESS);
        assert!(2 * LOOPBACK_CONNECT < host::FORWARD_ACCEPTED);
        // Here too.
        assert!(HOST_SOCKET_ANSWER > host::HOST_SOCKET_CONNECTED);
    }

    #[test]
    fn a_part_ends_before_the_whole() {
        assert!(READY_NOTICE_ATTEMPT + KEY_ANSWER < READY_NOTICE);
        assert!(READY_NOTICE_HEAD_START < READY_NOTICE_ATTEMPT);
        assert!(OOM_EVENT_FETCHED < PROCESS_EXIT_AFTER_SIGKILL);
        assert!(OOM_EVENT_FETCHED < PROCESS_COLLECTED);
        for (pause, whole) in [
            (READY_NOTICE_PAUSE, READY_NOTICE),
            (DEVICE_HOTPLUG_PAUSE, DEVICE_HOTPLUG),
            (CPUS_ONLINE_PAUSE, CPUS_ONLINE),
            (CGROUP_BUSY_PAUSE, FAILED_CREATE_CLEANUP),
            (MEMORY_LOOK, MEMORY_NEED),
            (MEMORY_PAUSE, MEMORY_LOOK),
        ] {
            assert!(10 * pause < whole);
        }
    }
}
