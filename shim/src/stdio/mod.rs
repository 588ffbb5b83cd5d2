//! Input and output of one process: containerd's end joined to the guest's.
//!
//! ```text
//! client            host::HostIo              Pumps                guest::GuestIo          guest
//! fifo      ─▶ Receiver ──────────────▶ copy_input ──▶ stream of vsock, or WriteStdin ─▶ stdin
//! fifo      ◀─ Fifo  ◀─┐
//! binary:// ◀─ Logger ◀┼─ finish ◀──── copy_output ◀── stream of vsock, or ReadStdout ◀─ stdout
//! file://   ◀─ LogFile ◀┘
//! ```
//!
//! Output is copied by a task for each stream that ends when the guest's stream ends, so a reader
//! that has stopped holds up its own stream and nothing else, and the exit of a process never waits
//! for it. Delete does, for as long as somebody reads, and no longer than its own deadline.
//!
//! * `host` opens what a request names. A fifo is opened without waiting for its client, and kept
//!   open for one that goes away and comes back: that is containerd's restart. A logger is a
//!   program of the client's that reads two pipes; a log file is written by threads of its own,
//!   because a disk may hang.
//! * `guest` is a stream of vsock for each channel where the agent takes them, dialled before the
//!   process exists, so that nothing it writes is lost; else calls that poll, for a stock
//!   kata-agent.
//! * What is in the fifo when `CloseIO` comes is still delivered: the shim only gives up its own
//!   writer, and the end is seen behind the last byte.
//!
//! Buffers are bounded: 64 KiB a stream here, and what vsock has credit for. A slow reader slows
//! the process down, as a pipe does; a log that cannot be written loses text and ends no process.

mod guest;
mod host;
pub mod log_file;
mod logger;

use sys::point::{Point, pass};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::deadlines::OUTPUT_UNREAD;

pub use guest::{GuestIo, PolledOutput};
pub use host::HostIo;

/// Copied at a time, in bytes.
const BUFFER: usize = 64 * 1024;

/// The running copies of a process's input and output. Dropping it closes everything.
pub struct Pumps {
    stdin: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    /// Counts the chunks that a reader has taken.
    progress: watch::Receiver<u64>,
    close_stdin: host::StdinCloser,
    _logger: Option<logger::Logger>,
}

impl std::fmt::Debug for Pumps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pumps")
    }
}

impl Pumps {
    /// Joins both ends. Copying begins at once.
    pub fn start(host: HostIo, guest: GuestIo) -> Pumps {
        let (moved, progress) = watch::channel(0);
        let stdin = match (host.stdin, guest.stdin) {
            (Some(from), Some(to)) => Some(tokio::spawn(copy_input(from, to))),
            _ => None,
        };
        let mut outputs = Vec::new();
        for (from, to) in [(guest.stdout, host.stdout), (guest.stderr, host.stderr)] {
            if let (Some(from), Some(mut to)) = (from, to) {
                let moved = moved.clone();
                outputs.push(tokio::spawn(async move {
                    copy_output(from, &mut to, &moved).await;
                    to.finish(&moved).await;
                }));
            }
        }
        Pumps {
            stdin,
            outputs,
            progress,
            close_stdin: host.close_stdin,
            _logger: host.logger,
        }
    }

    /// Lets the process see the end of its input, behind what is in the fifo already.
    pub fn close_stdin(&mut self) {
        self.close_stdin.close();
    }

    /// Waits until all output is read, as long as somebody reads it and no longer than `end`, then
    /// closes everything.
    pub async fn drain(mut self, end: Instant) {
        if let Some(stdin) = self.stdin.take() {
            stdin.abort();
        }
        for output in &mut self.outputs {
            loop {
                self.progress.mark_unchanged();
                let idle = (Instant::now() + OUTPUT_UNREAD).min(end);
                let waited = timeout_at(idle, &mut *output).await;
                let stuck = Instant::now() >= end || !self.progress.has_changed().unwrap_or(false);
                match waited {
                    Ok(_) => break,
                    Err(_) if stuck => {
                        tracing::warn!("output that nobody reads is dropped");
                        output.abort();
                        break;
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        self.stdin
            .iter()
            .chain(&self.outputs)
            .for_each(JoinHandle::abort);
    }
}

async fn copy_input(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                pass(Point::InputWaits);
                if to.write_all(&buffer[..length]).await.is_err() {
                    // The process has closed its input. What else arrives has nowhere to go.
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "input ends");
                break;
            }
        }
    }
    let _ = to.shutdown().await;
}

async fn copy_output(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &watch::Sender<u64>,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                pass(Point::OutputWaits);
                if let Err(error) = to.write_all(&buffer[..length]).await {
                    // The guest's end stays open and drained: a process does not die of its log's
                    // disk being full.
                    tracing::warn!(%error, "output is lost");
                    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
                    return;
                }
                moved.send_modify(|count| *count += 1);
            }
            Err(error) => {
                tracing::debug!(%error, "output ends");
                break;
            }
        }
    }
    let _ = to.flush().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pumps(output: JoinHandle<()>, progress: watch::Receiver<u64>) -> Pumps {
        Pumps {
            stdin: None,
            outputs: vec![output],
            progress,
            close_stdin: host::StdinCloser::default(),
            _logger: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_reads_is_given_up() {
        let (guest, mut process) = tokio::io::duplex(16);
        let (to_reader, _reader) = tokio::io::duplex(4);
        let (moved, progress) = watch::channel(0);
        let pumps = pumps(
            tokio::spawn(async move { copy_output(guest, to_reader, &moved).await }),
            progress,
        );
        process.write_all(b"more than fits").await.unwrap();
        let start = Instant::now();
        pumps.drain(start + OUTPUT_UNREAD * 5).await;
        assert!(start.elapsed() <= OUTPUT_UNREAD * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_is_read_slowly_is_all_read() {
        let (guest, mut process) = tokio::io::duplex(64);
        let (to_reader, mut reader) = tokio::io::duplex(1);
        let (moved, progress) = watch::channel(0);
        let pumps = pumps(
            tokio::spawn(async move { copy_output(guest, to_reader, &moved).await }),
            progress,
        );
        process.write_all(b"slow").await.unwrap();
        drop(process);
        let read = tokio::spawn(async move {
            let mut text = String::new();
            reader.read_to_string(&mut text).await.unwrap();
            text
        });
        pumps.drain(Instant::now() + OUTPUT_UNREAD).await;
        assert_eq!(read.await.unwrap(), "slow");
    }
}
