//! Port forwarding: streams from the host to TCP ports of the guest's loopback, which is the pod's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{FORWARD_MAGIC, Stream};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{HANDSHAKE, both_ways, read_line, serve as serve_all, until_end_of};
use crate::gate::Arrivals;

/// Longest request in bytes: the magic word, a space and a port.
const MAX_LINE: usize = FORWARD_MAGIC.len() + 1 + 5;

/// Serves forwarded connections for ever.
pub async fn serve(arrivals: Arrivals) {
    serve_all(arrivals, "port forwarding", forward).await;
}

async fn forward(mut host: Stream) -> io::Result<()> {
    let line = read_line(&mut host, MAX_LINE).await?;
    let port = parse(&line).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{line:?} does not name a TCP port"),
        )
    })?;
    let server = connect(port).await?;
    // What is carried has its own ideas of when to wait for more.
    let _ = server.set_nodelay(true);
    host.write_all(&[ACCEPTED]).await?;
    match host {
        Stream::Unix(_) => both_ways(host, server).await,
        // Not every vsock device passes on that one direction has ended, and who forwards a port
        // waits for that.
        Stream::Vsock(_) => until_end_of(server, host).await,
    }
}

fn parse(line: &str) -> Option<u16> {
    let text = line.strip_prefix(FORWARD_MAGIC)?.strip_prefix(' ')?;
    let port: u16 = text.parse().ok()?;
    // One way to write each port.
    (port != 0 && port.to_string() == text).then_some(port)
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    let mut refusal = None;
    for host in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        match timeout(HANDSHAKE, TcpStream::connect((host, port))).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_port_can_be_asked_for() {
        assert_eq!(parse("cofferdam-forward/1 1"), Some(1));
        assert_eq!(parse("cofferdam-forward/1 65535"), Some(65535));
        for bad in [
            "",
            "cofferdam-forward/1",
            "cofferdam-forward/1 ",
            "cofferdam-forward/1 0",
            "cofferdam-forward/1 +80",
            "cofferdam-forward/1 080",
            "cofferdam-forward/1 65536",
            "cofferdam-forward/1 80 ",
            "cofferdam-forward/2 80",
            "cofferdam-forward/1  80",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
