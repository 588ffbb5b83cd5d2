//! The agent as a test's stand-in for Kata's own: with the cargo feature `stock` it does what a
//! stock kata-agent 4.1.0 does otherwise than ours, as far as a shim can tell. A release is built
//! without.
//!
//! * It announces no extension.
//! * The output of a process is closed, read or not, as soon as somebody has waited for its exit.
//! * A SIGTERM to a first process that would not notice it is a SIGKILL.
//! * A seccomp rule without a number of an error, or with 0, lets the call succeed and do nothing.
//!   One that is newer than the profile gets the profile's default action.
//! * A spec with an entry for the pid namespace is refused. (Kata's takes the spec, and starts no
//!   exec then.)
//! * The empty write of a terminal's input closes the terminal.
//! * Of a container with the sandbox's id no OOM kill is told.
//! * An error ends with a back trace.
//! * File systems in memory are made without their options, such as a size.
//! * It does not step into shared volumes: sockets and fifos there are each container's own.

/// Whether it stands in for Kata's agent.
pub const STOCK: bool = cfg!(feature = "stock");
