//! What the host and the guest agent say to each other; both sides use this crate.
//!
//! Owns the wire: messages, features, paths and ports that both sides know, what is sent over which
//! socket, and by when an answer must be there. It never decides what a sandbox should do, and it
//! knows nothing of QEMU or containerd.

pub mod carry;
mod client;
pub mod deadlines;
pub mod forward;
mod frames;
pub mod host_socket;
mod key;
mod line;
pub mod packets;
pub mod stdio;
mod transport;

/// Messages and ttrpc stubs, generated from `protos/`.
#[allow(
    missing_docs,
    clippy::all,
    clippy::unwrap_used,
    clippy::panic,
    reason = "generated code"
)]
pub mod protocols {
    include!(concat!(env!("OUT_DIR"), "/protocols.rs"));
}

pub use client::{AgentClient, context};
pub use forward::{FEATURE_PORT_FORWARD, FORWARD_PORT, ForwardRequest};
pub use frames::MAX_FRAME;
pub use host_socket::{
    FEATURE_UDS, FEATURE_UDS_BELOW, HostSocketRequest, SocketKind, UDS_BELOW_DRIVER, UDS_DRIVER,
    UDS_PORT, UDS_PORT_OPTION, is_socket_name,
};
pub use key::{KEY_LINE, KEY_PARAMETER, Key};
pub use line::{BadLine, Line, read_line};
pub use transport::{Listener, Stream, Transport};

/// Port of the agent's ttrpc server in the guest.
pub const AGENT_PORT: u32 = 1024;

/// Port in the guest on which the agent takes raw stdio streams, where it announces
/// [`FEATURE_RAW_STDIO`].
pub const STDIO_PORT: u32 = 1028;

/// Port on the host's end of a hybrid transport to which the agent's ready notice is sent.
/// On kernel vsock the port space is shared by all sandboxes, so there the host picks a free port.
pub const READY_PORT: u32 = 1029;

/// Kernel command line parameter that names the host port of the ready notice.
pub const READY_PARAMETER: &str = "cofferdam.ready_port";

/// Entry of `AgentDetails.extra_features`: each stdio channel can be a vsock stream of its own, see
/// [`stdio`].
pub const FEATURE_RAW_STDIO: &str = "cofferdam.raw-stdio";

/// Entry of `AgentDetails.extra_features`: `SignalProcess` with the exec id [`ALL_PROCESSES`] is
/// for every process of the container. Without it only SIGKILL is.
pub const FEATURE_SIGNAL_ALL: &str = "cofferdam.signal-all";

/// Entry of `AgentDetails.extra_features`: a pod needs no pause container. Containers that share
/// the sandbox's pid namespace (`sandbox_pidns`) find a process of the agent's as PID 1 there, and
/// one whose pid namespace entry has a path of the form [`POD_PID_PATH`]`<container id>` joins that
/// container's.
pub const FEATURE_POD: &str = "cofferdam.pod";

/// Entry of `AgentDetails.extra_features`: the fields `Own` of messages (`protos/cofferdam.proto`)
/// are understood. Who sends one to an agent without has it ignored.
pub const FEATURE_OWN_FIELDS: &str = "cofferdam.own-fields";

/// See [`FEATURE_POD`].
pub const POD_PID_PATH: &str = "container:";

/// Entry of `AgentDetails.extra_features`: the service of `protos/clock.proto`.
pub const FEATURE_CLOCK: &str = "cofferdam.clock";

/// Entry of `AgentDetails.extra_features`: the service of `protos/memory.proto`.
pub const FEATURE_MEMORY: &str = "cofferdam.memory";

/// Entry of `AgentDetails.extra_features`: the service of `protos/network.proto`.
pub const FEATURE_NETWORK: &str = "cofferdam.network";

/// Entry of `AgentDetails.extra_features`: storages of [`IMAGE_DRIVER`].
pub const FEATURE_IMAGES: &str = "cofferdam.images";

/// Driver of a storage that is mounted from a file of a share, by a loop device. So is each file
/// that an option `device=` names.
pub const IMAGE_DRIVER: &str = "cofferdam.image";

/// Exec id that no exec can have, see [`FEATURE_SIGNAL_ALL`].
pub const ALL_PROCESSES: &str = "*";

/// Below it the guest has what belongs to the sandbox and is no share.
pub const GUEST_SANDBOX: &str = "/run/kata-containers/sandbox";

/// Where the guest mounts what a root file system consists of. Short: an overlay's options have one
/// page for the names of all its layers.
pub const GUEST_LAYERS: &str = "/run/layers";

/// Driver of a storage that is copied into the guest, and again when it changes: a volume as the
/// kubelet writes ConfigMaps and Secrets. Kata's name; there the mount point has to be in a
/// directory of its own.
pub const WATCHED_DRIVER: &str = "watchable-bind";

/// Where the guest has the pod's /dev/shm.
pub const GUEST_SHM: &str = "/run/kata-containers/sandbox/shm";

/// Tag of the virtio-fs device that shares volumes, and root file systems that the client made
/// itself.
pub const SHARE_TAG: &str = "kataShared";

/// Where the guest mounts the shared file system.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";

/// Tag of the virtio-fs device that shares root file systems which nobody but their container
/// changes: the guest keeps what it has read of them.
pub const ROOTFS_TAG: &str = "cofferdamRootfs";

/// Where the guest mounts those root file systems.
pub const GUEST_ROOTFS: &str = "/run/kata-containers/shared/rootfs";
