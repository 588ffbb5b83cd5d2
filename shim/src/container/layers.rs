//! A root file system of several mounts that name each other, as containerd's snapshotter for erofs
//! gives it (containerd 2.2 and later) to a runtime that claims such mounts: [`TYPES`] and
//! [`TRANSFORMS`].
//!
//! ```text
//!  mkfs/ext4             rwlayer.img    a disk for the guest; formatted first, if it is not there
//!  erofs                 layer.erofs    a file in the share, by a loop device in the guest
//!  format/mkdir/overlay  upperdir={{ mount 0 }}/upper,lowerdir={{ overlay 1 3 }}
//! ```
//!
//! A disk for each layer would cost a start 40 ms each under emulation, and loop devices cost 3.
//! Where directories of the host are among it, `rootfs` mounts all of it on the host.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use containerd_shim_protos::types::mount::Mount;
use guest_protocol::IMAGE_DRIVER;
use guest_protocol::protocols::agent::Storage;

use crate::container::rootfs::{self, Disk};
use crate::error::{Error, IoContext, Result};
use crate::host::death_signal;

/// Types of mounts that are left to us where we ask for it.
pub const TYPES: [&str; 1] = ["erofs"];

/// What containerd would do to a mount before, by the prefixes of its type.
pub const TRANSFORMS: [&str; 3] = ["format", "mkdir", "mkfs"];

/// Options that are containerd's own begin so: no kernel knows them.
const OWN_OPTIONS: [&str; 3] = ["X-containerd.", "uidmap=", "gidmap="];
const MKDIR: &str = "X-containerd.mkdir.path=";
const MKFS: &str = "X-containerd.mkfs.";

/// More than this, and the names of an overlay's layers may not fit a page.
const MAX_PARTS: usize = 150;

/// A directory that a mount needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    pub path: String,
    /// Permission bits.
    pub mode: u32,
}

/// A mount whose templates are filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Filled {
    pub mount: Mount,
    pub directories: Vec<Directory>,
}

/// Fills in what names the mounts before this one, which are at `points`.
///
/// # Errors
/// A template, transform or option that nobody knows.
pub fn fill(entry: &Mount, points: &[String]) -> Result<Filled> {
    let mut mount = entry.clone();
    let mut formats = false;
    while let Some((transform, rest)) = mount.type_.clone().split_once('/') {
        if !TRANSFORMS.contains(&transform) {
            return Err(Error::unimplemented(format!(
                "a root file system with a mount of the type {}",
                entry.type_
            )));
        }
        formats |= transform == "format";
        mount.type_ = rest.to_owned();
    }
    let mut directories = Vec::new();
    mount.options.clear();
    if formats {
        mount.source = expand(&entry.source, points)?;
        mount.target = expand(&entry.target, points)?;
    }
    for option in &entry.options {
        let option = if formats {
            expand(option, points)?
        } else {
            option.clone()
        };
        if let Some(directory) = option.strip_prefix(MKDIR) {
            directories.push(self::directory(directory)?);
        } else if option.starts_with(MKFS) {
            // See `format`.
        } else if OWN_OPTIONS.iter().any(|own| option.starts_with(own)) {
            return Err(unknown_option(&option));
        } else {
            mount.options.push(option);
        }
    }
    Ok(Filled { mount, directories })
}

fn unknown_option(option: &str) -> Error {
    let name = option.split('=').next().unwrap_or(option);
    let advice = match name {
        "X-containerd.dmverity" => {
            ": layers are not verified in a virtual machine; take dmverity_mode = \"off\" in the \
             configuration of containerd's snapshotter"
        }
        "uidmap" | "gidmap" => {
            ": ids of layers are not mapped in a virtual machine; leave the user namespace out"
        }
        _ => "",
    };
    Error::unimplemented(format!(
        "a root file system with the mount option {name}{advice}"
    ))
}

/// `PATH[:MODE[:UID:GID]]`, of which containerd itself takes no other owner than its own.
fn directory(text: &str) -> Result<Directory> {
    let (path, rest) = text.split_once(':').unwrap_or((text, "0700"));
    let mode = rest.split(':').next().unwrap_or(rest);
    match u32::from_str_radix(mode, 8) {
        Ok(mode) if mode <= 0o777 && path.starts_with('/') => Ok(Directory {
            path: path.to_owned(),
            mode,
        }),
        _ => Err(Error::invalid(format!(
            "root file system option {MKDIR}{text} is no path and mode"
        ))),
    }
}

/// Templates are calls such as `{{ mount 0 }}` or `{{ overlay 1 3 }}`.
fn expand(text: &str, points: &[String]) -> Result<String> {
    let bad = || {
        Error::invalid(format!(
            "root file system template {text:?} names no mount before it"
        ))
    };
    let number = |word: &str| word.parse().ok().filter(|at: &usize| *at < points.len());
    let (mut full, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("{{") {
        let (call, after) = after.split_once("}}").ok_or_else(bad)?;
        full.push_str(before);
        let words: Vec<&str> = call.split_ascii_whitespace().collect();
        match words[..] {
            ["mount", at] => full.push_str(&points[number(at).ok_or_else(bad)?]),
            ["overlay", from, to] => {
                let (from, to) = (number(from), number(to));
                let (from, to) = from.zip(to).ok_or_else(bad)?;
                let mut range = points[from.min(to)..=from.max(to)].to_vec();
                if from > to {
                    range.reverse();
                }
                full.push_str(&range.join(":"));
            }
            _ => return Err(bad()),
        }
        rest = after;
    }
    full.push_str(rest);
    Ok(full)
}

/// Makes the file systems that a list wants to have made. A file that is there has one.
///
/// # Errors
/// One line: an option that is none, or what mkfs says.
pub fn format(list: &[Mount]) -> Result<()> {
    for entry in list.iter().filter(|entry| entry.type_.starts_with("mkfs/")) {
        let path = Path::new(&entry.source);
        if !path.exists() {
            make_file_system(path, &entry.options)?;
        }
    }
    Ok(())
}

/// A file under a name of its own, until it is whole.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn make_file_system(path: &Path, options: &[String]) -> Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let doing = || format!("make a file system in {}", path.display());
    let option = |name: &str| {
        let values = options
            .iter()
            .filter_map(|option| option.strip_prefix(MKFS));
        let mut pairs = values.filter_map(|option| option.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let fstype = option("fs").unwrap_or("ext4");
    let id = match (fstype, option("uuid")) {
        ("ext2" | "ext3" | "ext4" | "xfs", None) => Vec::new(),
        ("ext2" | "ext3" | "ext4", Some(id)) => vec!["-U".to_owned(), id.to_owned()],
        ("xfs", Some(id)) => vec!["-m".to_owned(), format!("uuid={id}")],
        _ => return Err(Error::unimplemented(format!("{MKFS}fs={fstype}"))),
    };
    let size = option("size").and_then(|size| size.parse().ok());
    let size = size.ok_or_else(|| {
        let what = "is no number of bytes";
        Error::invalid(format!("cannot {}: {MKFS}size {what}", doing()))
    })?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let part = Unfinished(path.with_extension(format!("{}-{number}.part", std::process::id())));
    let mut how = fs::OpenOptions::new();
    how.write(true).create_new(true).mode(0o640);
    let file = how.open(&part.0).doing(doing)?;
    file.set_len(size).doing(doing)?;
    let program = format!("mkfs.{fstype}");
    let mut command = Command::new(&program);
    command.arg("-q").args(id).arg(&part.0).stdin(Stdio::null());
    // SAFETY: the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(death_signal::with_the_shim()) };
    let made = command.output().doing(|| format!("run {program}"))?;
    if !made.status.success() {
        let said = String::from_utf8_lossy(&made.stderr);
        let last = said.trim_end().lines().last().unwrap_or("it said nothing");
        return Err(Error::internal(format!("cannot {}: {last}", doing())));
    }
    file.sync_all().doing(doing)?;
    match fs::hard_link(&part.0, path) {
        // A call before this one was late.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked.doing(doing),
    }
}

/// A root file system that the guest mounts of its parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers {
    parts: Vec<Part>,
    /// What they are put together by.
    top: Mount,
}

/// Of the same place in the list.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Mounted from files, which nobody changes.
    Image {
        /// The first is mounted, and the others belong to it.
        files: Vec<PathBuf>,
        fstype: String,
        options: Vec<String>,
    },
    Disk(Disk),
}

impl Layers {
    /// The parts, if all of them can be mounted in a guest.
    ///
    /// # Errors
    /// Those of [`fill`].
    pub fn of(list: &[Mount]) -> Result<Option<Layers>> {
        let Some((top, parts)) = list.split_last() else {
            return Ok(None);
        };
        if parts.is_empty() || parts.len() > MAX_PARTS || !is_of_parts(top) {
            return Ok(None);
        }
        let mut found = Vec::new();
        for entry in parts {
            match part(&fill(entry, &[])?.mount) {
                Some(part) => found.push(part),
                None => return Ok(None),
            }
        }
        Ok(Some(Layers {
            parts: found,
            top: top.clone(),
        }))
    }

    /// Those of all images, in the order in which [`Layers::take_apart`] asks for their places.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().flat_map(|part| match part {
            Part::Image { files, .. } => files.iter().map(PathBuf::as_path).collect(),
            Part::Disk(_) => Vec::new(),
        })
    }

    /// The parts, each to be mounted at its point, and what puts them together.
    pub fn take_apart(self, points: &[String]) -> Result<(Vec<Part>, Filled)> {
        let top = fill(&self.top, points)?;
        Ok((self.parts, top))
    }

    /// How many parts there are.
    pub fn len(&self) -> usize {
        self.parts.len()
    }
}

/// Whether all of its directories are in mounts before it.
fn is_of_parts(top: &Mount) -> bool {
    let kind = top.type_.rsplit('/').next().unwrap_or_default();
    let is_in_part = |path: &str| path.starts_with("{{");
    match kind {
        "bind" => is_in_part(&top.source),
        "overlay" => top.options.iter().all(|option| {
            let directory = ["lowerdir=", "upperdir=", "workdir="]
                .iter()
                .find_map(|name| option.strip_prefix(name));
            directory.is_none_or(is_in_part)
        }),
        _ => false,
    }
}

/// One that the guest can mount.
fn part(mount: &Mount) -> Option<Part> {
    let kind = fs::metadata(&mount.source).ok()?.file_type();
    if mount.type_ != "erofs" || !kind.is_file() {
        return rootfs::disk(std::slice::from_ref(mount)).map(Part::Disk);
    }
    let mut files = vec![PathBuf::from(&mount.source)];
    let mut options = Vec::new();
    for option in &mount.options {
        match option.strip_prefix("device=") {
            Some(device) => files.push(device.into()),
            None if option == "loop" => {}
            None => options.push(option.clone()),
        }
    }
    Some(Part::Image {
        files,
        fstype: mount.type_.clone(),
        options,
    })
}

/// The storage that mounts an image from its files, which the guest has at `places`.
pub fn image(
    mut places: impl Iterator<Item = String>,
    fstype: String,
    mut options: Vec<String>,
    mount_point: &str,
) -> Storage {
    let source = places.next().unwrap_or_default();
    options.extend(places.map(|place| format!("device={place}")));
    Storage {
        driver: IMAGE_DRIVER.to_owned(),
        source,
        fstype,
        options,
        mount_point: mount_point.to_owned(),
        ..Default::default()
    }
}

/// The storages that put an overlay or a bind of parts together at `mount_point`, or elsewhere:
/// where the root file system is then.
pub fn on_top(top: Filled, mount_point: String, storages: &mut Vec<Storage>) -> String {
    let Filled { mount, directories } = top;
    storages.extend(directories.into_iter().map(|directory| Storage {
        driver: "local".to_owned(),
        mount_point: directory.path,
        ..Default::default()
    }));
    if mount.type_ != "overlay" {
        // The part is as writable as the bind would be.
        return mount.source;
    }
    storages.push(Storage {
        driver: "overlayfs".to_owned(),
        source: "overlay".to_owned(),
        fstype: "overlay".to_owned(),
        options: mount.options,
        mount_point: mount_point.clone(),
        ..Default::default()
    });
    mount_point
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    const OVERLAY: [&str; 5] = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        "lowerdir={{ overlay 1 3 }}",
    ];

    #[test]
    fn a_list_of_layers_is_taken_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            path.display().to_string()
        };
        let [rw, a, b, c, d] = ["rw", "a", "b", "c", "d"].map(file);
        let size = "X-containerd.mkfs.size=67108864";
        let device = format!("device={d}");
        let list = [
            mount(
                "mkfs/ext4",
                &rw,
                &["X-containerd.mkfs.fs=ext4", size, "rw", "loop"],
            ),
            mount("erofs", &a, &["ro", "loop"]),
            mount("erofs", &b, &["ro", "loop", &device]),
            mount("erofs", &c, &["ro", "loop"]),
            mount("format/mkdir/overlay", "overlay", &OVERLAY),
        ];
        let layers = Layers::of(&list).unwrap().unwrap();
        let files: Vec<&Path> = layers.files().collect();
        assert_eq!(files, [&a, &b, &d, &c].map(Path::new));
        let points: Vec<String> = (0..layers.len()).map(|at| format!("/l/{at}")).collect();
        let (parts, top) = layers.take_apart(&points).unwrap();
        let Part::Disk(disk) = &parts[0] else {
            panic!("{parts:?}")
        };
        assert!(!disk.read_only && disk.fstype == "ext4" && disk.options == ["rw"]);
        let mut storages = Vec::new();
        assert_eq!(on_top(top, "/l/root".into(), &mut storages), "/l/root");
        let places: Vec<&str> = storages
            .iter()
            .map(|one| one.mount_point.as_str())
            .collect();
        assert_eq!(places, ["/l/0/upper", "/l/0/work", "/l/root"]);
        assert_eq!(
            storages[2].options,
            [
                "workdir=/l/0/work",
                "upperdir=/l/0/upper",
                "lowerdir=/l/1:/l/2:/l/3"
            ]
        );
        // Upper directories on the host are not for the guest.
        let on_host = ["upperdir=/snapshots/1/fs", "lowerdir={{ overlay 0 1 }}"];
        let mut list = list[1..4].to_vec();
        list.push(mount("format/mkdir/overlay", "overlay", &on_host));
        assert_eq!(Layers::of(&list).unwrap(), None);
    }

    #[test]
    fn what_nobody_knows_is_refused_by_name() {
        let points = ["/l/0".to_owned()];
        let refused = |kind, source, options: &[&str]| {
            let filled = fill(&mount(kind, source, options), &points);
            filled.unwrap_err().to_string()
        };
        for template in [
            "{{ mount 1 }}",
            "{{ overlay 0 1 }}",
            "{{ exec 0 }}",
            "{{ mount 0",
        ] {
            let error = refused("format/bind", template, &[]);
            assert!(error.contains(template), "{error}");
        }
        assert!(refused("loop/ext4", "/x", &[]).contains("loop/ext4"));
        assert!(refused("erofs", "/x", &["X-containerd.dmverity=/m"]).contains("dmverity_mode"));
        assert!(refused("mkdir/bind", "/x", &["X-containerd.mkdir.path=/a:9"]).contains("/a:9"));
        // Without the transform a template is a name.
        let plain = fill(&mount("bind", "{{ mount 0 }}", &[]), &points).unwrap();
        assert_eq!(plain.mount.source, "{{ mount 0 }}");
    }

    #[test]
    fn a_writable_layer_is_formatted_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rwlayer.img");
        let name = path.display().to_string();
        let options = [
            "X-containerd.mkfs.size=8388608",
            "X-containerd.mkfs.fs=ext4",
        ];
        let list = [mount("mkfs/ext4", &name, &options)];
        format(&list).unwrap();
        let made = fs::read(&path).unwrap();
        assert_eq!(
            (made.len(), &made[0x438..0x43a]),
            (8 << 20, &[0x53, 0xef][..])
        );
        fs::write(&path, "somebody's").unwrap();
        format(&list).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "somebody's");
        fs::remove_file(&path).unwrap();
        let tiny = [mount("mkfs/ext4", &name, &["X-containerd.mkfs.size=1024"])];
        format(&tiny).unwrap_err();
        assert!(!path.exists());
        assert!(format(&[mount("mkfs/ext4", &name, &[])]).is_err());
    }
}
