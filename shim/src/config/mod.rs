//! The configuration: its keys, their defaults and what they accept. Defaults need no file at all.
//!
//! Later sources win key by key: the defaults, the file, its drop-ins, the runtime options in
//! containerd's own configuration, and the annotations that those before them allow.
//!
//! ```text
//! defaults ─▶ config.toml ─▶ config.toml.d/*.toml ─▶ runtime options ─▶ annotations ─▶ Config
//!             └────────── layers: one table, unknown keys refused ────┘  └ allowed ones only
//! ```
//!
//! The first four are the operator's and are trusted. Annotations are a tenant's: each key that
//! they may set is allowed by name, and no file or program is named by one. A value that is wrong is
//! refused with its key, its file and its line, before anything is made; it never falls back to a
//! default. The configuration of a sandbox is read once, with the request that begins it: a file
//! that changes later is for later sandboxes.

mod annotations;
mod layers;
mod programs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use launcher::UidRange;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::Value;
use vmm::Accelerator;

use crate::error::Result;
use annotations::SETTABLE;
use layers::Layers;

pub use programs::{find_file, find_program};

/// A range that systemd, distributions and container tools leave alone (systemd's docs/UIDS-GIDS).
const FIRST_UID: u32 = 1_900_000_000;
const UIDS: u32 = 65_536;

/// Where an administrator's configuration is.
const DEFAULT_PATH: &str = "/etc/cofferdam/cofferdam.toml";

/// How the guest is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VsockDevice {
    /// The host kernel's device where it opens, else the user space one.
    #[default]
    Auto,
    /// The host kernel's (`/dev/vhost-vsock`).
    Vhost,
    /// vhost-device-vsock.
    VhostUser,
}

/// What keeps a QEMU or helper that was taken over from the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConfinementLevel {
    /// All layers, or the sandbox does not start.
    #[default]
    Full,
    /// The file server of volumes is in the host's user namespace.
    NoUserNamespace,
    /// No filter of system calls.
    NoSeccomp,
    /// None: everything runs as root, and sees the host's files.
    None,
}

impl ConfinementLevel {
    /// Whether system calls are filtered.
    pub fn has_seccomp(self) -> bool {
        matches!(
            self,
            ConfinementLevel::Full | ConfinementLevel::NoUserNamespace
        )
    }
}

/// What becomes of a pod whose network namespace has rules of a packet filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetnsRules {
    /// The guest's kernel gets them; with one that it cannot have the pod does not start.
    #[default]
    Carry,
    /// It does not start.
    Refuse,
    /// It starts, and they do not bind it.
    Ignore,
}

/// What becomes of a pod that asks for the host's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostNetwork {
    /// It does not start.
    #[default]
    Refuse,
    /// Its connections are the host's own, made by pasta of passt.
    Passt,
}

/// `cofferdam.toml`; `configs/cofferdam.toml` explains every key.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The QEMU binary: a path, or a name in PATH.
    #[serde(deserialize_with = "program")]
    pub qemu: PathBuf,
    /// The guest kernel (vmlinux with PVH).
    #[serde(deserialize_with = "file")]
    pub kernel: PathBuf,
    #[serde(deserialize_with = "file")]
    pub initramfs: PathBuf,
    /// Added to the kernel command line.
    #[serde(deserialize_with = "kernel_params")]
    pub kernel_params: Vec<String>,
    /// virtiofsd: a path, or a name in PATH.
    #[serde(deserialize_with = "program")]
    pub virtiofsd: PathBuf,
    /// vhost-device-vsock: a path, or a name in PATH.
    #[serde(deserialize_with = "program")]
    pub vhost_device_vsock: PathBuf,
    /// Which accelerator runs the guest.
    pub accelerator: Accelerator,
    /// How the guest is reached.
    pub vsock: VsockDevice,
    /// How QEMU and the helpers are confined.
    pub confinement: ConfinementLevel,
    /// First and last of the user ids (and group ids) that sandboxes run as.
    #[serde(deserialize_with = "uid_range")]
    pub uid_range: UidRange,
    /// Whether a pod may have rules in its network namespace that do not bind it.
    pub netns_rules: NetnsRules,
    /// Whether a pod may have the host's network.
    pub host_network: HostNetwork,
    /// pasta: a path, or a name in PATH.
    #[serde(deserialize_with = "program")]
    pub pasta: PathBuf,
    /// Memory in MiB of a machine with a container that has no limit; limits are added to it.
    #[serde(deserialize_with = "whole::<64, 16_777_216, _, _>")]
    pub memory_mib: u64,
    /// What a machine with such a container grows to, in percent of the host's memory.
    #[serde(deserialize_with = "whole::<0, 100, _, _>")]
    pub max_memory_percent: u64,
    /// Virtual CPUs of a sandbox, or more by its containers' limits. Unset: as the limits say, and
    /// with a container that has none [`Self::vcpus_without_limit`].
    #[serde(deserialize_with = "vcpus")]
    pub vcpus: Option<u32>,
    /// No key: what the host gives a sandbox with a container that has no CPU limit.
    #[serde(skip)]
    pub vcpus_without_limit: u32,
    /// What containers write to their root file systems stays in the guest's memory.
    pub root_in_memory: bool,
    /// How long a guest may take from power-on to an answering agent.
    #[serde(deserialize_with = "whole::<1, 3600, _, _>")]
    pub boot_timeout_seconds: u64,
    /// How long a container may take to end after a SIGKILL, before its virtual machine is ended.
    #[serde(deserialize_with = "whole::<1, 3600, _, _>")]
    pub kill_timeout_seconds: u64,
    /// Guest console and agent log to `console.log` in the sandbox's state directory.
    pub debug: bool,
    /// Keys that annotations may set, see [`Config::annotated`].
    #[serde(deserialize_with = "settable")]
    pub enable_annotations: Vec<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            qemu: "qemu-system-x86_64".into(),
            kernel: programs::asset("share/cofferdam/vmlinux"),
            initramfs: programs::asset("share/cofferdam/initramfs.cpio"),
            kernel_params: Vec::new(),
            virtiofsd: programs::helper(
                "virtiofsd",
                &["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"],
            ),
            vhost_device_vsock: programs::helper("vhost-device-vsock", &[]),
            accelerator: Accelerator::Auto,
            vsock: VsockDevice::Auto,
            confinement: ConfinementLevel::Full,
            netns_rules: NetnsRules::Carry,
            host_network: HostNetwork::Refuse,
            pasta: "pasta".into(),
            uid_range: UidRange {
                first: FIRST_UID,
                count: UIDS,
            },
            memory_mib: 512,
            max_memory_percent: 50,
            vcpus: None,
            vcpus_without_limit: 1,
            root_in_memory: false,
            boot_timeout_seconds: 30,
            kill_timeout_seconds: 10,
            debug: false,
            enable_annotations: Vec::new(),
        }
    }
}

impl Config {
    /// What a sandbox is to be like. `file` is the ConfigPath of the runtime options and has to be
    /// there; without it the administrator's file is read if there is one. `options` is the rest of
    /// the runtime options, as TOML.
    ///
    /// # Errors
    /// One line: file, line, key and what was expected.
    pub fn load(file: Option<&Path>, options: &[u8]) -> Result<Config> {
        let mut layers = Layers::default();
        layers.file(file.unwrap_or(Path::new(DEFAULT_PATH)), file.is_some())?;
        layers.runtime_options(options)?;
        layers.config()
    }

    /// How long a guest may take from power-on to an answering agent.
    pub fn boot_deadline(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_seconds)
    }

    /// How long a container may take to end after a SIGKILL.
    pub fn kill_timeout(&self) -> Duration {
        Duration::from_secs(self.kill_timeout_seconds)
    }
}

/// A whole number from `MIN` to `MAX`.
fn whole<'de, const MIN: i64, const MAX: i64, T: TryFrom<i64>, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<T, D::Error> {
    let value = Value::deserialize(from)?;
    let number = value
        .as_integer()
        .filter(|number| (MIN..=MAX).contains(number));
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| {
            D::Error::custom(format!(
                "must be a whole number from {MIN} to {MAX}, not {value}"
            ))
        })
}

fn vcpus<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<u32>, D::Error> {
    whole::<1, 240, u32, D>(from).map(Some)
}

/// `[first, last]`; never root or an id that means none.
fn uid_range<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<UidRange, D::Error> {
    let value = Value::deserialize(from)?;
    let ends = value
        .as_array()
        .map(Vec::as_slice)
        .and_then(|ends| match ends {
            [first, last] => Some((first.as_integer()?, last.as_integer()?)),
            _ => None,
        });
    let range =
        ends.filter(|(first, last)| *first >= 1 && last >= first && *last < i64::from(u32::MAX));
    let range = range.and_then(|(first, last)| {
        Some((
            u32::try_from(first).ok()?,
            u32::try_from(last - first + 1).ok()?,
        ))
    });
    range
        .map(|(first, count)| UidRange { first, count })
        .ok_or_else(|| {
            D::Error::custom(format!(
                "must be two user ids such as [{FIRST_UID}, {}], not {value}",
                FIRST_UID + UIDS - 1
            ))
        })
}

/// A program: an absolute path, or a name to look up in PATH. The shim's working directory is a
/// container's bundle, where nothing must be looked for.
fn program<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<PathBuf, D::Error> {
    let value = Value::deserialize(from)?;
    let text = value
        .as_str()
        .filter(|text| text.starts_with('/') || (!text.is_empty() && !text.contains('/')));
    path(text).ok_or_else(|| {
        D::Error::custom(format!(
            "must be an absolute path or a name in PATH, not {value}"
        ))
    })
}

fn file<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<PathBuf, D::Error> {
    let value = Value::deserialize(from)?;
    let text = value.as_str().filter(|text| text.starts_with('/'));
    path(text).ok_or_else(|| D::Error::custom(format!("must be an absolute path, not {value}")))
}

fn path(text: Option<&str>) -> Option<PathBuf> {
    text.filter(|text| !text.contains('\0')).map(PathBuf::from)
}

fn kernel_params<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<String>, D::Error> {
    let value = Value::deserialize(from)?;
    let printable =
        |params: &Vec<String>| !params.iter().any(|param| param.contains(char::is_control));
    strings(&value).filter(printable).ok_or_else(|| {
        D::Error::custom(format!(
            "must be a list of words such as [\"quiet\"], not {value}"
        ))
    })
}

fn settable<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<String>, D::Error> {
    let value = Value::deserialize(from)?;
    let Some(keys) = strings(&value) else {
        return Err(D::Error::custom(format!(
            "must be a list of keys such as [\"memory_mib\"], not {value}"
        )));
    };
    match keys
        .iter()
        .find(|key| !SETTABLE.iter().any(|(name, _)| name == key))
    {
        Some(key) => Err(D::Error::custom(format!(
            "cannot have {key:?}: annotations can set {}, nothing else, and never programs or \
             files of the host",
            annotations::names()
        ))),
        None => Ok(keys),
    }
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value
        .as_array()?
        .iter()
        .map(|item| item.as_str().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests;
