//! Generates the messages of `protos/`; needs no protoc.

use std::path::Path;

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=protos/cri.proto");
    let out = std::env::var("OUT_DIR")?;
    let customize = Customize {
        async_all: true,
        ..Default::default()
    };
    Codegen::new()
        .out_dir(&out)
        .inputs(["protos/cri.proto"])
        .include("protos")
        .rust_protobuf()
        .customize(customize)
        .run()?;
    // Generated files begin with inner attributes, so they must be modules of their own, not
    // included text.
    std::fs::write(
        Path::new(&out).join("messages.rs"),
        "#[path = \"cri.rs\"]\npub mod cri;\n",
    )?;
    Ok(())
}
