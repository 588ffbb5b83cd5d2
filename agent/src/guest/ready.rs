//! Tells the host that the agent can be reached, and takes the key from it that connections have to
//! show.

use std::io;
use std::time::Duration;

use guest_protocol::{KEY_LINE, Key};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::gate;
use crate::log::log;

/// How long the notice is tried: the vsock device may come after the agent, and the host may be
/// busy.
const PERSEVERANCE: Duration = Duration::from_secs(60);

/// By when one attempt must be through.
const ATTEMPT: Duration = Duration::from_secs(2);

/// By when the host must answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Pause between attempts: where there is no device yet, they fail at once.
const PAUSE: Duration = Duration::from_millis(5);

/// Dials the host and sends one line. With `keyed` the host's key is the answer, without which
/// nobody comes in.
pub async fn tell(port: u32, keyed: bool) {
    let end = Instant::now() + PERSEVERANCE;
    loop {
        let connect = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port));
        let error = match timeout(ATTEMPT, connect).await {
            Ok(Ok(mut stream)) => {
                let sent = timeout(ATTEMPT, stream.write_all(b"ready\n")).await;
                // A host that hangs up at once has understood.
                if !keyed {
                    return;
                }
                match (sent, timeout(ANSWER, key(&mut stream)).await) {
                    (_, Ok(Ok(key))) => return gate::set(key),
                    (_, Ok(Err(error))) => error.to_string(),
                    (_, Err(_)) => "the host sends no key".to_owned(),
                }
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {ATTEMPT:?}"),
        };
        if Instant::now() >= end {
            return log!("ready notice to host port {port}: {error}");
        }
        sleep(PAUSE).await;
    }
}

async fn key(stream: &mut VsockStream) -> io::Result<Key> {
    let mut line = [0; KEY_LINE];
    stream.read_exact(&mut line).await?;
    Key::parse(line)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "what the host sends is no key"))
}
