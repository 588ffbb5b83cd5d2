//! Messages that reach a shim inside others and that no crate has: Kubernetes' runtime interface and
//! containerd's runtime options, generated from `protos/`.

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

pub use generated::{cri, runtimeoptions};
