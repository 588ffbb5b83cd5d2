//! What is known of a program, kept between runs: one small JSON file for each, good for as long as
//! the program's file is the same (path, device, inode, size, time of change).
//!
//! A cache that cannot be read or written costs time and nothing else.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Result};

/// Which very file a program is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileKey {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

#[derive(Serialize, Deserialize)]
struct Entry<T> {
    /// Version of this crate: it may ask for other things tomorrow.
    asked_by: String,
    key: FileKey,
    value: T,
}

impl FileKey {
    /// Looks at a program.
    ///
    /// # Errors
    /// It is not there, or not a program.
    pub(crate) fn of(program: &Path) -> Result<FileKey> {
        let data = fs::metadata(program).doing(|| format!("use {}", program.display()))?;
        if !data.is_file() || data.mode() & 0o111 == 0 {
            return Err(Error::Unsupported(format!(
                "cannot use {}: not an executable file",
                program.display()
            )));
        }
        Ok(FileKey {
            path: program.to_owned(),
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
        })
    }

    fn file(&self, directory: &Path, kind: &str) -> PathBuf {
        directory.join(format!("{kind}-{:x}-{:x}.json", self.device, self.inode))
    }

    /// What was stored for this very file.
    pub(crate) fn load<T: DeserializeOwned>(&self, directory: &Path, kind: &str) -> Option<T> {
        let entry: Entry<T> =
            serde_json::from_slice(&fs::read(self.file(directory, kind)).ok()?).ok()?;
        (entry.key == *self && entry.asked_by == env!("CARGO_PKG_VERSION")).then_some(entry.value)
    }

    /// Stores it, in place of whatever was there.
    pub(crate) fn store<T: Serialize>(&self, directory: &Path, kind: &str, value: &T) {
        let entry = Entry {
            asked_by: env!("CARGO_PKG_VERSION").into(),
            key: self.clone(),
            value,
        };
        let path = self.file(directory, kind);
        // Others may read and write at the same time: a whole file takes the place of the old one,
        // or none does.
        let new = path.with_extension(format!("{}.new", std::process::id()));
        let written = fs::create_dir_all(directory)
            .and_then(|()| serde_json::to_vec(&entry).map_err(io::Error::other))
            .and_then(|json| fs::write(&new, json))
            .and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&new);
            tracing::warn!(path = %path.display(), %error,
                "cannot keep what was learned of a program");
        }
    }
}
