//! Standard input and output of processes.
//!
//! ```text
//!   process          agent: Io                            host
//!   fd 0  <── pipe ── stdin   <── copy_to_process ─────── raw stream, or WriteStdin
//!   fd 1  ─── pipe ── stdout  ─── copy_to_host ─────────> raw stream, or ReadStdout
//!   fd 2  ─── pipe ── stderr  ─── copy_to_host ─────────> raw stream, or ReadStderr
//!   fd 0-2  <─ pty ─> stdin = stdout (the terminal's master)
//! ```
//!
//! [`Io`] is one process's part, from its making on. Its ends are read and written by raw streams
//! (one for each channel, each with a task that copies) and by the calls of hosts that know no raw
//! streams. A raw stream may come before its process: [`Parking`] keeps it, and [`Claimed`] hands
//! it over when the process is made.
//!
//! Rules that a change must not break:
//!
//! * The exit of a process waits for nothing here.
//! * Every byte of output is delivered once, in order, and all of it before the end of file. A raw
//!   stream that the host closes leaves the rest to whoever comes next.
//! * A channel that no raw stream was parked for, while another was, is the null device.
//! * The end of a raw stdin closes the process's stdin, but for a terminal's, which is its output
//!   too.
//! * What nobody fetches goes a while after the container is removed, not with the exit.

mod parking;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use guest_protocol::Stream;
use guest_protocol::stdio::Channel;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use sys::{check, lock};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::stock::STOCK;

pub use parking::{Claimed, Parking};

/// How much a pump moves at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// A process's standard input, output and error, as the child gets them.
pub type ChildStdio = [OwnedFd; 3];

/// The agent's end of a pipe or terminal.
#[derive(Debug)]
pub struct Endpoint(AsyncFd<OwnedFd>);

impl Endpoint {
    fn new(fd: OwnedFd) -> io::Result<Arc<Endpoint>> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd keeps one descriptor open until it is dropped, and nothing closes it
        // behind its back.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Arc::new(Endpoint(fd)))
    }

    /// Reads what is there, or waits for something; 0 is the end.
    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buffer)?)) {
                // A terminal whose last user has closed it.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(result) => return result,
                Err(_) => {}
            }
        }
    }

    async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), data)?)) {
                Ok(Ok(written)) => data = &data[written..],
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(())
    }
}

type Slot = Mutex<Option<Arc<Endpoint>>>;

/// The stdio of one process. A slot is empty when the channel does not exist or has ended.
#[derive(Debug, Default)]
pub struct Io {
    stdin: Slot,
    stdout: Slot,
    stderr: Slot,
    terminal: bool,
    exited: watch::Sender<bool>,
    stdin_pump: Mutex<Option<AbortHandle>>,
    output_pumps: Mutex<Vec<AbortHandle>>,
}

/// Pipes for a process without a terminal: the child's ends and ours. A channel that no raw stream
/// was parked for, while another was, is the null device: the host has said that nobody feeds or
/// reads it.
///
/// # Errors
/// The failed system call.
pub fn pipes(claimed: &Claimed) -> Result<(ChildStdio, Io)> {
    let io = Io::default();
    let channel = |channel: Channel, slot: &Slot| -> io::Result<OwnedFd> {
        if claimed.any() && claimed.get(channel).is_none() {
            return Ok(File::options()
                .read(true)
                .write(true)
                .open("/dev/null")?
                .into());
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        let (theirs, ours) = if channel == Channel::Stdin {
            (read, write)
        } else {
            (write, read)
        };
        *lock(slot) = Some(Endpoint::new(ours)?);
        Ok(theirs)
    };
    let make = |one, slot| channel(one, slot).context(|| "create stdio".into());
    let stdio = [
        make(Channel::Stdin, &io.stdin)?,
        make(Channel::Stdout, &io.stdout)?,
        make(Channel::Stderr, &io.stderr)?,
    ];
    Ok((stdio, io))
}

/// The stdio of a process that has a terminal.
///
/// # Errors
/// The failed system call.
pub fn terminal(master: OwnedFd) -> Result<Io> {
    let endpoint = Endpoint::new(master).context(|| "watch the terminal".into())?;
    Ok(Io {
        stdin: Mutex::new(Some(endpoint.clone())),
        stdout: Mutex::new(Some(endpoint)),
        terminal: true,
        ..Io::default()
    })
}

impl Io {
    /// Connects the raw streams that were parked for this process.
    pub fn attach_all(self: &Arc<Self>, claimed: Claimed) {
        for (channel, stream) in claimed {
            self.attach(channel, stream);
        }
    }

    /// Carries a channel over a raw stream until either ends.
    pub fn attach(self: &Arc<Self>, channel: Channel, mut stream: Stream) {
        // Nothing to carry: the stream ends at once. A terminal's output has one reader.
        let absent = self.terminal && channel == Channel::Stderr;
        let Some(endpoint) = lock(self.slot(channel)).clone().filter(|_| !absent) else {
            return;
        };
        let io = Arc::clone(self);
        if channel == Channel::Stdin {
            let pump = tokio::spawn(async move {
                copy_to_process(&mut stream, &endpoint).await;
                if !io.terminal {
                    lock(&io.stdin).take();
                }
            });
            *lock(&self.stdin_pump) = Some(pump.abort_handle());
        } else {
            let pump = tokio::spawn(async move {
                if copy_to_host(&endpoint, &mut stream).await == Copied::All {
                    lock(io.slot(channel)).take();
                    let _ = stream.shutdown().await;
                }
            });
            lock(&self.output_pumps).push(pump.abort_handle());
        }
    }

    fn slot(&self, channel: Channel) -> &Slot {
        match channel {
            Channel::Stdin => &self.stdin,
            Channel::Stdout => &self.stdout,
            // A terminal has one output.
            Channel::Stderr if self.terminal => &self.stdout,
            Channel::Stderr => &self.stderr,
        }
    }

    /// Up to `limit` bytes of an output channel; none is the end. After the exit of the process
    /// that is also the silence of what it left behind: Kata's clients ask for the exit only when
    /// they have read all.
    ///
    /// # Errors
    /// The failed read.
    pub async fn read(&self, channel: Channel, limit: usize) -> Result<Vec<u8>> {
        let Some(endpoint) = lock(self.slot(channel)).clone() else {
            return Ok(Vec::new());
        };
        let mut buffer = vec![0; limit.clamp(1, CHUNK)];
        let length = tokio::select! {
            read = endpoint.read(&mut buffer) => read.context(|| format!("read {channel:?}"))?,
            () = self.silence_after_exit() => 0,
        };
        buffer.truncate(length);
        if length == 0 {
            lock(self.slot(channel)).take();
        }
        Ok(buffer)
    }

    async fn silence_after_exit(&self) {
        // The sender lives as long as self.
        let _ = self.exited.subscribe().wait_for(|exited| *exited).await;
        tokio::time::sleep(deadlines::OUTPUT_AFTER_EXIT).await;
    }

    /// Writes all of `data` to stdin; no data closes it.
    ///
    /// # Errors
    /// A stdin that is closed, by either side.
    pub async fn write(&self, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            self.close_stdin();
            if STOCK && self.terminal {
                self.close_output();
            }
            return Ok(());
        }
        let endpoint = lock(&self.stdin).clone();
        let endpoint = endpoint.ok_or_else(|| Error::Failed("stdin is closed".into()))?;
        endpoint
            .write_all(data)
            .await
            .context(|| "write stdin".into())
    }

    /// Closes stdin; what was written before is still read.
    pub fn close_stdin(&self) {
        lock(&self.stdin).take();
    }

    /// Closes output, read or not.
    pub fn close_output(&self) {
        lock(&self.stdout).take();
        lock(&self.stderr).take();
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    /// Without a terminal, or when it is gone.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        let endpoint = lock(&self.stdout)
            .clone()
            .or_else(|| lock(&self.stdin).clone());
        let endpoint = endpoint
            .filter(|_| self.terminal)
            .ok_or_else(|| Error::Unavailable("the process has no terminal".into()))?;
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = libc::winsize {
            ws_row: cells(rows),
            ws_col: cells(columns),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: an open terminal, and a size that lives over the call.
        let result = unsafe {
            libc::ioctl(
                endpoint.0.get_ref().as_raw_fd(),
                libc::TIOCSWINSZ,
                &raw const size,
            )
        };
        check(result.into())
            .context(|| "resize the terminal".into())
            .map(|_| ())
    }

    /// After the exit of the process nobody reads its stdin any more.
    pub fn process_exited(&self) {
        self.exited.send_replace(true);
        if let Some(pump) = lock(&self.stdin_pump).take() {
            pump.abort();
        }
        if !self.terminal {
            self.close_stdin();
        }
    }

    /// Whether all output was delivered.
    pub fn is_delivered(&self) -> bool {
        lock(&self.stdout).is_none() && lock(&self.stderr).is_none()
    }

    /// After the removal of the container: what nobody fetches in time is dropped.
    pub fn close_after_removal(self: &Arc<Self>) {
        self.process_exited();
        let pumps = std::mem::take(&mut *lock(&self.output_pumps));
        if pumps.iter().all(AbortHandle::is_finished) {
            return;
        }
        tokio::spawn(async move {
            tokio::time::sleep(deadlines::OUTPUT_AFTER_REMOVAL).await;
            for pump in pumps {
                pump.abort();
            }
        });
    }
}

/// Carries input until the host has no more of it, or the process takes no more.
async fn copy_to_process(stream: &mut Stream, endpoint: &Endpoint) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                if endpoint.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// What ended a copy to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copied {
    /// The end of the output.
    All,
    /// The host closed its stream. Another stream or the polling calls can have the rest.
    Part,
}

async fn copy_to_host(endpoint: &Endpoint, stream: &mut Stream) -> Copied {
    let mut buffer = vec![0; CHUNK];
    loop {
        match endpoint.read(&mut buffer).await {
            Ok(0) | Err(_) => return Copied::All,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    return Copied::Part;
                }
            }
        }
    }
}
