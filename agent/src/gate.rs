//! Who may connect to the agent. Where the host has announced a key, only who shows it first; else
//! whoever comes.
//!
//! Strangers cannot keep the host out: of those that have shown nothing yet only the latest are
//! kept.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use guest_protocol::{KEY_LINE, Key, Listener, Stream};
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::log::log;
use crate::sys::lock;

/// By when a key must be shown. The host sends it with the connection.
const DEADLINE: Duration = Duration::from_secs(5);

/// Connections that have shown nothing yet. Far more than the host makes at once: its own are among
/// these until their first bytes have come, which is after the guest has answered them.
const STRANGERS: usize = 1024;

/// Connections that have, and that nobody has taken yet.
const WAITING: usize = 64;

/// In one place, so that copies of this process can be without it ([`forget`]).
static KEY: Mutex<Option<Key>> = Mutex::new(None);
static HAS_KEY: Notify = Notify::const_new();

/// Notes the key that connections have to show.
pub fn set(key: Key) {
    *lock(&KEY) = Some(key);
    HAS_KEY.notify_waiters();
}

/// For a copy of this process that others may look into.
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

/// Connections to one port.
#[derive(Debug)]
pub enum Arrivals {
    /// As they come.
    Open(Listener),
    /// Those that have shown the key.
    Keyed(mpsc::Receiver<Stream>),
}

impl Arrivals {
    /// Of a listener; `keyed` says that a key is to be shown.
    pub fn of(listener: Listener, keyed: bool) -> Arrivals {
        if !keyed {
            return Arrivals::Open(listener);
        }
        let (admitted, arrivals) = mpsc::channel(WAITING);
        tokio::spawn(watch(listener, admitted));
        Arrivals::Keyed(arrivals)
    }

    /// The next one.
    ///
    /// # Errors
    /// The socket's own.
    pub async fn accept(&mut self) -> io::Result<Stream> {
        match self {
            Arrivals::Open(listener) => listener.accept().await,
            Arrivals::Keyed(arrivals) => arrivals
                .recv()
                .await
                .ok_or_else(|| io::Error::other("nobody watches the gate")),
        }
    }
}

async fn watch(listener: Listener, admitted: mpsc::Sender<Stream>) {
    let mut strangers: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok(stream) => {
                strangers.retain(|stranger| !stranger.is_finished());
                if strangers.len() >= STRANGERS
                    && let Some(oldest) = strangers.pop_front()
                {
                    oldest.abort();
                }
                strangers.push_back(tokio::spawn(admit(stream, admitted.clone())).abort_handle());
            }
            Err(error) => {
                log!("accept: {error}");
                // Out of descriptors, for example: others must close some first.
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn admit(mut stream: Stream, admitted: mpsc::Sender<Stream>) {
    let shown = async {
        let mut line = [0; KEY_LINE];
        stream.read_exact(&mut line).await?;
        Ok::<_, io::Error>(shows_the_key(&line).await)
    };
    match timeout(DEADLINE, shown).await {
        // By a task of its own: who has shown the key is no stranger any more, however long nobody
        // takes it.
        Ok(Ok(true)) => drop(tokio::spawn(async move { admitted.send(stream).await })),
        _ => log!("a connection that shows no key, or another, is closed"),
    }
}

/// The host may connect before its key is here.
async fn shows_the_key(line: &[u8; KEY_LINE]) -> bool {
    loop {
        let mut comes = std::pin::pin!(HAS_KEY.notified());
        comes.as_mut().enable();
        if let Some(key) = lock(&KEY).as_ref() {
            return key.is_shown_by(line);
        }
        comes.await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    #[tokio::test]
    async fn only_who_shows_the_key_comes_in_however_many_strangers_there_are() {
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
        let mut arrivals = Arrivals::of(listener, true);
        let key = Key::random().unwrap();
        // Before there is a key: it waits for it.
        let mut early = UnixStream::connect(&path).await.unwrap();
        early.write_all(key.line()).await.unwrap();
        early.write_all(b"early").await.unwrap();
        set(key.clone());
        let mut text = [0; 5];
        arrivals
            .accept()
            .await
            .unwrap()
            .read_exact(&mut text)
            .await
            .unwrap();
        assert_eq!(&text, b"early");

        // Many at once, which nobody takes for now.
        let mut burst = Vec::new();
        for _ in 0..STRANGERS / 4 {
            burst.push(UnixStream::connect(&path).await.unwrap());
        }
        for stream in &mut burst {
            stream.write_all(key.line()).await.unwrap();
        }
        for _ in 0..WAITING {
            tokio::task::yield_now().await;
        }
        for _ in 0..burst.len() {
            arrivals
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

        let mut strangers = Vec::new();
        for _ in 0..STRANGERS + 100 {
            strangers.push(UnixStream::connect(&path).await.unwrap());
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
        arrivals
            .accept()
            .await
            .unwrap()
            .read_exact(&mut text)
            .await
            .unwrap();
        assert_eq!(&text, b"right");
        drop((strangers, half));
        forget();
        assert!(!lock(&KEY).as_ref().unwrap().is_shown_by(key.line()));
    }
}
