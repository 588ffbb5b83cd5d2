//! The exit of a container's init process, kept in its bundle so that `delete` can answer with the
//! real status after the server is gone: containerd publishes whatever `delete` returns.

use std::path::Path;
use std::time::SystemTime;

use crate::model::Exit;

const NAME: &str = "cofferdam-exit.json";

/// 128 and SIGKILL.
const KILLED: u32 = 137;

/// Records that a task with this pid is there, which ends with its server if nobody says otherwise.
pub fn write_live(bundle: &Path, pid: u32) {
    let at = SystemTime::UNIX_EPOCH;
    write(
        bundle,
        Exit {
            pid,
            status: KILLED,
            at,
        },
    );
}

/// Records the exit; a bundle that is already gone needs no record.
pub fn write(bundle: &Path, exit: Exit) {
    let written = serde_json::to_vec(&exit)
        .map_err(std::io::Error::other)
        .and_then(|json| {
            let temporary = bundle.join(format!(".{NAME}"));
            std::fs::write(&temporary, json)?;
            std::fs::rename(&temporary, bundle.join(NAME))
        });
    if let Err(error) = written {
        tracing::debug!(%error, bundle = %bundle.display(), "exit status is not recorded");
    }
}

/// The recorded exit, or that with the server, which is now.
pub fn read(bundle: &Path) -> Exit {
    let json = std::fs::read(bundle.join(NAME)).ok();
    let recorded = json.and_then(|json| serde_json::from_slice::<Exit>(&json).ok());
    match recorded {
        Some(exit) if exit.at != SystemTime::UNIX_EPOCH => exit,
        live => Exit {
            pid: live.map_or(0, |live| live.pid),
            status: KILLED,
            at: SystemTime::now(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_outlives_the_server() {
        let bundle = tempfile::tempdir().unwrap();
        let ended_with_its_server = |pid| {
            let exit = read(bundle.path());
            assert_eq!((exit.pid, exit.status), (pid, 137));
            assert_ne!(exit.at, SystemTime::UNIX_EPOCH);
        };
        ended_with_its_server(0);
        write_live(bundle.path(), 7);
        ended_with_its_server(7);
        let exit = Exit {
            pid: 7,
            status: 3,
            at: SystemTime::now(),
        };
        write(bundle.path(), exit);
        assert_eq!(read(bundle.path()), exit);
        std::fs::write(bundle.path().join(NAME), "garbage").unwrap();
        ended_with_its_server(0);
    }
}
