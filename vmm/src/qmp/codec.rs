//! Lines to messages and back. No IO.
//!
//! Source: QEMU's `docs/interop/qmp-spec`. Every message is one JSON object on one line that ends
//! in CRLF (LF is taken too); control characters between messages only reset QEMU's parser and mean
//! nothing.

use serde::Serialize;
use serde_json::{Map, Value};

use super::Event;

/// The longest line that is taken. `query-qmp-schema` answers with 200 KB; nothing in use comes
/// near this. A QEMU that was taken over can make us keep [`super::connection::EVENTS`] such lines
/// while an unplug listens.
const MAX_LINE: usize = 1 << 20;

/// Target of the trace of every line, as it is sent or received.
pub(super) const LINES: &str = "vmm::qmp";

/// What QEMU says.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The first message of a monitor.
    Greeting {
        /// `major.minor.micro`.
        version: String,
    },
    /// The answer to a command; errors of lines that are no command at all have no id.
    Reply {
        /// The id that was sent with the command.
        id: Option<u64>,
        /// What the command returned, or class and text of its error.
        outcome: Result<Value, (String, String)>,
    },
    /// Something happened.
    Event(Event),
}

/// What QEMU said is not QMP. There is no way back into step after this: close the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// More than 1 MiB without an end of line.
    #[error("a line of more than 1 MiB")]
    TooLong,
    /// Not JSON, or not one of the messages that QMP knows.
    #[error("not QMP: {0:?}")]
    NotQmp(String),
}

/// Makes messages of bytes, however they are cut.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Up to here `buffer` is known to have no end of line.
    searched: usize,
}

impl Decoder {
    /// Adds what was read.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// What came is not QMP.
    pub fn next_message(&mut self) -> Result<Option<Message>, Malformed> {
        while let Some(length) = self.buffer[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n')
        {
            let line: Vec<u8> = self.buffer.drain(..=self.searched + length).collect();
            self.searched = 0;
            let line = trim(&line);
            if !line.is_empty() {
                tracing::trace!(target: LINES, received = %String::from_utf8_lossy(line));
                return parse(line).map(Some);
            }
        }
        self.searched = self.buffer.len();
        if self.searched > MAX_LINE {
            return Err(Malformed::TooLong);
        }
        if self.buffer.is_empty() {
            // Once in a while a reply is large; do not keep its memory for the life of the virtual
            // machine.
            self.buffer.shrink_to(4096);
        }
        Ok(None)
    }
}

/// Without control characters and blanks around it; JSON has none there that mean anything.
fn trim(line: &[u8]) -> &[u8] {
    let noise = |byte: &u8| *byte <= b' ' || *byte == 0x7f || *byte == 0xff;
    let start = line
        .iter()
        .position(|byte| !noise(byte))
        .unwrap_or(line.len());
    let end = line
        .iter()
        .rposition(|byte| !noise(byte))
        .map_or(start, |last| last + 1);
    &line[start..end]
}

fn parse(line: &[u8]) -> Result<Message, Malformed> {
    let not_qmp =
        || Malformed::NotQmp(String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned());
    let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(|_| not_qmp())?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(Value::String(name)) = object.get("event") {
        return Ok(Message::Event(Event {
            name: name.clone(),
            data: object.remove("data").unwrap_or_default(),
        }));
    }
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(value) = object.remove("return") {
        return Ok(Message::Reply {
            id,
            outcome: Ok(value),
        });
    }
    if let Some(error) = object.get("error") {
        return Ok(Message::Reply {
            id,
            outcome: Err((text(error.get("class")), text(error.get("desc")))),
        });
    }
    if let Some(greeting) = object.get("QMP") {
        let number = |part: &str| {
            greeting["version"]["qemu"][part]
                .as_u64()
                .unwrap_or_default()
        };
        let version = format!(
            "{}.{}.{}",
            number("major"),
            number("minor"),
            number("micro")
        );
        return Ok(Message::Greeting { version });
    }
    Err(not_qmp())
}

/// The line that asks for `command`.
pub(super) fn encode<C: Serialize>(
    command: &str,
    arguments: &C,
    id: u64,
) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    struct Line<'a, C> {
        execute: &'a str,
        arguments: &'a C,
        id: u64,
    }
    let mut line = serde_json::to_vec(&Line {
        execute: command,
        arguments,
        id,
    })?;
    line.extend_from_slice(b"\r\n");
    Ok(line)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn decode(bytes: &[u8], chunk: usize) -> Result<Vec<Message>, Malformed> {
        let mut decoder = Decoder::default();
        let mut messages = Vec::new();
        for part in bytes.chunks(chunk) {
            decoder.extend(part);
            while let Some(message) = decoder.next_message()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    const STREAM: &[u8] = b"\x1e{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}}, \"capabilities\": [\"oob\"]}}\r\n\
        \r\n{\"return\": {}, \"id\": 1}\n\xff{\"timestamp\": {\"seconds\": 1}, \"event\": \
        \"STOP\"}\r\n\
        {\"id\": 2, \"error\": {\"class\": \"GenericError\", \"desc\": \
        \"no\\r\\n\\\"bus\\\"\"}}\r\n{\"error\": {\"class\": \"X\"}}\r\n\
        {\"event\": \"NEVER_HEARD_OF\", \"data\": {\"a\": [1]}, \"new\": 1}\r\n{\"return\": [1, \
        null], \"id\": 18446744073709551615}\r\n";

    fn wanted() -> Vec<Message> {
        vec![
            Message::Greeting {
                version: "7.2.22".into(),
            },
            Message::Reply {
                id: Some(1),
                outcome: Ok(json!({})),
            },
            Message::Event(Event {
                name: "STOP".into(),
                data: Value::Null,
            }),
            Message::Reply {
                id: Some(2),
                outcome: Err(("GenericError".into(), "no\r\n\"bus\"".into())),
            },
            Message::Reply {
                id: None,
                outcome: Err(("X".into(), String::new())),
            },
            Message::Event(Event {
                name: "NEVER_HEARD_OF".into(),
                data: json!({"a": [1]}),
            }),
            Message::Reply {
                id: Some(u64::MAX),
                outcome: Ok(json!([1, null])),
            },
        ]
    }

    #[test]
    fn a_stream_reads_the_same_however_it_is_cut() {
        for chunk in 1..=STREAM.len() {
            assert_eq!(
                decode(STREAM, chunk).as_deref(),
                Ok(&wanted()[..]),
                "in pieces of {chunk}"
            );
        }
    }

    #[test]
    fn what_is_not_qmp_is_said() {
        for line in [
            "hello\n",
            "[1]\n",
            "{\"ret\": 1}\n",
            "{\"return\": {}\n",
            "{\"event\": 3}\n",
            "\u{fffd}\n",
        ] {
            let error = decode(line.as_bytes(), 7).unwrap_err().to_string();
            assert!(error.starts_with("not QMP: "), "{line:?}: {error}");
        }
    }

    #[test]
    fn a_line_without_end_is_an_error_and_a_long_one_is_not() {
        let long = format!(
            "{{\"return\": \"{}\", \"id\": 1}}\n",
            "x".repeat(MAX_LINE - 100)
        );
        assert_eq!(decode(long.as_bytes(), 1 << 20).unwrap().len(), 1);
        assert_eq!(
            decode(&vec![b'x'; MAX_LINE + 2], 1 << 20),
            Err(Malformed::TooLong)
        );
    }

    /// A deterministic stream of damage: whatever comes, decoding ends, and in step lines before it
    /// are read.
    #[test]
    fn damaged_streams_never_hang_or_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let (mut whole, mut broken) = (0, 0);
        for _ in 0..20_000 {
            let mut bytes = STREAM.to_vec();
            for _ in 0..random(4) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes.truncate(at.max(8)),
                    2 => bytes.insert(at, [b'\n', b'"', b'{', 0][random(4)]),
                    _ => drop(bytes.remove(at)),
                }
            }
            match decode(&bytes, 1 + random(bytes.len())) {
                Ok(messages) => whole += usize::from(messages == wanted()),
                Err(_) => broken += 1,
            }
        }
        assert!(
            whole > 4_000 && broken > 4_000,
            "{whole} unharmed, {broken} broken"
        );
    }

    #[test]
    fn a_command_is_one_line_whatever_its_arguments_hold() {
        let line = encode("device_add", &json!({"id": "a\n\r\u{1}b"}), 7).unwrap();
        assert_eq!(
            line,
            b"{\"execute\":\"device_add\",\"arguments\":{\"id\":\"a\\n\\r\\u0001b\"},\"id\":7}\r\n"
        );
    }
}
