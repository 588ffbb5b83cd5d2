//! `containerd-shim-cofferdam-v2`: what containerd runs for `io.containerd.cofferdam.v2`. A library
//! only so that fuzz targets reach what reads other people's bytes.
//!
//! Owns the command line and nothing else: `start` leaves a server behind and prints its address,
//! `delete` cleans up after a server that is gone, `-info` and `-v` answer questions, `serve` is
//! the server itself.

mod args;
mod bootstrap;
mod config;
mod container;
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
