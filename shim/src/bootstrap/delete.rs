//! `delete`: undoes what a sandbox left on the host, whoever of shim, QEMU and helpers is dead or
//! alive.
//!
//! containerd runs it after every ordinary deletion too, and gives it 5 seconds. For a container
//! that merely belongs to a living sandbox there is nothing on the host that outlives its server,
//! so nothing is touched.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use super::group::group_id;
use crate::args::Args;
use crate::error::{Error, IoContext, Result};
use crate::host::exit_record;
use crate::host::identity::{STATE_ROOT, SandboxIdentity};
use crate::host::ledger;
use crate::model::Exit;

/// How long a living server may take to finish its own orderly end.
const SERVER_DEADLINE: Duration = Duration::from_secs(2);

/// How long others' leftovers may take beside one's own.
const SWEEP_DEADLINE: Duration = Duration::from_secs(1);

/// Runs `delete` and prints a `DeleteResponse`.
///
/// # Errors
/// One line that names what could not be undone.
pub fn run(args: &Args) -> Result<()> {
    let exit = exit_record::read(&args.bundle);
    let group = group_id(&args.bundle, &args.id);
    let identity = SandboxIdentity::new(&args.address, &args.namespace, &args.id);
    if group == args.id {
        ledger::undo(&identity.state_dir(), SERVER_DEADLINE)?;
    }
    if Path::new(&args.bundle).join("rootfs").is_dir() {
        // Mounts of a sandbox live in its own namespace; this is for one that an administrator made
        // by hand.
        let _ = nix::mount::umount2(
            &args.bundle.join("rootfs"),
            nix::mount::MntFlags::MNT_DETACH,
        );
    }
    print(exit)?;
    if group == args.id {
        ledger::sweep(Path::new(STATE_ROOT), SWEEP_DEADLINE);
    }
    Ok(())
}

/// The exit status that the server recorded; 137 where the container ended with its virtual
/// machine.
fn print(exit: Option<Exit>) -> Result<()> {
    let exit = exit.unwrap_or(Exit {
        pid: 0,
        status: 137,
        at: SystemTime::now(),
    });
    let response = DeleteResponse {
        pid: exit.pid,
        exit_status: exit.status,
        exited_at: Some(exit.at.into()).into(),
        ..Default::default()
    };
    let bytes = response
        .write_to_bytes()
        .map_err(|error| Error::internal(format!("cannot encode the reply: {error}")))?;
    let mut stdout = std::io::stdout();
    stdout
        .write_all(&bytes)
        .and_then(|()| stdout.flush())
        .doing(|| "print the reply".into())
}
