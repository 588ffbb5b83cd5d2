//! Makes a recording of a QEMU, which the crate's own tests hold the code against: what the binary
//! says of itself, and all that is said on its monitor in the lives of three machines.
//! `scripts/record-qemu` runs it; recordings/README.md says what is in a recording.
//!
//! What differs from one run to the next is left out, so that two recordings of the same binary are
//! the same.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed recording"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::tap::Netns;
use common::{Lab, SOON, cache_dir, installed};
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, span};
use vmm::parts::{
    VirtioFs, Virtiofsd, VirtiofsdConfig, Vm, VsockDaemon, VsockDaemonConfig, VsockDevice,
};
use vmm::{Accelerator, Block, Device, FsCache, MachineConfig, Net, capabilities};

/// CPUs, by accelerator. Their names are in no list of the crate's: QEMU says which one it is.
const CPUS: [&str; 2] = ["max-x86_64-cpu", "host-x86_64-cpu"];

#[tokio::test]
#[ignore = "makes a recording: scripts/record-qemu"]
async fn record() {
    let variable = |name: &str| PathBuf::from(std::env::var_os(name).expect(name));
    let qemu = variable("COFFERDAM_QEMU");
    tracing::subscriber::set_global_default(Lines).unwrap();
    let mut recording = asked(&qemu);
    recording.insert("options".into(), json!(options(&qemu)));
    let mut lives = Map::new();
    lives.insert("asked to quit".into(), whole_life(&qemu).await);
    for (name, script) in [
        ("guest powers off", "poweroff -f"),
        ("guest panics", "exit 1"),
    ] {
        lives.insert(name.into(), short_life(&qemu, script).await);
    }
    recording.insert("lives".into(), Value::Object(lives));
    std::fs::write(variable("COFFERDAM_RECORDING"), written(&recording)).unwrap();
}

/// What a binary says of itself.
fn asked(qemu: &Path) -> Map<String, Value> {
    let mut child = Command::new(qemu)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
        .args(["-machine", "q35,accel=tcg:kvm", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut monitor = Monitor {
        to: child.stdin.take().unwrap(),
        from: BufReader::new(child.stdout.take().unwrap()),
    };
    let greeting = monitor.hear("its start");
    let ask = |monitor: &mut Monitor, command: &str, arguments| {
        let answer = monitor.ask(command, arguments);
        answer.unwrap_or_else(|error| panic!("{command}: {error}"))
    };
    ask(&mut monitor, "qmp_capabilities", json!({}));
    // Not every version survives the question about a machine's type: this one is there.
    let machine = ask(&mut monitor, "qom-list", json!({"path": "/machine"}));
    let mut machine = kinds(&machine);
    let options = machine.as_object_mut().unwrap();
    options.retain(|_, kind| !text(kind).starts_with("child<"));
    let mut types: Map<String, Value> = capabilities::types()
        .chain(CPUS)
        .map(|typename| (typename.to_owned(), monitor.properties(typename)))
        .collect();
    types.insert("q35".into(), machine);
    let settings: Map<String, Value> =
        items(&ask(&mut monitor, "query-command-line-options", json!({})))
            .map(|option| (text(&option["option"]), kinds(&option["parameters"])))
            .collect();
    let schema = ask(&mut monitor, "query-qmp-schema", json!({}));
    let version = &greeting["QMP"]["version"]["qemu"];
    let version = ["major", "minor", "micro"].map(|part| version[part].to_string());
    // Not every version answers this.
    monitor.say("quit", json!({}));
    child.wait().unwrap();
    Map::from_iter(
        [
            ("version", json!(version.join("."))),
            ("greeting", greeting),
            ("settings", json!(settings)),
            ("types", json!(types)),
            ("schema", schema),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    )
}

/// A monitor on standard input and output.
struct Monitor {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Monitor {
    /// The next line, after `what`.
    fn hear(&mut self, what: &str) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        let read = serde_json::from_str(&line);
        read.unwrap_or_else(|error| panic!("no answer to {what}: {error} in {line:?}"))
    }

    fn say(&mut self, command: &str, arguments: Value) {
        let line = json!({"execute": command, "arguments": arguments});
        // In one piece: QEMU takes a command at its last brace, and after `quit` nothing more.
        self.to.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let what = format!("{command} {arguments}");
        self.say(command, arguments);
        loop {
            let answer = self.hear(&what);
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error.clone());
            }
        }
    }

    /// Properties of a type, or null if there is none of that name.
    fn properties(&mut self, typename: &str) -> Value {
        self.ask("qom-list-properties", json!({"typename": typename}))
            .map_or(Value::Null, |properties| kinds(&properties))
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Names and types of properties; a map of ours is in the order of its keys.
fn kinds(properties: &Value) -> Value {
    let pairs = items(properties).map(|item| (text(&item["name"]), item["type"].clone()));
    Value::Object(pairs.collect())
}

/// The options of the command line, as `-help` lists them: of most of them QMP knows nothing.
fn options(qemu: &Path) -> Vec<String> {
    let help = Command::new(qemu).arg("-help").output().unwrap().stdout;
    let help = String::from_utf8_lossy(&help).into_owned();
    let mut options: Vec<String> = help
        .lines()
        .filter(|line| line.starts_with('-'))
        .flat_map(|line| {
            // "-h or -help     display this help and exit".
            let words: Vec<&str> = line.split_whitespace().take(3).collect();
            match words[..] {
                [first, "or", second] => vec![first.to_owned(), second.to_owned()],
                _ => vec![words[0].to_owned()],
            }
        })
        .collect();
    options.sort();
    options.dedup();
    options
}

/// What was said on the monitors, in its order.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Takes the lines from the crate's log.
struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "vmm::qmp" && *metadata.level() == tracing::Level::TRACE
    }

    fn event(&self, event: &Event<'_>) {
        struct Line;
        impl Visit for Line {
            fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
                SAID.lock().unwrap().push(format!("{value:?}"));
            }
        }
        event.record(&mut Line);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// A machine that has not started.
async fn lab(qemu: &Path, script: &str) -> Lab {
    let mut lab = Lab::with(qemu.into(), script).await;
    let has = |typename| lab.config.capabilities.has(typename);
    let (emulated, grows) = (has("tcg-accel"), has("virtio-mem-pci"));
    // The same on every host, as far as the binary allows. The binary may be a script, which
    // cannot be confined.
    lab.config = MachineConfig {
        accel: match emulated {
            true => Accelerator::Tcg.resolve().unwrap(),
            false => Accelerator::Kvm.resolve().unwrap(),
        },
        confinement: None,
        max_vcpus: 2,
        max_memory_mib: if grows { 512 } else { 256 },
        ..lab.config
    };
    SAID.lock().unwrap().clear();
    lab
}

/// Every kind of device that the binary has, before the guest runs or after, both ways of growing,
/// and back.
async fn whole_life(qemu: &Path) -> Value {
    let script = "mount -t virtiofs share /mnt && cat /mnt/file; cd /sys/devices/system/cpu; \
        while :; do [ -e cpu1 ] && echo 1 >cpu1/online && echo cpu 1; \
        [ -e /sys/block/vda ] && echo disk || echo no disk; \
        [ -e /sys/class/net/eth1 ] && echo second card || echo one card; usleep 20000; done";
    let lab = lab(qemu, script).await;
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), "from host\n").unwrap();
    let (virtiofsd, connection) = Virtiofsd::spawn(&VirtiofsdConfig {
        binary: installed("libexec/cofferdam/virtiofsd"),
        cache_dir: cache_dir(),
        socket: lab.dir.path().join("fs.sock"),
        shared_dir: shared.path().into(),
        cache: FsCache::Auto,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: None,
    })
    .await
    .unwrap();
    let netns = Netns::new();
    let card = |name: &str, queues, last, mtu| {
        let taps = netns.tap(name, queues, &format!("10.0.{last}.1/24"));
        let mac = [2, 0, 0, 0, 0, last];
        let (name, vhost) = (name.into(), Vec::new());
        Device::Net(Net {
            name,
            taps,
            vhost,
            mac,
            mtu,
        })
    };
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();

    let vm = start(&lab).await;
    let daemon = vsock_daemon(&lab).await;
    let mut vsock = None;
    if lab.config.capabilities.has("vhost-user-vsock-pci") {
        let connection = daemon.connect(SOON).await.unwrap();
        let device = Device::Vsock(VsockDevice::User { connection });
        vsock = Some(vm.attach(device).await.unwrap());
    }
    let fs = VirtioFs {
        tag: "share".into(),
        connection,
        queue_size: 1024,
    };
    vm.attach(Device::VirtioFs(fs)).await.unwrap();
    vm.attach(card("tap1", 1, 1, Some(1400))).await.unwrap();
    vm.cont().await.unwrap();
    lab.prints("from host").await;
    let until = Instant::now() + SOON;
    while let Some(vsock) = &vsock
        && vm.driver_ok(&vsock.id).await.unwrap() == Some(false)
    {
        assert!(Instant::now() < until, "no driver of the vsock");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let second = vm.attach(card("tap2", 2, 2, None)).await.unwrap();
    lab.prints("second card").await;
    vm.detach(&second.id, SOON).await.unwrap();
    let disk = Device::Block(Block {
        path: image.path().into(),
        number: None,
        read_only: false,
    });
    let disk = vm.attach(disk).await.unwrap();
    prints_next(&lab, "\ndisk").await;
    vm.detach(&disk.id, SOON).await.unwrap();
    vm.resize_vcpus(2, SOON).await.unwrap();
    lab.prints("cpu 1").await;
    vm.resize_vcpus(1, SOON).await.unwrap();
    let most = lab.config.max_memory_mib;
    assert_eq!(vm.resize_memory(most, SOON).await.unwrap(), most);
    vm.resize_memory(256, SOON).await.unwrap();
    vm.stop(SOON).await.unwrap();
    virtiofsd.stop(SOON).await.unwrap();
    daemon.process.kill_and_wait(SOON).await.unwrap();
    said()
}

async fn vsock_daemon(lab: &Lab) -> VsockDaemon {
    VsockDaemon::spawn(&VsockDaemonConfig {
        binary: installed("libexec/cofferdam/vhost-device-vsock"),
        cache_dir: cache_dir(),
        dir: lab.sockets(),
        name: "vm".into(),
        guest_cid: 3,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: None,
    })
    .await
    .unwrap()
}

async fn start(lab: &Lab) -> Vm {
    let starting = Vm::spawn(&lab.config).await.unwrap();
    starting.connect(SOON).await.unwrap()
}

/// Waits until the guest prints `text` once more.
async fn prints_next(lab: &Lab, text: &str) {
    std::fs::write(lab.dir.path().join("console.log"), "").unwrap();
    lab.prints(text).await;
}

async fn short_life(qemu: &Path, script: &str) -> Value {
    let lab = lab(qemu, script).await;
    let vm = start(&lab).await;
    vm.cont().await.unwrap();
    let died = tokio::time::timeout(SOON, vm.died());
    died.await.expect("the end of the guest");
    said()
}

/// What was said, without what differs from run to run: ids, times, and how often something was
/// asked before it was as wanted.
fn said() -> Value {
    let mut lines: Vec<Value> = Vec::new();
    for line in SAID.lock().unwrap().drain(..) {
        let mut line: Value = serde_json::from_str(&line).unwrap();
        let object = line.as_object_mut().unwrap();
        object.remove("id");
        object.remove("timestamp");
        // Numbers of descriptors, and how far the guest was when QEMU last told its size.
        for (inside, number) in [("return", "fd"), ("data", "size")] {
            if let Some(number) = object
                .get_mut(inside)
                .and_then(|inside| inside.get_mut(number))
            {
                *number = json!(0);
            }
        }
        match (line.get("execute"), line.get("event")) {
            // Asked again: the first answer goes.
            (Some(_), _) => {
                let asked = lines.iter().rposition(|line| line.get("execute").is_some());
                if let Some(asked) = asked.filter(|asked| lines[*asked] == line) {
                    let answer = lines[asked..].iter().position(|line| {
                        line.get("event").is_none() && line.get("execute").is_none()
                    });
                    answer.map(|answer| lines.remove(asked + answer));
                    lines.remove(asked);
                }
            }
            // The same with other numbers.
            (None, Some(_)) => lines.retain(|earlier| {
                earlier["event"] != "MEMORY_DEVICE_SIZE_CHANGE" || earlier["event"] != line["event"]
            }),
            _ => {}
        }
        lines.push(line);
    }
    Value::Array(lines)
}

/// The parts of a recording in their order, each with how deep it is laid out: so that a line is
/// what changes by itself, as a property, an entity of the schema, a line of the monitor.
const PARTS: [(&str, usize); 7] = [
    ("version", 0),
    ("greeting", 0),
    ("options", 1),
    ("settings", 1),
    ("types", 2),
    ("lives", 2),
    ("schema", 1),
];

/// A recording as text.
fn written(recording: &Map<String, Value>) -> String {
    let parts = PARTS
        .map(|(name, depth)| format!("{}: {}", json!(name), laid_out(&recording[name], depth)));
    format!("{{\n{}\n}}\n", parts.join(",\n"))
}

fn laid_out(value: &Value, depth: usize) -> String {
    let (items, [open, close]): (Vec<String>, _) = match value {
        Value::Object(map) if depth > 0 => {
            let item = |(key, value)| format!("{}: {}", json!(key), laid_out(value, depth - 1));
            (map.iter().map(item).collect(), ["{", "}"])
        }
        Value::Array(list) if depth > 0 => {
            let item = |value| laid_out(value, depth - 1);
            (list.iter().map(item).collect(), ["[", "]"])
        }
        other => return other.to_string(),
    };
    format!("{open}\n{}\n{close}", items.join(",\n"))
}
