//! What a process that joins a running container does between clone and exec.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sched::{CloneFlags, setns};

use super::child::{self, Stdio};
use super::plan::ProcessPlan;
use super::spawn::{Handle, Step, Tried};

/// Joins the container of the process behind `target` and becomes the program. The pid namespace is
/// the agent's business: it counts for children only, so it was set before this process was made.
pub fn run(
    plan: &ProcessPlan,
    target: BorrowedFd<'_>,
    user_namespace: bool,
    stdio: Option<&Stdio>,
    handle: &mut Handle,
) -> Step<Infallible> {
    // Containers of the pod may look into this process.
    crate::gate::forget();
    child::detach()?;
    child::set_oom_score(plan.oom_score_adj)?;
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if user_namespace {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    setns(target, flags).tried("join the container's namespaces")?;
    if user_namespace {
        child::become_root()?;
    }
    child::set_umask(0o022);
    let console = match stdio {
        Some(stdio) => {
            child::take_stdio(stdio, plan.uid)?;
            None
        }
        None => Some(child::open_console(plan)?),
    };
    let program = child::assume(plan)?;
    if let Some(console) = console {
        handle.close_others(&[console.master.as_raw_fd()]);
        handle.ready(Some(console.master.as_raw_fd()));
    }
    child::exec(plan, &program)
}
