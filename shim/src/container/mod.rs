//! A container on its way into the guest, and back out.
//!
//! ```text
//! config.json ─▶ spec      read; what the parser does not know is replaced or refused
//!                 │          (unsupported: what a virtual machine cannot keep)
//!                 │
//!                 ├▶ role        single, a pod's sandbox, a pod's member; whose pids it sees
//!                 ├▶ rootfs      an overlay mounted here, a directory bound, or a disk plugged in
//!                 │  layers        or files that the guest mounts, and an overlay of them
//!                 ├▶ volumes     each mount: made in the guest, bound here, a socket, or a disk
//!                 ├▶ devices     numbers that travel, disks that are plugged in, access rules
//!                 └▶ hooks       run on the host, told QEMU's pid
//!                       │
//!                       ▼
//! HostSide: what the host has made ─▶ create: devices plugged, request to the agent ─▶ Container
//! ```
//!
//! `create` has the two halves of a creation. `HostSide::prepare` is blocking work on the host
//! beside the machine's boot; `in_guest` needs the running guest. Each value undoes by its drop what
//! it has made, so a failure at any step needs no list of what to undo: directories are an `Entry`,
//! a volume is shared by an `Arc` (`shared_volumes`: one bind for all containers that use it, or two
//! of them would not have the same file).
//!
//! The spec is a tenant's. So:
//!
//! * A field is kept, refused in words, or documented as meaningless in a virtual machine
//!   (docs/oci-fields.md); never dropped in silence. What restricts is only ever made stricter.
//! * A source is opened once, judged by its descriptor and bound from it (`volumes::Pinned`): what
//!   its path leads to later is of no interest.
//! * A name below the guest's share is made by descriptor, in directories that the guest cannot
//!   change, and never followed through a link.
//! * Nothing of the host's file systems is mounted from what the guest could have written: disks
//!   and images are plugged in, and the guest's kernel reads them.
//!
//! What the agent is sent is put together in `guest::guest_spec`.

pub mod create;
pub mod devices;
pub mod hooks;
pub mod layers;
pub mod role;
mod rootfs;
pub mod shared_volumes;
pub mod spec;
mod unsupported;
pub mod volumes;
