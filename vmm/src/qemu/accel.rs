//! Which accelerator runs the guest, and why.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use serde::Deserialize;

use crate::error::{Error, Result};

// linux/kvm.h: _IO(0xAE, 0x00) and _IO(0xAE, 0x01).
const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
const KVM_CREATE_VM: libc::Ioctl = 0xAE01;
const KVM_API_VERSION: i32 = 12;

/// What is wanted, by the words of a configuration: `auto`, `kvm`, `tcg`.
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

/// What is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// KVM, else emulation.
    pub kvm: bool,
    /// One line for the log.
    pub reason: String,
}

impl Accelerator {
    /// Decides, by looking at the host. Takes well under a millisecond.
    ///
    /// # Errors
    /// KVM is insisted on and cannot be had: the line says why.
    pub fn resolve(self) -> Result<Resolved> {
        let kvm = match self {
            Accelerator::Tcg => {
                return Ok(Resolved {
                    kvm: false,
                    reason: "emulation, as configured".into(),
                });
            }
            // An administrator who insists may know better than the flags of the CPU.
            Accelerator::Kvm => try_kvm(),
            Accelerator::Auto => serves_stock_guests().and_then(|()| try_kvm()),
        };
        match kvm {
            Ok(()) => Ok(Resolved {
                kvm: true,
                reason: "KVM".into(),
            }),
            Err(why) if self == Accelerator::Auto => Ok(Resolved {
                kvm: false,
                reason: format!("emulation: {why}"),
            }),
            Err(why) => Err(Error::Unsupported(format!("KVM cannot be used: {why}"))),
        }
    }
}

/// Under some clouds' paravirtual nesting `/dev/kvm` opens and makes virtual machines that print
/// nothing: there the CPU has no virtualization of its own.
fn serves_stock_guests() -> Result<(), String> {
    // The kernel makes the text of each CPU when it is read: one is enough.
    let info = File::open("/proc/cpuinfo").map(BufReader::new);
    if info.is_ok_and(has_virtualization) {
        Ok(())
    } else {
        Err("the CPU shows neither vmx nor svm".into())
    }
}

fn has_virtualization(cpuinfo: impl BufRead) -> bool {
    let mut lines = cpuinfo.lines().map_while(io::Result::ok);
    let flags = lines.find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| {
        flags
            .split_ascii_whitespace()
            .any(|flag| matches!(flag, "vmx" | "svm"))
    })
}

fn try_kvm() -> Result<(), String> {
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm: {error}"))?;
    // SAFETY: both ioctls take an integer and touch no memory of ours.
    let version = Errno::result(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) });
    match version {
        Ok(KVM_API_VERSION) => {}
        Ok(other) => {
            return Err(format!(
                "/dev/kvm has API version {other}, not {KVM_API_VERSION}"
            ));
        }
        Err(errno) => return Err(format!("/dev/kvm is no KVM: {}", errno.desc())),
    }
    // SAFETY: as above.
    let machine = Errno::result(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) });
    let machine =
        machine.map_err(|errno| format!("KVM makes no virtual machine: {}", errno.desc()))?;
    // SAFETY: a new descriptor that nobody else owns; closing it ends the virtual machine.
    drop(unsafe { OwnedFd::from_raw_fd(machine) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_flags_count() {
        let has_virtualization = |info: &str| has_virtualization(info.as_bytes());
        assert!(has_virtualization(
            "model name : x\nflags\t\t: fpu vmx sse\n"
        ));
        assert!(has_virtualization("flags\t\t: fpu svm"));
        assert!(!has_virtualization(
            "flags\t\t: fpu svm_lock sse\nvmx flags : vnmi"
        ));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn every_wish_ends_in_a_reason() {
        assert_eq!(
            Accelerator::Tcg.resolve().unwrap(),
            Resolved {
                kvm: false,
                reason: "emulation, as configured".into()
            }
        );
        let auto = Accelerator::Auto.resolve().unwrap();
        assert!(
            auto.kvm || auto.reason.starts_with("emulation: "),
            "{auto:?}"
        );
        if let Err(error) = Accelerator::Kvm.resolve() {
            assert!(
                error.to_string().starts_with("KVM cannot be used: "),
                "{error}"
            );
        }
    }
}
