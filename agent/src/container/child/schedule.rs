//! What a process takes on that its privileges are needed for and its file system is not: how it is
//! scheduled, and as which kind of system it presents itself.

use sys::check;

use super::super::plan::ProcessPlan;
use crate::spawn::step::{Step, StepContext};

/// linux/ioprio.h
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Takes on the scheduling and the personality of the plan, where it has any.
pub fn take_on(plan: &ProcessPlan) -> Step<()> {
    if let Some(scheduler) = &plan.scheduler {
        let attributes = std::ptr::from_ref(scheduler);
        // SAFETY: the attributes live over the call and say how long they are.
        check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, attributes, 0) })
            .context(format_args!("set the scheduler to {scheduler:?}"))?;
    }
    if let Some(priority) = plan.io_priority {
        // SAFETY: integers only.
        check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) })
            .context(format_args!("set the I/O priority to {priority:#x}"))?;
    }
    if let Some(personality) = plan.personality {
        // SAFETY: an integer only.
        check(unsafe { libc::personality(personality) }.into())
            .context(format_args!("set the personality to {personality:#x}"))?;
    }
    Ok(())
}
