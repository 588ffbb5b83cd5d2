//! What a container's first process does between clone and exec.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use sys::mount::{Extent, attach, clone_tree_at};

use super::super::plan::Plan;
use super::rootfs;
use crate::spawn::Handle;
use crate::spawn::step::{Step, StepContext};
use crate::stdio::ChildStdio;

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
    super::detach()?;
    // While it is root, to whom the file belongs.
    super::set_oom_score(plan.process.oom_score_adj)?;
    if plan.user_maps.is_some() {
        // The agent writes the maps; until then this process has the overflow ids.
        handle.wait_for_go();
        super::become_root()?;
    }
    for (fd, flag, name) in &inherited.join {
        setns(fd, CloneFlags::from_bits_retain(*flag))
            .context(format_args!("join {name} namespace"))?;
    }
    if !plan.join.iter().any(|join| join.kind == "cgroup") {
        // Not with clone3: the child would see the agent's cgroup as its root.
        unshare(CloneFlags::CLONE_NEWCGROUP).context("unshare the cgroup namespace")?;
    }
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).context(format_args!("set hostname {name}"))?;
    }
    rootfs::write_sysctls(&plan.sysctls)?;
    super::set_umask(0);
    rootfs::build(plan)?;
    super::set_umask(plan.process.umask);
    let stdio = match &inherited.stdio {
        Some(stdio) => {
            super::take_stdio(stdio, plan.process.uid)?;
            None
        }
        None => {
            let console = super::open_console(&plan.process)?;
            bind_console(&console.name)?;
            Some(console.master)
        }
    };
    let path = super::take_identity(&plan.process)?;
    handle.report_ready(stdio.as_ref().map(AsRawFd::as_raw_fd));
    handle.wait_for_go();
    drop(stdio);
    super::exec_program(&plan.process, &path)
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
        fs::write(console, "").context("create /dev/console")?;
    }
    let place = nix::fcntl::open(
        console,
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .context("open /dev/console")?;
    let terminal = CString::new(terminal)
        .map_err(std::io::Error::from)
        .context("name of the terminal")?;
    let tree = clone_tree_at(&terminal, Extent::Mount).context("bind /dev/console")?;
    attach(&tree, &place).context("bind /dev/console")
}
