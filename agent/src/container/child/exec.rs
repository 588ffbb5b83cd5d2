//! What a process that joins a running container does between clone and exec.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sched::{CloneFlags, setns};

use super::super::plan::ProcessPlan;
use crate::spawn::Handle;
use crate::spawn::step::{Step, StepContext};
use crate::stdio::ChildStdio;

/// Which user namespace a container's processes are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserNamespace {
    OfGuest,
    Own,
}

/// Joins the container of the process behind `target` and becomes the program. The pid namespace
/// is not joined here: it counts for children only, so the agent set it before the clone.
pub fn run(
    plan: &ProcessPlan,
    target: BorrowedFd<'_>,
    user_namespace: UserNamespace,
    stdio: Option<&ChildStdio>,
    handle: &mut Handle,
) -> Step<Infallible> {
    // Containers of the pod may look into this process.
    crate::gate::forget();
    super::detach()?;
    super::set_oom_score(plan.oom_score_adj)?;
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if user_namespace == UserNamespace::Own {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    setns(target, flags).context("join the container's namespaces")?;
    if user_namespace == UserNamespace::Own {
        super::become_root()?;
    }
    super::set_umask(plan.umask);
    let console = match stdio {
        Some(stdio) => {
            super::take_stdio(stdio, plan.uid)?;
            None
        }
        None => Some(super::open_console(plan)?),
    };
    let program = super::take_identity(plan)?;
    if let Some(console) = console {
        handle.close_others(&[console.master.as_raw_fd()]);
        handle.report_ready(Some(console.master.as_raw_fd()));
        handle.wait_for_go();
    }
    super::exec_program(plan, &program)
}
