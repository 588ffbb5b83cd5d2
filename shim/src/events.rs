//! Task events to containerd: one queue for the whole sandbox, in order, retried until containerd takes them.
//!
//! The head of the queue blocks the rest, so a daemon that restarts sees events late but never out of order. Memory is
//! bounded: beyond [`CAPACITY`] the newest are dropped with an error in the log.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Events that wait while containerd is away.
const CAPACITY: usize = 4096;

/// How long one delivery may take.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);

/// Pause between attempts, doubled up to the last value.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// An event's message and the topic that goes with it.
pub trait TaskEvent: MessageFull {
    /// Where containerd's subscribers find it.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ty => $topic:expr),* $(,)?) => { $(impl TaskEvent for $event { const TOPIC: &'static str = $topic; })* };
}

topics! {
    TaskCreate => topics::TASK_CREATE_EVENT_TOPIC,
    TaskStart => topics::TASK_START_EVENT_TOPIC,
    TaskExit => topics::TASK_EXIT_EVENT_TOPIC,
    TaskDelete => topics::TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => topics::TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => topics::TASK_RESUMED_EVENT_TOPIC,
    TaskOOM => topics::TASK_OOM_EVENT_TOPIC,
}

/// The sending end of the queue.
pub struct Publisher {
    namespace: String,
    queue: Option<mpsc::Sender<Envelope>>,
    worker: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Starts the queue's worker. An empty address (a caller that takes no events) means that nothing is sent.
    pub fn start(address: &str, namespace: &str) -> Publisher {
        if address.is_empty() {
            return Publisher { namespace: namespace.to_owned(), queue: None, worker: None };
        }
        let (queue, events) = mpsc::channel(CAPACITY);
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        let worker = tokio::spawn(deliver(address, events));
        Publisher { namespace: namespace.to_owned(), queue: Some(queue), worker: Some(worker) }
    }

    /// Queues an event; its time is now.
    pub fn publish<E: TaskEvent>(&self, event: &E) {
        let Some(queue) = &self.queue else { return };
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(%error, topic = E::TOPIC, "event cannot be encoded"),
        };
        // containerd looks events up by their bare name, without the usual type.googleapis.com/.
        let type_url = E::descriptor().full_name().to_owned();
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: Some(Any { type_url, value, ..Default::default() }).into(),
            ..Default::default()
        };
        if queue.try_send(envelope).is_err() {
            tracing::error!(topic = E::TOPIC, "event dropped: {CAPACITY} are waiting for containerd already");
        }
    }

    /// Closes the queue and waits for its last events, at most `deadline`.
    pub async fn flush(&mut self, deadline: Duration) {
        self.queue = None;
        if let Some(worker) = self.worker.take()
            && timeout(deadline, worker).await.is_err()
        {
            tracing::warn!("containerd did not take the last events in time");
        }
    }
}

async fn deliver(address: String, mut events: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
        let mut pause = BACKOFF.0;
        while let Err(error) = forward(&mut client, &address, &request).await {
            client = None;
            // containerd itself refuses what it cannot take (a bad topic, say): trying again would block the rest.
            if let ttrpc::Error::RpcStatus(status) = &error
                && status.code() == ttrpc::Code::INVALID_ARGUMENT
            {
                tracing::error!(%error, "containerd refused an event");
                break;
            }
            tracing::debug!(%error, "containerd is away, events wait");
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, request: &ForwardRequest) -> ttrpc::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    client.forward(ttrpc::context::with_duration(FORWARD_DEADLINE), request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscribers_find_events_by_bare_names() {
        assert_eq!(TaskExit::descriptor().full_name(), "containerd.events.TaskExit");
        assert_eq!(TaskOOM::descriptor().full_name(), "containerd.events.TaskOOM");
        assert_eq!(TaskExecStarted::TOPIC, "/tasks/exec-started");
    }
}
