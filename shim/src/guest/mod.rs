//! The running guest: how its virtual machine comes up, how its agent is reached and asked, and
//! what it has of the host's network, memory, CPUs and sockets.

pub mod boot;
pub mod calls;
mod clock;
pub mod ending;
pub mod guest_spec;
pub mod host_sockets;
pub mod machine_size;
mod nics;
mod place;
pub mod preconnect;
mod reach_agent;
pub mod running;
