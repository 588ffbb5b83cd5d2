//! The exit of a container's init process, kept in its bundle so that `delete` can answer with the
//! real status after the server is gone: containerd publishes whatever `delete` returns.

use std::path::Path;

use crate::model::Exit;

const NAME: &str = "cofferdam-exit.json";

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

/// The recorded exit, if there is one that can be read.
pub fn read(bundle: &Path) -> Option<Exit> {
    serde_json::from_slice(&std::fs::read(bundle.join(NAME)).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn the_status_outlives_the_server() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(read(bundle.path()), None);
        let exit = Exit {
            pid: 7,
            status: 3,
            at: SystemTime::now(),
        };
        write(bundle.path(), exit);
        assert_eq!(read(bundle.path()), Some(exit));
        std::fs::write(bundle.path().join(NAME), "garbage").unwrap();
        assert_eq!(read(bundle.path()), None);
    }
}
