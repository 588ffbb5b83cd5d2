//! Events: what `ctr events` sees, and a stand-in for containerd that takes them one by one.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit};
use containerd_shim_protos::shim_async;
use protobuf::Message;
use serde_json::Value;
use ttrpc::asynchronous::TtrpcContext;

use crate::daemon::{Daemon, namespace};
use crate::eventually;
use crate::task::runtime;

/// One event of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `start`, `exit`, `exec-added` and so on.
    pub topic: String,
    /// Its fields.
    pub body: Value,
}

impl Event {
    /// Topic, and the exec's id or process' id if it is not the container's own.
    pub fn brief(&self) -> String {
        let text = |key: &str| self.body[key].as_str().unwrap_or_default();
        let exec = if text("exec_id").is_empty() {
            text("id")
        } else {
            text("exec_id")
        };
        if exec.is_empty() || exec == text("container_id") {
            self.topic.clone()
        } else {
            format!("{} {exec}", self.topic)
        }
    }
}

/// Who tells the end of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Its shim.
    Told,
    /// containerd, after the death of the shim: it knows of no exec, and what the shim has told
    /// already it may tell again.
    ToldByContainerd,
}

impl Lifetime {
    /// Whether the events of a container that is gone are what containerd's clients expect: create,
    /// start, exit and delete in this order, each once, an exec's between start and exit.
    ///
    /// # Errors
    /// The rule that is broken, with the events.
    pub fn check(self, events: &[Event]) -> Result<(), String> {
        let briefs: Vec<String> = events.iter().map(Event::brief).collect();
        let at = |topic: &str| briefs.iter().position(|brief| brief == topic);
        let count = |topic: &str| briefs.iter().filter(|brief| *brief == topic).count();
        let rule = |holds: bool, rule: &str| {
            if holds {
                Ok(())
            } else {
                Err(format!("{rule}: {briefs:?}"))
            }
        };
        let most = match self {
            Lifetime::Told => 1,
            Lifetime::ToldByContainerd => 2,
        };
        for topic in ["create", "start", "exit", "delete"] {
            let most = if matches!(topic, "create" | "start") {
                1
            } else {
                most
            };
            rule(count(topic) <= most, &format!("{topic} is told once"))?;
        }
        let order: Vec<usize> = ["create", "start", "exit", "delete"]
            .into_iter()
            .filter_map(at)
            .collect();
        rule(order.is_sorted(), "create, start, exit, delete")?;
        if at("create").is_some() {
            rule(at("create") == Some(0), "nothing comes before create")?;
            rule(at("delete").is_some(), "what is created is deleted")?;
        }
        if at("start").is_some() {
            rule(at("exit").is_some(), "what is started ends")?;
        }
        for exec in briefs
            .iter()
            .filter_map(|brief| brief.strip_prefix("exec-started "))
        {
            let (started, ended) = (
                at(&format!("exec-started {exec}")),
                at(&format!("exit {exec}")),
            );
            let told = ended.is_some() || self == Lifetime::ToldByContainerd;
            rule(told, "an exec that is started ends")?;
            rule(
                ended.is_none() || started < ended,
                "an exec starts before it ends",
            )?;
            let last = ended.is_none() || at("exit").is_none_or(|exit| ended < Some(exit));
            rule(last, "the exit of init comes last")?;
        }
        Ok(())
    }
}

/// A running `ctr events`.
pub struct Events {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Events {
    /// Subscribes; everything that happens after the return is seen.
    pub fn subscribe(daemon: &Daemon) -> Events {
        let mut command = daemon.ctr_command(["events"]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (sink, output) = (Arc::clone(&lines), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                sink.lock().unwrap().push(line);
            }
        });
        let events = Events { child, lines };
        let mut number = 0;
        // `ctr events` does not say when it listens: make events until one is seen.
        eventually(
            "ctr events shows something",
            Duration::from_secs(20),
            || {
                number += 1;
                daemon
                    .ctr(&[
                        "namespaces",
                        "label",
                        &namespace(),
                        &format!("probe={number}"),
                    ])
                    .ok();
                (!events.lines.lock().unwrap().is_empty()).then_some(())
            },
        );
        events
    }

    /// The events of a container's tasks so far.
    pub fn of(&self, id: &str) -> Vec<Event> {
        let lines = self.lines.lock().unwrap();
        let parse = |line: &String| {
            let (_, rest) = line.split_once(" /tasks/")?;
            let (topic, body) = rest.split_once(' ')?;
            let body: Value = serde_json::from_str(body).ok()?;
            (body["container_id"] == id).then(|| Event {
                topic: topic.to_owned(),
                body,
            })
        };
        lines.iter().filter_map(parse).collect()
    }

    /// All events so far, of whatever container.
    pub fn text(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    /// Waits for the container's `/tasks/delete` and gives all of its events.
    #[track_caller]
    pub fn until_delete(&self, id: &str) -> Vec<Event> {
        eventually(
            &format!("/tasks/delete of {id}, of {:?}", self.of(id)),
            Duration::from_secs(30),
            || {
                let events = self.of(id);
                events
                    .iter()
                    .any(|event| event.brief() == "delete")
                    .then_some(events)
            },
        )
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stands in for containerd's ttrpc socket: takes the events of a shim that a test started by hand,
/// in the order in which they arrive.
pub struct Sink {
    server: ttrpc::asynchronous::Server,
    seen: Seen,
}

/// Topic and body of each event, in order.
type Seen = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

struct Forward(Seen);

#[async_trait]
impl shim_async::Events for Forward {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        assert!(
            envelope.timestamp.seconds > 0 && !envelope.namespace.is_empty(),
            "containerd refuses it: {envelope:?}"
        );
        self.0
            .lock()
            .unwrap()
            .push((envelope.topic.clone(), envelope.event.value.clone()));
        Ok(Empty::default())
    }
}

impl Sink {
    /// Listens where a daemon with this gRPC address would.
    pub fn listen(address: &Path) -> Sink {
        let seen = Seen::default();
        let service = shim_async::create_events(Arc::new(Forward(Arc::clone(&seen))));
        let server = runtime().block_on(async {
            let socket = format!("unix://{}.ttrpc", address.display());
            let mut server = ttrpc::asynchronous::Server::new()
                .bind(&socket)
                .unwrap()
                .register_service(service);
            server.start().await.unwrap();
            server
        });
        Sink { server, seen }
    }

    /// Topics without their `/tasks/`, with the exec's id where there is one.
    pub fn topics(&self) -> Vec<String> {
        let brief = |(topic, value): &(String, Vec<u8>)| {
            let exec = match topic.as_str() {
                "/tasks/exec-added" => TaskExecAdded::parse_from_bytes(value).unwrap().exec_id,
                "/tasks/exec-started" => TaskExecStarted::parse_from_bytes(value).unwrap().exec_id,
                "/tasks/exit" => {
                    let exit = TaskExit::parse_from_bytes(value).unwrap();
                    if exit.id == exit.container_id {
                        String::new()
                    } else {
                        exit.id
                    }
                }
                _ => String::new(),
            };
            format!("{} {exec}", topic.trim_start_matches("/tasks/"))
                .trim()
                .to_owned()
        };
        self.seen.lock().unwrap().iter().map(brief).collect()
    }

    /// Waits until this topic was seen.
    #[track_caller]
    pub fn until(&self, topic: &str) -> Vec<String> {
        eventually(
            &format!("{topic} among {:?}", self.topics()),
            Duration::from_secs(60),
            || {
                let topics = self.topics();
                topics.iter().any(|seen| seen == topic).then_some(topics)
            },
        )
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = runtime().block_on(self.server.shutdown());
    }
}
