//! Links, directories and files for every name in what the host shares, and in the place of each
//! that is there already.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;

use guest_protocol::{ROOTFS_TAG, SHARE_TAG};
use nix::mount::{MsFlags, mount};

/// What the links lead to: the test's file on the host.
const VICTIM: &str = "/victim";

/// How deep it goes.
const DEPTH: usize = 3;

/// Begins in both shares, and goes on as long as the guest runs.
pub fn everywhere() {
    let victim = fs::read_to_string(VICTIM)
        .unwrap_or_default()
        .trim()
        .to_owned();
    for tag in [SHARE_TAG, ROOTFS_TAG] {
        let (victim, dir) = (victim.clone(), Path::new("/").join(tag));
        thread::spawn(move || {
            let _ = fs::create_dir(&dir);
            loop {
                // The host's file server may come later.
                if mount(
                    Some(tag),
                    &dir,
                    Some("virtiofs"),
                    MsFlags::empty(),
                    None::<&str>,
                )
                .is_ok()
                {
                    break;
                }
            }
            loop {
                plant(&dir, &victim, DEPTH);
            }
        });
    }
}

fn plant(dir: &Path, victim: &str, depth: usize) {
    let there: Vec<OsString> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    let names = (0..40).map(|number| OsString::from(number.to_string()));
    let known = [
        ".volumes", ".served", "rootfs", "share", "shared", "c", "mounts",
    ]
    .map(OsString::from);
    for name in names.chain(known).chain(there.iter().cloned()) {
        let path: PathBuf = dir.join(&name);
        let _ = symlink(victim, &path);
        let _ = fs::rename(&path, dir.join("moved"));
        let _ = symlink(victim, &path);
        let _ = fs::remove_dir(&path);
        let _ = symlink(victim, &path);
    }
    if depth > 0 {
        for name in there {
            let below = dir.join(&name);
            if below.is_dir() && !below.is_symlink() {
                plant(&below, victim, depth - 1);
            }
        }
    }
}
