//! Takes raw stdio streams from the host: header, then parked or attached.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use guest_protocol::Stream;
use guest_protocol::stdio::{ACCEPTED, Header, MAX_HEADER};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::gate::Arrivals;
use crate::log::log;
use crate::sandbox::Sandbox;

/// By when a header must be complete.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);

/// How long a stream waits for its process.
const PARKED: Duration = Duration::from_secs(30);

/// Accepts streams for ever.
pub async fn serve(mut arrivals: Arrivals, sandbox: Arc<Sandbox>) {
    loop {
        match arrivals.accept().await {
            Ok(stream) => {
                let sandbox = sandbox.clone();
                tokio::spawn(async move {
                    if let Err(error) = take(stream, &sandbox).await {
                        log!("stdio stream: {error}");
                    }
                });
            }
            Err(error) => {
                log!("accept a stdio stream: {error}");
                // Out of descriptors, for example: others must close some first.
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn take(mut stream: Stream, sandbox: &Arc<Sandbox>) -> io::Result<()> {
    let mut header = timeout(HEADER_DEADLINE, read_header(&mut stream)).await??;
    // Both names of the init process are one.
    if header.exec_id == header.container_id {
        header.exec_id.clear();
    }
    stream.write_all(&[ACCEPTED]).await?;
    if let Ok(process) = sandbox.process(&header.container_id, &header.exec_id) {
        process.io().attach(header.channel, stream);
        return Ok(());
    }
    let ticket = sandbox
        .park(header.clone(), stream)
        .ok_or_else(|| io::Error::other("too many stdio streams wait for their process"))?;
    sleep(PARKED).await;
    sandbox.expire(&header, ticket);
    Ok(())
}

/// Reads one line and nothing behind it: that belongs to the process.
async fn read_header(stream: &mut Stream) -> io::Result<Header> {
    let mut line = Vec::with_capacity(MAX_HEADER);
    while line.last() != Some(&b'\n') {
        if line.len() == MAX_HEADER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the header has no end",
            ));
        }
        line.push(stream.read_u8().await?);
    }
    String::from_utf8_lossy(&line)
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
