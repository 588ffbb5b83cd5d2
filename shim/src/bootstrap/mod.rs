//! From containerd's `start` to a running server, and from its `delete` to nothing left.
//!
//! ```text
//! start:  lock ─▶ does a server of this group answer? ──yes──────────────▶ print its address
//!                      │ no
//!                      ▼
//!         undo what a dead one left ─▶ bind the socket ─▶ ledger ─▶ spawn `serve`
//!                                                                       │ own session,
//!         print the address ◀── "+" or one line of an error ◀───────────┘ own mount namespace
//!
//! serve:  ledger names itself ─▶ owner ─▶ ttrpc server ─▶ … ─▶ owner has ended ─▶ undo the ledger
//!
//! delete: print the exit status ─▶ wait for the server's end, or kill it ─▶ undo the ledger
//!         ─▶ sweep what other sandboxes' killed servers left
//! ```
//!
//! A group is what shares a server: a pod, or a container by itself (`group`). Its socket and its
//! state directory are found by digests of containerd's address, the namespace and the group's id,
//! so `delete` needs nothing but its flags, and works where bundle and server are gone.
//!
//! Rules that hold this together:
//!
//! * The lock of `start` is its sandbox's, and waiting for it has a deadline: what is left of one
//!   sandbox and hangs holds up no other.
//! * The ledger is made before the server is told to go on, and each resource is in the ledger
//!   before it is made. Whoever undoes a ledger first makes sure that the server it names is dead.
//! * What `start` prints is all that containerd knows: plain text for every daemon, protobuf for
//!   one that sent protobuf (`reply`). A server whose `start` was killed ends by itself, because
//!   nobody asks it anything.
//! * The server keeps no descriptor and no environment of containerd's that it does not use.

pub mod delete;
mod group;
mod reply;
pub mod serve;
pub mod start;
