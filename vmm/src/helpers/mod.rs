//! The vhost-user back ends beside QEMU: virtiofsd, one for each shared directory, and
//! vhost-device-vsock where the host's kernel has no vsock.
//!
//! ```text
//!   guest driver
//!        | virtqueues, in memory that both map
//!   QEMU |---- vhost-user socket ----> helper ----> directory, or sockets of the host
//!        |  (set-up and notifications)
//! ```
//!
//! * **We connect, QEMU inherits.** A helper's socket is connected here and QEMU gets the connected
//!   descriptor (`getfd`), so QEMU never waits for a path, and a helper that died is an error of
//!   ours, with its last words, before QEMU is asked. virtiofsd inherits a socket that already has
//!   its connection waiting, so nobody waits at all; the daemon binds a path itself, and is waited
//!   for.
//! * **One connection, for one machine.** A helper serves the first connection and ends with it.
//!   There is no reconnecting: a helper that has ended is the end of the machine
//!   ([`crate::Machine::died`]).
//! * **QEMU first.** A helper notices that QEMU is gone and ends by itself, so QEMU is stopped
//!   before it. virtiofsd has a child that serves and holds the mounts: kill the child first, and
//!   let its parent reap it.
//! * **Nothing is written down.** A helper keeps nothing that has to reach a disk, so SIGKILL is
//!   always allowed.
//! * **A path is short-lived.** virtiofsd's is removed before it runs; the daemon's directory is
//!   taken back once QEMU is connected. A helper that is taken over later can bind nothing there.

mod virtiofsd;
mod vsock_daemon;

pub use virtiofsd::{FsCache, Virtiofsd, VirtiofsdConfig};
pub use vsock_daemon::{VsockDaemon, VsockDaemonConfig};
