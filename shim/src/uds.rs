//! Unix sockets of the host that containers have as mounts: serves the connections that the guest makes to them.
//!
//! The agent listens on a socket in the guest and dials here for each connection, with the name that the shim gave to
//! the socket. Only names that were given lead anywhere.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_client::stdio::ACCEPTED;
use agent_client::{Listener, Stream, UDS_MAGIC};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::relay;

/// How long the agent may take to send its line, and the host's server to take the connection.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long to wait for room in a server's backlog: the kernel has no notice for it.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);

/// Longest line in bytes, the newline included.
const MAX_LINE: usize = 600;

/// The host's sockets by the names that the guest knows them by. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Sockets(Arc<Mutex<HashMap<String, PathBuf>>>);

impl Sockets {
    /// Lets the guest connect to `path` by the name `name`, which has no white space. The path is looked up at each
    /// connection: a server that restarts makes its socket anew.
    pub fn add(&self, name: &str, path: &Path) {
        self.lock().insert(name.to_owned(), path.to_owned());
    }

    /// No more connections by this name; those that are there stay.
    pub fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    fn get(&self, name: &str) -> Option<PathBuf> {
        self.lock().get(name).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, PathBuf>> {
        // Nobody panics halfway through a change.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Serves the guest's connections as long as the result lives.
pub fn serve(listener: Listener, sockets: Sockets) -> relay::Relay {
    relay::serve(listener, move |guest| {
        let sockets = sockets.clone();
        async move {
            if let Err(error) = join(guest, &sockets).await {
                tracing::debug!(%error, "a guest's connection to a unix socket of the host broke");
            }
        }
    })
}

async fn join(mut guest: Stream, sockets: &Sockets) -> io::Result<()> {
    let late = |what: &str| io::Error::new(io::ErrorKind::TimedOut, format!("{what} within {DEADLINE:?}"));
    let name = timeout(DEADLINE, read_name(&mut guest)).await.map_err(|_| late("the agent sent no line"))??;
    let path = sockets.get(&name).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("the guest asked for the unknown socket {name:?}"))
    })?;
    let connected = timeout(DEADLINE, connect(&path)).await;
    let mut host = connected.map_err(|_| late(&format!("{} did not take a connection", path.display())))??;
    guest.write_all(&[ACCEPTED]).await?;
    copy_bidirectional(&mut guest, &mut host).await.map(|_| ())
}

/// Reads the line byte by byte: what follows it is the connection's.
async fn read_name(guest: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match guest.read_u8().await? {
            b'\n' => break,
            _ if line.len() + 1 >= MAX_LINE => return Err(io::Error::other("the line is too long")),
            byte => line.push(byte),
        }
    }
    let line = String::from_utf8_lossy(&line);
    let name = line.strip_prefix(UDS_MAGIC).and_then(|rest| rest.strip_prefix(' '));
    name.map(str::to_owned).ok_or_else(|| io::Error::other(format!("the line {line:?} is not understood")))
}

/// Waits for room in the server's backlog, as a blocking client would.
async fn connect(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(BACKLOG_PAUSE).await,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use agent_client::{Transport, UDS_PORT};
    use tempfile::TempDir;
    use tokio::net::UnixListener;

    use super::*;

    struct Host {
        dir: TempDir,
        sockets: Sockets,
        _relay: relay::Relay,
    }

    impl Host {
        fn new() -> Host {
            let dir = tempfile::tempdir().unwrap();
            let transport = Transport::Unix { path: dir.path().join("vm") };
            let sockets = Sockets::default();
            let relay = serve(transport.listen(UDS_PORT).unwrap(), sockets.clone());
            Host { dir, sockets, _relay: relay }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// The agent's side: its line, and what follows it at once.
        async fn dial(&self, line: &[u8]) -> UnixStream {
            let mut stream = UnixStream::connect(self.path(&format!("vm_{UDS_PORT}"))).await.unwrap();
            stream.write_all(line).await.unwrap();
            stream
        }

        async fn is_closed(&self, line: &[u8]) -> bool {
            let mut answer = Vec::new();
            let mut stream = self.dial(line).await;
            let end = timeout(2 * DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
            answer.is_empty() && end.map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |length| length == 0)
        }
    }

    /// Answers a whole request with its length, once.
    async fn answer(listener: &UnixListener) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        stream.write_all(request.len().to_string().as_bytes()).await.unwrap();
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
        host.sockets.add("vol-1", &path);
        for _ in 0..2 {
            let server = UnixListener::bind(&path).unwrap();
            let (text, ()) = tokio::join!(ask(&host, b"cofferdam-uds/1 vol-1\n"), answer(&server));
            assert_eq!(text, "100000", "with the half-close of the client");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_not_given_or_is_not_there_is_closed() {
        let host = Host::new();
        let path = host.path("server");
        let _server = UnixListener::bind(&path).unwrap();
        host.sockets.add("vol-1", &path);
        host.sockets.add("gone", &host.path("no-such-server"));
        for line in [
            b"cofferdam-uds/1 vol-2\n".to_vec(),
            b"cofferdam-uds/1 gone\n".to_vec(),
            format!("cofferdam-uds/1 {}\n", path.display()).into_bytes(),
            b"cofferdam-uds/2 vol-1\n".to_vec(),
            b"\n".to_vec(),
            vec![b'x'; MAX_LINE],
        ] {
            assert!(host.is_closed(&line).await, "{}", String::from_utf8_lossy(&line));
        }
        host.sockets.remove("vol-1");
        assert!(host.is_closed(b"cofferdam-uds/1 vol-1\n").await);
    }

    #[tokio::test]
    async fn a_full_backlog_is_waited_for() {
        let host = Host::new();
        let path = host.path("server");
        host.sockets.add("vol-1", &path);
        let server = narrow_listener(&path);
        // The first fills the backlog; nobody accepts yet.
        let mut waiting = Vec::new();
        for _ in 0..4 {
            waiting.push(host.dial(b"cofferdam-uds/1 vol-1\n").await);
        }
        for _ in 0..4 {
            let (stream, _) = timeout(Duration::from_secs(5), server.accept()).await.unwrap().unwrap();
            drop(stream);
        }
        for mut stream in waiting {
            assert_eq!(stream.read_u8().await.unwrap(), ACCEPTED);
        }
    }

    /// A listener with room for one connection.
    fn narrow_listener(path: &Path) -> UnixListener {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
        use std::os::fd::AsRawFd;
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        UnixListener::from_std(fd.into()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_says_nothing_is_not_waited_for() {
        let host = Host::new();
        assert!(host.is_closed(b"").await);
    }
}
