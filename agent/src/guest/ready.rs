//! The ready notice: the agent dials the host and sends one line, and the host answers with the key
//! that connections to the agent have to show.

use std::io;

use guest_protocol::{KEY_LINE, Key};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::deadlines;
use crate::gate::{self, Admission};
use crate::log::log;

/// Dials the host and sends one line. The answer is the key, if connections to the agent need it:
/// without it no connection is admitted.
pub async fn notify_host(port: u32, admission: Admission) {
    let end = Instant::now() + deadlines::READY_NOTICE;
    loop {
        let connect = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port));
        let error = match timeout(deadlines::READY_NOTICE_ATTEMPT, connect).await {
            Ok(Ok(mut stream)) => {
                let sent = timeout(
                    deadlines::READY_NOTICE_ATTEMPT,
                    stream.write_all(b"ready\n"),
                )
                .await;
                // A host that hangs up at once has got the notice.
                if admission == Admission::Anybody {
                    return;
                }
                match (
                    sent,
                    timeout(deadlines::KEY_ANSWER, read_key(&mut stream)).await,
                ) {
                    (_, Ok(Ok(key))) => return gate::set(key),
                    (_, Ok(Err(error))) => error.to_string(),
                    (_, Err(_)) => "the host sends no key".to_owned(),
                }
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the host did not accept in time".to_owned(),
        };
        if Instant::now() >= end {
            return log!("ready notice to host port {port}: {error}");
        }
        sleep(deadlines::READY_NOTICE_PAUSE).await;
    }
}

async fn read_key(stream: &mut VsockStream) -> io::Result<Key> {
    let mut line = [0; KEY_LINE];
    stream.read_exact(&mut line).await?;
    Key::parse(line)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the host's answer is not a key"))
}
