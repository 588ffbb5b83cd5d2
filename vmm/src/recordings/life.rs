//! The recorded lives: whether what a QEMU said in them is read as it was meant, by the same code
//! that reads it from a socket.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::peer::Sent;
use super::schema::text;
use super::{Recording, hold};
use crate::qmp::codec::{Decoder, Message};
use crate::qmp::commands::{self, Command};
use crate::qmp::events::{self, Known};

/// Reads a value, and says what is wrong with it.
type Read = fn(Value) -> Option<String>;

/// How everything that is read is read, by name.
#[derive(Default)]
struct Readers {
    replies: HashMap<&'static str, Read>,
    events: HashMap<&'static str, Read>,
}

fn read<T: for<'de> Deserialize<'de>>(value: Value) -> Option<String> {
    T::deserialize(value).err().map(|error| error.to_string())
}

impl commands::Visit for Readers {
    fn command<C: Command>(&mut self, _: Option<&[(&str, &str)]>) {
        self.replies.insert(C::NAME, read::<C::Reply>);
    }
}

impl events::Visit for Readers {
    fn event<K: Known>(&mut self) {
        self.events.insert(K::NAME, read::<K>);
    }
}

/// What is wrong with a life.
pub(super) fn wrong(recording: &Recording, life: &[Value]) -> Vec<String> {
    let mut readers = Readers::default();
    commands::each(&mut readers);
    events::each(&mut readers);
    let mut wrong = Vec::new();
    let mut sent: Vec<Sent> = Vec::new();
    let (mut greeted, mut answered, mut last_word) = (None, 0, None);
    let mut decoder = Decoder::default();
    for line in life {
        if line.get("execute").is_some() {
            sent.push((text(&line["execute"]), line["arguments"].clone()));
            continue;
        }
        let mut line = line.clone();
        if line.get("return").is_some() {
            line["id"] = json!(answered);
        }
        decoder.extend(format!("{line}\r\n").as_bytes());
        match decoder.next_message() {
            Ok(Some(Message::Greeting { version })) => greeted = Some(version),
            Ok(Some(Message::Reply {
                id: Some(_),
                outcome: Ok(value),
            })) => {
                // One was asked after the other.
                let name = sent.get(answered).map_or("", |(name, _)| name.as_str());
                answered += 1;
                match readers.replies.get(name) {
                    Some(read) => {
                        let error = read(value);
                        wrong.extend(error.map(|error| format!("the answer to {name}: {error}")));
                    }
                    None => wrong.push(format!("{name:?} is in no list of commands")),
                }
            }
            Ok(Some(Message::Event(event))) => {
                last_word = event.last_word().or(last_word);
                if let Some(read) = readers.events.get(event.name.as_str()) {
                    let error = read(event.data);
                    wrong.extend(error.map(|error| format!("the event {}: {error}", event.name)));
                }
            }
            other => wrong.push(format!("{line} is read as {other:?}")),
        }
    }
    if greeted.as_ref() != Some(&recording.version) {
        wrong.push(format!("the greeting tells the version {greeted:?}"));
    }
    match last_word {
        Some(word) if word.starts_with("it shut down") => wrong.push(format!("its end: {word}")),
        None => wrong.push("nothing says why it ended".into()),
        Some(_) => {}
    }
    // What a real QEMU took cannot be wrong: this is about the test.
    wrong.extend(hold::commands(recording, &sent));
    wrong
}
