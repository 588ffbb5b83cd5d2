//! `delete`: undoes what a sandbox left on the host, whoever of shim, QEMU and helpers is dead or
//! alive.
//!
//! containerd runs it after every ordinary deletion too, and gives it 5 seconds. For a container
//! that merely belongs to a living sandbox, or gave it its name and is not the last one in it,
//! there is nothing on the host that outlives its server, so nothing is touched.

use std::io::Write;
use std::path::Path;

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse};
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::Message;
use sys::point::{Point, pass};
use ttrpc::asynchronous::Client;
use ttrpc::context;

use super::group::group_id;
use super::start::ADDRESS;
use crate::args::Args;
use crate::deadlines::{SERVER_ANSWER, SERVER_END_BEFORE_DELETE, SWEEP};
use crate::error::{Error, IoContext, Result};
use crate::host::exit_record;
use crate::host::identity::{STATE_ROOT, SandboxIdentity};
use crate::host::ledger;
use crate::model::Exit;

/// What containerd 2 keeps of the answer to `start`, in the bundle of each of a pod's containers.
const BOOTSTRAP: &str = "bootstrap.json";

/// Runs `delete` and prints a `DeleteResponse`.
///
/// # Errors
/// One line that names what could not be undone.
pub fn run(args: &Args) -> Result<()> {
    let exit = exit_record::read(&args.bundle);
    let group = group_id(&args.bundle, &args.id);
    let identity = SandboxIdentity::new(&args.address, &args.namespace, &args.id);
    let state_dir = identity.state_dir();
    // A group may have a name that no container has, so that nobody else's `delete` is for it.
    let group_dir = SandboxIdentity::new(&args.address, &args.namespace, &group).state_dir();
    let spared =
        || ledger::server_lives(&state_dir) && has_others(&args.bundle).is_some_and(answers);
    if group == args.id && !spared() {
        ledger::undo(&state_dir, SERVER_END_BEFORE_DELETE)?;
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
    pass(Point::DeleteSweeps);
    if group == args.id || !ledger::server_lives(&group_dir) {
        ledger::sweep(Path::new(STATE_ROOT), SWEEP);
    }
    Ok(())
}

/// The server's address, if other bundles beside this one belong to it too, by what `start` wrote
/// into each, or containerd 2, which does not run `start` for a pod's further containers. Those
/// with a dot containerd is about to remove.
fn has_others(bundle: &Path) -> Option<String> {
    let own = address(bundle)?;
    let beside = std::fs::read_dir(bundle.parent()?).ok()?.flatten();
    let mut others = beside.filter(|entry| {
        let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        !is_hidden && entry.path() != bundle
    });
    others
        .any(|other| address(&other.path()).as_ref() == Some(&own))
        .then_some(own)
}

fn address(bundle: &Path) -> Option<String> {
    if let Ok(address) = std::fs::read_to_string(bundle.join(ADDRESS)) {
        return Some(address);
    }
    let bootstrap = std::fs::read(bundle.join(BOOTSTRAP)).ok()?;
    let bootstrap: serde_json::Value = serde_json::from_slice(&bootstrap).ok()?;
    Some(bootstrap["address"].as_str()?.to_owned())
}

/// Whether a server still answers: one that hangs is of no use to whoever is left in it.
fn answers(address: String) -> bool {
    let asked = async move {
        let client = Client::connect(&address).await.ok()?;
        let request = ConnectRequest::default();
        let asking = TaskClient::new(client);
        match asking.connect(context::Context::default(), &request).await {
            Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => Some(()),
            Err(_) => None,
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.is_ok_and(|runtime| {
        let answer = async { tokio::time::timeout(SERVER_ANSWER, asked).await };
        matches!(runtime.block_on(answer), Ok(Some(())))
    })
}

fn print(exit: Exit) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_of_one_server_are_known_by_its_address() {
        let root = tempfile::tempdir().unwrap();
        let bundle = |name: &str, address: &str| {
            let bundle = root.path().join(name);
            std::fs::create_dir(&bundle).unwrap();
            std::fs::write(bundle.join(ADDRESS), address).unwrap();
            bundle
        };
        let first = bundle("first", "unix:///run/a");
        bundle("stranger", "unix:///run/b");
        std::fs::create_dir(root.path().join("empty")).unwrap();
        assert_eq!(has_others(&first), None);
        assert_eq!(has_others(&root.path().join("empty")), None);
        bundle(".second", "unix:///run/a");
        assert_eq!(has_others(&first), None);
        bundle("second", "unix:///run/a");
        let address = has_others(&first).unwrap();
        assert_eq!(address, "unix:///run/a");
        let third = root.path().join("third");
        std::fs::create_dir(&third).unwrap();
        let bootstrap = r#"{"version":3,"address":"unix:///run/b","protocol":"ttrpc"}"#;
        std::fs::write(third.join(BOOTSTRAP), bootstrap).unwrap();
        let other = has_others(&root.path().join("stranger"));
        assert_eq!(other.as_deref(), Some("unix:///run/b"));
        assert!(!answers(address), "nobody is there");
    }
}
