//! The wire, field by field: every message is encoded and its bytes are compared with the published
//! table, so that a stock agent and a stock client understand us.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of a test fail by panicking, as the test does"
)]

use std::collections::BTreeMap;

use guest_protocol::protocols::{agent, csi, health, oci, types};
use protobuf::reflect::{
    FileDescriptor, MessageDescriptor, ReflectValueBox, RuntimeFieldType, RuntimeType,
};

const TABLE: &str = include_str!("wire.txt");

/// Name and type of each field, by message and number.
type Messages = BTreeMap<String, BTreeMap<u32, (String, String)>>;

fn table() -> Messages {
    let mut messages = Messages::new();
    let mut name = "";
    for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
        match line.strip_prefix("  ") {
            None => {
                name = line;
                messages.entry(name.to_owned()).or_default();
            }
            Some(field) => {
                let mut parts = field.splitn(3, ' ');
                let number = parts.next().unwrap().parse().unwrap();
                let field = (
                    parts.next().unwrap().to_owned(),
                    parts.next().unwrap().to_owned(),
                );
                messages.get_mut(name).unwrap().insert(number, field);
            }
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
        assert_eq!(
            descriptor.fields().count(),
            fields.len(),
            "{name} has other fields than the table"
        );
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
fn there_is_no_message_that_the_table_does_not_know() {
    let table = table();
    for name in descriptors().keys() {
        assert!(table.contains_key(name), "{name} is not in the table");
    }
}

#[test]
fn services_and_methods_have_their_published_names() {
    let services: BTreeMap<String, usize> = files()
        .iter()
        .flat_map(|file| {
            file.services()
                .map(|service| (service.proto().name().to_owned(), service.methods().count()))
        })
        .collect();
    assert_eq!(
        services,
        BTreeMap::from([("AgentService".to_owned(), 42), ("Health".to_owned(), 2)])
    );
    assert_eq!(agent::file_descriptor().proto().package(), "grpc");
    assert_eq!(types::file_descriptor().proto().package(), "types");
}

#[test]
fn zero_and_absent_differ_where_the_protocol_says_so() {
    use protobuf::Message;
    let mut rule = oci::LinuxSyscall::new();
    assert!(rule.write_to_bytes().unwrap().is_empty());
    rule.set_errnoret(0);
    assert_eq!(rule.write_to_bytes().unwrap(), [3 << 3, 0]);
}
