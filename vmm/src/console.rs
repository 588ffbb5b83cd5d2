//! The guest's console, for debugging: QEMU writes it into a socket, and the end of it is kept in a
//! file. The guest decides how much comes, so what is kept is bounded.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::error::{Doing, Result};

/// The file, and the one before it (`.old`), have at most so many bytes each.
const KEPT: usize = 64 << 10;

/// Keeps the console until it is dropped, or QEMU ends.
#[derive(Debug)]
pub(crate) struct Console(JoinHandle<()>);

impl Drop for Console {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// QEMU's end of a console whose other end is kept in `file`.
///
/// # Errors
/// The file cannot be made.
pub(crate) fn keep(file: &Path) -> Result<(Option<OwnedFd>, Option<Console>)> {
    let doing = || format!("keep the guest's console in {}", file.display());
    let (ours, theirs) = StdUnixStream::pair().doing(doing)?;
    ours.set_nonblocking(true).doing(doing)?;
    let stream = UnixStream::from_std(ours).doing(doing)?;
    let log = Log {
        path: file.to_owned(),
        size: 0,
        file: open(file, false).doing(doing)?,
    };
    Ok((
        Some(theirs.into()),
        Some(Console(tokio::spawn(copy(stream, log)))),
    ))
}

struct Log {
    path: PathBuf,
    file: File,
    size: usize,
}

impl Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.size + bytes.len() > KEPT {
            std::fs::rename(&self.path, self.path.with_extension("log.old"))?;
            self.file = open(&self.path, true)?;
            self.size = 0;
        }
        self.size += bytes.len();
        self.file.write_all(bytes)
    }
}

fn open(path: &Path, anew: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW);
    if anew {
        options.create_new(true)
    } else {
        options.create(true)
    }
    .open(path)
}

async fn copy(mut stream: UnixStream, mut log: Log) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        if let Err(error) = log.write(&buffer[..count]) {
            tracing::warn!(%error, path = %log.path.display(),
                "the guest's console is not kept any more");
            // It is still read, because the guest waits for room.
            while let Ok(1..) = stream.read(&mut buffer).await {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_guest_that_prints_without_end_fills_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let (theirs, _console) = keep(&path).unwrap();
        let mut theirs = StdUnixStream::from(theirs.unwrap());
        let writer = tokio::task::spawn_blocking(move || {
            for line in 0..100_000 {
                writeln!(theirs, "line {line} of many").unwrap();
            }
            writeln!(theirs, "last words").unwrap();
        });
        writer.await.unwrap();
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while !std::fs::read_to_string(&path)
            .unwrap()
            .ends_with("last words\n")
        {
            assert!(tokio::time::Instant::now() < end, "the last words are kept");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for file in std::fs::read_dir(dir.path()).unwrap() {
            assert!(file.unwrap().metadata().unwrap().len() <= KEPT as u64);
        }
    }
}
