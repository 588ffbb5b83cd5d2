//! A log file of a client's (`file:///path`). Threads of its own open and write it, so that a disk
//! that hangs holds up the output that goes to it and nothing else: the shim's one thread and its
//! few blocking ones have a whole sandbox to serve.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use sys::point::{Point, reach};
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};

use super::BUFFER;
use crate::deadlines::{LOG_FILE_LOOK_AGAIN, LOG_FILE_OPEN};
use crate::error::{Error, IoContext, Result};

/// A thread needs its buffer on the heap and little else.
const STACK: usize = 64 * 1024;

/// Writers that are at work.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Waits until all log files of the process are written, for `deadline` at most. Their streams have
/// ended by then.
pub async fn written(deadline: Duration) {
    let all = async {
        while RUNNING.load(Ordering::Relaxed) > 0 {
            sleep(LOG_FILE_LOOK_AGAIN / 10).await;
        }
    };
    if timeout(deadline, all).await.is_err() {
        tracing::warn!("a log file's disk hangs: the end of its output is lost");
    }
}

/// One more writer, until it is dropped.
struct Running;

impl Running {
    fn new() -> Running {
        RUNNING.fetch_add(1, Ordering::Relaxed);
        Running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One stream's way into the file.
pub struct LogFile {
    pub(super) pipe: Option<pipe::Sender>,
    /// Closed once all that went into the pipe is written.
    written: oneshot::Receiver<()>,
    /// Counts the chunks that are.
    chunks: Arc<AtomicU64>,
}

impl LogFile {
    /// Opens the file for a process's output and its errors.
    ///
    /// # Errors
    /// One line that names the file: it cannot be opened, or not in time.
    pub async fn open(uri: &str) -> Result<[LogFile; 2]> {
        let path = uri
            .strip_prefix("file://")
            .or_else(|| uri.strip_prefix("file:"))
            .unwrap_or(uri)
            .to_owned();
        let doing = || format!("open the log file {path}");
        let (stdout, stdout_writer) = stream().doing(doing)?;
        let (stderr, stderr_writer) = stream().doing(doing)?;
        let (opened, is_open) = oneshot::channel();
        let opens = path.clone();
        let open_and_write = move || {
            let files = open_twice(Path::new(&opens));
            let (file, other) = match files {
                Ok(files) => files,
                Err(error) => return drop(opened.send(Err(error))),
            };
            let second = spawn(move || stderr_writer.run(other));
            // Who asked may have given up, and then nothing comes through the pipes.
            let _ = opened.send(second);
            stdout_writer.run(file);
        };
        spawn(open_and_write).doing(doing)?;
        match timeout(LOG_FILE_OPEN, is_open).await {
            Ok(Ok(opened)) => opened.doing(doing)?,
            Ok(Err(_)) => return Err(Error::internal(format!("the writer of {path} has failed"))),
            Err(_) => {
                return Err(Error::deadline(format!(
                    "the log file {path} did not open within {LOG_FILE_OPEN:?}: its disk hangs"
                )));
            }
        }
        Ok([stdout, stderr])
    }

    /// Waits until everything is written, and tells of progress meanwhile. Whoever calls this gives
    /// up when there is none.
    pub async fn finish(&mut self, progress: &watch::Sender<u64>) {
        self.pipe = None;
        let mut known = self.chunks.load(Ordering::Relaxed);
        while timeout(LOG_FILE_LOOK_AGAIN, &mut self.written)
            .await
            .is_err()
        {
            let now = self.chunks.load(Ordering::Relaxed);
            if now != known {
                known = now;
                progress.send_modify(|count| *count += 1);
            }
        }
    }
}

/// A stream's way, and what writes it.
fn stream() -> io::Result<(LogFile, Writer)> {
    let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
    let (done, written) = oneshot::channel();
    let pipe = Some(pipe::Sender::from_file(File::from(to))?);
    let chunks = Arc::default();
    let writer = Writer {
        from,
        _done: done,
        chunks: Arc::clone(&chunks),
    };
    let log = LogFile {
        pipe,
        written,
        chunks,
    };
    Ok((log, writer))
}

fn open_twice(path: &Path) -> io::Result<(File, File)> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let file = File::options().create(true).append(true).open(path)?;
    let other = file.try_clone()?;
    Ok((file, other))
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("log-file".to_owned());
    thread.stack_size(STACK).spawn(work).map(drop)
}

/// The reading end of a stream.
struct Writer {
    from: OwnedFd,
    _done: oneshot::Sender<()>,
    chunks: Arc<AtomicU64>,
}

impl Writer {
    /// Writes until the stream ends. What a full disk does not take is lost, and what comes after
    /// it is tried again: a process does not die of its log, and logs on once there is room.
    fn run(self, mut file: File) {
        let _running = Running::new();
        let mut from = File::from(self.from);
        let mut buffer = vec![0; BUFFER];
        let mut fails = false;
        loop {
            let length = match from.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => length,
            };
            let reached = reach(Point::LogFileWriting);
            match reached.and_then(|()| file.write_all(&buffer[..length])) {
                Ok(()) => {
                    fails = false;
                    self.chunks.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) if !fails => {
                    fails = true;
                    tracing::warn!(%error, "output to a log file is lost");
                }
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn both_streams_are_in_the_file_once_they_are_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/log");
        let uri = format!("file://{}", path.display());
        for round in 1..=2 {
            let mut streams = LogFile::open(&uri).await.unwrap();
            for stream in &mut streams {
                let pipe = stream.pipe.as_mut().unwrap();
                pipe.write_all(b"line\n").await.unwrap();
                stream.finish(&watch::Sender::new(0)).await;
            }
            let lines = std::fs::read_to_string(&path).unwrap();
            assert_eq!(lines, "line\n".repeat(2 * round), "it is appended to");
        }
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_holds_up_nobody_and_is_tried_again() {
        // What is written to it is refused with ENOSPC, every time.
        let [mut stdout, _stderr] = LogFile::open("file:///dev/full").await.unwrap();
        let pipe = stdout.pipe.as_mut().unwrap();
        for _ in 0..8 {
            pipe.write_all(&vec![b'x'; BUFFER]).await.unwrap();
        }
        stdout.finish(&watch::Sender::new(0)).await;
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_opened_is_named() {
        let error = LogFile::open("file:///dev/null/log").await.err().unwrap();
        assert!(error.to_string().contains("/dev/null/log"), "{error}");
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_reads_is_no_reason_to_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        tokio::time::pause();
        let uri = format!("file://{}", path.display());
        let error = LogFile::open(&uri).await.err().unwrap();
        assert_eq!(error.code(), ttrpc::Code::DEADLINE_EXCEEDED);
        // Lets its thread go.
        drop(File::options().read(true).open(&path));
    }
}
