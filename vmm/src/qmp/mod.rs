//! The QEMU machine protocol (QEMU's `docs/interop/qmp-spec`): what a line means, one connection,
//! and the commands and events that this crate uses. Knows nothing of our virtual machine.
//!
//! ```text
//!   callers: execute(command) ----queue----> Task ----lines----> QEMU
//!            <--oneshot reply--                ^ <--replies, events--
//!            events(): broadcast <-------------|
//!            closing(): watch    <-------------/
//! ```
//!
//! * [`codec`] makes messages of bytes and does no IO; [`connection`] owns the socket in one task;
//!   [`commands`] is the list of what is ever sent, as types; [`events`] says what an event means.
//! * **QEMU may be hostile.** It is the process that a guest takes over first. What it sends is
//!   bounded (a line of 1 MiB, a broadcast of 64 events), and what is no QMP ends the connection:
//!   there is no way back into step.
//! * **Every command has a deadline**, and not answered does not mean not done. Who needs to know
//!   asks QEMU afterwards (`qom-list`).
//! * **A caller may be dropped** between any two polls. Its command counts among the eight that
//!   QEMU takes at a time until QEMU has answered, or QEMU would stop reading.
//! * **An event is a hint**: QEMU rate-limits some and a slow reader misses some. A query is the
//!   truth.
//! * **A descriptor** goes with the first byte of its line, and QEMU keeps only those of the last
//!   line that brought some. So one `getfd` or `add-fd` at a time.
//! * **The end of the connection is the end of QEMU**, or becomes it: [`crate::vm`] kills a QEMU
//!   whose monitor is gone.

pub(crate) mod codec;
pub(crate) mod commands;
mod connection;
pub(crate) mod events;
#[cfg(test)]
mod hostile_monitor;

// Pieces of what `fuzz/` feeds, and of nothing else outside this crate.
#[cfg(fuzzing)]
pub use codec::Decoder;
pub(crate) use connection::Qmp;
pub(crate) use events::Event;
