//! A QEMU that is a recording: it answers what it is asked as the recorded one did, takes whatever
//! it is told to do, and notes all of it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::schema::{list, text};
use super::{MACHINE, Recording};

/// A command as it was sent: its name and its arguments.
pub(super) type Sent = (String, Value);

/// What a peer was sent so far.
pub(super) type Noted = Arc<Mutex<Vec<Sent>>>;

struct Peer {
    recording: Arc<Recording>,
    /// A command that fails.
    refused: Option<&'static str>,
    noted: Noted,
    /// Places for CPUs, as `query-hotpluggable-cpus` tells them.
    cpus: Vec<Value>,
    /// What the last `qom-set` said.
    set: Value,
}

/// Starts a peer; it ends with its connection. Descriptors that come with a line are dropped.
pub(super) fn start(
    recording: &Arc<Recording>,
    refused: Option<&'static str>,
    noted: &Noted,
) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer {
        recording: recording.clone(),
        refused,
        noted: noted.clone(),
        cpus: recording.cpus(),
        set: Value::Null,
    };
    std::thread::spawn(move || {
        let mut socket = theirs.try_clone().unwrap();
        let mut say = |line: Value| drop(socket.write_all(format!("{line}\r\n").as_bytes()));
        say(peer.recording.greeting.clone());
        for line in BufReader::new(theirs).lines() {
            let Ok(line) = line else { return };
            let line: Value = serde_json::from_str(&line).unwrap();
            let (command, arguments) = (text(&line["execute"]), line["arguments"].clone());
            let answer = peer.answer(&command, &arguments);
            peer.noted
                .lock()
                .unwrap()
                .push((command.clone(), arguments.clone()));
            match answer {
                Ok(value) => say(json!({"return": value, "id": line["id"]})),
                Err(desc) => say(json!({"error": {"class": "GenericError", "desc": desc},
                    "id": line["id"]})),
            }
            if command == "quit" {
                return;
            }
            // Of CPUs it says nothing, as if they were emulated.
            if command == "device_del" && !text(&arguments["id"]).starts_with("cpu") {
                say(json!({"event": "DEVICE_DELETED", "data": {"device": arguments["id"]}}));
            }
        }
    });
    ours
}

impl Peer {
    fn answer(&mut self, command: &str, arguments: &Value) -> Result<Value, &'static str> {
        if self.refused == Some(command) {
            return Err("as the test wants it");
        }
        let recording = &self.recording;
        Ok(match command {
            "qom-list-properties" | "qom-list" => {
                let typename = match arguments["path"].as_str() {
                    Some("/machine") => MACHINE.to_owned(),
                    // There is nothing any more.
                    Some(_) => return Ok(json!([])),
                    None => text(&arguments["typename"]),
                };
                let properties = recording.types.get(&typename).cloned().flatten();
                let properties = properties.ok_or("no such type")?;
                let named = |(name, kind)| json!({"name": name, "type": kind});
                properties.iter().map(named).collect()
            }
            "query-commands" => {
                let named = |name| json!({"name": name});
                recording.schema().commands().map(named).collect()
            }
            "query-command-line-options" => {
                let named = |name| json!({"option": name, "parameters": []});
                recording.settings.keys().map(named).collect()
            }
            "query-hotpluggable-cpus" => json!(self.cpus),
            "device_add" | "device_del" => {
                let path = json!(format!("/machine/peripheral/{}", text(&arguments["id"])));
                let there = |cpu: &Value| {
                    let mut props = cpu["props"].as_object().unwrap().iter();
                    cpu["qom-path"] == path
                        || props.all(|(name, value)| arguments.get(name) == Some(value))
                };
                if let Some(cpu) = self.cpus.iter_mut().find(|cpu| there(cpu)) {
                    let cpu = cpu.as_object_mut().unwrap();
                    match command {
                        "device_add" => cpu.insert("qom-path".into(), path),
                        _ => cpu.remove("qom-path"),
                    };
                }
                json!({})
            }
            "qom-set" => {
                self.set = arguments["value"].clone();
                json!({})
            }
            "qom-get" => self.set.clone(),
            "add-fd" => json!({"fd": 9, "fdset-id": 1}),
            "x-query-virtio-status" => json!({"status": {"statuses": []}}),
            _ => json!({}),
        })
    }
}

impl Recording {
    /// The places for CPUs as they were before the first of them came.
    fn cpus(&self) -> Vec<Value> {
        let lines = self.lives.values().flatten();
        let asked = lines.skip_while(|line| line["execute"] != "query-hotpluggable-cpus");
        let answer = asked
            .map(|line| &line["return"])
            .find(|value| value.is_array());
        let cpus = list(answer.unwrap_or(&Value::Null)).to_vec();
        assert!(
            !cpus.is_empty(),
            "{}: no query-hotpluggable-cpus in its lives",
            self.name
        );
        cpus
    }
}
