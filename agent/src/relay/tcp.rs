//! Port forwarding: streams from the host to TCP ports of the guest's loopback, which is the pod's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use guest_protocol::carry::{copy_both_ways, copy_until_end_of};
use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{ForwardRequest, Stream, read_line};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::serve as serve_all;
use crate::deadlines;
use crate::gate::Incoming;

/// Serves forwarded connections for ever.
pub async fn serve(incoming: Incoming) {
    serve_all(incoming, "port forwarding", forward).await;
}

async fn forward(mut host: Stream) -> io::Result<()> {
    let read = read_line::<ForwardRequest>(&mut host);
    let ForwardRequest { port } = timeout(deadlines::REQUEST_LINE, read).await??;
    let mut server = connect(port).await?;
    // Small writes are passed on as they come: whoever made them has decided when to wait for more.
    let _ = server.set_nodelay(true);
    host.write_all(&[ACCEPTED]).await?;
    match host {
        Stream::Unix(_) => copy_both_ways(&mut host, &mut server).await,
        // Not every vsock device passes on that one direction has ended, so the end of the server's
        // side ends the connection: `kubectl port-forward` waits for it.
        Stream::Vsock(_) => copy_until_end_of(server, host).await,
    }
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    let mut refusal = None;
    for host in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        match timeout(
            deadlines::LOOPBACK_CONNECT,
            TcpStream::connect((host, port)),
        )
        .await
        {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => refusal = refusal.or(Some(error)),
            Err(late) => refusal = refusal.or(Some(late.into())),
        }
    }
    let refusal = refusal.map(|error| error.to_string()).unwrap_or_default();
    Err(io::Error::other(format!(
        "connect to port {port} of the loopback: {refusal}"
    )))
}
