//! What QEMU and each helper is confined to: the jail that [`launcher`] puts it in.
//!
//! Their roots hold the program, its libraries as the dynamic loader lists them, and what the
//! program reads by path. Everything else comes by descriptor.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use launcher::{Entry, Filter, Jail, User, libraries};
use serde::{Deserialize, Serialize};

use crate::cache::FileKey;
use crate::deadlines::LIBRARIES_LISTED;
use crate::error::{Doing, Error, Result};
use crate::process::stdout_of;

/// Descriptors that QEMU and vhost-device-vsock may have open; the latter has one for each
/// connection.
const DESCRIPTORS: u64 = 8192;

/// Threads of a sandbox's user: virtual CPUs, disks' workers, the daemon's own.
const THREADS: u64 = 1024;

/// linux/capability.h: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETPCAP (which
/// virtiofsd gives up with the rest of its bounding set), SETFCAP.
const FILE_SERVER: [u32; 8] = [0, 1, 3, 4, 6, 7, 8, 31];

/// CAP_MKNOD counts in the host's own user namespace only.
const MKNOD: u32 = 27;

/// Where a jail has the guest's kernel and initramfs.
pub(crate) const KERNEL: &str = "/kernel";
pub(crate) const INITRAMFS: &str = "/initramfs";

/// Where a jail has the directory that is served.
pub(crate) const SHARED: &str = "/shared";

/// Where a jail has the sockets of vhost-device-vsock.
pub(crate) const SOCKETS: &str = "/sockets";

/// How a sandbox's processes are confined.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// An empty directory of the sandbox's.
    pub mount_point: PathBuf,
    /// User and group of QEMU and vhost-device-vsock.
    pub uid: u32,
    /// The user namespace of the file server of volumes ([`launcher::user_namespace`]); the host's
    /// own if none.
    pub user_namespace: Option<Arc<OwnedFd>>,
    /// Whether system calls are filtered, by us and by QEMU itself.
    pub seccomp: bool,
}

/// What a program needs in its root beside its own files.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Needed {
    /// The index of libraries, as it was when the loader listed them: it is made anew whenever a
    /// library is installed.
    index: (i64, i64),
    files: Vec<PathBuf>,
}

impl Confinement {
    /// QEMU's jail. `files` are what it reads by path: data, modules.
    ///
    /// # Errors
    /// Its libraries cannot be listed.
    pub(crate) async fn qemu(
        &self,
        binary: &Path,
        cache_dir: &Path,
        kvm: bool,
        boot: Vec<Entry>,
    ) -> Result<Jail> {
        let mut root = program(binary, cache_dir).await?;
        root.extend(boot);
        // By which it finds out what kind of locks the kernel has: without one, two disks may be of
        // one file.
        root.push(Entry::Device("/dev/null".into()));
        for path in modules(binary)
            .into_iter()
            .chain(["/sys/kernel/mm/transparent_hugepage/hpage_pmd_size".into()])
        {
            if path.exists() {
                root.push(Entry::ReadOnly(path));
            }
        }
        if kvm {
            root.push(Entry::Device("/dev/kvm".into()));
        }
        Ok(self.jail(self.own_user(), root, Filter::Qemu))
    }

    /// virtiofsd's jail. With `nodes` containers may make device nodes in what is served, which
    /// takes the host's own user namespace; they cannot be opened there.
    ///
    /// # Errors
    /// Its libraries cannot be listed.
    pub(crate) async fn file_server(
        &self,
        binary: &Path,
        cache_dir: &Path,
        dir: &Path,
        nodes: bool,
    ) -> Result<Jail> {
        let mut root = program(binary, cache_dir).await?;
        root.push(Entry::OwnDescriptors);
        root.push(Entry::Directory {
            from: dir.to_owned(),
            to: SHARED.into(),
        });
        let mut capabilities = FILE_SERVER.to_vec();
        if nodes {
            capabilities.push(MKNOD);
        }
        let user_namespace = self.user_namespace.clone().filter(|_| !nodes);
        let user = User::Root {
            capabilities,
            user_namespace,
        };
        let mut jail = self.jail(user, root, Filter::FileServer);
        // The guest's cached inodes each have a descriptor: as many as there may be.
        jail.limits
            .retain(|(limit, _)| *limit != libc::RLIMIT_NOFILE);
        Ok(jail)
    }

    /// vhost-device-vsock's jail, with the directory of its sockets.
    ///
    /// # Errors
    /// Its libraries cannot be listed.
    pub(crate) async fn vsock_daemon(
        &self,
        binary: &Path,
        cache_dir: &Path,
        sockets: &Path,
    ) -> Result<Jail> {
        let mut root = program(binary, cache_dir).await?;
        root.push(Entry::Directory {
            from: sockets.to_owned(),
            to: SOCKETS.into(),
        });
        Ok(self.jail(self.own_user(), root, Filter::VsockDaemon))
    }

    fn own_user(&self) -> User {
        User::Own {
            uid: self.uid,
            gid: self.uid,
        }
    }

    fn jail(&self, user: User, root: Vec<Entry>, filter: Filter) -> Jail {
        Jail {
            mount_point: self.mount_point.clone(),
            user,
            root,
            filter: self.seccomp.then_some(filter),
            limits: vec![
                (libc::RLIMIT_NOFILE, DESCRIPTORS),
                (libc::RLIMIT_NPROC, THREADS),
                (libc::RLIMIT_MSGQUEUE, 0),
            ],
        }
    }
}

/// A program with its loader and libraries.
async fn program(binary: &Path, cache_dir: &Path) -> Result<Vec<Entry>> {
    let index = fs::metadata(libraries::INDEX)
        .map(|index| (index.mtime(), index.mtime_nsec()))
        .unwrap_or_default();
    let key = FileKey::of(binary)?;
    let known: Option<Needed> = key
        .load(cache_dir, "libraries")
        .filter(|known: &Needed| known.index == index);
    let files = match known {
        Some(known) => known.files,
        None => {
            let files = list(binary).await?;
            key.store(
                cache_dir,
                "libraries",
                &Needed {
                    index,
                    files: files.clone(),
                },
            );
            files
        }
    };
    Ok(std::iter::once(binary.to_owned())
        .chain(files)
        .map(Entry::ReadOnly)
        .collect())
}

async fn list(binary: &Path) -> Result<Vec<PathBuf>> {
    let doing = || format!("find the libraries of {}", binary.display());
    let loader = libraries::interpreter(binary).map_err(|error| {
        Error::Unsupported(format!(
            "{error}: only a program itself can be confined, not a script that starts it"
        ))
    })?;
    let Some(loader) = loader else {
        return Ok(Vec::new());
    };
    let Some(text) = binary.to_str() else {
        return Err(Error::Unsupported(format!(
            "the path {} is not UTF-8",
            binary.display()
        )));
    };
    let printed = stdout_of(&loader, &["--list", text], LIBRARIES_LISTED).await?;
    let mut files = libraries::listed(&printed).doing(doing)?;
    files.push(loader);
    files.push(libraries::INDEX.into());
    files.retain(|file| file.exists());
    Ok(files)
}

/// Directories of QEMU's modules, which it finds from where it is itself.
fn modules(binary: &Path) -> Vec<PathBuf> {
    let Some(prefix) = binary.parent().and_then(Path::parent) else {
        return Vec::new();
    };
    ["lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"]
        .map(|dir| prefix.join(dir))
        .into()
}
