//! Mount options as text, and what they are to the kernel: flags of mount(2), attributes of
//! mount_setattr(2), and data of the file system.

use nix::mount::MsFlags;
use sys::mount::{Attributes, Extent};

fn put(attributes: &mut Attributes, change: Change) {
    let Change { bit, set } = change;
    if bit & ATIME != 0 || bit == RELATIME_MARK {
        // The access time modes are one field, not bits.
        let bit = if bit == RELATIME_MARK { 0 } else { bit };
        attributes.clear |= ATIME;
        attributes.set = (attributes.set & !ATIME) | if set { bit } else { 0 };
    } else if set {
        attributes.set |= bit;
        attributes.clear &= !bit;
    } else {
        attributes.clear |= bit;
        attributes.set &= !bit;
    }
}

/// Mask of the access time modes, `MOUNT_ATTR__ATIME`.
const ATIME: u64 = 0x70;
/// Stands for `MOUNT_ATTR_RELATIME`, which is zero.
const RELATIME_MARK: u64 = 1 << 63;
const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x0020_0000;

/// Read-only.
pub const READ_ONLY: Attributes = Attributes::set(RDONLY);

#[derive(Clone, Copy)]
struct Change {
    bit: u64,
    set: bool,
}

/// The options of one mount, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Flags of mount(2), for new file systems.
    pub flags: MsFlags,
    /// The same as attributes, for binds: only what was asked for, so that the source keeps the
    /// rest.
    pub attributes: Attributes,
    /// The options with an `r` in front: for a whole tree.
    pub recursive: Attributes,
    /// `bind` or `rbind`.
    pub bind: Option<Extent>,
    /// Propagation changes, in order.
    pub propagation: Vec<MsFlags>,
    /// Copy what the image has at the place into the new tmpfs.
    pub copy_up: bool,
    /// What the file system itself must understand, joined by commas.
    pub data: String,
}

impl Options {
    /// Sorts options by what they change. Unknown ones are the file system's own.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Options {
        let mut out = Options {
            flags: MsFlags::empty(),
            attributes: Attributes::default(),
            recursive: Attributes::default(),
            bind: None,
            propagation: Vec::new(),
            copy_up: false,
            data: String::new(),
        };
        for option in options {
            let option = option.as_ref();
            if let Some((change, flag)) = per_mount(option) {
                put(&mut out.attributes, change);
                out.flags.set(flag, change.set);
                continue;
            }
            if let Some((change, _)) = option.strip_prefix('r').and_then(per_mount) {
                put(&mut out.recursive, change);
                continue;
            }
            if let Some(flag) = propagation(option) {
                out.propagation.push(flag);
                continue;
            }
            match option {
                "bind" => out.bind = Some(out.bind.unwrap_or(Extent::Mount)),
                "rbind" => out.bind = Some(Extent::Tree),
                "tmpcopyup" => out.copy_up = true,
                // Nothing to do, or not to be done here.
                "" | "defaults" | "remount" | "loud" | "nofail" => {}
                "sync" => out.flags.insert(MsFlags::MS_SYNCHRONOUS),
                "async" => out.flags.remove(MsFlags::MS_SYNCHRONOUS),
                "dirsync" => out.flags.insert(MsFlags::MS_DIRSYNC),
                "silent" => out.flags.insert(MsFlags::MS_SILENT),
                "mand" => out.flags.insert(MsFlags::MS_MANDLOCK),
                "nomand" => out.flags.remove(MsFlags::MS_MANDLOCK),
                "lazytime" => out.flags.insert(MsFlags::MS_LAZYTIME),
                "nolazytime" => out.flags.remove(MsFlags::MS_LAZYTIME),
                "iversion" => out.flags.insert(MsFlags::MS_I_VERSION),
                "noiversion" => out.flags.remove(MsFlags::MS_I_VERSION),
                other => {
                    if !out.data.is_empty() {
                        out.data.push(',');
                    }
                    out.data.push_str(other);
                }
            }
        }
        out
    }

    /// True when the mount is to end read-only.
    pub fn read_only(&self) -> bool {
        self.flags.contains(MsFlags::MS_RDONLY)
    }
}

fn per_mount(option: &str) -> Option<(Change, MsFlags)> {
    let on = |bit, flag| Some((Change { bit, set: true }, flag));
    let off = |bit, flag| Some((Change { bit, set: false }, flag));
    match option {
        "ro" => on(RDONLY, MsFlags::MS_RDONLY),
        "rw" => off(RDONLY, MsFlags::MS_RDONLY),
        "nosuid" => on(NOSUID, MsFlags::MS_NOSUID),
        "suid" => off(NOSUID, MsFlags::MS_NOSUID),
        "nodev" => on(NODEV, MsFlags::MS_NODEV),
        "dev" => off(NODEV, MsFlags::MS_NODEV),
        "noexec" => on(NOEXEC, MsFlags::MS_NOEXEC),
        "exec" => off(NOEXEC, MsFlags::MS_NOEXEC),
        "noatime" => on(NOATIME, MsFlags::MS_NOATIME),
        "atime" => off(NOATIME, MsFlags::MS_NOATIME),
        "strictatime" => on(STRICTATIME, MsFlags::MS_STRICTATIME),
        "nostrictatime" => off(STRICTATIME, MsFlags::MS_STRICTATIME),
        "relatime" => on(RELATIME_MARK, MsFlags::MS_RELATIME),
        "norelatime" => off(RELATIME_MARK, MsFlags::MS_RELATIME),
        "nodiratime" => on(NODIRATIME, MsFlags::MS_NODIRATIME),
        "diratime" => off(NODIRATIME, MsFlags::MS_NODIRATIME),
        // MS_NOSYMFOLLOW; nix has no name for it.
        "nosymfollow" => on(NOSYMFOLLOW, MsFlags::from_bits_retain(0x100)),
        "symfollow" => off(NOSYMFOLLOW, MsFlags::from_bits_retain(0x100)),
        _ => None,
    }
}

/// A propagation type by name, with `MS_REC` for those with an `r` in front.
pub fn propagation(name: &str) -> Option<MsFlags> {
    let (recursive, name) = match name.strip_prefix('r') {
        Some(rest) => (MsFlags::MS_REC, rest),
        None => (MsFlags::empty(), name),
    };
    let flag = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(recursive | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_changes_only_what_is_named() {
        let options = Options::parse(&["rbind", "rprivate", "ro"]);
        assert_eq!(options.bind, Some(Extent::Tree));
        assert_eq!(options.attributes, READ_ONLY);
        assert_eq!(options.propagation, [MsFlags::MS_REC | MsFlags::MS_PRIVATE]);
        assert_eq!(options.recursive, Attributes::default());
        assert!(options.data.is_empty());
    }

    #[test]
    fn the_last_of_two_opposites_counts() {
        let options = Options::parse(&["ro", "nosuid", "rw", "noexec", "exec"]);
        assert_eq!(
            options.attributes,
            Attributes {
                set: NOSUID,
                clear: RDONLY | NOEXEC,
                ..Default::default()
            }
        );
        assert_eq!(options.flags, MsFlags::MS_NOSUID);
    }

    #[test]
    fn access_time_modes_replace_each_other() {
        let options = Options::parse(&["noatime", "strictatime"]);
        assert_eq!(
            options.attributes,
            Attributes {
                set: STRICTATIME,
                clear: ATIME,
                ..Default::default()
            }
        );
        let options = Options::parse(&["noatime", "relatime"]);
        assert_eq!(
            options.attributes,
            Attributes {
                set: 0,
                clear: ATIME,
                ..Default::default()
            }
        );
    }

    #[test]
    fn recursive_options_are_kept_apart() {
        let options = Options::parse(&["rbind", "rro", "rnosuid", "rnoatime"]);
        assert_eq!(options.attributes, Attributes::default());
        assert_eq!(
            options.recursive,
            Attributes {
                set: RDONLY | NOSUID | NOATIME,
                clear: ATIME,
                ..Default::default()
            }
        );
    }

    #[test]
    fn the_rest_is_for_the_file_system() {
        let options = Options::parse(&[
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "tmpcopyup",
            "rw",
        ]);
        assert_eq!(options.data, "mode=755,size=65536k");
        assert!(options.copy_up && !options.read_only());
        assert_eq!(options.flags, MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME);
    }
}
