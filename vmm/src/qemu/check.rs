//! Whether a machine can be: sizes that fit each other, and a binary that has all that it takes.
//! Looked at before anything is started.

use super::capabilities::{KVM, TCG, VIRTCONSOLE, VIRTIO_MEM, VIRTIO_SERIAL};
use super::machine::{FIRST_PORT_SLOT, LAST_PORT_SLOT, MachineConfig};
use crate::error::{Error, Result};

/// What x86 firmware and kernels number without further ado.
const MOST_VCPUS: u32 = 240;

/// Whether it can be.
///
/// # Errors
/// A size that does not fit, or what the binary lacks, and what to do.
pub(super) fn check(config: &MachineConfig) -> Result<()> {
    let no = |what: String| Err(Error::Unsupported(what));
    let most = (LAST_PORT_SLOT - FIRST_PORT_SLOT + 1).saturating_sub(config.bridges);
    if !(1..=most).contains(&config.root_ports) {
        return no(format!(
            "{} root ports: there can be 1 to {most}",
            config.root_ports
        ));
    }
    let MachineConfig {
        vcpus,
        max_vcpus,
        memory_mib,
        max_memory_mib,
        ..
    } = config;
    if !(1..=*max_vcpus).contains(vcpus) || *max_vcpus > MOST_VCPUS {
        return no(format!(
            "{vcpus} to {max_vcpus} CPUs: there can be 1 to {MOST_VCPUS}"
        ));
    }
    if memory_mib > max_memory_mib {
        return no(format!(
            "{memory_mib} MiB of memory are more than the most there shall be, {max_memory_mib}"
        ));
    }
    check_binary(config)
}

/// Whether the binary has what this machine takes, beyond what every machine does
/// ([`super::capabilities::query`] has refused those that lack that).
fn check_binary(config: &MachineConfig) -> Result<()> {
    let capabilities = &config.capabilities;
    let need = |there: bool, what, instead| match there {
        true => Ok(()),
        false => Err(capabilities.lack(&config.qemu, what, instead)),
    };
    let has = |typename| capabilities.has(typename);
    if config.accel.kvm {
        let instead = Some("accelerator = \"tcg\"");
        need(has(KVM), "KVM (kvm-accel)", instead)?;
    } else {
        need(has(TCG), "emulation (tcg-accel) and gets no KVM", None)?;
    }
    // Unconfined it is not insisted on.
    if config.confinement.as_ref().is_some_and(|jail| jail.seccomp) {
        let instead = Some("confinement = \"no-seccomp\"");
        need(capabilities.sandbox, "seccomp filter (-sandbox)", instead)?;
    }
    if config.max_memory_mib > config.memory_mib {
        need(has(VIRTIO_MEM), VIRTIO_MEM, None)?;
    }
    if config.console.is_some() {
        for part in [VIRTIO_SERIAL, VIRTCONSOLE] {
            need(has(part), part, Some("debug = false"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confine::Confinement;
    use crate::qemu::accel::Resolved;
    use crate::qemu::machine::tests::config;

    /// A binary that has everything but `missing`.
    fn without(missing: &str, config: MachineConfig) -> MachineConfig {
        let mut config = config;
        if !config.capabilities.types.remove(missing) {
            assert_eq!(missing, "-sandbox");
            config.capabilities.sandbox = false;
        }
        config
    }

    #[test]
    fn what_a_machine_takes_and_a_binary_lacks_is_said_before_anything_starts() {
        let accel = |kvm| Resolved {
            kvm,
            reason: String::new(),
        };
        let jail = |seccomp| Confinement {
            mount_point: "/jail".into(),
            uid: 1,
            user_namespace: None,
            seccomp,
        };
        let plain = config();
        let kvm = MachineConfig {
            accel: accel(true),
            ..plain.clone()
        };
        let confined = MachineConfig {
            confinement: Some(jail(true)),
            ..plain.clone()
        };
        let unfiltered = MachineConfig {
            confinement: Some(jail(false)),
            ..plain.clone()
        };
        let grows = MachineConfig {
            max_memory_mib: 512,
            ..plain.clone()
        };
        let debugged = MachineConfig {
            console: Some("/log".into()),
            ..plain.clone()
        };
        for (missing, wants_it, other, instead) in [
            (KVM, &kvm, &plain, ", or set accelerator = \"tcg\""),
            (TCG, &plain, &kvm, ""),
            (
                "-sandbox",
                &confined,
                &unfiltered,
                ", or set confinement = \"no-seccomp\"",
            ),
            (VIRTIO_MEM, &grows, &plain, ""),
            (VIRTIO_SERIAL, &debugged, &plain, ", or set debug = false"),
            (VIRTCONSOLE, &debugged, &plain, ", or set debug = false"),
        ] {
            let error = check(&without(missing, wants_it.clone()));
            let error = error.unwrap_err().to_string();
            let begin = "/usr/bin/qemu-system-x86_64 (QEMU 7.2.22) has no ";
            assert!(
                error.starts_with(begin)
                    && error.contains(missing)
                    && error.ends_with(&format!(": use another{instead}")),
                "{missing}: {error}"
            );
            assert!(check(wants_it).is_ok(), "{missing}");
            let fits = check(&without(missing, other.clone()));
            assert!(fits.is_ok(), "{missing} is wanted without need: {fits:?}");
        }
    }

    #[test]
    fn there_are_as_many_ports_as_the_bus_has_room_for() {
        for (root_ports, fits) in [(0, false), (1, true), (25, true), (26, false)] {
            let config = MachineConfig {
                root_ports,
                ..config()
            };
            assert_eq!(check(&config).is_ok(), fits, "{root_ports}");
        }
    }
}
