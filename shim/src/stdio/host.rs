//! containerd's end of stdio: fifos, `file://` and `binary://` URIs.
//!
//! Output fifos are opened for reading too: then opening waits for nobody, and a client that goes
//! away and comes back (containerd's restart) is no broken pipe. The client sees the end of output
//! when the shim closes its descriptor. An input fifo gets a writer of the shim's own that keeps it
//! open until `CloseIO`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::log_file::LogFile;
use super::logger::Logger;
use crate::deadlines::{FIFO_CLIENT, FIFO_CLIENT_LOOK_AGAIN};
use crate::error::{Error, IoContext, Result};
use crate::model::Stdio;

#[derive(Default)]
pub struct HostIo {
    /// Where input comes from.
    pub stdin: Option<pipe::Receiver>,
    /// Where output goes.
    pub stdout: Option<Output>,
    /// Where errors go; never with a terminal.
    pub stderr: Option<Output>,
    pub(super) close_stdin: StdinCloser,
    pub(super) logger: Option<Logger>,
}

/// Where one output stream goes.
pub enum Output {
    /// A fifo of the client's.
    Fifo(Fifo),
    /// The pipe to a logger.
    Pipe(pipe::Sender),
    Log(LogFile),
}

/// An output fifo with a reader of the shim's own.
pub struct Fifo {
    sender: pipe::Sender,
    reader: Option<File>,
    opened: Instant,
}

impl Output {
    /// Waits until a log file is written, and until a fifo's client has opened its end, if the
    /// process was so quick that this is not sure: what is in a fifo that nobody has open is lost,
    /// and who opens it then waits for ever. A client that does not come in the time that one may
    /// take is none.
    pub async fn finish(&mut self, progress: &watch::Sender<u64>) {
        let fifo = match self {
            Output::Fifo(fifo) => fifo,
            Output::Log(log) => return log.finish(progress).await,
            Output::Pipe(_) => return,
        };
        fifo.reader = None;
        while fifo.opened.elapsed() < FIFO_CLIENT && !has_reader(&fifo.sender) {
            sleep(FIFO_CLIENT_LOOK_AGAIN).await;
        }
    }
}

/// poll(2) reports an error on a pipe that nobody reads.
fn has_reader(sender: &pipe::Sender) -> bool {
    let mut fds = [PollFd::new(sender.as_fd(), PollFlags::empty())];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    !fds[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLERR))
}

/// The shim's own writer of an input fifo: while it is there, the reader sees no end.
#[derive(Clone, Default)]
pub struct StdinCloser(Arc<Mutex<Option<File>>>);

impl StdinCloser {
    /// Gives up the writer; the reader sees the end once the client has closed too.
    pub fn close(&self) {
        if let Ok(mut writer) = self.0.lock() {
            writer.take();
        }
    }
}

impl HostIo {
    /// Opens what a request names.
    ///
    /// # Errors
    /// One line that names the path or URI; an unknown scheme.
    pub async fn open(io: &Stdio, namespace: &str, id: &str) -> Result<HostIo> {
        let mut host = HostIo::default();
        if let Some(stdin) = &io.stdin {
            let (reader, writer) = open_input(Path::new(stdin))?;
            host.stdin = Some(reader);
            host.close_stdin = StdinCloser(Arc::new(Mutex::new(Some(writer))));
        }
        let uri = io.stdout.as_deref().unwrap_or_default();
        let scheme = uri.split_once("://").map(|(scheme, _)| scheme);
        match scheme.or_else(|| other_scheme(uri)) {
            None | Some("fifo") => {
                host.stdout = io.stdout.as_deref().map(open_output).transpose()?;
                if !io.terminal {
                    host.stderr = io.stderr.as_deref().map(open_output).transpose()?;
                }
            }
            Some("file") => {
                let [stdout, stderr] = LogFile::open(uri).await?;
                host.stdout = Some(Output::Log(stdout));
                host.stderr = Some(Output::Log(stderr));
            }
            Some("binary") => {
                let (logger, stdout, stderr) = Logger::start(uri, namespace, id).await?;
                host.logger = Some(logger);
                host.stdout = Some(Output::Pipe(stdout));
                host.stderr = Some(Output::Pipe(stderr));
            }
            Some(scheme) => {
                return Err(Error::invalid(format!(
                    "stdio URI {uri:?} has the unknown scheme {scheme:?}: use a fifo, file:// or \
                     binary://"
                )));
            }
        }
        Ok(host)
    }
}

/// A scheme without slashes (`file:/path`), as Go's URL parser takes it. An absolute path has none.
fn other_scheme(uri: &str) -> Option<&str> {
    let (scheme, _) = uri.split_once(':')?;
    (!scheme.is_empty()
        && scheme
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')))
    .then_some(scheme)
}

fn open_input(path: &Path) -> Result<(pipe::Receiver, File)> {
    let doing = || format!("open the input fifo {}", path.display());
    // The reader first: a fifo without one cannot be opened for writing alone.
    let reader = pipe::OpenOptions::new().open_receiver(path).doing(doing)?;
    let writer = pipe::OpenOptions::new().open_sender(path).doing(doing)?;
    Ok((
        reader,
        File::from(writer.into_nonblocking_fd().doing(doing)?),
    ))
}

fn open_output(uri: &str) -> Result<Output> {
    let path = Path::new(uri.strip_prefix("fifo://").unwrap_or(uri));
    let doing = || format!("open the output fifo {}", path.display());
    let reader = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .doing(doing)?;
    let sender = pipe::OpenOptions::new().open_sender(path).doing(doing)?;
    Ok(Output::Fifo(Fifo {
        sender,
        reader: Some(reader),
        opened: Instant::now(),
    }))
}

impl AsyncWrite for Output {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Output::Fifo(fifo) => Pin::new(&mut fifo.sender).poll_write(cx, buf),
            Output::Pipe(sender) => Pin::new(sender).poll_write(cx, buf),
            Output::Log(log) => match &mut log.pipe {
                Some(pipe) => Pin::new(pipe).poll_write(cx, buf),
                None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            },
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::stat::Mode;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.to_string_lossy().into_owned()
    }

    #[tokio::test]
    async fn fifos_open_without_a_client_and_end_when_closed() {
        let dir = tempfile::tempdir().unwrap();
        let io = Stdio {
            stdout: Some(fifo(dir.path(), "out")),
            stderr: Some(fifo(dir.path(), "err")),
            ..Stdio::default()
        };
        let mut host = HostIo::open(&io, "default", "web").await.unwrap();
        let mut reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(io.stdout.as_ref().unwrap())
            .unwrap();
        host.stdout
            .as_mut()
            .unwrap()
            .write_all(b"hello")
            .await
            .unwrap();
        drop(host);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn a_client_that_comes_after_the_process_has_ended_finds_its_output() {
        let dir = tempfile::tempdir().unwrap();
        let io = Stdio {
            stdout: Some(fifo(dir.path(), "out")),
            ..Stdio::default()
        };
        let mut output = HostIo::open(&io, "default", "web")
            .await
            .unwrap()
            .stdout
            .unwrap();
        output.write_all(b"hello").await.unwrap();
        let path = io.stdout.clone().unwrap();
        let client = std::thread::spawn(move || {
            std::thread::sleep(FIFO_CLIENT_LOOK_AGAIN * 10);
            std::fs::read_to_string(path).unwrap()
        });
        output.finish(&watch::Sender::new(0)).await;
        drop(output);
        assert_eq!(client.join().unwrap(), "hello");
    }

    #[tokio::test]
    async fn a_client_that_never_comes_is_not_waited_for_long_after_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let io = Stdio {
            stdout: Some(fifo(dir.path(), "out")),
            ..Stdio::default()
        };
        let mut output = HostIo::open(&io, "default", "web")
            .await
            .unwrap()
            .stdout
            .unwrap();
        tokio::time::pause();
        tokio::time::advance(FIFO_CLIENT).await;
        tokio::time::timeout(
            FIFO_CLIENT_LOOK_AGAIN,
            output.finish(&watch::Sender::new(0)),
        )
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn input_ends_at_close_io_behind_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let io = Stdio {
            stdin: Some(fifo(dir.path(), "in")),
            ..Stdio::default()
        };
        let mut host = HostIo::open(&io, "default", "web").await.unwrap();
        let mut client = File::options()
            .write(true)
            .open(io.stdin.as_ref().unwrap())
            .unwrap();
        client.write_all(b"all of it").unwrap();
        drop(client);
        host.close_stdin.close();
        let mut text = String::new();
        host.stdin
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .await
            .unwrap();
        assert_eq!(text, "all of it");
    }

    #[tokio::test]
    async fn both_outputs_go_to_one_file_in_a_directory_that_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/log");
        for uri in [
            format!("file://{}", path.display()),
            format!("file:{}", path.display()),
        ] {
            let io = Stdio {
                stdout: Some(uri),
                ..Stdio::default()
            };
            let mut host = HostIo::open(&io, "default", "web").await.unwrap();
            for (output, text) in [(&mut host.stdout, "out "), (&mut host.stderr, "err ")] {
                let output = output.as_mut().unwrap();
                output.write_all(text.as_bytes()).await.unwrap();
                output.finish(&watch::Sender::new(0)).await;
            }
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "out err out err ");
    }

    #[tokio::test]
    async fn a_process_without_stdio_has_none() {
        let host = HostIo::open(&Stdio::default(), "default", "web")
            .await
            .unwrap();
        assert!(host.stdin.is_none() && host.stdout.is_none() && host.stderr.is_none());
    }

    #[tokio::test]
    async fn an_unknown_scheme_is_named() {
        let io = Stdio {
            stdout: Some("gopher://x/y".into()),
            ..Stdio::default()
        };
        let error = HostIo::open(&io, "default", "web").await.err().unwrap();
        assert!(error.to_string().contains("\"gopher\""), "{error}");
    }
}
