//! `containerd-shim-cofferdam-v2`: what containerd runs for `io.containerd.cofferdam.v2`. A library
//! only so that fuzz targets reach what reads other people's bytes.
//!
//! One program, run in four ways:
//!
//! ```text
//! containerd ─▶ start ──spawns──▶ serve ◀──ttrpc── containerd (create, exec, wait, kill, …)
//!                 │ prints the         │
//!                 │ server's address   └─▶ QEMU, virtiofsd, vhost-device-vsock
//! containerd ─▶ delete: undoes what a server that is gone has left
//! anybody    ─▶ -info, -v: questions
//! ```
//!
//! The folders, each of which uses those below it and none above:
//!
//! ```text
//! bootstrap   start, delete, and the process of the server
//! service     containerd's calls, turned into requests
//! sandbox     the owner of all state; what may happen when; requests and their outcomes
//! container   a spec's container: root file system, volumes, devices, hooks
//! guest       the running guest: boot, agent, size, cards, sockets of the host
//! from_guest  what the guest may say │ stdio  one process's streams
//! network     a pod's links          │ host   directories, mounts, cgroups, the ledger
//! config, events, metrics, relay, logging · model, refusal, error
//! ```
//!
//! To follow a request, begin in `service/task.rs`, which names it; `sandbox/owner.rs` lists all
//! requests and outcomes in two `match`es; what takes time is begun there and reports back as an
//! outcome. `args` owns the command line and nothing else.

mod args;
mod bootstrap;
mod config;
mod container;
mod deadlines;
mod error;
mod events;
mod from_guest;
#[cfg(fuzzing)]
pub mod fuzz;
mod guest;
mod host;
mod info;
mod logging;
mod metrics;
mod model;
mod network;
mod protos;
mod refusal;
mod relay;
mod sandbox;
mod service;
mod stdio;

use std::ffi::OsString;
use std::process::ExitCode;

use args::{Action, Args};

/// Does what the command line says.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let args = match Args::parse(&args) {
        Ok(args) => args,
        Err(error) => return fail(&error),
    };
    let result = match args.action {
        Action::Version => {
            println!("containerd-shim-cofferdam-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Info => info::print(),
        Action::Features => info::print_features(),
        Action::Start => bootstrap::start::run(&args),
        Action::Delete => bootstrap::delete::run(&args),
        Action::Serve => bootstrap::serve::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// containerd shows the user what `start` and `delete` print before they fail: exactly one line.
fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{}", error.to_string().replace('\n', " "));
    ExitCode::FAILURE
}
