//! Tells the host that the agent can be reached.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep, timeout};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::log::log;

/// How long the notice is tried: the vsock device may come after the agent, and the host may be busy.
const PERSEVERANCE: Duration = Duration::from_secs(60);

/// By when one attempt must be through.
const ATTEMPT: Duration = Duration::from_secs(2);

/// Pause between attempts: where there is no device yet, they fail at once.
const PAUSE: Duration = Duration::from_millis(5);

/// Dials the host and sends one line.
pub async fn tell(port: u32) {
    let end = Instant::now() + PERSEVERANCE;
    loop {
        let connect = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port));
        let error = match timeout(ATTEMPT, connect).await {
            // A host that hangs up at once has understood.
            Ok(Ok(mut stream)) => {
                let _ = timeout(ATTEMPT, stream.write_all(b"ready\n")).await;
                return;
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
