//! What is carried through the guest: forwarded ports, and unix sockets of the host.

use std::time::{Duration, Instant};

use guest_protocol::packets::{MAX_PACKET, read_packet};
use guest_protocol::protocols::agent::{CreateContainerRequest, Storage};
use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{FORWARD_PORT, Stream, UDS_DRIVER, UDS_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::client::{Client, DEADLINE, read_all, refusal, soon};

async fn ask(client: &Client<'_>, line: &str) -> Stream {
    let mut stream = client
        .guest
        .transport
        .dial(FORWARD_PORT, DEADLINE)
        .await
        .unwrap();
    let _ = stream.write_all(line.as_bytes()).await;
    stream
}

/// A stream to a port on which somebody will listen soon.
async fn forwarded(client: &Client<'_>, port: u16) -> Stream {
    let end = Instant::now() + DEADLINE;
    loop {
        let mut stream = ask(client, &format!("cofferdam-forward/1 {port}\n")).await;
        if let Ok(answer) = timeout(DEADLINE, stream.read_u8()).await.unwrap() {
            assert_eq!(answer, ACCEPTED);
            return stream;
        }
        assert!(Instant::now() < end, "nobody listens on port {port}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// A container that runs a script for each connection to a port.
async fn server(client: &Client<'_>, id: &str, port: u16, script: &str) {
    let args = [
        "nc",
        "-ll",
        "-p",
        &port.to_string(),
        "-e",
        "sh",
        "-c",
        script,
    ];
    client.create(id, client.spec(&args)).await.unwrap();
    client.start(id).await.unwrap();
}

pub async fn a_port_of_a_container_can_be_reached(client: &Client<'_>) {
    server(client, "web", 8080, "read line; echo got $line").await;
    let mut stream = forwarded(client, 8080).await;
    stream.write_all(b"this\n").await.unwrap();
    assert_eq!(read_all(Some(stream)).await, b"got this\n");
    client
        .create(
            "web6",
            client.spec(&["httpd", "-f", "-p", "[::1]:8083", "-h", "/seed"]),
        )
        .await
        .unwrap();
    client.start("web6").await.unwrap();
    let mut stream = forwarded(client, 8083).await;
    stream
        .write_all(b"GET /file HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    assert!(read_all(Some(stream)).await.ends_with(b"seeded\n"));
    client.remove("web6").await.unwrap();
    server(client, "echo", 8081, "cat").await;
    let mut stream = forwarded(client, 8081).await;
    let sent: Vec<u8> = (0..300_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let mut received = vec![0; sent.len()];
    let (mut read, mut write) = tokio::io::split(&mut stream);
    let both = async { tokio::join!(write.write_all(&sent), read.read_exact(&mut received)) };
    let (written, got) = timeout(DEADLINE, both).await.unwrap();
    written.unwrap();
    got.unwrap();
    assert!(sent == received);
    if !client.guest.is_vm {
        // The user space vsock device takes the end of one direction for the end of both.
        stream.shutdown().await.unwrap();
        assert_eq!(read_all(Some(stream)).await, b"");
        server(client, "half", 8082, "cat >/dev/null; echo all read").await;
        let mut stream = forwarded(client, 8082).await;
        stream.write_all(b"some").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(read_all(Some(stream)).await, b"all read\n");
        client.remove("half").await.unwrap();
    }
    client.remove("web").await.unwrap();
    client.remove("echo").await.unwrap();
}

pub async fn nonsense_on_the_forward_port_is_dropped(client: &Client<'_>) {
    let long = "x".repeat(5000);
    for line in [
        "GET / HTTP/1.1\n",
        &long,
        "cofferdam-forward/1 0\n",
        "cofferdam-forward/1 1\n",
        "unfinished",
    ] {
        let mut stream = ask(client, line).await;
        let mut answer = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut answer))
            .await
            .expect("the stream stays open");
        assert!(answer.is_empty(), "{line:?}");
    }
    drop(ask(client, "cofferdam").await);
}

pub async fn many_forwarded_connections_leave_nothing(client: &Client<'_>) {
    // A server that neither sends nor minds the other end: only the agent can notice that the host
    // has gone.
    server(client, "mute", 8090, "exec sleep 1000 <&-").await;
    drop(forwarded(client, 8090).await);
    let before = (!client.guest.is_vm).then(|| client.guest.holdings());
    let mut streams = Vec::new();
    for _ in 0..100 {
        streams.push(forwarded(client, 8090).await);
    }
    drop(streams);
    if let Some(before) = before {
        let end = Instant::now() + DEADLINE;
        while client.guest.holdings()[0] > before[0] {
            assert!(
                Instant::now() < end,
                "{before:?} became {:?}",
                client.guest.holdings()
            );
            sleep(Duration::from_millis(20)).await;
        }
    }
    // A server that goes ends the streams.
    let stream = forwarded(client, 8090).await;
    client.remove("mute").await.unwrap();
    let mut rest = Vec::new();
    let mut stream = stream;
    let _ = timeout(DEADLINE, stream.read_to_end(&mut rest))
        .await
        .expect("the stream has no end");
}

/// Makes a container with a socket of the host in it; the path of the socket as the agent sees it.
async fn with_socket(client: &Client<'_>, id: &str) -> String {
    with_socket_of_kind(client, id, "stream").await
}

async fn with_socket_of_kind(client: &Client<'_>, id: &str, kind: &str) -> String {
    let place = client
        .guest
        .rootfs
        .parent()
        .unwrap()
        .join(format!("{id}/host.sock"))
        .display()
        .to_string();
    let storage = Storage {
        driver: UDS_DRIVER.into(),
        driver_options: vec![format!("port={UDS_PORT}")],
        source: "csi".into(),
        options: [&format!("type={kind}"), "mode=0620", "uid=12", "gid=34"]
            .map(str::to_owned)
            .into(),
        mount_point: place.clone(),
        ..Default::default()
    };
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: Some(client.spec(&["sleep", "1000"])).into(),
        storages: vec![storage],
        ..Default::default()
    };
    client
        .rpc
        .agent
        .create_container(soon(), &request)
        .await
        .unwrap();
    place
}

async fn accept(listener: &guest_protocol::Listener) -> Stream {
    let mut stream = timeout(DEADLINE, listener.accept()).await.unwrap().unwrap();
    let mut line = [0; "cofferdam-uds/2 csi 0 0\n".len()];
    timeout(DEADLINE, stream.read_exact(&mut line))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&line, b"cofferdam-uds/2 csi 0 0\n");
    stream
}

// These three speak from outside to the socket in the guest, which only works with a process;
// busybox has no program that connects to a unix socket.

pub async fn a_host_socket_is_reached_from_the_guest(client: &Client<'_>) {
    if client.guest.is_vm {
        return;
    }
    let listener = client.guest.transport.listen(UDS_PORT).unwrap();
    let place = with_socket(client, "reaches").await;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let metadata = std::fs::metadata(&place).unwrap();
    assert_eq!(
        (
            metadata.permissions().mode() & 0o777,
            metadata.uid(),
            metadata.gid()
        ),
        (0o620, 12, 34)
    );
    for _ in 0..100 {
        let mut inside = UnixStream::connect(&place).await.unwrap();
        let mut outside = accept(&listener).await;
        outside.write_all(&[ACCEPTED]).await.unwrap();
        inside.write_all(b"question").await.unwrap();
        inside.shutdown().await.unwrap();
        let mut got = String::new();
        timeout(DEADLINE, outside.read_to_string(&mut got))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(got, "question");
        outside.write_all(b"answer").await.unwrap();
        drop(outside);
        assert_eq!(read_all(Some(Stream::Unix(inside))).await, b"answer");
    }
    client.remove("reaches").await.unwrap();
}

pub async fn datagrams_are_carried_each_by_itself(client: &Client<'_>) {
    if client.guest.is_vm {
        return;
    }
    let listener = client.guest.transport.listen(UDS_PORT).unwrap();
    let place = with_socket_of_kind(client, "grams", "datagram").await;
    let inside = std::os::unix::net::UnixDatagram::unbound().unwrap();
    inside.connect(&place).unwrap();
    let mut buffer = vec![0; MAX_PACKET];
    // The host ends a connection, as when its server begins anew.
    for _ in 0..2 {
        inside.send(b"one").unwrap();
        inside.send(&[7; 50_000]).unwrap();
        let mut outside = accept(&listener).await;
        outside.write_all(&[ACCEPTED]).await.unwrap();
        for length in [3, 50_000] {
            let reading = read_packet(&mut outside, &mut buffer);
            let got = timeout(DEADLINE, reading).await.unwrap().unwrap();
            assert_eq!(got.map(<[u8]>::len), Some(length));
        }
        drop(outside);
        sleep(Duration::from_millis(100)).await;
    }
    client.remove("grams").await.unwrap();
}

pub async fn a_descriptor_that_is_passed_ends_the_connection(client: &Client<'_>) {
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
    use std::os::fd::AsRawFd;
    if client.guest.is_vm {
        return;
    }
    let listener = client.guest.transport.listen(UDS_PORT).unwrap();
    let place = with_socket(client, "passes").await;
    let mut inside = UnixStream::connect(&place).await.unwrap();
    let mut outside = accept(&listener).await;
    outside.write_all(&[ACCEPTED]).await.unwrap();
    let passed = [0];
    let control = [ControlMessage::ScmRights(&passed)];
    let parts = [std::io::IoSlice::new(b"take this")];
    let socket = inside.as_raw_fd();
    sendmsg::<UnixAddr>(socket, &parts, &control, MsgFlags::empty(), None).unwrap();
    assert_eq!(read_all(Some(outside)).await, b"");
    let end = timeout(DEADLINE, inside.read(&mut [0])).await.unwrap();
    assert_eq!(end.unwrap_or(0), 0);
    client.remove("passes").await.unwrap();
}

pub async fn a_host_that_refuses_closes_the_connection(client: &Client<'_>) {
    if client.guest.is_vm {
        return;
    }
    let place = with_socket(client, "refused").await;
    // Nobody there, somebody who hangs up, somebody who says something else, somebody who says
    // nothing.
    let mut inside = UnixStream::connect(&place).await.unwrap();
    assert_eq!(
        timeout(DEADLINE, inside.read(&mut [0]))
            .await
            .unwrap()
            .unwrap_or(0),
        0
    );
    let listener = client.guest.transport.listen(UDS_PORT).unwrap();
    for answer in [Some(b"".as_slice()), Some(b"-no"), None] {
        let mut inside = UnixStream::connect(&place).await.unwrap();
        let mut outside = accept(&listener).await;
        let kept = match answer {
            Some(bytes) => {
                outside.write_all(bytes).await.unwrap();
                None
            }
            None => Some(outside),
        };
        assert_eq!(
            timeout(DEADLINE, inside.read(&mut [0]))
                .await
                .unwrap()
                .unwrap_or(0),
            0
        );
        drop(kept);
    }
    client.remove("refused").await.unwrap();
    let bad = Storage {
        driver: UDS_DRIVER.into(),
        source: "csi".into(),
        mount_point: place,
        ..Default::default()
    };
    let request = CreateContainerRequest {
        container_id: "no-port".into(),
        storages: vec![bad],
        ..Default::default()
    };
    let (_, text) = refusal(client.rpc.agent.create_container(soon(), &request).await);
    assert!(text.ends_with("has no driver option port="), "{text}");
}

pub async fn a_released_host_socket_is_gone(client: &Client<'_>) {
    if client.guest.is_vm {
        return;
    }
    let listener = client.guest.transport.listen(UDS_PORT).unwrap();
    let round = async || {
        let place = with_socket(client, "released").await;
        let inside = UnixStream::connect(&place).await.unwrap();
        let mut outside = accept(&listener).await;
        outside.write_all(&[ACCEPTED]).await.unwrap();
        client.remove("released").await.unwrap();
        assert_eq!(read_all(Some(Stream::Unix(inside))).await, b"");
        assert_eq!(read_all(Some(outside)).await, b"");
        assert!(
            UnixStream::connect(&place).await.is_err() && !std::path::Path::new(&place).exists()
        );
    };
    round().await;
    let before = client.guest.holdings();
    for _ in 0..5 {
        round().await;
    }
    let end = Instant::now() + DEADLINE;
    while client.guest.holdings() != before {
        assert!(
            Instant::now() < end,
            "{before:?} became {:?}",
            client.guest.holdings()
        );
        sleep(Duration::from_millis(20)).await;
    }
}
