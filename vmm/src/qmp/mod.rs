//! The QEMU machine protocol: what a line means, one connection, the commands and events this crate
//! uses. Knows the protocol and nothing of our virtual machine.

mod codec;
pub(crate) mod commands;
mod connection;
mod events;

pub use codec::{Decoder, Malformed, Message};
pub use commands::Command;
pub use connection::Qmp;
pub use events::Event;
