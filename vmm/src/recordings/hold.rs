//! What is sent, held against a recording. Each thing that does not fit is a line that names the
//! version, the command and what is missing.

use std::collections::BTreeMap;
use std::ffi::OsString;

use serde_json::{Map, Value, json};

use super::peer::Sent;
use super::reading::unread;
use super::schema::{has_value, list, text};
use super::{MACHINE, Recording};
use crate::devices::block::HOST_DEVICE;
use crate::qmp::commands::{self, Command, QueryVirtioStatus};
use crate::qmp::events::{self, Known, SHUTDOWN_REASONS, Shutdown};

/// What does not fit in the lists of commands and events: names, arguments and what is read.
pub(super) fn lists(recording: &Recording, virtio_status: bool) -> Vec<String> {
    struct Lists<'a>(&'a Recording, bool, Vec<String>);
    impl commands::Visit for Lists<'_> {
        fn command<C: Command>(&mut self, arguments: Option<&[(&str, &str)]>) {
            let (name, schema) = (C::NAME, self.0.schema());
            if name == QueryVirtioStatus::NAME && !self.1 {
                return;
            }
            let Some(command) = schema.find("command", name) else {
                return self.2.push(format!("no command {name}"));
            };
            if let Some(arguments) = arguments {
                let sample = arguments.iter().map(|(field, kind)| {
                    let value = match *kind {
                        "String" => json!("text"),
                        "u64" => json!(1),
                        "Value" => Value::Null,
                        other => panic!("the test knows no {other} yet: {name} {field}"),
                    };
                    (field.replace('_', "-"), value)
                });
                let sample: Map<String, Value> = sample.collect();
                // Of a free value only the name is known here.
                let free: Vec<String> = sample
                    .iter()
                    .filter(|(_, value)| value.is_null())
                    .map(|(field, _)| format!("{name}: {field} "))
                    .collect();
                let of = text(&command["arg-type"]);
                let wrong = schema.check(&of, &Value::Object(sample), &format!("{name}:"));
                let known = |line: &String| !free.iter().any(|free| line.starts_with(free));
                self.2.extend(wrong.into_iter().filter(known));
            }
            let reply = format!("{name}: what it returns");
            self.2.extend(unread::<C::Reply>(
                schema,
                &text(&command["ret-type"]),
                &reply,
            ));
        }
    }
    impl events::Visit for Lists<'_> {
        fn event<K: Known>(&mut self) {
            let schema = self.0.schema();
            let Some(event) = schema.find("event", K::NAME) else {
                return self.2.push(format!("no event {}", K::NAME));
            };
            let of = text(&event["arg-type"]);
            self.2
                .extend(unread::<K>(schema, &of, &format!("event {}:", K::NAME)));
        }
    }
    let mut lists = Lists(recording, virtio_status, Vec::new());
    commands::each(&mut lists);
    events::each(&mut lists);
    let Lists(_, _, mut wrong) = lists;
    let schema = recording.schema();
    let shutdown = schema.entity(Shutdown::NAME);
    let shutdown = schema.entity(shutdown["arg-type"].as_str().unwrap_or_default());
    let reason = list(&shutdown["members"])
        .iter()
        .find(|member| member["name"] == "reason");
    let reasons = reason.map(|reason| schema.entity(reason["type"].as_str().unwrap_or_default()));
    for (theirs, _) in SHUTDOWN_REASONS {
        if !reasons.is_some_and(|reasons| has_value(reasons, theirs)) {
            wrong.push(format!("event {}: no reason {theirs}", Shutdown::NAME));
        }
    }
    wrong
}

/// What does not fit in commands as they are sent, one after the other to the same QEMU.
pub(super) fn commands(recording: &Recording, sent: &[Sent]) -> Vec<String> {
    let mut wrong = Vec::new();
    // Which driver the device of an id has.
    let mut drivers = BTreeMap::new();
    for (name, arguments) in sent {
        let Some(command) = recording.schema().find("command", name) else {
            wrong.push(format!("no command {name}"));
            continue;
        };
        let check = |arguments| {
            let of = text(&command["arg-type"]);
            recording
                .schema()
                .check(&of, arguments, &format!("{name}:"))
        };
        match name.as_str() {
            "device_add" => {
                let driver = text(&arguments["driver"]);
                wrong.extend(device(recording, &driver, arguments));
                drivers.insert(text(&arguments["id"]), driver);
            }
            "blockdev-add" => {
                wrong.extend(check(arguments));
                // What a test cannot have: a block device of the host.
                let mut other = arguments.clone();
                other["file"]["driver"] = json!(HOST_DEVICE);
                wrong.extend(check(&other));
            }
            _ => wrong.extend(check(arguments)),
        }
        let path = arguments["path"].as_str().unwrap_or_default();
        if let Some(rest) = path.strip_prefix("/machine/peripheral/") {
            let (id, child) = rest.split_once('/').unwrap_or((rest, ""));
            let driver = drivers.get(id).map_or("", String::as_str);
            let property = arguments["property"].as_str().unwrap_or(child);
            let error = recording.property(driver, property).err();
            wrong.extend(error.map(|error| format!("{name} {error}")));
        }
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

/// A `device_add`, whose arguments are the driver's properties and not in the schema.
fn device(recording: &Recording, driver: &str, arguments: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let arguments = arguments.as_object().into_iter().flatten();
    let mut own = Map::new();
    for (name, value) in arguments {
        if ["driver", "id", "bus"].contains(&name.as_str()) {
            own.insert(name.clone(), value.clone());
            continue;
        }
        match recording.property(driver, name) {
            Ok(kind) => {
                // QEMU takes some of these as text too, but not from 9.2 on.
                let fits = match kind {
                    // Text in every release; those before 10 name the type of its other form.
                    _ if name == "addr" => value.is_string(),
                    "bool" => value.is_boolean(),
                    kind if is_number(kind) => value.is_number(),
                    _ => value.is_string(),
                };
                if !fits {
                    wrong.push(format!(
                        "device_add {driver}: {name} is {kind}, not {value}"
                    ));
                }
            }
            Err(error) => wrong.push(format!("device_add {error}")),
        }
    }
    let command = recording.schema().entity("device_add");
    let of = text(&command["arg-type"]);
    wrong.extend(
        recording
            .schema()
            .check(&of, &Value::Object(own), "device_add:"),
    );
    wrong
}

fn is_number(kind: &str) -> bool {
    let integer = kind.trim_start_matches('u').trim_start_matches("int");
    matches!(kind, "size" | "number")
        || (integer.len() < kind.len() && integer.parse::<u8>().is_ok())
        || kind == "int"
}

/// What does not fit in a command line.
pub(super) fn line(recording: &Recording, line: &[OsString]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut words = line.iter().map(|word| word.to_str().unwrap());
    while let Some(option) = words.next() {
        if !recording.options.contains(option) {
            wrong.push(format!("no option {option}"));
        }
        // Where the pairs of its value are explained, and what its first word, if it has no name,
        // is the value of.
        let (kind, first) = match option {
            "-nodefaults" | "-no-user-config" | "-nographic" | "-no-reboot" | "-S" => continue,
            "-L" | "-append" | "-bios" | "-display" | "-initrd" | "-kernel" => {
                words.next();
                continue;
            }
            "-accel" => (Kind::Type(|name| format!("{name}-accel")), ""),
            "-cpu" => (Kind::Type(|name| format!("{name}-x86_64-cpu")), ""),
            "-device" | "-object" => (Kind::Type(str::to_owned), ""),
            "-machine" => (Kind::Machine, ""),
            "-chardev" => (Kind::Setting("chardev"), "backend"),
            "-m" => (Kind::Setting("memory"), "size"),
            "-mon" => (Kind::Setting("mon"), "chardev"),
            "-name" => (Kind::Setting("name"), "guest"),
            "-sandbox" => (Kind::Setting("sandbox"), "enable"),
            "-smp" => (Kind::Setting("smp-opts"), "cpus"),
            other => panic!("the test does not know yet what {other} takes"),
        };
        let value = words.next().unwrap();
        let mut subject = String::new();
        for (number, pair) in value.split(',').enumerate() {
            let (key, value) = match pair.split_once('=') {
                None if number == 0 => {
                    subject = pair.to_owned();
                    (first, pair)
                }
                None => panic!("{option} {pair} has no name"),
                Some(pair) => pair,
            };
            let found = match (&kind, key) {
                (Kind::Type(typename), "") => recording.a_type(&typename(&subject)).map(|_| ""),
                // These two are QEMU's, whatever the type.
                (Kind::Type(_), "id" | "bus") => continue,
                (Kind::Type(typename), key) => recording.property(&typename(&subject), key),
                // A word for another option, which no list has.
                (Kind::Machine, "accel") => continue,
                (Kind::Machine, "") => continue,
                (Kind::Machine, key) => recording.property(MACHINE, key),
                (Kind::Setting(setting), "id") => recording.setting(setting, None),
                (Kind::Setting(setting), key) => recording.setting(setting, Some(key)),
            };
            match found {
                Ok(kind) if fits(kind, value) => {}
                Ok(kind) => wrong.push(format!("{option} {subject}: {key} is {kind}, not {value}")),
                Err(error) => wrong.push(format!("{option} {error}")),
            }
        }
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

enum Kind {
    /// Properties of a type whose name is made of the first word.
    Type(fn(&str) -> String),
    /// Properties of the machine.
    Machine,
    /// In the list of the command line's settings.
    Setting(&'static str),
}

/// Whether a word of the command line can be of a kind; where the kind is not one of these, any.
fn fits(kind: &str, value: &str) -> bool {
    match kind {
        "bool" | "boolean" => matches!(value, "on" | "off"),
        "OnOffAuto" => matches!(value, "on" | "off" | "auto"),
        // With a suffix, as in 256M, or hexadecimal.
        kind if is_number(kind) => match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).is_ok(),
            None => value
                .trim_end_matches(['K', 'M', 'G'])
                .parse::<u64>()
                .is_ok(),
        },
        _ => true,
    }
}

impl Recording {
    fn a_type(&self, typename: &str) -> Result<&BTreeMap<String, String>, String> {
        match self.types.get(typename) {
            Some(Some(properties)) => Ok(properties),
            Some(None) => Err(format!("{typename}: no such type")),
            None => Err(format!("{typename}: not in the recording, make it again")),
        }
    }

    /// The type of a property.
    fn property(&self, typename: &str, name: &str) -> Result<&str, String> {
        let kind = self.a_type(typename)?.get(name);
        kind.map(String::as_str)
            .ok_or_else(|| format!("{typename}: no property {name}"))
    }

    /// The type of a setting of an option of the command line.
    fn setting(&self, option: &str, name: Option<&str>) -> Result<&str, String> {
        let settings = self
            .settings
            .get(option)
            .ok_or(format!("{option}: no such option"))?;
        let Some(name) = name else { return Ok("") };
        let kind = settings.get(name).map(String::as_str);
        kind.ok_or_else(|| format!("{option}: no setting {name}"))
    }
}
