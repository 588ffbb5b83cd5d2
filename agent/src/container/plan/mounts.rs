//! Mounts and device nodes of a container, checked.

use std::ffi::CString;

use guest_protocol::protocols::oci;
use sys::mount::Extent;

use super::c_string;
use crate::error::{Error, Result};
use crate::mount_options::Options;

/// One mount of a container.
#[derive(Clone, Debug)]
pub struct MountPlan {
    pub target: String,
    pub source: CString,
    pub kind: MountKind,
    pub options: Options,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    Bind(Extent),
    Cgroup,
    New { fstype: CString },
}

/// A device node of a container.
#[derive(Clone, Debug)]
pub struct DevicePlan {
    pub path: String,
    /// File type bits and permissions.
    pub mode: libc::mode_t,
    pub number: libc::dev_t,
    pub uid: libc::uid_t,
    pub gid: libc::gid_t,
}

/// Checks one mount.
pub fn mount(mount: &oci::Mount) -> Result<MountPlan> {
    if !mount.destination.starts_with('/') {
        return Err(Error::Invalid(format!(
            "mount destination {:?} is not absolute",
            mount.destination
        )));
    }
    let options = Options::parse(&mount.options);
    let kind = match (mount.type_.as_str(), options.bind) {
        (_, Some(extent)) => MountKind::Bind(extent),
        ("bind", None) => MountKind::Bind(Extent::Mount),
        ("cgroup" | "cgroup2", None) => MountKind::Cgroup,
        ("", None) => {
            return Err(Error::Invalid(format!(
                "mount on {} has no type",
                mount.destination
            )));
        }
        (fstype, None) => MountKind::New {
            fstype: c_string(fstype)?,
        },
    };
    if matches!(kind, MountKind::Bind(_)) && !mount.source.starts_with('/') {
        return Err(Error::Invalid(format!(
            "source {:?} of the bind mount on {} is not absolute",
            mount.source, mount.destination
        )));
    }
    Ok(MountPlan {
        target: mount.destination.clone(),
        source: c_string(&mount.source)?,
        kind,
        options,
    })
}

/// The devices that every container has, then the container's own, which may replace them.
pub fn devices(own: &[oci::LinuxDevice]) -> Result<Vec<DevicePlan>> {
    let default = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ];
    let mut out: Vec<DevicePlan> = Vec::with_capacity(default.len() + own.len());
    for (name, major, minor) in default {
        let path = format!("/dev/{name}");
        if own.iter().all(|device| device.Path != path) {
            let number = libc::makedev(major, minor);
            out.push(DevicePlan {
                path,
                mode: libc::S_IFCHR | 0o666,
                number,
                uid: 0,
                gid: 0,
            });
        }
    }
    for device in own {
        if !device.Path.starts_with('/') {
            return Err(Error::Invalid(format!(
                "device path {:?} is not absolute",
                device.Path
            )));
        }
        let kind = match device.Type.as_str() {
            "c" | "u" => libc::S_IFCHR,
            "b" => libc::S_IFBLK,
            "p" => libc::S_IFIFO,
            other => {
                return Err(Error::Invalid(format!(
                    "device {} has unknown type {other:?}",
                    device.Path
                )));
            }
        };
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| {
                Error::Invalid(format!(
                    "device {} has impossible number {value}",
                    device.Path
                ))
            })
        };
        let permissions = if device.FileMode == 0 {
            0o666
        } else {
            device.FileMode & 0o7777
        };
        out.push(DevicePlan {
            path: device.Path.clone(),
            mode: kind | permissions,
            number: libc::makedev(number(device.Major)?, number(device.Minor)?),
            uid: device.UID,
            gid: device.GID,
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use guest_protocol::protocols::oci::LinuxDevice;

    use super::*;

    #[test]
    fn a_devices_own_entry_replaces_the_default() {
        let tty = LinuxDevice {
            Path: "/dev/tty".into(),
            Type: "c".into(),
            Major: 9,
            Minor: 9,
            ..Default::default()
        };
        let list = devices(&[tty]).unwrap();
        assert_eq!(list.len(), 6);
        assert_eq!(list.last().unwrap().number, libc::makedev(9, 9));
    }
}
