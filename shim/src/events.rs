//! Task events to containerd: one queue for the whole sandbox, in order, retried until containerd
//! takes them.
//!
//! The head of the queue blocks the rest, so a daemon that restarts sees events late but never out
//! of order. Memory is bounded, in events and in bytes, for each [`Rank`] by itself: what a guest
//! or a client can make many of (out of memory, execs) never takes the place of an exit. Beyond the
//! bound the newest are dropped with an error in the log.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use containerd_shim::event::Event;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::MessageDyn;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use ttrpc::Code;

use crate::error::Failure;

/// What waits of each rank while containerd is away: events, and their bytes.
const MAX_EVENTS: usize = 4096;
const MAX_BYTES: usize = 1 << 20;

/// What an event takes beside its message.
const OVERHEAD: usize = 256;

/// How long one delivery may take.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);

/// Pause between attempts, doubled up to the last value.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// How often an event is sent to which containerd says something that may mean anything.
const ATTEMPTS: u32 = 10;

/// Whose place in the queue an event takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rank {
    /// A container's life: as many as there are containers.
    Life,
    /// The exit of an exec.
    Exec,
    /// Everything else.
    Other,
}

impl Rank {
    fn of(event: &impl Event, topic: &str) -> Rank {
        let event: &dyn MessageDyn = event;
        let exit: Option<&TaskExit> = event.downcast_ref();
        match topic {
            _ if exit.is_some_and(|exit| exit.id != exit.container_id) => Rank::Exec,
            topics::TASK_CREATE_EVENT_TOPIC
            | topics::TASK_START_EVENT_TOPIC
            | topics::TASK_EXIT_EVENT_TOPIC
            | topics::TASK_DELETE_EVENT_TOPIC => Rank::Life,
            _ => Rank::Other,
        }
    }
}

/// What waits for containerd.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// Something has come, or nothing will any more.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<(Rank, usize, Envelope)>,
    /// Events and bytes of each rank.
    used: [(usize, usize); 3],
    closed: bool,
}

impl Queue {
    /// Whether there was room.
    fn push(&self, rank: Rank, envelope: Envelope) -> bool {
        let mut waiting = sys::lock(&self.waiting);
        let size = OVERHEAD + envelope.event.value.len();
        let (events, bytes) = &mut waiting.used[rank as usize];
        if *events >= MAX_EVENTS || *bytes + size > MAX_BYTES {
            return false;
        }
        *events += 1;
        *bytes += size;
        waiting.events.push_back((rank, size, envelope));
        drop(waiting);
        self.changed.notify_one();
        true
    }

    /// The next one; none once the queue is closed and empty.
    async fn pop(&self) -> Option<Envelope> {
        loop {
            {
                let mut waiting = sys::lock(&self.waiting);
                if let Some((rank, size, envelope)) = waiting.events.pop_front() {
                    let (events, bytes) = &mut waiting.used[rank as usize];
                    *events -= 1;
                    *bytes -= size;
                    return Some(envelope);
                }
                if waiting.closed {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    fn close(&self) {
        sys::lock(&self.waiting).closed = true;
        self.changed.notify_one();
    }
}

/// The sending end of the queue.
pub struct Publisher {
    namespace: String,
    queue: Option<Arc<Queue>>,
    worker: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Starts the queue's worker. An empty address (a caller that takes no events) means that
    /// nothing is sent.
    pub fn start(address: &str, namespace: &str) -> Publisher {
        if address.is_empty() {
            return Publisher {
                namespace: namespace.to_owned(),
                queue: None,
                worker: None,
            };
        }
        let queue = Arc::new(Queue::default());
        let address = if address.contains("://") {
            address.to_owned()
        } else {
            format!("unix://{address}")
        };
        let worker = tokio::spawn(deliver(address, queue.clone()));
        Publisher {
            namespace: namespace.to_owned(),
            queue: Some(queue),
            worker: Some(worker),
        }
    }

    /// One whose events wait until a test takes them.
    #[cfg(test)]
    pub fn recording() -> Publisher {
        Publisher {
            namespace: "default".to_owned(),
            queue: Some(Arc::default()),
            worker: None,
        }
    }

    /// What has been published since the last call.
    #[cfg(test)]
    pub fn take(&self) -> Vec<Envelope> {
        let queue = self.queue.as_ref();
        let mut waiting = queue.map(|queue| sys::lock(&queue.waiting));
        let events = waiting
            .as_mut()
            .map(|waiting| std::mem::take(&mut **waiting));
        events
            .into_iter()
            .flat_map(|waiting| waiting.events)
            .map(|(_, _, event)| event)
            .collect()
    }

    /// Queues an event; its time is now.
    pub fn publish(&self, event: impl Event) {
        let Some(queue) = &self.queue else { return };
        let topic = event.topic();
        let rank = Rank::of(&event, &topic);
        let event = match convert_to_any(Box::new(event)) {
            Ok(event) => event,
            Err(error) => return tracing::error!(%error, topic, "event cannot be encoded"),
        };
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()).into(),
            namespace: self.namespace.clone(),
            topic: topic.clone(),
            event: Some(event).into(),
            ..Default::default()
        };
        if !queue.push(rank, envelope) {
            tracing::error!(
                topic,
                "event dropped: too many are waiting for containerd already"
            );
        }
    }

    /// Closes the queue and waits for its last events, at most `deadline`.
    pub async fn flush(&mut self, deadline: Duration) {
        if let Some(queue) = self.queue.take() {
            queue.close();
        }
        if let Some(worker) = self.worker.take()
            && timeout(deadline, worker).await.is_err()
        {
            tracing::warn!("containerd did not take the last events in time");
        }
    }
}

/// What to do about a delivery that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// containerd is away: the event stays the first of the queue.
    Wait,
    /// It would fail again for ever, and block the rest.
    Drop,
}

/// Decides by the error and the number of times that containerd answered this event with one.
fn next(error: &ttrpc::Error, answers: u32) -> Next {
    match (Failure::of(error), error) {
        (_, ttrpc::Error::RpcStatus(status)) => match status.code() {
            Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED => Next::Wait,
            // A daemon on its way down says this too.
            Code::UNKNOWN | Code::INTERNAL | Code::ABORTED | Code::RESOURCE_EXHAUSTED
                if answers < ATTEMPTS =>
            {
                Next::Wait
            }
            _ => Next::Drop,
        },
        // It is too long, say. And an answer that does not decode is one.
        (Failure::Unsendable | Failure::Garbled, _) => Next::Drop,
        (Failure::Late | Failure::Lost | Failure::Answered, _) => Next::Wait,
    }
}

async fn deliver(address: String, queue: Arc<Queue>) {
    let mut client = None;
    while let Some(envelope) = queue.pop().await {
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..Default::default()
        };
        let mut pause = BACKOFF.0;
        let mut answers = 0;
        while let Err(error) = forward(&mut client, &address, &request).await {
            answers += u32::from(Failure::of(&error) == Failure::Answered);
            client = None;
            if next(&error, answers) == Next::Drop {
                let topic = &request.envelope.topic;
                tracing::error!(%error, topic, "event dropped: containerd does not take it");
                break;
            }
            tracing::debug!(%error, "containerd is away, events wait");
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    client
        .forward(ttrpc::context::with_duration(FORWARD_DEADLINE), request)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use async_trait::async_trait;
    use containerd_shim_protos::events::task::{
        TaskCreate, TaskDelete, TaskExecStarted, TaskOOM, TaskPaused,
    };
    use protobuf::Message;
    use protobuf::well_known_types::any::Any;
    use tokio::net::UnixListener;
    use tokio::sync::mpsc;
    use ttrpc::r#async::{MethodHandler, Server, Service, TtrpcContext};
    use ttrpc::proto::{Request, Response};

    use super::*;

    fn exit(container: &str, id: &str) -> TaskExit {
        TaskExit {
            container_id: container.into(),
            id: id.into(),
            ..Default::default()
        }
    }

    fn oom(container: &str) -> TaskOOM {
        TaskOOM {
            container_id: container.into(),
            ..Default::default()
        }
    }

    /// A containerd that takes events.
    struct Daemon(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl MethodHandler for Daemon {
        async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
            let envelope = ForwardRequest::parse_from_bytes(&request.payload)
                .unwrap()
                .envelope
                .unwrap();
            if envelope.topic == topics::TASK_PAUSED_EVENT_TOPIC {
                return Ok(ttrpc::Error::RpcStatus(ttrpc::get_status(
                    Code::INVALID_ARGUMENT,
                    "no such topic",
                ))
                .into());
            }
            self.0.send(envelope).unwrap();
            Ok(Response::default())
        }
    }

    async fn daemon(path: &std::path::Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, received) = mpsc::unbounded_channel();
        let method: Box<dyn MethodHandler + Send + Sync> = Box::new(Daemon(sender));
        let methods = HashMap::from([("Forward".to_owned(), method)]);
        let service = Service {
            methods,
            streams: HashMap::new(),
        };
        let services = HashMap::from([(
            "containerd.services.events.ttrpc.v1.Events".to_owned(),
            service,
        )]);
        let listener = UnixListener::bind(path).unwrap();
        let mut server = Server::new()
            .add_listener(listener.into())
            .register_service(services);
        server.start().await.unwrap();
        (server, received)
    }

    fn topics_of(received: &mut mpsc::UnboundedReceiver<Envelope>) -> Vec<String> {
        std::iter::from_fn(|| received.try_recv().ok())
            .map(|envelope| envelope.topic)
            .collect()
    }

    #[test]
    fn subscribers_find_events_by_bare_names() {
        let queue = Arc::new(Queue::default());
        let publisher = Publisher {
            namespace: "n".into(),
            queue: Some(queue.clone()),
            worker: None,
        };
        publisher.publish(exit("web", "web"));
        publisher.publish(TaskExecStarted::default());
        let events = &sys::lock(&queue.waiting).events;
        let names = events
            .iter()
            .map(|(_, _, envelope)| (envelope.topic.as_str(), envelope.event.type_url.as_str()));
        let expected = [
            ("/tasks/exit", "containerd.events.TaskExit"),
            ("/tasks/exec-started", "containerd.events.TaskExecStarted"),
        ];
        assert!(names.eq(expected), "{events:?}");
    }

    #[tokio::test]
    async fn an_event_that_cannot_be_delivered_does_not_block_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_server, mut received) = daemon(&path).await;
        // Larger than any frame of the protocol; the queue itself would not take it.
        let queue = Arc::new(Queue::default());
        let large = Any {
            value: vec![b'A'; 5 << 20],
            ..Default::default()
        };
        let envelope = Envelope {
            event: Some(large).into(),
            topic: "/large".into(),
            ..Default::default()
        };
        sys::lock(&queue.waiting)
            .events
            .push_back((Rank::Other, 0, envelope));
        sys::lock(&queue.waiting).used[Rank::Other as usize].0 = 1;
        let worker = tokio::spawn(deliver(format!("unix://{}", path.display()), queue.clone()));
        let mut publisher = Publisher {
            namespace: "n".into(),
            queue: Some(queue),
            worker: Some(worker),
        };
        publisher.publish(TaskPaused::default());
        publisher.publish(exit("web", "web"));
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(topics_of(&mut received), [topics::TASK_EXIT_EVENT_TOPIC]);
    }

    #[tokio::test]
    async fn events_wait_for_a_daemon_that_is_away_and_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut publisher = Publisher::start(path.to_str().unwrap(), "n");
        publisher.publish(oom("web"));
        publisher.publish(exit("web", "web"));
        publisher.publish(TaskDelete::default());
        tokio::time::sleep(BACKOFF.0 / 2).await;
        let (_server, mut received) = daemon(&path).await;
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(
            topics_of(&mut received),
            [
                topics::TASK_OOM_EVENT_TOPIC,
                topics::TASK_EXIT_EVENT_TOPIC,
                topics::TASK_DELETE_EVENT_TOPIC
            ]
        );
    }

    #[tokio::test]
    async fn a_daemon_that_went_away_gets_what_came_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (mut server, mut received) = daemon(&path).await;
        let mut publisher = Publisher::start(path.to_str().unwrap(), "n");
        publisher.publish(TaskCreate::default());
        assert_eq!(
            received.recv().await.unwrap().topic,
            topics::TASK_CREATE_EVENT_TOPIC
        );
        server.disconnect().await;
        drop(server);
        std::fs::remove_file(&path).unwrap();
        // The connection is known to have ended, or not yet.
        publisher.publish(oom("web"));
        tokio::time::sleep(BACKOFF.0).await;
        publisher.publish(exit("web", "web"));
        let (_server, mut received) = daemon(&path).await;
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(
            topics_of(&mut received),
            [topics::TASK_OOM_EVENT_TOPIC, topics::TASK_EXIT_EVENT_TOPIC]
        );
    }

    #[tokio::test]
    async fn a_flood_takes_a_bounded_place_and_never_that_of_an_exit() {
        let queue = Arc::new(Queue::default());
        let publisher = Publisher {
            namespace: "n".into(),
            queue: Some(queue.clone()),
            worker: None,
        };
        let long = "a".repeat(100_000);
        for number in 0..20_000 {
            publisher.publish(oom("web"));
            publisher.publish(oom(&long));
            publisher.publish(exit("web", &format!("e{number}")));
        }
        let bytes: usize = sys::lock(&queue.waiting)
            .events
            .iter()
            .map(|(_, size, _)| size)
            .sum();
        assert!(bytes <= 3 * MAX_BYTES, "{bytes}");
        publisher.publish(exit("web", "web"));
        queue.close();
        let mut last = None;
        while let Some(envelope) = queue.pop().await {
            last = Some(envelope);
        }
        let last = TaskExit::parse_from_bytes(&last.unwrap().event.value).unwrap();
        assert_eq!(
            (last.container_id, last.id),
            ("web".to_owned(), "web".to_owned())
        );
        assert_eq!(sys::lock(&queue.waiting).used, [(0, 0); 3]);
    }

    #[test]
    fn only_what_may_pass_is_sent_again() {
        let said = |code| ttrpc::Error::RpcStatus(ttrpc::get_status(code, "x"));
        let words = |text: &str| ttrpc::Error::Others(text.to_owned());
        let away = [
            "Socket::connect error x",
            "Request deadline elapsed",
            "send to wire channel failed: channel closed",
        ];
        for error in away.map(words).into_iter().chain([said(Code::UNAVAILABLE)]) {
            assert_eq!(next(&error, 1_000_000), Next::Wait, "{error}");
        }
        assert_eq!(
            next(&ttrpc::Error::Socket("reset".into()), 1_000_000),
            Next::Wait
        );
        for error in [
            said(Code::INVALID_ARGUMENT),
            said(Code::UNIMPLEMENTED),
            words("message length 4194400 exceed"),
        ] {
            assert_eq!(next(&error, 1), Next::Drop, "{error}");
        }
        assert_eq!(next(&said(Code::UNKNOWN), 1), Next::Wait);
        assert_eq!(next(&said(Code::UNKNOWN), ATTEMPTS), Next::Drop);
    }
}
