//! Generates the Rust messages and the async ttrpc stubs from `protos/`; needs no protoc.

use std::fmt::Write as _;
use std::path::Path;

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = [
        "agent",
        "clock",
        "cofferdam",
        "csi",
        "health",
        "memory",
        "network",
        "oci",
        "types",
    ]
    .map(|name| format!("protos/{name}.proto"));
    for proto in &protos {
        println!("cargo:rerun-if-changed={proto}");
    }
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .inputs(&protos)
        .include("protos")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // Generated files begin with inner attributes, so they must be modules of their own, not
    // included text.
    let mut modules = String::new();
    for name in [
        "agent",
        "agent_ttrpc",
        "clock",
        "clock_ttrpc",
        "cofferdam",
        "csi",
        "health",
        "health_ttrpc",
        "memory",
        "memory_ttrpc",
        "network",
        "network_ttrpc",
        "oci",
        "types",
    ] {
        writeln!(modules, "#[path = \"{name}.rs\"]\npub mod {name};")?;
    }
    std::fs::write(Path::new(&out).join("protocols.rs"), modules)?;
    Ok(())
}
