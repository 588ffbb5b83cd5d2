//! The running guest: how it comes up, is reached, asked, sized and ended, and what it has of the
//! host's network, memory, CPUs and sockets.
//!
//! ```text
//!   boot::start --> vmm::boot (QEMU, helpers, devices, power on) --> reach_agent --> RunningGuest
//!      |  place: cgroup            nics: taps, cards                     |  key       : GuestCalls
//!      |  ledger: each process                                           v
//!      `-- twice, if the agent does not answer in time              create_sandbox
//!
//!   sandbox's owner --GuestCalls--> RunningGuest --> Agent (what is asked of the guest)
//!                                        |---------> Machine (disks, cards, sizes, the end)
//!                                        |---------> place (limits and OOM score on the host)
//!                                        `---------> nics, host_sockets (what it has of the host)
//! ```
//!
//! * **Comes up** ([`boot`]). The shim says what the machine is made of: kernel and its parameters,
//!   two shared directories, which vsock, size, cgroup, confinement, network cards. In which order
//!   that comes is [`vmm::boot`]'s. Links are joined to taps ([`nics`]) while QEMU starts.
//! * **Is reached** ([`reach_agent`]). Our agent dials us when it is ready and gets a key for this
//!   boot; any other is dialled. Nothing is said to a guest without the key from then on.
//! * **Is asked** ([`calls`]). [`GuestCalls`](calls::GuestCalls) is all that the rest of the shim
//!   knows of a guest: [`running`] answers with a machine, the owner's tests with a double. What
//!   the agent answers is believed as far as `from_guest` lets it.
//! * **Is seen by pid** ([`task_process`]). A container goes by the pid of a process on the host
//!   that has its root and passes signals on.
//! * **Is sized** ([`machine_size`], [`place`]). The host's limits widen before the machine grows
//!   and narrow after it has shrunk, by what the guest really gave back.
//! * **Ends** ([`ending`]). With whichever part ends first: QEMU, a helper, the agent's connection,
//!   or an answer that is none. QEMU's end is the better reason for each of the others, so it gets
//!   a moment to be noticed. What a guest refuses is ended by ending the machine.
//!
//! What a change must not break:
//!
//! * Every process is in the ledger before it is used, and every step of a boot dies with the
//!   future that takes it: there is nothing to roll back by hand.
//! * Every call of [`GuestCalls`](calls::GuestCalls) ends within its deadline
//!   ([`crate::deadlines`]) or with the machine, and a machine that has ended is asked nothing.
//! * One machine, one agent, one key: there is no reconnecting. A sandbox whose guest is lost is
//!   lost.

pub mod boot;
pub mod calls;
mod clock;
mod disks;
pub mod ending;
pub mod guest_spec;
pub mod host_sockets;
pub mod machine_size;
mod memory;
mod nics;
mod place;
pub mod preconnect;
mod reach_agent;
pub mod running;
pub mod sockets_below;
pub mod task_process;
