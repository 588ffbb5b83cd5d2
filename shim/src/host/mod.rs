//! What the shim makes on the host, and how it is undone.
//!
//! ```text
//!            before it is made                  by its drop, or the server's end
//! resource ──────▶ ledger (a line in a file) ◀────── undone, idempotent ──────▶ gone
//!                     ▲
//!     delete, sweep ──┘ read by whoever comes after a kill -9
//! ```
//!
//! * `identity`: the digests by which a sandbox's directory and socket are found from flags alone.
//! * `ledger`: what outlives a process: QEMU and helpers on their way out, cgroups, redirects on
//!   links, the socket, the directory. One line each, appended before the resource exists; a line
//!   that was torn by a full disk costs that line. Undoing is idempotent and has a time.
//! * `dir`: a directory by descriptor. Names are made and opened beneath it and never followed
//!   through a link, because containers can change what is below some of them.
//! * `mounts`, `mount_table`: binds from one descriptor onto another, and what is mounted below a
//!   directory. Mounts are made in the server's own mount namespace and end with it.
//! * `cgroup`: the sandbox's cgroup, in both hierarchies, by files or through systemd, with limits.
//! * `sandbox_lock`: whoever makes a sandbox's server, or undoes what a dead one left, has it.
//! * `socket_kind`, `socket_scan`: what kind of socket a file is, asked without its server's notice,
//!   and which ones are below a directory.
//! * `exit_record`: a container's exit status in its bundle, for `delete`, which containerd asks
//!   when the server can no longer be asked.
//! * `node_sysctls`: which settings of the node's kernel a guest's kernel begins with.
//!
//! Rules: a path that a tenant can change is walked once, and what was found is kept by descriptor.
//! Whatever may hang (a dead NFS, a frozen cgroup) is done on a blocking thread with a deadline, and
//! undoes itself by its drop if it comes too late. An undo that fails is logged and tried again by
//! the next `delete` of any sandbox.

pub mod cgroup;
pub mod death_signal;
pub mod dir;
pub mod exit_record;
pub mod identity;
pub mod ledger;
pub mod mount_table;
pub mod mounts;
pub mod node_sysctls;
pub mod sandbox_lock;
pub mod socket_kind;
pub mod socket_scan;
