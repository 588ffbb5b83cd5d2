//! Tests that hold the code against each version of QEMU that was recorded (`recordings/`, whose
//! README says what is in a recording, and `scripts/record-qemu`, which makes one).
//!
//! ```text
//!   sent     runs the code against a peer, and notes all that it can send
//!   peer       a QEMU that answers as the recorded one
//!   life     whether what was recorded is read as it was meant
//!   hold     each command, argument, property and option that was noted, in the recording?
//!   schema     what QEMU says of its commands and events
//!   reading    what types of ours read of replies and events
//! ```
//!
//! A new recording is held by being there. What a version lacks and the code avoids, it avoids
//! here too: what it can do is found out from the recording as from the binary.

mod hold;
mod life;
mod peer;
mod reading;
mod schema;
mod sent;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde::Deserialize;
use serde_json::Value;

use self::peer::Noted;
use self::schema::Schema;
use self::sent::{capabilities, everything};
use crate::qemu::capabilities::{
    BRIDGE, KVM, TCG, VHOST_USER_VSOCK, VHOST_VSOCK, VIRTIO_MEM, types,
};
use crate::qmp::commands::{self, Command, QueryVirtioStatus};

/// The name of our machine among the types, though its options are those of one that was made.
const MACHINE: &str = "q35";

/// What a QEMU said.
#[derive(Clone, Debug, Deserialize)]
struct Recording {
    /// The recording's file.
    #[serde(skip)]
    name: String,
    version: String,
    greeting: Value,
    options: BTreeSet<String>,
    settings: BTreeMap<String, BTreeMap<String, String>>,
    types: BTreeMap<String, Option<BTreeMap<String, String>>>,
    /// Lines of the monitor, in their order.
    lives: BTreeMap<String, Vec<Value>>,
    #[serde(rename = "schema")]
    entities: Vec<Value>,
    #[serde(skip)]
    schema: OnceLock<Schema>,
}

impl Recording {
    /// All there are.
    fn all() -> Vec<Arc<Recording>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings");
        let files = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let mut all: Vec<_> = files
            .filter(|file| {
                file.extension()
                    .is_some_and(|extension| extension == "json")
            })
            .map(|file| {
                let text = std::fs::read_to_string(&file).unwrap();
                let read = serde_json::from_str::<Recording>(&text);
                let mut recording =
                    read.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
                recording.name = file.file_name().unwrap().to_string_lossy().into_owned();
                Arc::new(recording)
            })
            .collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        assert!(
            !all.is_empty(),
            "no recording in vmm/recordings: scripts/record-qemu"
        );
        all
    }

    fn schema(&self) -> &Schema {
        self.schema.get_or_init(|| Schema::of(&self.entities))
    }

    /// This recording with something changed.
    fn with(&self, change: impl FnOnce(&mut Recording)) -> Arc<Recording> {
        let mut changed = self.clone();
        changed.schema = OnceLock::new();
        change(&mut changed);
        Arc::new(changed)
    }
}

/// All that is wrong with a recorded QEMU.
async fn wrong(recording: &Arc<Recording>) -> Vec<String> {
    let sent = match everything(recording).await {
        Ok(sent) => sent,
        Err(error) => return vec![format!("QEMU {}: {error}", recording.version)],
    };
    let can_tell = sent.capabilities.virtio_status();
    let mut wrong = hold::lists(recording, can_tell);
    wrong.extend(hold::commands(recording, &sent.commands));
    for line in &sent.lines {
        wrong.extend(hold::line(recording, line));
    }
    let names: BTreeSet<&str> = sent
        .commands
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    for listed in listed() {
        if !names.contains(listed) && (can_tell || listed != QueryVirtioStatus::NAME) {
            wrong.push(format!(
                "{listed} is in the list of commands and was not sent by the test"
            ));
        }
    }
    wrong.sort();
    wrong.dedup();
    let version = &recording.version;
    wrong
        .into_iter()
        .map(|line| format!("QEMU {version}: {line}"))
        .collect()
}

/// The names of all commands in use.
fn listed() -> Vec<&'static str> {
    struct Names(Vec<&'static str>);
    impl commands::Visit for Names {
        fn command<C: Command>(&mut self, _: Option<&[(&str, &str)]>) {
            self.0.push(C::NAME);
        }
    }
    let mut names = Names(Vec::new());
    commands::each(&mut names);
    names.0
}

#[tokio::test]
async fn every_recorded_qemu_has_all_that_it_is_sent_and_says_all_that_is_read() {
    let mut lines = Vec::new();
    for recording in Recording::all() {
        lines.extend(wrong(&recording).await);
    }
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
}

#[test]
fn what_recorded_qemus_said_is_understood() {
    let mut lines = Vec::new();
    for recording in Recording::all() {
        for (name, life) in &recording.lives {
            let wrong = life::wrong(&recording, life).into_iter();
            lines.extend(wrong.map(|line| format!("{}, {name}: {line}", recording.name)));
        }
    }
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
}

/// Renames `from` wherever it is a name in an entity of the schema.
fn rename(recording: &mut Recording, from: &str, to: &str) {
    let (from, to) = (format!("\"name\":\"{from}\""), format!("\"name\":\"{to}\""));
    for entity in &mut recording.entities {
        let text = entity.to_string().replace(&from, &to);
        *entity = serde_json::from_str(&text).unwrap();
    }
}

/// What makes the tests above worth having: each kind of change in a later version is found, and
/// said in one line.
#[tokio::test]
async fn what_a_later_version_renames_is_one_line_that_names_it() {
    type Change = fn(&mut Recording);
    let property = |typename: &'static str, name: &'static str| {
        move |recording: &mut Recording| {
            let properties = recording.types.get_mut(typename).unwrap().as_mut().unwrap();
            assert!(properties.remove(name).is_some(), "{typename} {name}");
        }
    };
    let schema =
        |name: &'static str| move |recording: &mut Recording| rename(recording, name, "renamed");
    let other: [(Change, &str); 4] = [
        (
            |recording| assert!(recording.options.remove("-no-reboot")),
            "no option -no-reboot",
        ),
        (
            |recording| {
                let memory = recording.settings.get_mut("memory").unwrap();
                memory.remove("maxmem");
            },
            "-m memory: no setting maxmem",
        ),
        (
            |recording| {
                let net = recording.types.get_mut("virtio-net-pci").unwrap();
                net.as_mut().unwrap().insert("mq".into(), "str".into());
            },
            "device_add virtio-net-pci: mq is str, not true",
        ),
        (
            |recording| {
                let text = serde_json::to_string(&recording.entities).unwrap();
                let text = text.replace("guest-panic", "renamed");
                recording.entities = serde_json::from_str(&text).unwrap();
            },
            "event SHUTDOWN: no reason guest-panic",
        ),
    ];
    let recording = Recording::all().remove(0);
    let mut cases = Vec::new();
    for (typename, name, wanted) in [
        (
            "virtio-net-pci",
            "host_mtu",
            "device_add virtio-net-pci: no property host_mtu",
        ),
        (
            "virtio-mem-pci",
            "size",
            "qom-get virtio-mem-pci: no property size",
        ),
        (
            "pcie-root-port",
            "io-reserve",
            "-device pcie-root-port: no property io-reserve",
        ),
        (
            "memory-backend-memfd",
            "share",
            "-object memory-backend-memfd: no property share",
        ),
        (TCG, "tb-size", "-accel tcg-accel: no property tb-size"),
        (
            "max-x86_64-cpu",
            "erms",
            "-cpu max-x86_64-cpu: no property erms",
        ),
    ] {
        cases.push((recording.with(property(typename, name)), wanted));
    }
    for (name, wanted) in [
        ("blockdev-del", "no command blockdev-del"),
        ("fdname", "getfd: has no fdname"),
        ("node-name", "blockdev-del: has no node-name"),
        ("vhostfds", "netdev_add: has no vhostfds"),
        ("discard", "blockdev-add: has no discard"),
        ("aio", "blockdev-add: file has no aio"),
        ("server", "chardev-add: backend data has no server"),
        ("qom-type", "object-add: has no qom-type"),
        ("fdset-id", "add-fd: what it returns has no fdset-id"),
        (
            "qom-path",
            "query-hotpluggable-cpus: what it returns has no qom-path",
        ),
        (
            "DEVICE_UNPLUG_GUEST_ERROR",
            "no event DEVICE_UNPLUG_GUEST_ERROR",
        ),
        ("reason", "event SHUTDOWN: has no reason"),
    ] {
        cases.push((recording.with(schema(name)), wanted));
    }
    for (change, wanted) in other {
        cases.push((recording.with(change), wanted));
    }
    let mut tasks = tokio::task::JoinSet::new();
    for (changed, wanted) in cases {
        let wanted = format!("QEMU {}: {wanted}", recording.version);
        tasks.spawn(async move { (wrong(&changed).await, wanted) });
    }
    for (found, wanted) in tasks.join_all().await {
        assert!(found.contains(&wanted), "{wanted}\n{}", found.join("\n"));
    }
}

#[tokio::test]
async fn a_qemu_that_lacks_a_part_of_every_machine_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let optional = [BRIDGE, KVM, TCG, VHOST_VSOCK, VHOST_USER_VSOCK, VIRTIO_MEM];
    let console = ["virtio-serial-pci", "virtconsole"];
    for recording in Recording::all() {
        let refusal = async |changed: Arc<Recording>| {
            let asked = capabilities(&changed, dir.path(), &Noted::default()).await;
            asked.err().map(|error| error.to_string())
        };
        let line = |what: &str| {
            let (qemu, version) = (dir.path().join("qemu"), &recording.version);
            format!(
                "{} (QEMU {version}) has no {what}: use another",
                qemu.display()
            )
        };
        for typename in types() {
            let lacks = recording.with(|it| drop(it.types.insert(typename.into(), None)));
            let needed = !optional.contains(&typename) && !console.contains(&typename);
            assert_eq!(
                refusal(lacks).await,
                needed.then(|| line(typename)),
                "{typename}"
            );
        }
        let option = recording.with(|it| {
            let q35 = it.types.get_mut(MACHINE).unwrap().as_mut().unwrap();
            q35.remove("memory-backend");
        });
        let wanted = line("option memory-backend of the q35 machine");
        assert_eq!(refusal(option).await, Some(wanted));
    }
}
