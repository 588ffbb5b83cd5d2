//! What a process that joins a running container does between clone and exec.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::child;
use super::plan::ProcessPlan;
use crate::spawn::{Handle, Step, Tried};
use crate::stdio::ChildStdio;
use crate::sys::check;

/// Joins the container of the process behind `target` and becomes the program. The pid namespace is
/// the agent's business: it counts for children only, so it was set before this process was made.
pub fn run(
    plan: &ProcessPlan,
    target: BorrowedFd<'_>,
    user_namespace: bool,
    stdio: Option<&ChildStdio>,
    handle: &mut Handle,
) -> Step<Infallible> {
    // Containers of the pod may look into this process.
    crate::gate::forget();
    child::detach()?;
    child::set_oom_score(plan.oom_score_adj)?;
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if user_namespace {
        flags |= libc::CLONE_NEWUSER;
    }
    // SAFETY: an open descriptor and a plain number.
    check(unsafe { libc::setns(target.as_raw_fd(), flags) }.into())
        .tried("join the container's namespaces")?;
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
