//! What `ctr events` sees.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use crate::daemon::{Daemon, namespace};
use crate::eventually;

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
        let exec = if text("exec_id").is_empty() { text("id") } else { text("exec_id") };
        if exec.is_empty() || exec == text("container_id") {
            self.topic.clone()
        } else {
            format!("{} {exec}", self.topic)
        }
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
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
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
        eventually("ctr events shows something", Duration::from_secs(20), || {
            number += 1;
            daemon.ctr(&["namespaces", "label", &namespace(), &format!("probe={number}")]).ok();
            (!events.lines.lock().unwrap().is_empty()).then_some(())
        });
        events
    }

    /// The events of a container's tasks so far.
    pub fn of(&self, id: &str) -> Vec<Event> {
        let lines = self.lines.lock().unwrap();
        let parse = |line: &String| {
            let (_, rest) = line.split_once(" /tasks/")?;
            let (topic, body) = rest.split_once(' ')?;
            let body: Value = serde_json::from_str(body).ok()?;
            (body["container_id"] == id).then(|| Event { topic: topic.to_owned(), body })
        };
        lines.iter().filter_map(parse).collect()
    }

    /// Waits for the container's `/tasks/delete` and gives all of its events.
    #[track_caller]
    pub fn until_delete(&self, id: &str) -> Vec<Event> {
        eventually(&format!("/tasks/delete of {id}, of {:?}", self.of(id)), Duration::from_secs(30), || {
            let events = self.of(id);
            events.iter().any(|event| event.brief() == "delete").then_some(events)
        })
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
