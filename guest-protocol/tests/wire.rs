//! The wire: our protos are held against the published table (`wire.txt`), in names, numbers and
//! types and in both directions, and every message is encoded and its bytes are compared with what
//! the table says. So a stock agent and a stock client understand us.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of a test fail by panicking, as the test does"
)]

use std::collections::BTreeMap;

use guest_protocol::protocols::{agent, csi, health, oci, types};
use protobuf::descriptor::field_descriptor_proto::{Label, Type};
use protobuf::descriptor::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
};
use protobuf::reflect::{
    FileDescriptor, MessageDescriptor, ReflectValueBox, RuntimeFieldType, RuntimeType,
};

const TABLE: &str = include_str!("wire.txt");

/// What the table has and our protos do not, by the text before the colon of a mismatch, and why.
/// For now that is nothing.
const NOT_CARRIED: &[(&str, &str)] = &[];

/// Number and package of the fields that are ours (`protos/cofferdam.proto`): the table has none of
/// them, and no number of the table comes near.
const OWN_FIELD: i32 = 1000;
const OWN_PACKAGE: &str = ".cofferdam.";

/// What there is, and what it is: `message grpc.Device` (by itself), `message grpc.Device 2` (a
/// field, by its number), `service grpc.Health Check` (a method, by its name).
type Entries = BTreeMap<String, String>;

/// The entries of the table.
fn published() -> Entries {
    let (mut entries, mut whole) = (Entries::new(), "");
    for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
        let (key, value) = match line.strip_prefix("  ") {
            None => {
                whole = line;
                (line.to_owned(), String::new())
            }
            Some(part) => {
                let (key, value) = part.split_once(' ').unwrap();
                (format!("{whole} {key}"), value.to_owned())
            }
        };
        assert_eq!(
            entries.insert(key, value),
            None,
            "twice in the table: {line}"
        );
    }
    entries
}

/// The entries of a proto file of ours.
fn carried(file: &FileDescriptorProto) -> Entries {
    let (mut entries, package) = (Entries::new(), file.package());
    for service in &file.service {
        let whole = format!("service {package}.{}", service.name());
        for method in &service.method {
            let [request, reply] = [method.input_type(), method.output_type()]
                .map(|name| shortened(name, package, package));
            let mut value = format!("{request} {reply}");
            if method.client_streaming() || method.server_streaming() {
                value.push_str(" as a stream");
            }
            entries.insert(format!("{whole} {}", method.name()), value);
        }
        entries.insert(whole, String::new());
    }
    for message in &file.message_type {
        add_message(&mut entries, message, package, package);
    }
    for values in &file.enum_type {
        add_enum(&mut entries, values, package);
    }
    entries
}

fn add_message(entries: &mut Entries, message: &DescriptorProto, scope: &str, package: &str) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        if field.number() >= OWN_FIELD {
            assert!(field.type_name().starts_with(OWN_PACKAGE), "{name} {field}");
            continue;
        }
        let value = format!(
            "{} {}",
            field.name(),
            type_of(field, message, &name, package)
        );
        entries.insert(format!("message {name} {}", field.number()), value);
    }
    for nested in &message.nested_type {
        // The entries of a map are its field's.
        if !nested.options.map_entry() {
            add_message(entries, nested, &name, package);
        }
    }
    for values in &message.enum_type {
        add_enum(entries, values, &name);
    }
    entries.insert(format!("message {name}"), String::new());
}

fn add_enum(entries: &mut Entries, values: &EnumDescriptorProto, scope: &str) {
    let whole = format!("enum {scope}.{}", values.name());
    for value in &values.value {
        entries.insert(
            format!("{whole} {}", value.number()),
            value.name().to_owned(),
        );
    }
    entries.insert(whole, String::new());
}

/// The type of a field, as the table writes it.
fn type_of(
    field: &FieldDescriptorProto,
    message: &DescriptorProto,
    scope: &str,
    package: &str,
) -> String {
    let plain = match field.type_() {
        Type::TYPE_MESSAGE | Type::TYPE_ENUM => shortened(field.type_name(), scope, package),
        scalar => format!("{scalar:?}")
            .trim_start_matches("TYPE_")
            .to_ascii_lowercase(),
    };
    let map = message
        .nested_type
        .iter()
        .find(|nested| nested.options.map_entry() && nested.name() == plain);
    if let Some(map) = map {
        let [key, value] = [0, 1].map(|part| type_of(&map.field[part], map, scope, package));
        return format!("map<{key}, {value}>");
    }
    if field.label() == Label::LABEL_REPEATED {
        format!("repeated {plain}")
    } else if field.proto3_optional() {
        format!("optional {plain}")
    } else if field.has_oneof_index() {
        let choice = usize::try_from(field.oneof_index()).unwrap();
        format!("oneof {} {plain}", message.oneof_decl[choice].name())
    } else {
        plain
    }
}

/// A name without the message or the package that it is used in.
fn shortened(name: &str, scope: &str, package: &str) -> String {
    let name = name.trim_start_matches('.');
    let inner = [scope, package]
        .iter()
        .find_map(|outer| name.strip_prefix(outer)?.strip_prefix('.'));
    inner.unwrap_or(name).to_owned()
}

/// One line for each difference.
fn mismatches(published: &Entries, carried: &Entries) -> Vec<String> {
    let mut lines = Vec::new();
    for (key, ours) in carried {
        match published.get(key) {
            None => lines.push(format!("{key}: ours is {ours:?}, the table has none")),
            Some(theirs) if theirs != ours => {
                lines.push(format!("{key}: ours is {ours:?}, the table has {theirs:?}"));
            }
            Some(_) => {}
        }
    }
    let excused = |key: &str| NOT_CARRIED.iter().any(|(name, _)| *name == key);
    for (key, theirs) in published {
        if !carried.contains_key(key) && !excused(key) {
            lines.push(format!(
                "{key}: the table has {theirs:?}, ours has none and NOT_CARRIED does not say why"
            ));
        }
    }
    for (key, reason) in NOT_CARRIED {
        if !published.contains_key(*key) || carried.contains_key(*key) || reason.is_empty() {
            lines.push(format!("{key}: NOT_CARRIED has it for no reason"));
        }
    }
    lines
}

/// Name and type of each field, by message and number.
type Messages = BTreeMap<String, BTreeMap<u32, (String, String)>>;

fn table() -> Messages {
    let mut messages = Messages::new();
    for (key, value) in published() {
        let mut parts = key.split(' ');
        if parts.next() != Some("message") {
            continue;
        }
        let fields = messages.entry(parts.next().unwrap().to_owned());
        let fields = fields.or_default();
        if let Some(number) = parts.next() {
            let (name, kind) = value.split_once(' ').unwrap();
            let field = (name.to_owned(), kind.to_owned());
            fields.insert(number.parse().unwrap(), field);
        }
    }
    messages
}

fn files() -> [&'static FileDescriptor; 5] {
    [
        agent::file_descriptor(),
        csi::file_descriptor(),
        health::file_descriptor(),
        oci::file_descriptor(),
        types::file_descriptor(),
    ]
}

fn descriptors() -> BTreeMap<String, MessageDescriptor> {
    files()
        .iter()
        .flat_map(|file| file.messages())
        .map(|message| (message.full_name().to_owned(), message))
        .collect()
}

/// Wire type and payload of a value that is not its type's default.
fn probe(kind: &RuntimeType) -> (u32, ReflectValueBox, Vec<u8>) {
    match kind {
        RuntimeType::I32 => (0, ReflectValueBox::I32(7), vec![7]),
        RuntimeType::I64 => (0, ReflectValueBox::I64(7), vec![7]),
        RuntimeType::U32 => (0, ReflectValueBox::U32(7), vec![7]),
        RuntimeType::U64 => (0, ReflectValueBox::U64(7), vec![7]),
        RuntimeType::Bool => (0, ReflectValueBox::Bool(true), vec![1]),
        RuntimeType::Enum(kind) => (0, ReflectValueBox::Enum(kind.clone(), 1), vec![1]),
        RuntimeType::String => (2, ReflectValueBox::String("x".into()), vec![1, b'x']),
        RuntimeType::VecU8 => (2, ReflectValueBox::Bytes(vec![9]), vec![1, 9]),
        RuntimeType::Message(kind) => (2, ReflectValueBox::Message(kind.new_instance()), vec![0]),
        other => panic!("the protocol has no {other:?}"),
    }
}

fn varint(mut value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn is_packable(kind: &RuntimeType) -> bool {
    probe(kind).0 == 0
}

#[test]
fn every_field_is_encoded_under_its_published_number() {
    let descriptors = descriptors();
    for (name, fields) in table() {
        let descriptor = descriptors
            .get(&name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        for (number, (field_name, kind)) in fields {
            let field = descriptor
                .field_by_number(number)
                .unwrap_or_else(|| panic!("{name} {number} is missing"));
            assert_eq!(field.name(), field_name, "{name} {number}");
            let mut message = descriptor.new_instance();
            let (wire, payload) = match field.runtime_field_type() {
                RuntimeFieldType::Singular(of) => {
                    let (wire, value, payload) = probe(&of);
                    field.set_singular_field(&mut *message, value);
                    assert!(
                        !kind.starts_with("repeated") && !kind.starts_with("map"),
                        "{name}.{field_name}"
                    );
                    (wire, payload)
                }
                RuntimeFieldType::Repeated(of) => {
                    let (wire, value, payload) = probe(&of);
                    field.mut_repeated(&mut *message).push(value);
                    assert!(kind.starts_with("repeated "), "{name}.{field_name}");
                    match is_packable(&of) {
                        true => (2, [vec![1], payload].concat()),
                        false => (wire, payload),
                    }
                }
                RuntimeFieldType::Map(key, of) => {
                    let (_, key, key_bytes) = probe(&key);
                    let (wire, value, value_bytes) = probe(&of);
                    field.mut_map(&mut *message).insert(key, value);
                    assert!(kind.starts_with("map<"), "{name}.{field_name}");
                    let entry =
                        [vec![0x0a], key_bytes, vec![0x10 | wire as u8], value_bytes].concat();
                    (2, [vec![entry.len() as u8], entry].concat())
                }
            };
            let expected = [varint(number << 3 | wire), payload].concat();
            assert_eq!(
                message.write_to_bytes_dyn().unwrap(),
                expected,
                "{name}.{field_name}"
            );
        }
    }
}

#[test]
fn our_protos_are_those_of_the_table() {
    let carried = files()
        .iter()
        .flat_map(|file| carried(file.proto()))
        .collect();
    let lines = mismatches(&published(), &carried);
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
}

#[test]
fn a_mismatch_is_one_line_that_says_what_is_where() {
    let entries = |list: &[(&str, &str)]| -> Entries {
        let owned = list.iter();
        owned
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    };
    let table = entries(&[("message a.B 1", "x string"), ("message a.B 2", "y bool")]);
    let ours = entries(&[("message a.B 1", "x bytes"), ("message a.B 3", "y bool")]);
    assert_eq!(
        mismatches(&table, &ours),
        [
            "message a.B 1: ours is \"x bytes\", the table has \"x string\"",
            "message a.B 3: ours is \"y bool\", the table has none",
            "message a.B 2: the table has \"y bool\", ours has none and NOT_CARRIED does not say \
             why",
        ]
    );
}

#[test]
fn zero_and_absent_differ_where_the_protocol_says_so() {
    use protobuf::Message;
    let mut rule = oci::LinuxSyscall::new();
    assert!(rule.write_to_bytes().unwrap().is_empty());
    rule.set_errnoret(0);
    assert_eq!(rule.write_to_bytes().unwrap(), [3 << 3, 0]);
}

#[test]
fn a_field_of_a_later_release_is_kept_and_does_no_harm() {
    use protobuf::Message;
    // container_id, and a text that nobody knows under number 99.
    let bytes = [&[1 << 3 | 2, 1, b'x'][..], &varint(99 << 3 | 2), &[1, b'y']].concat();
    let request = agent::StartContainerRequest::parse_from_bytes(&bytes).unwrap();
    assert_eq!(request.container_id, "x");
    assert_eq!(request.write_to_bytes().unwrap(), bytes);
    // A value that no enum of ours has.
    let address = types::IPAddress::parse_from_bytes(&[1 << 3, 7]).unwrap();
    assert_eq!(address.family.value(), 7);
    assert!(address.family.enum_value().is_err());
}
