//! A container's mounts: what of them the host shares, what the guest makes itself, and in which
//! way.
//!
//! | mount | becomes |
//! |---|---|
//! | proc, sysfs, tmpfs, devpts, mqueue, cgroup; binds of /proc, /sys, /sys/fs/cgroup, /dev, and of devices that are no disks | made in the guest |
//! | /dev/shm of a pod | the pod's own tmpfs in the guest |
//! | emptyDir in memory | a tmpfs in the guest, of the same size |
//! | a ConfigMap, a Secret, a projected volume, the downward API | shared, and copied by the agent, so that its changes raise events |
//! | a unix socket of the host | a socket of the agent, joined to the host's through vsock |
//! | what else the host's kernel shows, a disk, a FIFO | refused |
//! | every other bind, also of what is mounted below /dev | shared by virtio-fs |

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest_protocol::protocols::agent::Storage;
use guest_protocol::protocols::oci as proto;
use guest_protocol::{GUEST_SANDBOX, GUEST_SHM, SocketKind, UDS_DRIVER, WATCHED_DRIVER};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use oci_spec::runtime::Mount;

use crate::container::shared_volumes::{SharedVolume, SharedVolumes};
use crate::error::{Error, Result};
use crate::guest::host_sockets;
use crate::guest::task_process::TaskMount;
use crate::host::mounts::{self, Bind};
use crate::host::socket_kind;

/// The kubelet's directory for volumes that live as long as their pod.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// The kubelet's directories for volumes that it writes anew when the cluster's objects change.
const CONFIGURATION: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// What the guest needs to know, and what the host holds for it.
#[derive(Debug, Default)]
pub struct Volumes {
    /// All mounts, with their sources in the guest.
    pub mounts: Vec<proto::Mount>,
    /// What the guest mounts for them first.
    pub storages: Vec<Storage>,
    /// Sockets of the host.
    pub sockets: Vec<HostSocket>,
    /// Where the container has which of the host's.
    shares: Vec<(PathBuf, Arc<SharedVolume>)>,
    /// Those that the container may write to.
    written: Vec<Arc<SharedVolume>>,
    /// Those in which processes of the host may have sockets.
    may_have_sockets: Vec<Arc<SharedVolume>>,
}

/// A socket of the host that is a mount by itself.
#[derive(Debug)]
pub struct HostSocket {
    /// That of its storage.
    pub name: String,
    /// Where it is, without links.
    pub path: PathBuf,
    pub kind: SocketKind,
}

/// What a container's mounts may be of its pod's own.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfPod<'a> {
    /// Source of the mount on /dev/shm that stands for the pod's.
    pub shm: Option<&'a Path>,
    /// The pod's uid, by which the kubelet names the directory of its volumes.
    pub uid: Option<&'a str>,
}

/// Prepares the mounts of a container.
///
/// # Errors
/// One line that names the mount; nothing stays shared.
pub fn prepare(list: &[Mount], shares: &SharedVolumes, pod: OfPod<'_>) -> Result<Volumes> {
    let mut volumes = Volumes::default();
    for mount in list {
        let mount = volumes.translate(mount, shares, pod)?;
        volumes.mounts.push(mount);
    }
    Ok(volumes)
}

impl Volumes {
    /// Directories of the host in which its processes may have sockets.
    pub fn may_have_sockets(&self) -> &[Arc<SharedVolume>] {
        &self.may_have_sockets
    }

    /// What of the mounts in `list` the host has, for a process that stands for the container.
    ///
    /// # Errors
    /// A bind of the shim's own is not there.
    pub fn on_host(&self, list: &[Mount]) -> Result<Vec<TaskMount>> {
        let mut shares = self.shares.iter().peekable();
        let on_host = |mount: &Mount| {
            let is_it = |(destination, _): &&(PathBuf, _)| destination == mount.destination();
            let share = shares.next_if(is_it).map(|(_, share)| share);
            let options = mount.options().as_deref().unwrap_or_default();
            Ok(TaskMount {
                destination: mount.destination().clone(),
                source: share.map(|share| share.open()).transpose()?.map(Into::into),
                read_only: options
                    .iter()
                    .any(|option| option == "ro" || option == "rro"),
            })
        };
        list.iter().map(on_host).collect()
    }

    fn translate(
        &mut self,
        from: &Mount,
        shares: &SharedVolumes,
        pod: OfPod<'_>,
    ) -> Result<proto::Mount> {
        let mut to = proto::Mount {
            destination: from.destination().to_string_lossy().into_owned(),
            source: from
                .source()
                .as_ref()
                .map(|source| source.to_string_lossy().into_owned())
                .unwrap_or_default(),
            type_: from.typ().clone().unwrap_or_default(),
            options: from.options().clone().unwrap_or_default(),
            ..Default::default()
        };
        if to.destination == "/dev/shm" && pod.shm.is_some_and(|shm| shm == Path::new(&to.source)) {
            to.source = GUEST_SHM.to_owned();
            to.type_ = "bind".to_owned();
            to.options = vec!["rbind".to_owned()];
            return Ok(to);
        }
        let has = |wanted: &[&str]| {
            to.options
                .iter()
                .any(|option| wanted.contains(&option.as_str()))
        };
        let is_socket = to.type_ == "uds";
        let is_bind =
            has(&["bind", "rbind"]) || matches!(to.type_.as_str(), "bind" | "rbind") || is_socket;
        if !is_bind {
            return Ok(to);
        }
        // Walked once: what is judged is what is bound, whatever becomes of the path meanwhile.
        let pinned = match Pinned::open(Path::new(&to.source)) {
            Ok(pinned) => pinned,
            // The guest may have what the host has not.
            Err(_) if is_of_the_kernel(Path::new(&to.source)) => return Ok(to),
            Err(error) => {
                return Err(Error::invalid(format!(
                    "mount source {} for {}: {error}",
                    to.source, to.destination
                )));
            }
        };
        if pinned.is_the_guests() {
            to.source = pinned.is_at.to_string_lossy().into_owned();
            return Ok(to);
        }
        let is_socket = is_socket || pinned.metadata.file_type().is_socket();
        if let Some(why) = pinned.cannot_be_shared(pod.uid).filter(|_| !is_socket) {
            return Err(Error::invalid(format!(
                "mount source {} for {} is {why}",
                to.source, to.destination
            )));
        }
        if has(&["shared", "rshared"]) {
            return Err(Error::invalid(format!(
                "mount {} asks that mounts made in the container appear on the host \
                 (Bidirectional, shared), which a \
                 virtual machine cannot do: use HostToContainer (rslave) or None",
                to.destination
            )));
        }
        let source = pinned.is_at.clone();
        let metadata = &pinned.metadata;
        let read_only = has(&["ro", "rro"]);
        if is_socket {
            let kind = socket_kind::kind_of(&pinned).unwrap_or_default();
            let name = host_sockets::random_name()?;
            // Not the name, which is a secret: every container of the guest can read the paths of
            // sockets.
            to.source = format!("{GUEST_SANDBOX}/uds/{}", shares.next_id());
            to.type_ = "bind".to_owned();
            if !has(&["bind", "rbind"]) {
                to.options.push("bind".to_owned());
            }
            self.storages.push(Storage {
                driver: UDS_DRIVER.to_owned(),
                source: name.clone(),
                mount_point: to.source.clone(),
                options: vec![
                    format!("type={kind}"),
                    format!("mode={:o}", metadata.permissions().mode() & 0o7777),
                    format!("uid={}", metadata.uid()),
                    format!("gid={}", metadata.gid()),
                ],
                ..Default::default()
            });
            self.sockets.push(HostSocket {
                name,
                path: source,
                kind,
            });
        } else if let Some(storage) = memory_volume(&pinned, pod.uid) {
            to.source.clone_from(&storage.mount_point);
            self.storages.push(storage);
        } else {
            let how = Bind {
                recursive: has(&["rbind"]) || to.type_ == "rbind",
                // A pod's own scratch space is written by some of its containers and only read by
                // others, which must see the same files: there the guest alone keeps readers from
                // writing.
                read_only: read_only && kind_of_volume(&source, pod.uid) != Some(EMPTY_DIR),
                // The kernel's own file systems are closed to writers also where other mounts below
                // are not.
                read_only_below: has(&["rro"])
                    || read_only && mounts::has_kernels_mounts_below(&source)?,
                private: !has(&["slave", "rslave"]),
            };
            let share = shares.get(&pinned, how)?;
            to.source = share.guest_path().to_owned();
            let kind = kind_of_volume(&source, pod.uid);
            if read_only
                && metadata.is_dir()
                && kind.is_some_and(|kind| CONFIGURATION.contains(&kind))
            {
                self.watch(&mut to);
            }
            if how.read_only && !how.read_only_below && share.has_mounts_below()? {
                // What is mounted below the source stays writable, and in the guest it takes its
                // parent's flags.
                to.options.retain(|option| option != "ro");
            }
            if !how.read_only {
                self.written.push(share.clone());
            }
            if metadata.is_dir() && !is_kubelets(&source) {
                // Sockets that are found there are mounted over in the guest, also later: the
                // container sees that if its mount is no more private than the agent makes it.
                let private = ["private", "rprivate", "unbindable", "runbindable", "bind"];
                to.options
                    .retain(|option| !private.contains(&option.as_str()));
                if !to.options.iter().any(|option| option == "rbind") {
                    to.options.push("rbind".to_owned());
                }
                self.may_have_sockets.push(share.clone());
            }
            self.shares.push((from.destination().clone(), share));
        }
        Ok(to)
    }

    /// Shares that were made for readers, and that the container may write to: their paths below the
    /// shared directory.
    pub fn to_be_writable(&self) -> impl Iterator<Item = &Path> {
        self.written
            .iter()
            .filter_map(|share| share.read_only_path())
    }

    /// Has the guest copy a shared directory, again when it changes.
    fn watch(&mut self, to: &mut proto::Mount) {
        let share = std::mem::take(&mut to.source);
        let name = share.rsplit('/').next().unwrap_or_default();
        to.source = format!("{GUEST_SANDBOX}/watched/{name}");
        self.storages.push(Storage {
            driver: WATCHED_DRIVER.to_owned(),
            source: share,
            mount_point: to.source.clone(),
            ..Default::default()
        });
    }

    /// For an agent that cannot copy them: the shared directories themselves.
    pub fn watch_none(&mut self) {
        let is_watched = |storage: &mut Storage| storage.driver == WATCHED_DRIVER;
        for storage in self.storages.extract_if(.., is_watched) {
            let mut mounts = self.mounts.iter_mut();
            if let Some(mount) = mounts.find(|mount| mount.source == storage.mount_point) {
                mount.source = storage.source;
            }
        }
    }
}

/// Gives a tmpfs that names no size half of what the machine may have: of itself the guest's kernel
/// would give it half of the memory that there is by now.
pub fn with_size(options: &mut Vec<String>, mib: u64) {
    let sizes = ["size=", "nr_blocks="];
    if !options
        .iter()
        .any(|option| sizes.iter().any(|size| option.starts_with(size)))
    {
        options.push(format!("size={mib}m"));
    }
}

/// A mount's source, held by a descriptor.
#[derive(Debug)]
pub struct Pinned {
    file: File,
    /// Where it is, without links.
    pub is_at: PathBuf,
    pub metadata: std::fs::Metadata,
}

/// File systems in which the kernel shows itself (linux/magic.h): proc, sysfs, cgroup, cgroup2,
/// debugfs, tracefs, securityfs, bpf, devpts, mqueue, pstore, efivarfs, configfs, hugetlbfs.
const OF_THE_KERNEL: [i64; 14] = [
    0x9fa0,
    0x6265_6572,
    0x27_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11,
    0x1cd1,
    0x1980_0202,
    0x6165_676c,
    0xde5e_81e4,
    0x6265_6570,
    0x9584_58f6,
];

impl Pinned {
    /// Follows the path, as runc does, once.
    pub fn open(path: &Path) -> std::io::Result<Pinned> {
        let file = mounts::hold(path)?;
        let metadata = file.metadata()?;
        let is_at = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Pinned {
            file,
            is_at,
            metadata,
        })
    }

    /// The size in bytes of the tmpfs that it is in, if it is in one.
    pub fn tmpfs_size(&self) -> Option<u64> {
        let statfs = fstatfs(&self.file).ok()?;
        let block = u64::try_from(statfs.block_size()).ok()?;
        (statfs.filesystem_type() == TMPFS_MAGIC).then(|| statfs.blocks().saturating_mul(block))
    }

    /// Whether the guest has it of its own, and a container is to see that: the kernel's file systems
    /// as a whole, and what its drivers have made below /dev. A device with the same name is the same
    /// kind of device there, but for disks.
    fn is_the_guests(&self) -> bool {
        let whole = [
            "/proc",
            "/sys",
            "/sys/fs/cgroup",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
        ];
        let of_dev = self.metadata.file_type().is_char_device() && self.is_at.starts_with("/dev");
        of_dev || whole.iter().any(|path| self.is_at == Path::new(path))
    }

    /// Why the guest cannot have it, and what to do.
    fn cannot_be_shared(&self, pod_uid: Option<&str>) -> Option<&'static str> {
        let kind = self.metadata.file_type();
        if kind.is_block_device() {
            Some(
                "a disk of the host, which a virtual machine has as a device only: name it among \
                 the devices (volumeDevices, --device)",
            )
        } else if kind.is_fifo() && kind_of_volume(&self.is_at, pod_uid) != Some(EMPTY_DIR) {
            Some(
                "a FIFO of the host, whose other end a virtual machine cannot have: use a unix \
                 socket",
            )
        } else if self.is_kernels() {
            Some(
                "the host kernel's (proc, sysfs, cgroup, devtmpfs or the like), which a virtual \
                 machine cannot share: leave that mount out, or mount all of /proc, /sys or /dev, \
                 which are the virtual machine's own",
            )
        } else {
            None
        }
    }

    fn is_kernels(&self) -> bool {
        // What cannot be told is not shared. A devtmpfs says that it is a tmpfs.
        let device = |path: &str| std::fs::metadata(path).map(|found| found.dev()).ok();
        let is_dev = device("/dev") != device("/") && device("/dev") == Some(self.metadata.dev());
        is_dev
            || !fstatfs(&self.file)
                .is_ok_and(|found| !OF_THE_KERNEL.contains(&found.filesystem_type().0))
    }
}

impl AsFd for Pinned {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether a path is where the kernel shows itself, on the host and in the guest.
fn is_of_the_kernel(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"]
        .iter()
        .any(|root| path.starts_with(root))
}

/// The kind of volume of this very pod that this is, or is in:
/// `…/pods/<uid>/volumes/<kind>/<name>`, as the kubelet names it. Another pod's is a directory of
/// the host like any other.
fn kind_of_volume<'a>(source: &'a Path, uid: Option<&str>) -> Option<&'a str> {
    let uid = uid?;
    let parts: Vec<_> = source.iter().collect();
    let mut found = parts.windows(4);
    let found = found.find(|window| window[..3] == ["pods", uid, "volumes"])?;
    found[3].to_str()
}

/// Whether the kubelet alone, or the pod itself, writes what is there.
fn is_kubelets(source: &Path) -> bool {
    let parts: Vec<_> = source.iter().collect();
    parts.windows(4).any(|window| {
        let kind = window[3].to_str().unwrap_or_default();
        let own = kind == EMPTY_DIR || CONFIGURATION.contains(&kind);
        window[0] == "pods" && window[2] == "volumes" && own
    })
}

/// An emptyDir of medium Memory: the kubelet has mounted a tmpfs there, which the guest has of its
/// own instead. It stays until the sandbox ends: a container that is restarted finds its data.
fn memory_volume(source: &Pinned, uid: Option<&str>) -> Option<Storage> {
    let Pinned {
        file,
        is_at,
        metadata,
    } = source;
    let is_volume = is_at.parent()?.file_name()? == EMPTY_DIR;
    if !metadata.is_dir() || !is_volume || kind_of_volume(is_at, uid) != Some(EMPTY_DIR) {
        return None;
    }
    let parent = openat(file, "..", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    if File::from(parent).metadata().ok()?.dev() == metadata.dev() {
        return None;
    }
    let size = source.tmpfs_size()?;
    let mut options = vec![
        format!("size={size}"),
        format!("mode={:o}", metadata.permissions().mode() & 0o7777),
    ];
    if metadata.gid() != 0 {
        options.push(format!("fsgid={}", metadata.gid()));
    }
    Some(Storage {
        driver: "ephemeral".to_owned(),
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        options,
        mount_point: format!(
            "{GUEST_SANDBOX}/ephemeral/{}",
            is_at.file_name()?.to_string_lossy()
        ),
        shared: true,
        ..Default::default()
    })
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
