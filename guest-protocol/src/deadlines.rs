//! How long the host waits for what the agent itself has to wait for.
//!
//! The agent's own deadlines for the same work are shorter (`agent/src/deadlines.rs` has the test),
//! so that the host hears what failed before it gives up. Calls in which the agent does not wait
//! are not here.

use std::time::Duration;

/// `CreateSandbox`: the shares are mounted, once their devices are there.
pub const CREATE_SANDBOX: Duration = Duration::from_secs(10);

/// `CreateContainer`: storages, cgroup, and the first process up to the point where it waits.
pub const CREATE_CONTAINER: Duration = Duration::from_secs(90);

/// `StartContainer` and `ExecProcess`: until the program runs, which includes the guest's reading
/// of the program from the image.
pub const START_PROCESS: Duration = Duration::from_secs(60);

/// `RemoveContainer` of a container whose creation was given up. An ordinary removal has the time
/// that its delete has left, which may be less.
pub const REMOVE_CONTAINER: Duration = Duration::from_secs(10);

/// `PauseContainer`, `ResumeContainer`, `UpdateContainer`.
pub const CHANGE_CONTAINER: Duration = Duration::from_secs(10);

/// `OnlineCPUMem`.
pub const ONLINE_CPU_MEM: Duration = Duration::from_secs(10);

/// `UpdateInterface`, `UpdateRoutes`, `AddARPNeighbors`.
pub const UPDATE_NETWORK: Duration = Duration::from_secs(10);

/// `Memory.Wait`, which the agent answers after a minute at the latest.
pub const MEMORY_NEED: Duration = Duration::from_secs(120);

/// A stdio stream, from the dial to the agent's answer.
pub const STDIO_ACCEPTED: Duration = Duration::from_secs(10);

/// How long the host counts on a stdio stream that the agent holds for a process to come. Those of a
/// client that takes longer are made again.
pub const STREAMS_HELD: Duration = Duration::from_secs(20);

/// A forwarded TCP connection, from the dial to the agent's answer.
pub const FORWARD_ACCEPTED: Duration = Duration::from_secs(10);

/// Here the agent is the one who waits longer: how long the host may take to connect to its unix
/// socket for the guest.
pub const HOST_SOCKET_CONNECTED: Duration = Duration::from_secs(10);

/// How often a carried connection is checked for two dead ends.
pub const DEAD_CONNECTION_POLL: Duration = Duration::from_secs(1);

/// vhost-device-vsock answers a CONNECT. A dial is left alone for that long even when nobody wants
/// it any more: the daemon spins on a connection that ends before it has answered.
pub const VSOCK_DAEMON_ANSWER: Duration = Duration::from_secs(60);
