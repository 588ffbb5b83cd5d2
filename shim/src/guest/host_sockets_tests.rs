//! Connections of a guest to sockets of the host, with a server at the other end.

use guest_protocol::{Line, Transport, UDS_PORT};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::*;

struct Host {
    dir: TempDir,
    sockets: Sockets,
    _host: HostSockets,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let transport = Transport::Unix {
            path: dir.path().join("vm"),
        };
        let host = HostSockets::serve(transport.listen(UDS_PORT).unwrap(), UDS_PORT);
        Host {
            dir,
            sockets: host.sockets.clone(),
            _host: host,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn add(&self, name: &str, path: &Path, users: &Users) -> io::Result<()> {
        let socket = PinnedSocket::mounted(path, SocketKind::Stream, users)?;
        self.sockets.add(name, socket);
        Ok(())
    }

    /// The agent's side: its line, and what follows it at once.
    async fn dial(&self, line: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.path(&format!("vm_{UDS_PORT}")))
            .await
            .unwrap();
        stream.write_all(line).await.unwrap();
        stream
    }

    async fn is_closed(&self, line: &[u8]) -> bool {
        let mut answer = Vec::new();
        let mut stream = self.dial(line).await;
        let end = timeout(2 * HOST_SOCKET, stream.read_to_end(&mut answer))
            .await
            .unwrap();
        answer.is_empty()
            && end.map_or_else(
                |e| e.kind() == io::ErrorKind::ConnectionReset,
                |length| length == 0,
            )
    }
}

fn users(list: &[(u32, u32)]) -> Users {
    let users = Users::default();
    for (uid, gid) in list {
        let user = serde_json::json!({"uid": uid, "gid": gid, "additionalGids": [77]});
        users.add(&serde_json::from_value(user).unwrap());
    }
    users
}

/// Who the server sees when the guest says that `uid` and `gid` connected.
async fn seen(users: &Users, uid: u32, gid: u32) -> (u32, u32) {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new();
    let path = host.path("server");
    let server = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    host.add("s", &path, users).unwrap();
    let _guest = host
        .dial(format!("cofferdam-uds/2 s {uid} {gid}\n").as_bytes())
        .await;
    let (stream, _) = timeout(HOST_SOCKET, server.accept())
        .await
        .unwrap()
        .unwrap();
    let peer = stream.peer_cred().unwrap();
    (peer.uid(), peer.gid())
}

#[tokio::test]
async fn a_server_sees_the_user_of_the_container_and_no_other() {
    let plain = users(&[(1000, 100), (2000, 200)]);
    assert_eq!(seen(&plain, 1000, 100).await, (1000, 100));
    assert_eq!(seen(&plain, 2000, 200).await, (2000, 200), "an exec");
    assert_eq!(
        seen(&plain, 2000, 0).await,
        (2000, 200),
        "the group that was asked for"
    );
    assert_eq!(
        seen(&plain, 0, 0).await,
        (1000, 100),
        "a guest cannot say that it is root"
    );
    let root = users(&[(0, 0)]);
    assert_eq!(seen(&root, 33, 44).await, (33, 44), "root becomes anybody");
    assert_eq!(seen(&root, 0, 0).await, (0, 0));
    assert!(
        nix::unistd::geteuid().is_root(),
        "only that thread has changed"
    );
}

#[tokio::test]
async fn a_socket_of_root_alone_is_closed_to_others() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new();
    let path = host.path("server");
    let _server = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    host.add("s", &path, &users(&[(1000, 100)])).unwrap();
    assert!(host.is_closed(b"cofferdam-uds/2 s 0 0\n").await);
}

#[tokio::test]
async fn a_link_in_the_sockets_place_leads_nowhere() {
    let host = Host::new();
    let (path, other) = (host.path("server"), host.path("other"));
    let _servers = [
        UnixListener::bind(&path).unwrap(),
        UnixListener::bind(&other).unwrap(),
    ];
    host.add("s", &path, &users(&[(0, 0)])).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&other, &path).unwrap();
    assert!(host.is_closed(b"cofferdam-uds/2 s 0 0\n").await);
}

#[tokio::test]
async fn a_directory_that_has_become_a_link_is_not_followed() {
    let host = Host::new();
    std::fs::create_dir(host.path("real")).unwrap();
    let path = host.path("dir").join("server");
    let _server = UnixListener::bind(host.path("real").join("server")).unwrap();
    std::os::unix::fs::symlink(host.path("real"), host.path("dir")).unwrap();
    assert_eq!(
        host.add("s", &path, &users(&[]))
            .unwrap_err()
            .raw_os_error(),
        Some(libc::ELOOP)
    );
}

#[tokio::test]
async fn connections_end_with_their_container() {
    let host = Host::new();
    let path = host.path("server");
    let server = UnixListener::bind(&path).unwrap();
    host.add("s", &path, &users(&[(0, 0)])).unwrap();
    let mut guest = host.dial(b"cofferdam-uds/2 s 0 0\n").await;
    let (mut stream, _) = timeout(HOST_SOCKET, server.accept())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(guest.read_u8().await.unwrap(), ACCEPTED);
    host.sockets.remove("s");
    let mut rest = Vec::new();
    timeout(HOST_SOCKET, stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    timeout(HOST_SOCKET, guest.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.is_empty());
}

#[test]
fn names_are_long_and_differ() {
    let (one, other) = (random_name().unwrap(), random_name().unwrap());
    assert!(one.len() == 32 && one != other, "{one} {other}");
}

/// Answers a whole request with its length, once.
async fn answer(listener: &UnixListener) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    stream.read_to_end(&mut request).await.unwrap();
    stream
        .write_all(request.len().to_string().as_bytes())
        .await
        .unwrap();
}

async fn ask(host: &Host, line: &[u8]) -> String {
    let mut stream = host.dial(line).await;
    assert_eq!(stream.read_u8().await.unwrap(), ACCEPTED);
    stream.write_all(&[1; 100_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_server_of_the_host_is_reached_and_again_after_its_restart() {
    let host = Host::new();
    let path = host.path("server");
    for turn in 0..2 {
        let server = UnixListener::bind(&path).unwrap();
        if turn == 0 {
            host.add("vol-1", &path, &users(&[(0, 0)])).unwrap();
        }
        let (text, ()) = tokio::join!(ask(&host, b"cofferdam-uds/2 vol-1 0 0\n"), answer(&server));
        assert_eq!(text, "100000", "with the half-close of the client");
        std::fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn what_was_not_given_or_is_not_there_is_closed() {
    let host = Host::new();
    let path = host.path("server");
    let _server = UnixListener::bind(&path).unwrap();
    host.add("vol-1", &path, &users(&[(0, 0)])).unwrap();
    std::fs::write(host.path("plain"), "").unwrap();
    host.add("gone", &host.path("plain"), &users(&[(0, 0)]))
        .unwrap();
    host.add("nobodys", &path, &Users::default()).unwrap();
    for line in [
        b"cofferdam-uds/2 vol-2 0 0\n".to_vec(),
        b"cofferdam-uds/2 gone 0 0\n".to_vec(),
        format!("cofferdam-uds/2 {} 0 0\n", path.display()).into_bytes(),
        b"cofferdam-uds/1 vol-1 0 0\n".to_vec(),
        b"cofferdam-uds/2 vol-1\n".to_vec(),
        b"cofferdam-uds/2 vol-1 0 4294967295\n".to_vec(),
        b"cofferdam-uds/2 vol-1 -1 0\n".to_vec(),
        b"cofferdam-uds/2 nobodys 0 0\n".to_vec(),
        b"\n".to_vec(),
        vec![b'x'; HostSocketRequest::MAX_BYTES],
    ] {
        assert!(
            host.is_closed(&line).await,
            "{}",
            String::from_utf8_lossy(&line)
        );
    }
    host.sockets.remove("vol-1");
    assert!(host.is_closed(b"cofferdam-uds/2 vol-1 0 0\n").await);
}

#[tokio::test]
async fn a_full_backlog_is_waited_for() {
    let host = Host::new();
    let path = host.path("server");
    let server = narrow_listener(&path);
    host.add("vol-1", &path, &users(&[(0, 0)])).unwrap();
    // The first fills the backlog; nobody accepts yet.
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(host.dial(b"cofferdam-uds/2 vol-1 0 0\n").await);
    }
    for _ in 0..4 {
        let (stream, _) = timeout(std::time::Duration::from_secs(5), server.accept())
            .await
            .unwrap()
            .unwrap();
        drop(stream);
    }
    for mut stream in waiting {
        assert_eq!(stream.read_u8().await.unwrap(), ACCEPTED);
    }
}

/// A listener with room for one connection.
fn narrow_listener(path: &Path) -> UnixListener {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    use std::os::fd::AsRawFd;
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK,
        None,
    )
    .unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(0).unwrap()).unwrap();
    UnixListener::from_std(fd.into()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_says_nothing_is_not_waited_for() {
    let host = Host::new();
    assert!(host.is_closed(b"").await);
}
