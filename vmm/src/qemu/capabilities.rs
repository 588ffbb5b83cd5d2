//! What a QEMU binary can do. It is asked once, over QMP and without a machine, and the answer is
//! kept in the cache: asking takes about 0.1 s, and no start of a sandbox but the first one pays
//! that.

use std::collections::BTreeSet;
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
    QomListProperties, QueryCommandLineOptions, QueryCommands, QueryMachines, Quit,
};

/// A firmware that does no more than our guests need, by the name that QEMU finds it by.
pub(super) const QBOOT: &str = "qboot.rom";

/// What this runtime wants to know of a QEMU binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `7.2.22`.
    pub version: String,
    /// Compiled with KVM; whether the host has it is another question.
    pub kvm: bool,
    /// Compiled with emulation.
    pub tcg: bool,
    /// `vhost-vsock-pci` is there.
    pub vhost_vsock: bool,
    /// `vhost-user-vsock-pci` is there.
    pub vhost_user_vsock: bool,
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
            kvm: true,
            tcg: true,
            vhost_vsock: true,
            vhost_user_vsock: true,
            sandbox: true,
            data_dirs: Vec::new(),
            virtio_status: true,
            machine_options: ["usb", "sata"].map(String::from).into(),
        }
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
}

/// What our machine is made of: without one of these a binary is of no use.
const NEEDED: [&str; 6] = [
    "pcie-root-port",
    "virtio-rng-pci",
    "virtio-balloon-pci",
    "virtio-blk-pci",
    "vhost-user-fs-pci",
    "memory-backend-memfd",
];

/// Takes the answer from the cache, or asks the binary and keeps the answer.
///
/// # Errors
/// The binary is missing, no QEMU, hangs, or lacks what every sandbox needs; one line that names
/// it.
pub async fn query(qemu: &Path, cache_dir: &Path) -> Result<Capabilities> {
    let key = FileKey::of(qemu)?;
    if let Some(known) = key.load(cache_dir, "qemu") {
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
    key.store(cache_dir, "qemu", &found);
    Ok(found)
}

async fn ask(qemu: &Path) -> Result<Capabilities> {
    let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
    let mut arguments = Arguments::default();
    for flag in ["-nodefaults", "-no-user-config", "-nographic"] {
        arguments.flag(flag);
    }
    arguments.plain("-display", "none");
    arguments.list("-machine", Properties::new("none").with("accel", "tcg:kvm"));
    monitor(&mut arguments, theirs.as_raw_fd());
    let child = Child::spawn(Spawn {
        fds: vec![OwnedFd::from(theirs)],
        ..Spawn::new(qemu, arguments.into_vec())
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

async fn interview(qemu: &Path, monitor: UnixStream) -> Result<Capabilities> {
    let (qmp, version) = Qmp::open(monitor, CAPABILITIES).await?;
    let unfit = |what: &str| {
        Err(Error::Unsupported(format!(
            "{} (QEMU {version}) has no {what}",
            qemu.display()
        )))
    };
    for needed in NEEDED {
        if !has(&qmp, needed).await? {
            return unfit(needed);
        }
    }
    let machines = qmp.execute(&QueryMachines {}).await?;
    let Some(q35) = machines
        .iter()
        .find(|machine| machine.name == "q35" || machine.alias.as_deref() == Some("q35"))
    else {
        return unfit("q35 machine; use the full qemu-system-x86_64");
    };
    let typename = format!("{}-machine", q35.name);
    let machine_options = qmp
        .execute(&QomListProperties { typename })
        .await?
        .into_iter()
        .map(|item| item.name)
        .collect();
    let commands = qmp.execute(&QueryCommands {}).await?;
    let options = qmp.execute(&QueryCommandLineOptions {}).await?;
    let data_dirs = stdout_of(qemu, &["-L", "help"], CAPABILITIES).await?;
    let found = Capabilities {
        kvm: has(&qmp, "kvm-accel").await?,
        tcg: has(&qmp, "tcg-accel").await?,
        vhost_vsock: has(&qmp, "vhost-vsock-pci").await?,
        vhost_user_vsock: has(&qmp, "vhost-user-vsock-pci").await?,
        sandbox: options.iter().any(|option| option.option == "sandbox"),
        virtio_status: commands
            .iter()
            .any(|command| command.name == "x-query-virtio-status"),
        data_dirs: data_dirs
            .lines()
            .map(plain)
            .filter(|dir| dir.is_absolute())
            .collect(),
        machine_options,
        version,
    };
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
