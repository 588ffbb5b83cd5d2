//! Starts QEMU, virtiofsd and vhost-device-vsock so that one of them that was taken over finds
//! nothing of the host.
//!
//! A [`Launch`] says what to run, a [`Jail`] what it is left with: a user, a root directory that
//! holds only what the program needs, namespaces, system calls, limits. [`spawn`] opens and
//! computes everything that can fail or allocate, clones, and the child ([`child`]) only makes
//! system calls. They come in this order:
//!
//! 1. descriptors, cgroups, OOM score, network namespace: while /proc and /sys are there and root
//!    is root
//! 2. an empty tmpfs becomes the root, with binds of what the program needs, read-only
//! 3. limits, user namespace, capabilities, user, no_new_privs, seccomp filter
//! 4. the death signal, a look whether the parent still lives, exec
//!
//! It fails closed: a step that is refused ends the child with status [`FAILED`] and one line on
//! its stderr.

mod child;
pub mod filter;
pub mod libraries;
mod root;
mod task_program;
mod uids;
mod userns;

use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use filter::Filter;
pub use root::Entry;
pub use sys::process::Started;
use sys::process::pidfd_open;
pub use task_program::task_program;
pub use uids::{UidLease, UidRange};
pub use userns::user_namespace;

/// Exit status of a child that could not be confined, or whose program cannot be executed.
pub const FAILED: i32 = 126;

/// What to run. It gets an empty environment and `/` as its working directory, and dies with the
/// thread that spawned it.
#[derive(Debug)]
pub struct Launch {
    /// Path of the program; not looked up in PATH.
    pub program: PathBuf,
    /// The program itself, if it is in no directory; `program` is only its name then.
    pub image: Option<OwnedFd>,
    /// Its arguments, without its own name.
    pub args: Vec<OsString>,
    /// Descriptors it inherits, under the numbers they have here (3 and up); all others are closed.
    pub fds: Vec<OwnedFd>,
    /// Where its stdout goes; `/dev/null` if nowhere.
    pub stdout: Option<OwnedFd>,
    /// Where its stderr goes.
    pub stderr: OwnedFd,
    /// `cgroup.procs` files it is written to before anything else (one for cgroup v2, several for
    /// v1).
    pub cgroup_procs: Vec<PathBuf>,
    /// The network namespace that it runs in; without one the caller's, or for a jail an empty one.
    pub netns: Option<Arc<OwnedFd>>,
    /// How gladly the kernel kills it when memory runs out (proc(5), `oom_score_adj`); inherited if
    /// none. A value that needs a capability which the caller lacks is left alone.
    pub oom_score_adj: Option<i32>,
    /// What it is confined to; nothing if none.
    pub jail: Option<Jail>,
}

/// What a program is confined to. It always gets mount, pid, ipc and uts namespaces of its own,
/// no_new_privs, no core dumps, and an empty, read-only root with `root` in it.
#[derive(Clone, Debug)]
pub struct Jail {
    /// An empty directory of the caller's, which the new root is mounted on, in the child's
    /// namespace only.
    pub mount_point: PathBuf,
    /// Who it runs as.
    pub user: User,
    /// What is in its root.
    pub root: Vec<Entry>,
    /// Which system calls it may make; all if none.
    pub filter: Option<Filter>,
    /// Limits (getrlimit(2)), soft and hard alike; one that is lower already stays.
    pub limits: Vec<(Limit, u64)>,
}

/// A resource of setrlimit(2).
pub type Limit = libc::__rlimit_resource_t;

/// Who a program runs as.
#[derive(Clone, Debug)]
pub enum User {
    /// A user of its own, without any capability.
    Own {
        /// User id.
        uid: u32,
        /// Group id; no supplementary groups.
        gid: u32,
    },
    /// Root with no more than these capabilities.
    Root {
        /// By the numbers of linux/capability.h.
        capabilities: Vec<u32>,
        /// The user namespace in which it has them ([`user_namespace`]); the caller's if none.
        user_namespace: Option<Arc<OwnedFd>>,
    },
}

/// Everything that the child needs, ready to be used without an allocation.
struct Plan {
    exec: CString,
    image: Option<OwnedFd>,
    /// Holds what `argv_pointers` points to.
    _argv: Vec<CString>,
    /// The last one is null.
    argv_pointers: Vec<*const libc::c_char>,
    inherited: Vec<RawFd>,
    stdio: [RawFd; 3],
    cgroups: Vec<File>,
    netns: Option<Arc<OwnedFd>>,
    oom_score: Option<CString>,
    parent: OwnedFd,
    jail: Option<PlannedJail>,
}

struct PlannedJail {
    mount_point: CString,
    steps: Vec<root::Step>,
    user: User,
    filter: Option<Vec<libc::sock_filter>>,
    limits: Vec<(Limit, u64)>,
}

/// Starts a program. What is wrong with its place is found out by the child, whose stderr then says
/// so.
///
/// # Errors
/// The program, a file that its root is to hold or a cgroup is not there; the filter cannot be
/// built; no more processes.
pub fn spawn(launch: Launch) -> io::Result<Started> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let stdout = launch
        .stdout
        .as_ref()
        .map_or(null.as_raw_fd(), AsRawFd::as_raw_fd);
    let inherited: Vec<RawFd> = launch.fds.iter().map(AsRawFd::as_raw_fd).collect();
    if inherited.iter().any(|fd| *fd <= 2) {
        return Err(io::Error::other(
            "descriptors 0 to 2 must be open before anything is started",
        ));
    }
    if launch.image.is_none() {
        // Found out here, where there is somebody to tell.
        File::open(&launch.program)?;
    }
    let exec = c_string(&launch.program)?;
    let mut argv = vec![exec.clone()];
    for argument in &launch.args {
        argv.push(CString::new(argument.as_bytes())?);
    }
    let mut argv_pointers: Vec<_> = argv.iter().map(|argument| argument.as_ptr()).collect();
    argv_pointers.push(std::ptr::null());
    let open = |path: &PathBuf| {
        let file = OpenOptions::new().write(true).open(path);
        file.map_err(|error| {
            io::Error::new(error.kind(), format!("open {}: {error}", path.display()))
        })
    };
    let jail = launch.jail.as_ref().map(PlannedJail::new).transpose()?;
    let plan = Plan {
        exec,
        image: launch.image,
        _argv: argv,
        argv_pointers,
        inherited,
        stdio: [null.as_raw_fd(), stdout, launch.stderr.as_raw_fd()],
        cgroups: launch
            .cgroup_procs
            .iter()
            .map(open)
            .collect::<io::Result<_>>()?,
        netns: launch.netns.clone(),
        oom_score: launch
            .oom_score_adj
            .map(|score| CString::new(score.to_string()))
            .transpose()?,
        parent: pidfd_open(std::process::id().cast_signed())?,
        jail,
    };
    clone(&plan)
}

impl PlannedJail {
    fn new(jail: &Jail) -> io::Result<PlannedJail> {
        let owner = match jail.user {
            User::Own { uid, gid } => (uid, gid),
            User::Root { .. } => (0, 0),
        };
        Ok(PlannedJail {
            mount_point: c_string(&jail.mount_point)?,
            steps: root::steps(&jail.mount_point, &jail.root, owner)?,
            user: jail.user.clone(),
            filter: jail.filter.as_ref().map(Filter::compile).transpose()?,
            limits: jail.limits.clone(),
        })
    }
}

fn clone(plan: &Plan) -> io::Result<Started> {
    let mut flags = 0;
    if plan.jail.is_some() {
        flags |= libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        if plan.netns.is_none() {
            flags |= libc::CLONE_NEWNET;
        }
    }
    // SAFETY: the child only makes system calls until its exec.
    match unsafe { sys::process::fork(flags, None) }? {
        None => child::run(plan),
        Some(started) => Ok(started),
    }
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
