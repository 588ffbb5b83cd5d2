//! OOM kills: noticed by the kernel's notice on `memory.events`, queued for the one call that waits
//! for them, and handed over before the exit that they caused.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use sys::lock;
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Container;
use crate::deadlines;
use crate::log::log;

/// Events that nobody fetches: above this number the oldest is dropped.
const MAX_EVENTS: usize = 100;

/// Events that wait to be fetched.
#[derive(Debug, Default)]
pub struct Queue {
    events: Mutex<VecDeque<String>>,
    added: Notify,
    taken: Notify,
    /// Callers of [`Queue::next`].
    waiting: AtomicUsize,
}

/// Counts a caller that waits, however it ends.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Queue {
    /// The next container that had a process killed.
    pub async fn next(&self) -> String {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        loop {
            let added = self.added.notified();
            if let Some(id) = lock(&self.events).pop_front() {
                self.taken.notify_waiters();
                return id;
            }
            added.await;
        }
    }

    /// Queues an event if the container's count of kills has grown.
    pub fn check(&self, container: &Container) {
        if container.new_oom_kills() {
            let mut events = lock(&self.events);
            if events.len() == MAX_EVENTS {
                events.pop_front();
            }
            events.push_back(container.id().to_owned());
            self.added.notify_waiters();
        }
    }

    /// Queues an event if there is one, and waits until it is fetched, if a caller waits for
    /// events.
    pub async fn wait_until_fetched(&self, container: &Container) {
        self.check(container);
        let fetched = async {
            loop {
                let taken = self.taken.notified();
                let pending = lock(&self.events).iter().any(|id| id == container.id());
                if !pending || self.waiting.load(Ordering::Relaxed) == 0 {
                    return;
                }
                taken.await;
            }
        };
        let _ = timeout(deadlines::OOM_EVENT_FETCHED, fetched).await;
        // The caller was woken before those who wait for the exit; one turn lets its answer go out
        // first.
        tokio::task::yield_now().await;
    }
}

/// Watches a container's kills until it is removed.
pub fn watch(queue: &Arc<Queue>, container: &Arc<Container>) {
    let file = match crate::cgroup::watch(&container.cgroup().file("memory.events")) {
        Ok(file) => file,
        Err(error) => return log!("no OOM events of {}: {error}", container.id()),
    };
    let queue = queue.clone();
    let container: Weak<Container> = Arc::downgrade(container);
    tokio::spawn(async move {
        while let Ok(mut ready) = file.ready(Interest::PRIORITY).await {
            ready.clear_ready();
            match container.upgrade() {
                Some(container) if !container.is_removed() => queue.check(&container),
                _ => return,
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_that_gives_up_is_not_counted() {
        let queue = Queue::default();
        let _ = timeout(std::time::Duration::from_millis(1), queue.next()).await;
        assert_eq!(queue.waiting.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn events_come_in_order() {
        let queue = Queue::default();
        lock(&queue.events).extend(["a".to_owned(), "b".to_owned()]);
        assert_eq!(queue.next().await, "a");
        assert_eq!(queue.next().await, "b");
    }
}
