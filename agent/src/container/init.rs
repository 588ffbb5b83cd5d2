//! What a container's first process does between clone and exec.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::child;
use super::plan::Plan;
use super::rootfs;
use crate::spawn::{Handle, Step, Tried};
use crate::stdio::ChildStdio;
use crate::sys::check;

/// What the agent opened for the child.
pub struct Inherited {
    /// The three descriptors, or none with a terminal.
    pub stdio: Option<ChildStdio>,
    /// Namespaces to join, with their flags and names.
    pub join: Vec<(OwnedFd, libc::c_int, &'static str)>,
}

/// Becomes the container: namespaces, file system, terminal, identity; says it is ready; and once
/// told to go on, becomes the container's program.
pub fn run(plan: &Plan, inherited: &Inherited, handle: &mut Handle) -> Step<Infallible> {
    let keep: Vec<i32> = inherited
        .join
        .iter()
        .map(|(fd, ..)| fd.as_raw_fd())
        .chain(inherited.fds())
        .collect();
    handle.close_others(&keep);
    // Containers of the pod may look into this process.
    crate::gate::forget();
    child::detach()?;
    // Before it is somebody else: the file belongs to root.
    child::set_oom_score(plan.process.oom_score_adj)?;
    if plan.user_maps.is_some() {
        // The agent writes the maps; without them this process is nobody.
        handle.wait();
        child::become_root()?;
    }
    for (fd, flag, name) in &inherited.join {
        // SAFETY: an open descriptor and a plain number.
        check(unsafe { libc::setns(fd.as_raw_fd(), *flag) }.into())
            .tried(format_args!("join {name} namespace"))?;
    }
    if !plan.join.iter().any(|join| join.kind == "cgroup") {
        // Not with clone3: the child would see the agent's cgroup as its root.
        // SAFETY: a plain number.
        check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into())
            .tried("unshare the cgroup namespace")?;
    }
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).tried(format_args!("set hostname {name}"))?;
    }
    rootfs::write_sysctls(&plan.sysctls)?;
    child::set_umask(0);
    rootfs::build(plan)?;
    child::set_umask(0o022);
    let stdio = match &inherited.stdio {
        Some(stdio) => {
            child::take_stdio(stdio, plan.process.uid)?;
            None
        }
        None => {
            let console = child::open_console(&plan.process)?;
            bind_console(&console.name)?;
            Some(console.master)
        }
    };
    let path = child::assume(&plan.process)?;
    handle.ready(stdio.as_ref().map(AsRawFd::as_raw_fd));
    drop(stdio);
    child::exec(&plan.process, &path)
}

impl Inherited {
    fn fds(&self) -> impl Iterator<Item = i32> {
        self.stdio
            .iter()
            .flat_map(|stdio| stdio.iter().map(AsRawFd::as_raw_fd))
    }
}

/// Lets /dev/console be the container's terminal.
fn bind_console(terminal: &str) -> Step<()> {
    let console = "/dev/console";
    if fs::symlink_metadata(console).is_err() {
        fs::write(console, "").tried("create /dev/console")?;
    }
    let place = nix::fcntl::open(
        console,
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .tried("open /dev/console")?;
    let terminal = CString::new(terminal)
        .map_err(std::io::Error::from)
        .tried("name of the terminal")?;
    let tree = rootfs::clone_tree(&terminal, false, 0).tried("bind /dev/console")?;
    rootfs::attach(tree.as_fd(), place.as_fd()).tried("bind /dev/console")
}
