//! What a QEMU binary can do. It is asked once, over QMP, and the answer is kept in the cache:
//! asking takes about 0.1 s, and no start of a sandbox but the first one pays that.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sys::point::{Point, reach};

use super::args::{Arguments, Properties};
use crate::cache::FileKey;
use crate::deadlines::{CAPABILITIES, CAPABILITIES_LAST_WORDS, CAPABILITIES_QUIT};
use crate::error::{Doing, Error, Result};
use crate::process::{Child, Spawn, stdout_of};
use crate::qmp::Qmp;
use crate::qmp::commands::{
    Command, QomList, QomListProperties, QueryCommandLineOptions, QueryCommands, QueryVirtioStatus,
    Quit,
};

/// A firmware that does no more than our guests need, by the name that QEMU finds it by.
pub(super) const QBOOT: &str = "qboot.rom";

/// What this runtime wants to know of a QEMU binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `7.2.22`.
    pub version: String,
    /// Which of [`types`] are there.
    pub types: BTreeSet<String>,
    /// `-sandbox` (a seccomp filter) is there.
    pub sandbox: bool,
    /// `x-query-virtio-status` is there.
    pub(crate) virtio_status: bool,
    /// Where it looks for firmware and the like, whether those directories are there or not. Their
    /// contents are other packages' files, which come and go without the binary.
    pub(super) data_dirs: Vec<PathBuf>,
    /// Settings of the q35 machine.
    pub(crate) machine_options: BTreeSet<String>,
}

impl Capabilities {
    /// One that has everything, for tests.
    #[cfg(test)]
    pub(crate) fn full() -> Capabilities {
        Capabilities {
            version: "7.2.22".into(),
            types: types().map(String::from).collect(),
            sandbox: true,
            data_dirs: Vec::new(),
            virtio_status: true,
            machine_options: NEEDED_OPTIONS
                .into_iter()
                .chain(["usb", "sata"])
                .map(String::from)
                .collect(),
        }
    }

    /// Whether one of [`types`] is there.
    pub fn has(&self, typename: &str) -> bool {
        self.types.contains(typename)
    }

    /// The error of a binary that lacks `what`; `instead` is what to do but take another one.
    pub(crate) fn lack(&self, qemu: &Path, what: &str, instead: Option<&str>) -> Error {
        let instead = instead.map(|instead| format!(", or set {instead}"));
        Error::Unsupported(format!(
            "{} (QEMU {}) has no {what}: use another{}",
            qemu.display(),
            self.version,
            instead.unwrap_or_default()
        ))
    }

    /// Directories of firmware and the like, as far as they are there.
    pub(crate) fn data_dirs(&self) -> impl Iterator<Item = &PathBuf> {
        self.data_dirs.iter().filter(|dir| dir.is_dir())
    }

    /// Whether the small firmware qboot is there: looked for at every start, because it may be
    /// installed or removed while the binary stays the same.
    pub(crate) fn has_qboot(&self) -> bool {
        self.data_dirs.iter().any(|dir| dir.join(QBOOT).is_file())
    }

    /// Whether it can tell if a guest's driver is up. From 10.2 on the question ends QEMU, for
    /// every device (seen with 11.1; 10.0 is fine, and 10.2 brought the sets of 128 features that
    /// the failed assertion is about).
    pub fn virtio_status(&self) -> bool {
        let mut parts = self
            .version
            .split('.')
            .map(|part| part.parse::<u32>().unwrap_or_default());
        self.virtio_status && (parts.next(), parts.next()) < (Some(10), Some(2))
    }

    /// Whether a machine can have [`crate::MachineConfig::bridges`].
    pub fn bridges(&self) -> bool {
        self.has(BRIDGE)
    }
}

/// A bus with many slots.
pub(crate) const BRIDGE: &str = "pcie-pci-bridge";

/// What every machine is made of or may be given later: without one of these a binary is of no use.
const NEEDED: [&str; 8] = [
    "memory-backend-memfd",
    "pcie-root-port",
    "rng-builtin",
    "vhost-user-fs-pci",
    "virtio-balloon-pci",
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-rng-pci",
];

/// What some machines are made of.
const WANTED: [&str; 8] = [
    BRIDGE,
    KVM,
    TCG,
    VHOST_VSOCK,
    VHOST_USER_VSOCK,
    VIRTIO_MEM,
    VIRTIO_SERIAL,
    VIRTCONSOLE,
];

/// Every type of QEMU's that the command line or a command names. CPUs and the machine itself are
/// not among them: their names differ with version and accelerator.
pub fn types() -> impl Iterator<Item = &'static str> {
    NEEDED.into_iter().chain(WANTED)
}

/// The accelerators, as far as they are compiled in; whether the host has KVM is another question.
pub(crate) const KVM: &str = "kvm-accel";
pub(crate) const TCG: &str = "tcg-accel";

/// The ways to the guest.
pub(crate) const VHOST_VSOCK: &str = "vhost-vsock-pci";
pub(crate) const VHOST_USER_VSOCK: &str = "vhost-user-vsock-pci";

/// What a machine that may grow has.
pub(crate) const VIRTIO_MEM: &str = "virtio-mem-pci";

/// What a machine with a console has.
pub(crate) const VIRTIO_SERIAL: &str = "virtio-serial-pci";
pub(crate) const VIRTCONSOLE: &str = "virtconsole";

/// Settings of the q35 machine that every command line has.
pub(super) const NEEDED_OPTIONS: [&str; 2] = ["memory-backend", "dump-guest-core"];

/// Takes the answer from the cache, or asks the binary and keeps the answer.
///
/// # Errors
/// The binary is missing, no QEMU, hangs, or lacks what every sandbox needs; one line that names
/// it.
pub async fn query(qemu: &Path, cache_dir: &Path) -> Result<Capabilities> {
    let key = FileKey::of(qemu)?;
    // Another version of this program may have asked for less.
    let asked: Vec<String> = types().map(String::from).collect();
    if let Some((before, known)) = key.load::<(Vec<String>, _)>(cache_dir, "qemu")
        && before == asked
    {
        return Ok(known);
    }
    let found = match tokio::time::timeout(CAPABILITIES, ask(qemu)).await {
        Ok(found) => found?,
        Err(_) => {
            let doing = format!("{} to say what it can do (is it QEMU?)", qemu.display());
            return Err(Error::Deadline {
                doing,
                timeout: CAPABILITIES,
            });
        }
    };
    key.store(cache_dir, "qemu", &(asked, &found));
    Ok(found)
}

async fn ask(qemu: &Path) -> Result<Capabilities> {
    let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
    let arguments = arguments(theirs.as_raw_fd());
    let child = Child::spawn(Spawn {
        fds: vec![OwnedFd::from(theirs)],
        ..Spawn::new(qemu, arguments)
    })?;
    reach(Point::CapabilitiesAsked).doing(|| format!("ask {}", qemu.display()))?;
    match interview(qemu, ours).await {
        // One that ended says more by its status and its last words than by the end of its monitor.
        Err(Error::Closed { reason }) => {
            let closed = Error::Closed {
                reason: format!("{reason} ({})", qemu.display()),
            };
            Err(child.explain(closed, CAPABILITIES_LAST_WORDS).await)
        }
        told => told,
    }
}

/// The command line of a binary that is only asked. It makes a machine, whose options are then
/// looked at: QEMU 9.2 does not survive the same question about the type of a machine.
pub(crate) fn arguments(socket: RawFd) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    for flag in ["-nodefaults", "-no-user-config", "-nographic", "-S"] {
        arguments.flag(flag);
    }
    arguments.plain("-display", "none");
    arguments.list("-machine", Properties::new("q35").with("accel", "tcg:kvm"));
    monitor(&mut arguments, socket);
    arguments.into_vec()
}

pub(crate) async fn interview(qemu: &Path, monitor: UnixStream) -> Result<Capabilities> {
    let (qmp, version) = Qmp::open(monitor, CAPABILITIES).await?;
    let mut found = Capabilities {
        version,
        types: BTreeSet::new(),
        sandbox: false,
        virtio_status: false,
        data_dirs: Vec::new(),
        machine_options: BTreeSet::new(),
    };
    for typename in types() {
        if has(&qmp, typename).await? {
            found.types.insert(typename.into());
        }
    }
    if let Some(missing) = NEEDED.iter().find(|needed| !found.has(needed)) {
        return Err(found.lack(qemu, missing, None));
    }
    let path = "/machine".into();
    let options = qmp.execute(&QomList { path }).await?;
    found.machine_options = options.into_iter().map(|item| item.name).collect();
    if let Some(missing) = NEEDED_OPTIONS
        .iter()
        .find(|needed| !found.machine_options.contains(**needed))
    {
        return Err(found.lack(qemu, &format!("option {missing} of the q35 machine"), None));
    }
    let options = qmp.execute(&QueryCommandLineOptions {}).await?;
    found.sandbox = options.iter().any(|option| option.option == "sandbox");
    let commands = qmp.execute(&QueryCommands {}).await?;
    found.virtio_status = commands
        .iter()
        .any(|command| command.name == QueryVirtioStatus::NAME);
    let data_dirs = stdout_of(qemu, &["-L", "help"], CAPABILITIES).await?;
    found.data_dirs = data_dirs
        .lines()
        .map(plain)
        .filter(|dir| dir.is_absolute())
        .collect();
    // The answers are here; how it ends does not matter, and it dies with its handle.
    let _ = qmp.execute_within(&Quit {}, CAPABILITIES_QUIT).await;
    Ok(found)
}

/// `/usr/bin/../share/qemu`, as a QEMU says that can be moved, without its detour.
fn plain(dir: &str) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in Path::new(dir).components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

/// Whether there is a type of this name. To list all of them would load every module of QEMU, which
/// takes longer than everything else together.
async fn has(qmp: &Qmp, typename: &str) -> Result<bool> {
    match qmp
        .execute(&QomListProperties {
            typename: typename.into(),
        })
        .await
    {
        Ok(_) => Ok(true),
        Err(Error::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A monitor on an inherited, connected socket: its end of file is QEMU's death, and no path is
/// left behind.
pub(super) fn monitor(arguments: &mut Arguments, socket: RawFd) {
    arguments.list(
        "-chardev",
        Properties::new("socket")
            .with("id", "qmp")
            .with("fd", socket.to_string()),
    );
    arguments.list(
        "-mon",
        Properties::pairs()
            .with("chardev", "qmp")
            .with("mode", "control"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firmware_that_comes_or_goes_is_noticed_though_qemu_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let later = dir.path().join("qboot");
        let qemu = Capabilities {
            data_dirs: vec![dir.path().into(), later.clone()],
            ..Capabilities::full()
        };
        let dirs = || qemu.data_dirs().count();
        assert_eq!((qemu.has_qboot(), dirs()), (false, 1));
        std::fs::create_dir(&later).unwrap();
        std::fs::write(later.join(QBOOT), "firmware").unwrap();
        assert_eq!((qemu.has_qboot(), dirs()), (true, 2));
        std::fs::remove_dir_all(&later).unwrap();
        assert_eq!((qemu.has_qboot(), dirs()), (false, 1));
    }

    #[test]
    fn a_question_that_ends_qemu_is_not_asked() {
        for (version, can_tell) in [
            ("7.2.22", true),
            ("10.0.13", true),
            ("10.2.0", false),
            ("11.1.2", false),
        ] {
            let qemu = Capabilities {
                version: version.into(),
                ..Capabilities::full()
            };
            assert_eq!(qemu.virtio_status(), can_tell, "{version}");
        }
    }
}
