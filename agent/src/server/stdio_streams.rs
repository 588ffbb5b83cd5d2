//! Takes raw stdio streams from the host: reads the header, then attaches the stream to its
//! process, or parks it until the process is made.

use std::io;
use std::sync::Arc;

use guest_protocol::stdio::{ACCEPTED, Header};
use guest_protocol::{Stream, read_line};
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};

use super::exec_id;
use crate::deadlines;
use crate::gate::Incoming;
use crate::log::log;
use crate::sandbox::Sandbox;

/// Accepts streams for ever.
pub async fn serve(mut incoming: Incoming, sandbox: Arc<Sandbox>) {
    loop {
        match incoming.accept().await {
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
                sleep(deadlines::ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
}

async fn take(mut stream: Stream, sandbox: &Arc<Sandbox>) -> io::Result<()> {
    let read = read_line::<Header>(&mut stream);
    let mut header = timeout(deadlines::REQUEST_LINE, read).await??;
    // Both names of the first process are one.
    if header.exec_id == header.container_id {
        header.exec_id.clear();
    }
    let exec_id = exec_id(&header.container_id, &header.exec_id);
    let has_process = || sandbox.process(&header.container_id, exec_id).is_ok();
    // Before the answer: whoever has it may count on the stream.
    if !has_process() && !sandbox.can_park(&header) {
        return Err(io::Error::other(
            "too many stdio streams wait for their process",
        ));
    }
    stream.write_all(&[ACCEPTED]).await?;
    if let Ok(process) = sandbox.process(&header.container_id, exec_id) {
        process.io().attach(header.channel, stream);
        return Ok(());
    }
    let ticket = sandbox.park(header.clone(), stream);
    sleep(deadlines::STDIO_STREAM_UNCLAIMED).await;
    sandbox.expire(&header, ticket);
    Ok(())
}
