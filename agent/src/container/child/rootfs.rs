//! File system work of a container's first process, between clone and exec.
//!
//! Every path inside the container's root is resolved by openat2(2) with the root as its boundary,
//! because the image (and a volume that another container writes) may hold any symlink. Nothing
//! here trusts a path twice: what was opened is what is mounted on.

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fchmodat, fstat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, chdir, fchdir, fchownat, pivot_root, symlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use sys::mount::{Attributes, Extent, attach, clone_tree, clone_tree_at, set_attributes};

use super::super::plan::{DevicePlan, MountKind, MountPlan, Plan};
use super::copy_up::copy_up;
use crate::mount_options::READ_ONLY;
use crate::spawn::step::{Failure, Step, StepContext};

const MAX_SYMLINKS: usize = 40;

/// What is mounted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Directory,
    /// Anything that is no directory.
    File,
}

/// How device nodes come into a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nodes {
    Make,
    Bind,
}

/// Builds the container's file system in the calling process's own mount namespace and makes it the
/// root.
///
/// # Errors
/// The step that failed, on which path.
pub fn build(plan: &Plan) -> Step<()> {
    // Mounts that come later into the agent's namespace may arrive, none may leave.
    change_propagation(c"/", MsFlags::MS_REC | MsFlags::MS_SLAVE).context("make mounts private")?;
    let name = plan.root.to_string_lossy();
    let place = open_nofollow(&plan.root).context(format_args!("root file system {name}"))?;
    let root = clone_tree(&place, Extent::Tree).context(format_args!("root file system {name}"))?;
    attach(&root, &place).context(format_args!("root file system {name}"))?;
    // A trusted null device, before the image's own /dev can stand in for it.
    let null = clone_tree_at(c"/dev/null", Extent::Mount).context("clone /dev/null")?;
    for one in &plan.mounts {
        mount_one(root.as_fd(), one)?;
    }
    if plan.make_dev {
        // A user namespace may not make nodes: the guest's own are bound.
        let nodes = match plan.user_maps {
            Some(_) => Nodes::Bind,
            None => Nodes::Make,
        };
        make_dev(root.as_fd(), &plan.devices, nodes)?;
    }
    for one in plan
        .mounts
        .iter()
        .filter(|one| one.options.read_only() && is_late_read_only(one))
    {
        let target = open_in(root.as_fd(), Path::new(&one.target), OFlag::empty())
            .context(format_args!("open mount {}", one.target))?;
        set_attributes(&target, &READ_ONLY, Extent::Mount)
            .context(format_args!("make {} read-only", one.target))?;
    }
    switch(root.as_fd())?;
    make_cwd(plan)?;
    if let Some(flags) = plan.root_propagation {
        change_propagation(c"/", flags).context("set propagation of the root")?;
    }
    let slash = open_nofollow(c"/").context("open the root")?;
    for path in &plan.readonly {
        make_readonly(slash.as_fd(), path).context(format_args!("make {path} read-only"))?;
    }
    mask(slash.as_fd(), null, &plan.masked)?;
    if plan.root_readonly {
        set_attributes(&slash, &READ_ONLY, Extent::Mount).context("make the root read-only")?;
    }
    Ok(())
}

/// The new root becomes `/` and the old one vanishes, as runc does it: both are `.` for a moment.
fn switch(root: BorrowedFd<'_>) -> Step<()> {
    let old = open_nofollow(c"/").context("open the old root")?;
    fchdir(root).context("enter the new root")?;
    pivot_root(c".", c".").context("pivot_root")?;
    fchdir(old).context("enter the old root")?;
    change_propagation(c".", MsFlags::MS_REC | MsFlags::MS_SLAVE).context("detach the old root")?;
    umount2(c".", MntFlags::MNT_DETACH).context("unmount the old root")?;
    chdir(c"/").context("enter the new root")
}

/// A working directory that the image lacks is made, as runc does it; later the root may be
/// read-only.
fn make_cwd(plan: &Plan) -> Step<()> {
    let cwd = Path::new(OsStr::from_bytes(plan.process.cwd.as_bytes()));
    if cwd.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(cwd).context(format_args!("create working directory {}", cwd.display()))
}

/// A tmpfs that must be filled first becomes read-only last.
fn is_late_read_only(plan: &MountPlan) -> bool {
    matches!(&plan.kind, MountKind::New { fstype } if fstype.as_bytes() == b"tmpfs")
}

fn mount_one(root: BorrowedFd<'_>, plan: &MountPlan) -> Step<()> {
    let MountPlan {
        target,
        source,
        kind,
        options,
    } = plan;
    let path = Path::new(target);
    let attempt = format!("mount {} on {target}", source.to_string_lossy());
    match kind {
        MountKind::Bind(extent) => {
            let tree = clone_tree_at(source, *extent).context(&attempt)?;
            let kind = kind_of(tree.as_fd()).context(&attempt)?;
            let place = make(root, path, kind).context(&attempt)?;
            set_attributes(&tree, &options.attributes, Extent::Mount).context(&attempt)?;
            set_attributes(&tree, &options.recursive, Extent::Tree).context(&attempt)?;
            attach(&tree, &place).context(&attempt)?;
            for flags in &options.propagation {
                propagate(tree.as_fd(), *flags).context(&attempt)?;
            }
        }
        MountKind::Cgroup => {
            let place = make(root, path, Place::Directory).context(&attempt)?;
            // Not mount(2), which refuses what is there already: with a user namespace the guest's
            // /sys is bound, and the guest's cgroups with it.
            let tree = new_detached(c"cgroup2", &[], &options.attributes).context(&attempt)?;
            attach(&tree, &place).context(&attempt)?;
        }
        MountKind::New { fstype } => {
            // A symlink at the place of /proc or /sys would make checks of their files worthless.
            let kernel = matches!(fstype.to_bytes(), b"proc" | b"sysfs");
            let place = make(root, path, Place::Directory).context(&attempt)?;
            if kernel && !is_plain(root, path) {
                return Err(Failure(format!("{attempt}: the place is a symlink")));
            }
            let mut flags = options.flags;
            if is_late_read_only(plan) {
                flags.remove(MsFlags::MS_RDONLY);
            }
            match mount_new(source, &place, fstype, flags, &options.data) {
                // Not allowed in a user namespace that does not own the network: use the guest's.
                Err(error)
                    if error.raw_os_error() == Some(libc::EPERM)
                        && fstype.to_bytes() == b"sysfs" =>
                {
                    let tree = clone_tree_at(c"/sys", Extent::Tree).context(&attempt)?;
                    set_attributes(&tree, &READ_ONLY, Extent::Tree).context(&attempt)?;
                    attach(&tree, &place).context(&attempt)?;
                }
                result => result.context(&attempt)?,
            }
            // What was opened lies below the new mount now.
            let mounted = open_in(root, path, OFlag::O_DIRECTORY).context(&attempt)?;
            if options.copy_up {
                copy_up(place.as_fd(), mounted.as_fd())
                    .context(format_args!("copy {target} into its tmpfs"))?;
            }
            set_attributes(&mounted, &options.recursive, Extent::Tree).context(&attempt)?;
            for flags in &options.propagation {
                propagate(mounted.as_fd(), *flags).context(&attempt)?;
            }
        }
    }
    Ok(())
}

/// /dev as every image expects it: nodes, and the links to /proc and devpts.
fn make_dev(root: BorrowedFd<'_>, devices: &[DevicePlan], nodes: Nodes) -> Step<()> {
    for device in devices {
        make_device(root, device, nodes).context(format_args!("create device {}", device.path))?;
    }
    let dev = make(root, Path::new("/dev"), Place::Directory).context("create /dev")?;
    let links = [
        (c"/proc/self/fd", c"fd"),
        (c"/proc/self/fd/0", c"stdin"),
        (c"/proc/self/fd/1", c"stdout"),
        (c"/proc/self/fd/2", c"stderr"),
        (c"pts/ptmx", c"ptmx"),
    ];
    for (target, name) in links {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => {
                return Err(error)
                    .context(format_args!("create link /dev/{}", name.to_string_lossy()));
            }
        }
    }
    Ok(())
}

fn make_device(root: BorrowedFd<'_>, device: &DevicePlan, nodes: Nodes) -> io::Result<()> {
    let path = Path::new(&device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    if nodes == Nodes::Bind {
        let source = CString::new(device.path.as_str())?;
        let tree = clone_tree_at(&source, Extent::Mount)?;
        let place = make(root, path, Place::File)?;
        return attach(&tree, &place);
    }
    let parent = make(root, parent, Place::Directory)?;
    let kind = SFlag::from_bits_truncate(device.mode & libc::S_IFMT);
    let mode = Mode::from_bits_truncate(device.mode & 0o7777);
    match mknodat(&parent, name, kind, mode, device.number) {
        Ok(()) => {}
        Err(nix::Error::EEXIST) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    if device.uid != 0 || device.gid != 0 {
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        fchownat(
            &parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
        // A change of owner may have taken permissions away.
        fchmodat(
            &parent,
            name,
            mode,
            nix::sys::stat::FchmodatFlags::FollowSymlink,
        )?;
    }
    Ok(())
}

/// A mount that hides others: itself the first time, clones of itself after that (a detached mount
/// cannot be cloned).
struct Cover {
    tree: OwnedFd,
    attached: bool,
}

impl Cover {
    fn put(&mut self, place: BorrowedFd<'_>) -> io::Result<()> {
        if !std::mem::replace(&mut self.attached, true) {
            return attach(&self.tree, place);
        }
        attach(clone_tree(&self.tree, Extent::Mount)?, place)
    }
}

/// Puts nothing where the kernel shows too much: the null device over files, an empty tmpfs over
/// directories.
fn mask(root: BorrowedFd<'_>, null: OwnedFd, paths: &[String]) -> Step<()> {
    let mut null = Cover {
        tree: null,
        attached: false,
    };
    let mut empty: Option<Cover> = None;
    for path in paths {
        let attempt = format!("mask {path}");
        let place = match open_in(root, Path::new(path), OFlag::empty()) {
            Ok(place) => place,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                continue;
            }
            Err(error) => return Err(error).context(&attempt),
        };
        let cover = if kind_of(place.as_fd()).context(&attempt)? == Place::File {
            &mut null
        } else if let Some(empty) = &mut empty {
            empty
        } else {
            empty.insert({
                let options = [(c"nr_blocks", c"1"), (c"nr_inodes", c"2")];
                let tree = new_detached(c"tmpfs", &options, &READ_ONLY).context(&attempt)?;
                Cover {
                    tree,
                    attached: false,
                }
            })
        };
        cover.put(place.as_fd()).context(&attempt)?;
    }
    Ok(())
}

/// A detached mount of a new file system.
fn new_detached(
    fstype: &CStr,
    options: &[(&CStr, &CStr)],
    attributes: &Attributes,
) -> io::Result<OwnedFd> {
    // The same bits as for mount_setattr(2), where there is room for more of them.
    let attributes = MountAttrFlags::from_bits_truncate(attributes.set as u32);
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value)?;
    }
    fsconfig_create(&context)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(fsmount(&context, flags, attributes)?)
}

fn make_readonly(root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    let place = match open_in(root, Path::new(path), OFlag::empty()) {
        Ok(place) => place,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let tree = clone_tree(&place, Extent::Tree)?;
    set_attributes(&tree, &READ_ONLY, Extent::Mount)?;
    attach(&tree, &place)
}

/// Opens `path` inside `root` as a place (O_PATH); symlinks stay inside.
fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(
        root,
        if path.as_os_str().is_empty() {
            Path::new("/")
        } else {
            path
        },
        how,
    )?)
}

/// True when no part of the path is a symlink.
fn is_plain(root: BorrowedFd<'_>, path: &Path) -> bool {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(root, path, how).is_ok()
}

/// Opens `path` inside `root`, and makes it and the directories above it where they do not exist.
fn make(root: BorrowedFd<'_>, path: &Path, place: Place) -> io::Result<OwnedFd> {
    let wanted = match place {
        Place::Directory => OFlag::O_DIRECTORY,
        Place::File => OFlag::empty(),
    };
    match open_in(root, path, wanted) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    // What remains to be walked, the next part last; `at` is the resolved way so far.
    let parts = |path: &Path| -> Vec<PathBuf> {
        path.components()
            .rev()
            .map(|part| PathBuf::from(part.as_os_str()))
            .filter(|part| part != Path::new("/"))
            .collect()
    };
    let mut rest = parts(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == Path::new("..") {
            at.pop();
            continue;
        }
        let here = at.join(&part);
        match open_in(root, &here, OFlag::O_NOFOLLOW) {
            Ok(found) => {
                if SFlag::from_bits_truncate(fstat(&found)?.st_mode) & SFlag::S_IFMT
                    != SFlag::S_IFLNK
                {
                    at = here;
                    continue;
                }
                links += 1;
                if links > MAX_SYMLINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                let target = PathBuf::from(readlinkat(&found, "")?);
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                rest.extend(parts(&target));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = open_in(root, &at, OFlag::O_DIRECTORY)?;
                let made = if place == Place::Directory || !rest.is_empty() {
                    mkdirat(&parent, &part, Mode::from_bits_truncate(0o755))
                } else {
                    mknodat(
                        &parent,
                        &part,
                        SFlag::S_IFREG,
                        Mode::from_bits_truncate(0o644),
                        0,
                    )
                };
                match made {
                    Ok(()) | Err(nix::Error::EEXIST) => at = here,
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
    open_in(root, &at, wanted)
}

fn open_nofollow(path: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    Ok(nix::fcntl::open(path, flags, Mode::empty())?)
}

fn kind_of(fd: BorrowedFd<'_>) -> io::Result<Place> {
    let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
    Ok(if kind == SFlag::S_IFDIR {
        Place::Directory
    } else {
        Place::File
    })
}

fn propagate(mount: BorrowedFd<'_>, flags: MsFlags) -> io::Result<()> {
    let extent = if flags.contains(MsFlags::MS_REC) {
        Extent::Tree
    } else {
        Extent::Mount
    };
    let kind = flags & !MsFlags::MS_REC;
    set_attributes(mount, &Attributes::propagation(kind.bits()), extent)
}

fn change_propagation(path: &CStr, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&CStr>, path, None::<&CStr>, flags, None::<&CStr>)
}

/// Mounts a new file system on an opened place, by its name in the agent's /proc: a descriptor's
/// name always leads to what it has open.
fn mount_new(
    source: &CStr,
    place: &OwnedFd,
    fstype: &CStr,
    flags: MsFlags,
    data: &str,
) -> io::Result<()> {
    let name = format!("/proc/self/fd/{}", place.as_raw_fd());
    let data = if data.is_empty() { None } else { Some(data) };
    Ok(mount(
        Some(source),
        name.as_str(),
        Some(fstype),
        flags,
        data,
    )?)
}

/// Writes the container's sysctls, through the agent's /proc, because the container's own may be
/// anywhere.
pub fn write_sysctls(sysctls: &[(String, String)]) -> Step<()> {
    for (key, value) in sysctls {
        fs::write(Path::new("/proc/sys").join(key), value)
            .context(format_args!("sysctl {key} = {value}"))?;
    }
    Ok(())
}
