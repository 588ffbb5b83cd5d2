//! Generates the messages of `protos/`; needs no protoc.

use std::fmt::Write as _;
use std::path::Path;

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let names = ["cri", "runtimeoptions"];
    let protos = names.map(|name| format!("protos/{name}.proto"));
    for proto in &protos {
        println!("cargo:rerun-if-changed={proto}");
    }
    let out = std::env::var("OUT_DIR")?;
    let customize = Customize {
        async_all: true,
        ..Default::default()
    };
    Codegen::new()
        .out_dir(&out)
        .inputs(&protos)
        .include("protos")
        .rust_protobuf()
        .customize(customize)
        .run()?;
    // Generated files begin with inner attributes, so they must be modules of their own, not
    // included text.
    let mut modules = String::new();
    for name in names {
        writeln!(modules, "#[path = \"{name}.rs\"]\npub mod {name};")?;
    }
    std::fs::write(Path::new(&out).join("messages.rs"), modules)?;
    Ok(())
}
