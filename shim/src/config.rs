//! The configuration file, and what is found where it says nothing. Defaults need no file at all.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Where an administrator's configuration is.
const DEFAULT_PATH: &str = "/etc/cofferdam/cofferdam.toml";

/// Which accelerator runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where it serves a stock guest, else emulation.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// Emulation.
    Tcg,
}

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

/// `cofferdam.toml`; `configs/cofferdam.toml` explains every key.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The QEMU binary: a path, or a name in PATH.
    pub qemu: PathBuf,
    /// The guest kernel (vmlinux with PVH).
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// Added to the kernel command line.
    pub kernel_params: Vec<String>,
    /// virtiofsd: a path, or a name in PATH.
    pub virtiofsd: PathBuf,
    /// vhost-device-vsock: a path, or a name in PATH.
    pub vhost_device_vsock: PathBuf,
    /// Which accelerator runs the guest.
    pub accelerator: Accelerator,
    /// How the guest is reached.
    pub vsock: VsockDevice,
    /// Memory of the virtual machine in MiB, before the container's own limit is added.
    pub memory_mib: u64,
    /// Virtual CPUs of a sandbox without a CPU limit.
    pub vcpus: u32,
    /// How long a guest may take from power-on to an answering agent.
    pub boot_timeout_seconds: u64,
    /// Guest console and agent log to `console.log` in the sandbox's state directory.
    pub debug: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            qemu: "qemu-system-x86_64".into(),
            kernel: asset("share/cofferdam/vmlinux"),
            initramfs: asset("share/cofferdam/initramfs.cpio"),
            kernel_params: Vec::new(),
            virtiofsd: helper("virtiofsd", &["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"]),
            vhost_device_vsock: helper("vhost-device-vsock", &[]),
            accelerator: Accelerator::Auto,
            vsock: VsockDevice::Auto,
            memory_mib: 512,
            vcpus: 1,
            boot_timeout_seconds: 30,
            debug: false,
        }
    }
}

/// A file of this installation: `<prefix>/<relative>` for a shim in `<prefix>/bin`.
fn asset(relative: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program.parent().and_then(Path::parent).unwrap_or(Path::new("/usr/local")).join(relative)
}

/// A helper of this installation, else one that distributions install outside PATH, else whatever PATH has.
fn helper(name: &str, elsewhere: &[&str]) -> PathBuf {
    let ours = asset(&format!("libexec/cofferdam/{name}"));
    std::iter::once(ours).chain(elsewhere.iter().map(PathBuf::from)).find(|path| path.is_file()).unwrap_or(name.into())
}

impl Config {
    /// Reads `path` (from the runtime options), else the administrator's file, else takes the defaults.
    ///
    /// # Errors
    /// File, line and what was expected; a file that the options name and that is not there.
    pub fn load(path: Option<&Path>) -> Result<Config> {
        let path = match path {
            Some(path) => path,
            None if Path::new(DEFAULT_PATH).exists() => Path::new(DEFAULT_PATH),
            None => return Ok(Config::default()),
        };
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::invalid(format!("cannot read configuration {}: {error}", path.display())))?;
        Config::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Config> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            let message = error.message().replace('\n', " ");
            Error::invalid(format!("configuration {} line {line}: {message}", path.display()))
        })?;
        let bad = |key: &str, why: &str| Err(Error::invalid(format!("configuration {}: {key} {why}", path.display())));
        if config.memory_mib < 64 {
            return bad("memory_mib", "is in MiB and must be 64 or more");
        }
        if !(1..=240).contains(&config.vcpus) {
            return bad("vcpus", "must be between 1 and 240");
        }
        if config.boot_timeout_seconds == 0 {
            return bad("boot_timeout_seconds", "must be 1 or more");
        }
        Ok(config)
    }

    /// How long a guest may take from power-on to an answering agent.
    pub fn boot_deadline(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_seconds)
    }
}

/// The file behind a configured program: a path as it is, a name looked up in PATH.
///
/// # Errors
/// One line with the configuration key to set.
pub fn find_program(program: &Path, key: &str) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = if program.components().count() > 1 {
        vec![program.to_owned()]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|dir| dir.join(program)).collect()
    };
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        Error::invalid(format!("{} is not there: install it or set {key} in {DEFAULT_PATH}", program.display()))
    })
}

/// A guest file, checked before anything is started for it.
///
/// # Errors
/// One line with the configuration key to set.
pub fn find_file(path: &Path, key: &str) -> Result<()> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Error::invalid(format!("guest {key} {}: {error}; set {key} in {DEFAULT_PATH}", path.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("/etc/c.toml"))
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn every_key_of_the_shipped_file_is_known() {
        let text = std::fs::read_to_string("../configs/cofferdam.toml").unwrap();
        assert_eq!(parse(&text).unwrap(), Config::default(), "as shipped, the file changes nothing");
        let uncommented: String =
            text.lines().map(|line| line.strip_prefix("#=").unwrap_or(line)).collect::<Vec<_>>().join("\n");
        parse(&uncommented).unwrap();
    }

    #[test]
    fn a_mistake_names_file_line_and_what_was_expected() {
        for (text, part) in [
            ("\nmemory = 3\n", "/etc/c.toml line 2: unknown field `memory`"),
            ("vcpus = \"two\"", "/etc/c.toml line 1: invalid type"),
            ("\n\naccelerator = \"xen\"", "/etc/c.toml line 3: unknown variant `xen`, expected one of"),
            ("memory_mib = 3", "memory_mib is in MiB"),
            ("vcpus = 0", "vcpus must be"),
            ("boot_timeout_seconds = 0", "boot_timeout_seconds must be"),
            ("qemu = [", "/etc/c.toml line 1"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(part) && !message.contains('\n'), "{text:?}: {message}");
        }
    }

    #[test]
    fn a_program_that_is_missing_names_its_key() {
        let message = find_program(Path::new("/no/qemu"), "qemu").unwrap_err().to_string();
        assert!(message.contains("/no/qemu") && message.contains("set qemu"), "{message}");
        assert!(find_program(Path::new("sh"), "qemu").is_ok());
    }
}
