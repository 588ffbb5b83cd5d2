//! The guest's end of stdio: raw vsock streams where the agent takes them, else the agent's polling
//! calls.

use std::io::ErrorKind;
use std::pin::Pin;

use futures::future::try_join_all;
use guest_protocol::protocols::agent::{ReadStreamRequest, WriteStreamRequest};
use guest_protocol::stdio::{ACCEPTED, Channel, Header};
use guest_protocol::{STDIO_PORT, Transport};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::BUFFER;
use crate::deadlines::{CLIENT_READS, STDIO_ACCEPTED, STREAM_REDIAL};
use crate::error::{Error, Result};
use crate::from_guest::Agent;
use crate::model::{ProcessId, Stdio};

/// How many processes have their streams connected at a time. More would only fill the guest's
/// queue of connections, and their deadlines would run meanwhile.
static DIALLING: Semaphore = Semaphore::const_new(32);

/// How often a stream that ends before the agent has taken it is dialled again. An agent that
/// refuses a stream ends it too.
const REDIALS: u32 = 3;

/// Asked for at a time by a polling call, in bytes.
const POLL_SIZE: u32 = 32 * 1024;

type Reader = Pin<Box<dyn AsyncRead + Send>>;
type Writer = Pin<Box<dyn AsyncWrite + Send>>;

/// The guest's ends of a process's channels.
#[derive(Default)]
pub struct GuestIo {
    /// Takes input.
    pub stdin: Option<Writer>,
    /// Gives output.
    pub stdout: Option<Reader>,
    /// Gives errors.
    pub stderr: Option<Reader>,
}

fn channels(io: &Stdio) -> Vec<Channel> {
    // A logger and a file take both; a fifo takes one.
    let uri = io.stdout.as_deref().is_some_and(|stdout| {
        ["file:", "binary:"]
            .iter()
            .any(|scheme| stdout.starts_with(scheme))
    });
    let mut channels = Vec::new();
    if io.stdin.is_some() {
        channels.push(Channel::Stdin);
    }
    if io.stdout.is_some() {
        channels.push(Channel::Stdout);
    }
    if !io.terminal && (io.stderr.is_some() || uri) {
        channels.push(Channel::Stderr);
    }
    channels
}

impl GuestIo {
    /// Connects a stream for each channel that `io` has, before the process exists: nothing it
    /// writes is lost.
    ///
    /// # Errors
    /// `UNAVAILABLE` or `DEADLINE_EXCEEDED`: the agent does not take them, or is gone.
    pub async fn raw(
        agent: &Agent,
        transport: &Transport,
        key: &ProcessId,
        io: &Stdio,
    ) -> Result<GuestIo> {
        let mut wanted = channels(io);
        if wanted.is_empty() {
            // Without any stream the agent would wait for polling calls. An input that nobody feeds
            // ends at once, and what has no stream beside it goes to /dev/null.
            wanted.push(Channel::Stdin);
        }
        let dials = async {
            // It is never closed.
            let _turn = DIALLING.acquire().await;
            let dials = wanted.iter().map(|channel| dial(transport, key, *channel));
            try_join_all(dials).await
        };
        let streams = tokio::select! {
            streams = dials => streams?,
            // Whoever dials would take a refusal for a queue that is full for the moment.
            _ = agent.failed() => {
                return Err(Error::unavailable(format!(
                    "the guest agent was gone before it took the stdio of {key}"
                )));
            }
        };
        let mut guest = GuestIo::default();
        for (channel, stream) in wanted.iter().zip(streams) {
            match channel {
                Channel::Stdin => guest.stdin = Some(Box::pin(stream)),
                Channel::Stdout => guest.stdout = Some(Box::pin(stream)),
                Channel::Stderr => guest.stderr = Some(Box::pin(stream)),
            }
        }
        Ok(guest)
    }

    /// Serves the channels by calls to an agent that has no raw streams. To be used once the
    /// process exists. What the client does not want is read all the same, and an input that it
    /// does not have ends at once: a process must not wait for nobody.
    pub fn polled(agent: &Agent, key: &ProcessId, io: &Stdio) -> (GuestIo, PolledOutput) {
        let wanted = channels(io);
        let (mut guest, mut output) = (GuestIo::default(), PolledOutput(Vec::new()));
        let (ours, theirs) = duplex(BUFFER);
        tokio::spawn(write_loop(agent.clone(), key.clone(), io.terminal, ours));
        guest.stdin = wanted
            .contains(&Channel::Stdin)
            .then(|| Box::pin(theirs) as Writer);
        let mut reader = |channel| -> Option<Reader> {
            let (blocked, is_blocked) = watch::channel(false);
            output.0.push(is_blocked);
            let (agent, key) = (agent.clone(), key.clone());
            if !wanted.contains(&channel) {
                let nobody = tokio::io::sink();
                tokio::spawn(read_loop(agent, key, channel, nobody, blocked));
                return None;
            }
            let (ours, theirs) = duplex(BUFFER);
            tokio::spawn(read_loop(agent, key, channel, ours, blocked));
            Some(Box::pin(theirs))
        };
        guest.stdout = reader(Channel::Stdout);
        if !io.terminal {
            guest.stderr = reader(Channel::Stderr);
        }
        (guest, output)
    }
}

/// The output of a process whose agent is polled: for each channel whether its client keeps it from
/// being read. A channel whose sender has gone is at its end.
#[derive(Debug)]
pub struct PolledOutput(Vec<watch::Receiver<bool>>);

impl PolledOutput {
    /// Waits until all output is read, but not for a client that reads nothing. Kata's agent closes
    /// the output of a process as soon as somebody has waited for its exit, read or not.
    pub async fn read(self) {
        for mut is_blocked in self.0 {
            loop {
                let blocked = *is_blocked.borrow_and_update();
                let changed = is_blocked.changed();
                let ended = match blocked {
                    false => changed.await.is_err(),
                    true => !matches!(timeout(CLIENT_READS, changed).await, Ok(Ok(()))),
                };
                if ended {
                    break;
                }
            }
        }
    }
}

async fn dial(
    transport: &Transport,
    key: &ProcessId,
    channel: Channel,
) -> Result<guest_protocol::Stream> {
    let header = Header {
        channel,
        container_id: key.container.clone(),
        exec_id: key.exec_id().to_owned(),
    };
    let connect = async {
        let mut dropped = 0;
        loop {
            let answer = async {
                let mut stream = transport.dial(STDIO_PORT, STDIO_ACCEPTED).await?;
                stream.write_all(header.to_string().as_bytes()).await?;
                std::io::Result::Ok((stream.read_u8().await?, stream))
            };
            match answer.await {
                Ok((ACCEPTED, stream)) => return Ok(stream),
                Ok((other, _)) => {
                    return Err(std::io::Error::other(format!("unexpected byte {other}")));
                }
                // The agent is there: a refusal is a queue that is full for the moment. The
                // kernel's vsock resets, the user space one refuses.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset
                    ) =>
                {
                    sleep(STREAM_REDIAL).await;
                }
                // vhost-device-vsock drops a connection now and then, with what it carried. The
                // agent takes the last stream of a channel.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe
                    ) && dropped < REDIALS =>
                {
                    dropped += 1;
                    sleep(STREAM_REDIAL).await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    match timeout(STDIO_ACCEPTED, connect).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(Error::unavailable(format!(
            "the guest agent does not take {channel:?} of {key}: {error}"
        ))),
        Err(_) => Err(Error::deadline(format!(
            "the guest agent did not take {channel:?} of {key} in {STDIO_ACCEPTED:?}"
        ))),
    }
}

/// An agent's end of output is empty data, or an error with older ones.
async fn read_loop(
    agent: Agent,
    key: ProcessId,
    channel: Channel,
    mut to: impl AsyncWrite + Unpin,
    blocked: watch::Sender<bool>,
) {
    let request = ReadStreamRequest {
        exec_id: key.exec_id().to_owned(),
        container_id: key.container,
        len: POLL_SIZE,
        ..Default::default()
    };
    loop {
        match agent.read(channel, &request).await {
            Ok(Some(data)) => {
                blocked.send_replace(true);
                if to.write_all(&data).await.is_err() {
                    return;
                }
                blocked.send_replace(false);
            }
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "output ends");
                return;
            }
        }
    }
}

/// Empty data closes the process's input, in order behind what was written. A terminal has no end
/// of input: Kata's agent would close all of it, output too.
async fn write_loop(agent: Agent, key: ProcessId, is_terminal: bool, mut from: DuplexStream) {
    let mut buffer = vec![0; POLL_SIZE as usize];
    loop {
        let length = from.read(&mut buffer).await.unwrap_or_default();
        if is_terminal && length == 0 {
            return;
        }
        let request = WriteStreamRequest {
            container_id: key.container.clone(),
            exec_id: key.exec_id().to_owned(),
            data: buffer[..length].to_vec(),
            ..Default::default()
        };
        if agent.write(&request).await.is_err() || length == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_exit_is_asked_for_when_all_output_is_read() {
        let (blocked, stdout) = watch::channel(false);
        let output = PolledOutput(vec![stdout]);
        tokio::spawn(async move {
            // A client that is slow, and reads.
            for _ in 0..20 {
                blocked.send_replace(true);
                sleep(CLIENT_READS / 2).await;
                blocked.send_replace(false);
            }
        });
        let began = Instant::now();
        output.read().await;
        assert!(began.elapsed() >= CLIENT_READS * 10);
    }

    #[tokio::test(start_paused = true)]
    async fn an_exit_does_not_wait_for_a_client_that_does_not_read() {
        let (blocked, stdout) = watch::channel(false);
        blocked.send_replace(true);
        timeout(CLIENT_READS * 2, PolledOutput(vec![stdout]).read())
            .await
            .unwrap();
        drop(blocked);
    }

    #[test]
    fn a_process_has_the_channels_that_its_client_named() {
        let io = |stdin: &str, stdout: &str, stderr: &str, terminal| {
            channels(&Stdio::of_request(stdin, stdout, stderr, terminal))
        };
        assert_eq!(io("", "", "", false), []);
        assert_eq!(
            io("/i", "/o", "/e", false),
            [Channel::Stdin, Channel::Stdout, Channel::Stderr]
        );
        assert_eq!(
            io("/i", "/o", "/e", true),
            [Channel::Stdin, Channel::Stdout]
        );
        assert_eq!(
            io("", "file:///log", "file:///log", false),
            [Channel::Stdout, Channel::Stderr]
        );
        assert_eq!(
            io("", "binary:///log", "", false),
            [Channel::Stdout, Channel::Stderr]
        );
    }
}
