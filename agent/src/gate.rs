//! Who may connect to the agent: whoever shows the key, or, where the host has announced none,
//! anybody.
//!
//! AF_VSOCK knows no permissions: every local user of the host can dial the guest. So each
//! connection begins with the key of this boot (`guest_protocol::Key`). A flood of connections
//! without the key cannot keep the host out: of those that have shown nothing yet only the latest
//! are kept.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;

use guest_protocol::{KEY_LINE, Key, Listener, Stream};
use sys::lock;
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::deadlines;
use crate::log::log;

/// Connections that have shown nothing yet. Far more than the host makes at once: its own are among
/// these until their first bytes have come, which is after the guest has answered them.
const MAX_UNAUTHENTICATED: usize = 1024;

/// Connections that have shown the key and are not accepted yet.
const MAX_ADMITTED: usize = 64;

/// The only place of the key, so that [`forget`] leaves none in a copy of this process.
static KEY: Mutex<Option<Key>> = Mutex::new(None);
static HAS_KEY: Notify = Notify::const_new();

/// Notes the key that connections have to show.
pub fn set(key: Key) {
    *lock(&KEY) = Some(key);
    HAS_KEY.notify_waiters();
}

/// Overwrites the key: for a copy of this process that a container may look into.
pub fn forget() {
    if let Ok(mut key) = KEY.try_lock()
        && let Some(key) = key.as_mut()
    {
        // An ordinary write to what is never read again would be left out.
        // SAFETY: writes a whole value of the type over a valid one, which has no destructor.
        unsafe {
            std::ptr::write_volatile(
                std::ptr::from_mut(key).cast::<[u8; size_of::<Key>()]>(),
                [0; size_of::<Key>()],
            )
        };
    }
}

/// What a connection needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    Anybody,
    /// The key of this boot, which the host sends as the answer to the ready notice.
    Key,
}

/// Connections to one port.
#[derive(Debug)]
pub enum Incoming {
    /// Accepted as they come.
    Open(Listener),
    /// Those that have shown the key.
    Keyed(mpsc::Receiver<Stream>),
}

impl Incoming {
    pub fn of(listener: Listener, admission: Admission) -> Incoming {
        if admission == Admission::Anybody {
            return Incoming::Open(listener);
        }
        let (admitted, incoming) = mpsc::channel(MAX_ADMITTED);
        tokio::spawn(admit_all(listener, admitted));
        Incoming::Keyed(incoming)
    }

    /// The next connection.
    ///
    /// # Errors
    /// The error of accept(2).
    pub async fn accept(&mut self) -> io::Result<Stream> {
        match self {
            Incoming::Open(listener) => listener.accept().await,
            Incoming::Keyed(incoming) => incoming
                .recv()
                .await
                .ok_or_else(|| io::Error::other("connections are not admitted any more")),
        }
    }
}

async fn admit_all(listener: Listener, admitted: mpsc::Sender<Stream>) {
    let mut unauthenticated: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok(stream) => {
                unauthenticated.retain(|task| !task.is_finished());
                if unauthenticated.len() >= MAX_UNAUTHENTICATED
                    && let Some(oldest) = unauthenticated.pop_front()
                {
                    oldest.abort();
                }
                unauthenticated
                    .push_back(tokio::spawn(admit(stream, admitted.clone())).abort_handle());
            }
            Err(error) => {
                log!("accept: {error}");
                // Out of descriptors, for example: others must close some first.
                sleep(deadlines::ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
}

async fn admit(mut stream: Stream, admitted: mpsc::Sender<Stream>) {
    let shown = async {
        let mut line = [0; KEY_LINE];
        stream.read_exact(&mut line).await?;
        Ok::<_, io::Error>(shows_key(&line).await)
    };
    match timeout(deadlines::KEY_SHOWN, shown).await {
        // In a task of its own: this one may be aborted to make room.
        Ok(Ok(true)) => drop(tokio::spawn(async move { admitted.send(stream).await })),
        _ => log!("a connection that shows no key, or another, is closed"),
    }
}

/// Waits for the key: the host may connect before it has come.
async fn shows_key(line: &[u8; KEY_LINE]) -> bool {
    loop {
        let mut key_is_set = std::pin::pin!(HAS_KEY.notified());
        key_is_set.as_mut().enable();
        if let Some(key) = lock(&KEY).as_ref() {
            return key.is_shown_by(line);
        }
        key_is_set.await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    #[tokio::test]
    async fn only_who_shows_the_key_comes_in_however_many_others_there_are() {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the limit lives over both calls.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
            limit.rlim_cur = limit.rlim_max.min(4096);
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = Listener::Unix {
            listener: UnixListener::bind(&path).unwrap(),
            path: path.clone(),
        };
        let mut incoming = Incoming::of(listener, Admission::Key);
        let key = Key::random().unwrap();
        // Before there is a key: it waits for it.
        let mut early = UnixStream::connect(&path).await.unwrap();
        early.write_all(key.line()).await.unwrap();
        early.write_all(b"early").await.unwrap();
        set(key.clone());
        let mut text = [0; 5];
        incoming
            .accept()
            .await
            .unwrap()
            .read_exact(&mut text)
            .await
            .unwrap();
        assert_eq!(&text, b"early");

        // Many at once, which nobody takes for now.
        let mut burst = Vec::new();
        for _ in 0..MAX_UNAUTHENTICATED / 4 {
            burst.push(UnixStream::connect(&path).await.unwrap());
        }
        for stream in &mut burst {
            stream.write_all(key.line()).await.unwrap();
        }
        for _ in 0..MAX_ADMITTED {
            tokio::task::yield_now().await;
        }
        for _ in 0..burst.len() {
            incoming
                .accept()
                .await
                .unwrap()
                .write_all(b"taken")
                .await
                .unwrap();
        }
        for stream in &mut burst {
            stream.read_exact(&mut text).await.unwrap();
        }

        let mut unauthenticated = Vec::new();
        for _ in 0..MAX_UNAUTHENTICATED + 100 {
            unauthenticated.push(UnixStream::connect(&path).await.unwrap());
            tokio::task::yield_now().await;
        }
        let mut wrong = UnixStream::connect(&path).await.unwrap();
        wrong
            .write_all(Key::random().unwrap().line())
            .await
            .unwrap();
        assert_eq!(wrong.read(&mut text).await.unwrap(), 0, "closed");
        let mut half = UnixStream::connect(&path).await.unwrap();
        half.write_all(&key.line()[..KEY_LINE / 2]).await.unwrap();
        let mut right = UnixStream::connect(&path).await.unwrap();
        right.write_all(key.line()).await.unwrap();
        right.write_all(b"right").await.unwrap();
        incoming
            .accept()
            .await
            .unwrap()
            .read_exact(&mut text)
            .await
            .unwrap();
        assert_eq!(&text, b"right");
        drop((unauthenticated, half));
        forget();
        assert!(!lock(&KEY).as_ref().unwrap().is_shown_by(key.line()));
    }
}
