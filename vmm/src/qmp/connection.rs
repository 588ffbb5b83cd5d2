//! One QMP connection: a task owns the socket, callers hold a handle.
//!
//! Every command has an id and a deadline. A caller that goes away, or whose deadline passes,
//! leaves its entry behind: the late reply finds it and is dropped, and until then the command
//! counts among the eight that QEMU takes at a time. End of file, a reset and anything that is not
//! QMP all end the connection, and with it every waiting command.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch};

use super::codec::{Decoder, LINES, Message, encode};
use super::commands::{AddFd, Closefd, Command, Getfd, QmpCapabilities};
use super::events::Event;
use crate::deadlines::QMP_COMMAND;
use crate::error::{Doing, Error, Result};

/// QEMU stops reading when more commands than this wait (docs/interop/qmp-spec).
const IN_FLIGHT: usize = 8;

/// How many events a slow reader may be behind before it misses some, which it is told.
pub(super) const EVENTS: usize = 64;

type Outcome = Result<Value, (String, String)>;

/// A handle of a connection. The connection ends with the last handle.
#[derive(Clone, Debug)]
pub struct Qmp(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    requests: mpsc::UnboundedSender<Request>,
    in_flight: Arc<Semaphore>,
    next_id: AtomicU64,
    /// QEMU keeps only the descriptors of the last line that brought some, so one `getfd` at a
    /// time.
    passing_fd: tokio::sync::Mutex<()>,
    watched: Watched,
}

/// What the task tells everybody.
#[derive(Clone, Debug)]
struct Watched {
    events: broadcast::Sender<Event>,
    last_word: Arc<Mutex<Option<String>>>,
    /// Why the connection is closed, when it is.
    closed: watch::Receiver<Option<String>>,
}

#[derive(Debug)]
struct Request {
    id: u64,
    line: Vec<u8>,
    fd: Option<OwnedFd>,
    waiter: Waiter,
}

#[derive(Debug)]
struct Waiter {
    reply: oneshot::Sender<Outcome>,
    /// Given back when QEMU answers, not when the caller loses patience.
    _in_flight: OwnedSemaphorePermit,
}

impl Qmp {
    /// Waits for the greeting and negotiates. The socket must be connected to a monitor in control
    /// mode.
    ///
    /// # Errors
    /// The deadline passed, or what is at the other end closed or does not speak QMP.
    pub async fn open(stream: StdUnixStream, timeout: Duration) -> Result<(Qmp, String)> {
        let stream = stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream));
        let stream = stream.doing(|| "set up the monitor's socket".into())?;
        let (requests, queue) = mpsc::unbounded_channel();
        let (greet, greeting) = oneshot::channel();
        let (close, closed) = watch::channel(None);
        let watched = Watched {
            events: broadcast::Sender::new(EVENTS),
            last_word: Arc::default(),
            closed,
        };
        let task = Task {
            stream,
            decoder: Decoder::default(),
            greet: Some(greet),
            outgoing: VecDeque::new(),
            waiting: HashMap::new(),
            events: watched.events.clone(),
            last_word: watched.last_word.clone(),
        };
        tokio::spawn(async move {
            let reason = task.run(queue).await;
            tracing::debug!(reason, "QEMU's monitor is closed");
            close.send_replace(Some(reason));
        });
        let qmp = Qmp(Arc::new(Shared {
            requests,
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
            next_id: AtomicU64::new(1),
            passing_fd: tokio::sync::Mutex::default(),
            watched,
        }));
        let doing = "QEMU's greeting";
        let version = within(timeout, doing, async {
            match greeting.await {
                Ok(version) => Ok(version),
                Err(_) => Err(qmp.closed_error().await),
            }
        })
        .await?;
        qmp.execute_within(&QmpCapabilities {}, timeout).await?;
        Ok((qmp, version))
    }

    /// Runs a command within [`QMP_COMMAND`].
    ///
    /// # Errors
    /// As [`Qmp::execute_within`].
    pub async fn execute<C: Command>(&self, command: &C) -> Result<C::Reply> {
        self.execute_within(command, QMP_COMMAND).await
    }

    /// Runs a command.
    ///
    /// # Errors
    /// QEMU's own, the end of the connection, or the deadline: then it is not known whether it was
    /// done, so ask.
    pub async fn execute_within<C: Command>(
        &self,
        command: &C,
        timeout: Duration,
    ) -> Result<C::Reply> {
        self.send(command, None, timeout).await
    }

    /// Gives QEMU a descriptor under a name, for the next command to use.
    ///
    /// # Errors
    /// As [`Qmp::execute_within`].
    pub async fn pass_fd(&self, name: &str, fd: OwnedFd) -> Result<()> {
        let doing = "passing a descriptor to QEMU";
        within(QMP_COMMAND, doing, async {
            let _alone = self.0.passing_fd.lock().await;
            self.send(
                &Getfd {
                    fdname: name.into(),
                },
                Some(fd),
                QMP_COMMAND,
            )
            .await
            .map(drop)
        })
        .await
    }

    /// Gives QEMU a descriptor that it opens as `/dev/fdset/<number>`; the number is returned.
    ///
    /// # Errors
    /// As [`Qmp::execute_within`].
    pub async fn add_fd(&self, fd: OwnedFd) -> Result<u64> {
        let doing = "passing a descriptor to QEMU";
        within(QMP_COMMAND, doing, async {
            let _alone = self.0.passing_fd.lock().await;
            self.send(&AddFd {}, Some(fd), QMP_COMMAND)
                .await
                .map(|set| set.fdset_id)
        })
        .await
    }

    /// Closes a descriptor that [`Qmp::pass_fd`] gave and no device took.
    ///
    /// # Errors
    /// As [`Qmp::execute_within`].
    pub async fn close_fd(&self, name: &str) -> Result<()> {
        self.execute(&Closefd {
            fdname: name.into(),
        })
        .await
        .map(drop)
    }

    /// Events from now on. A reader that is more than [`EVENTS`] behind learns that it missed some.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.0.watched.events.subscribe()
    }

    /// Waits for the end of the connection, without holding it open, and says why it came.
    pub(crate) fn closing(&self) -> impl Future<Output = String> + Send + 'static {
        let mut closed = self.0.watched.closed.clone();
        async move {
            let reason = closed
                .wait_for(Option::is_some)
                .await
                .map(|reason| reason.clone());
            reason
                .ok()
                .flatten()
                .unwrap_or_else(|| "the runtime ended".into())
        }
    }

    /// A place where the last event that explains the end of the virtual machine is kept.
    pub(crate) fn last_word(&self) -> Arc<Mutex<Option<String>>> {
        self.0.watched.last_word.clone()
    }

    async fn closed_error(&self) -> Error {
        Error::Closed {
            reason: self.closing().await,
        }
    }

    async fn send<C: Command>(
        &self,
        command: &C,
        fd: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<C::Reply> {
        let shared = &self.0;
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let line = encode(C::NAME, command, id).map_err(|error| {
            Error::Unsupported(format!("{} cannot be written as JSON: {error}", C::NAME))
        })?;
        let doing = format!("QEMU's answer to {}", C::NAME);
        let outcome = within(timeout, &doing, async {
            // The semaphore is never closed; if it were, that would be the end of the connection
            // too.
            let Ok(permit) = shared.in_flight.clone().acquire_owned().await else {
                return Err(self.closed_error().await);
            };
            let (reply, outcome) = oneshot::channel();
            let request = Request {
                id,
                line,
                fd,
                waiter: Waiter {
                    reply,
                    _in_flight: permit,
                },
            };
            if shared.requests.send(request).is_err() {
                return Err(self.closed_error().await);
            }
            match outcome.await {
                Ok(outcome) => Ok(outcome),
                Err(_) => Err(self.closed_error().await),
            }
        })
        .await?;
        let value = outcome.map_err(|(class, desc)| Error::Refused {
            command: C::NAME,
            class,
            desc,
        })?;
        C::Reply::deserialize(value).map_err(|error| {
            Error::Unsupported(format!(
                "QEMU's answer to {} is not understood: {error}",
                C::NAME
            ))
        })
    }
}

async fn within<T>(
    timeout: Duration,
    doing: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Deadline {
            doing: doing.to_owned(),
            timeout,
        }),
    }
}

/// Owner of the socket.
struct Task {
    stream: UnixStream,
    decoder: Decoder,
    greet: Option<oneshot::Sender<String>>,
    outgoing: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    waiting: HashMap<u64, Waiter>,
    events: broadcast::Sender<Event>,
    last_word: Arc<Mutex<Option<String>>>,
}

impl Task {
    /// Runs until the connection ends, and says why it did.
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Request>) -> String {
        loop {
            let interest = if self.outgoing.is_empty() {
                Interest::READABLE
            } else {
                Interest::READABLE | Interest::WRITABLE
            };
            let step = tokio::select! {
                request = queue.recv() => match request {
                    Some(request) => {
                        self.take(request);
                        Ok(())
                    }
                    None => return "no longer used".into(),
                },
                ready = self.stream.ready(interest) => match ready {
                    // Both every time: neither a flood of events nor one of commands may starve the
                    // other direction.
                    Ok(ready) => match if ready.is_readable() { self.read() } else { Ok(()) } {
                        Ok(()) if ready.is_writable() => self.write(),
                        other => other,
                    },
                    Err(error) => Err(error.to_string()),
                },
            };
            // Requests that are still queued, and all that wait, learn it from their dropped
            // channels.
            if let Err(reason) = step {
                return reason;
            }
        }
    }

    fn take(&mut self, request: Request) {
        // A caller that left before its command was sent does not want it any more.
        if request.waiter.reply.is_closed() {
            return;
        }
        tracing::trace!(target: LINES, sent = %String::from_utf8_lossy(&request.line).trim_end());
        self.waiting.insert(request.id, request.waiter);
        self.outgoing.push_back((request.line, request.fd));
    }

    fn read(&mut self) -> Result<(), String> {
        let mut buffer = [0; 16 << 10];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => return Err("end of file".into()),
            Ok(count) => self.decoder.extend(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        while let Some(message) = self
            .decoder
            .next_message()
            .map_err(|error| error.to_string())?
        {
            self.dispatch(message);
        }
        Ok(())
    }

    fn dispatch(&mut self, message: Message) {
        match message {
            Message::Greeting { version } => {
                if let Some(greet) = self.greet.take() {
                    let _ = greet.send(version);
                }
            }
            Message::Event(event) => {
                tracing::debug!(event = event.name, data = %event.data, "QEMU's event");
                if let Some(word) = event.last_word() {
                    *sys::lock(&self.last_word) = Some(word);
                }
                // Fails only if nobody listens.
                let _ = self.events.send(event);
            }
            Message::Reply {
                id: Some(id),
                outcome,
            } => match self.waiting.remove(&id) {
                // Fails only if the caller left: the late reply ends here.
                Some(waiter) => drop(waiter.reply.send(outcome)),
                None => tracing::debug!(id, "QEMU answered a command that nobody sent"),
            },
            Message::Reply { id: None, outcome } => {
                tracing::warn!(?outcome, "QEMU answered without an id")
            }
        }
    }

    fn write(&mut self) -> Result<(), String> {
        while let Some((line, fd)) = self.outgoing.front_mut() {
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
                let rights = [ControlMessage::ScmRights(&fds)];
                let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
                let socket = self.stream.as_fd().as_raw_fd();
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                Ok(sendmsg::<()>(
                    socket,
                    &[IoSlice::new(line)],
                    rights,
                    flags,
                    None,
                )?)
            });
            match sent {
                Ok(count) => {
                    // A descriptor goes with the first byte of its line.
                    *fd = None;
                    line.drain(..count);
                    if line.is_empty() {
                        self.outgoing.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // QEMU may have said why before it left: let reading find the end.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.outgoing.clear(),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}
