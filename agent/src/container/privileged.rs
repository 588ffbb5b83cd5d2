//! What a privileged container gets: every device of the guest. The host's are nothing that it
//! could use.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use guest_protocol::protocols::oci::{LinuxDevice, Spec};

use crate::cgroup::devices;

/// Mount points in /dev: a container has file systems of its own there.
const SKIPPED: [&str; 3] = ["pts", "shm", "mqueue"];

/// As many as Linux makes by itself where it is not told otherwise.
const LOOP_DEVICES: i64 = 8;

const LOOP_MAJOR: i64 = 7;

/// Adds the guest's devices to a spec whose rules allow all of them.
pub fn add_devices(spec: &mut Spec) {
    let linux = spec.Linux.mut_or_insert_default();
    if devices::allow_all(&linux.Resources.get_or_default().Devices) {
        let mut found = Vec::new();
        walk(Path::new("/dev"), &mut found);
        add_loop_devices(&mut found);
        found.retain(|device| linux.Devices.iter().all(|own| own.Path != device.Path));
        linux.Devices.extend(found);
    }
}

/// The kernel makes a loop device when somebody asks /dev/loop-control for a free one or opens it,
/// and a node for it in the guest's own /dev only: a container has the nodes before.
fn add_loop_devices(found: &mut Vec<LinuxDevice>) {
    if !found.iter().any(|one| one.Path == "/dev/loop-control") {
        return;
    }
    for minor in 0..LOOP_DEVICES {
        let path = format!("/dev/loop{minor}");
        if found.iter().all(|one| one.Path != path) {
            found.push(LinuxDevice {
                Path: path,
                Type: "b".into(),
                Major: LOOP_MAJOR,
                Minor: minor,
                FileMode: 0o600,
                ..Default::default()
            });
        }
    }
}

fn walk(dir: &Path, found: &mut Vec<LinuxDevice>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // Links are not followed.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            if !SKIPPED.iter().any(|name| entry.file_name() == *name) {
                walk(&entry.path(), found);
            }
            continue;
        }
        // The console of a container is its terminal.
        if !(kind.is_char_device() || kind.is_block_device())
            || entry.path() == Path::new("/dev/console")
        {
            continue;
        }
        found.push(LinuxDevice {
            Path: entry.path().to_string_lossy().into_owned(),
            Type: if kind.is_char_device() { "c" } else { "b" }.into(),
            Major: libc::major(metadata.rdev()).into(),
            Minor: libc::minor(metadata.rdev()).into(),
            FileMode: metadata.permissions().mode() & 0o7777,
            UID: metadata.uid(),
            GID: metadata.gid(),
            ..Default::default()
        });
    }
}
