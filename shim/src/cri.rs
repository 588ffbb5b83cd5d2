//! The messages of Kubernetes' runtime interface that reach a shim, generated from
//! `protos/cri.proto`.

#[allow(
    missing_docs,
    clippy::all,
    clippy::unwrap_used,
    clippy::panic,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}

pub use generated::cri::{DNSConfig, LinuxContainerResources, NamespaceMode, PodSandboxConfig};
