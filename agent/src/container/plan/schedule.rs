//! How the kernel schedules a process and its reads and writes, and as which kind of system it
//! presents itself: numbers of system calls, from the names of a spec.

use guest_protocol::protocols::cofferdam::{IOPriority, Scheduler};

use crate::error::{Error, Result};

/// `struct sched_attr` of sched_setattr(2), its first version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerPlan {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

// linux/sched.h
const POLICIES: [(&str, u32); 6] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", 6),
];
const FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 1),
    ("SCHED_FLAG_RECLAIM", 2),
    ("SCHED_FLAG_DL_OVERRUN", 4),
    ("SCHED_FLAG_KEEP_POLICY", 8),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

// linux/ioprio.h
const CLASSES: [(&str, libc::c_int); 3] = [
    ("IOPRIO_CLASS_RT", 1),
    ("IOPRIO_CLASS_BE", 2),
    ("IOPRIO_CLASS_IDLE", 3),
];
const CLASS_SHIFT: libc::c_int = 13;
const IO_PRIORITIES: u32 = 8;

// linux/personality.h
const PERSONALITIES: [(&str, libc::c_ulong); 2] = [("LINUX", 0), ("LINUX32", 8)];

fn number<T: Copy>(table: &[(&str, T)], name: &str, what: &str) -> Result<T> {
    let found = table.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, number)| *number)
        .ok_or_else(|| Error::Invalid(format!("unknown {what} {name:?}")))
}

/// What sched_setattr(2) gets.
///
/// # Errors
/// A name that nobody knows.
pub fn scheduler(from: &Scheduler) -> Result<SchedulerPlan> {
    let mut flags = 0;
    for flag in &from.flags {
        flags |= number(&FLAGS, flag, "flag of the scheduler")?;
    }
    Ok(SchedulerPlan {
        size: size_of::<SchedulerPlan>() as u32,
        policy: number(&POLICIES, &from.policy, "scheduling policy")?,
        flags,
        nice: from.nice,
        priority: from.priority,
        runtime: from.runtime,
        deadline: from.deadline,
        period: from.period,
    })
}

/// What ioprio_set(2) gets.
///
/// # Errors
/// A class that nobody knows, or a priority that it does not have.
pub fn io_priority(from: &IOPriority) -> Result<libc::c_int> {
    let class = number(&CLASSES, &from.class, "class of I/O priority")?;
    match libc::c_int::try_from(from.priority) {
        Ok(priority) if from.priority < IO_PRIORITIES => Ok((class << CLASS_SHIFT) | priority),
        _ => Err(Error::Invalid(format!(
            "I/O priority {} is not one of 0 to {}",
            from.priority,
            IO_PRIORITIES - 1
        ))),
    }
}

/// What personality(2) gets; none for an empty name.
///
/// # Errors
/// A name that nobody knows.
pub fn personality(domain: &str) -> Result<Option<libc::c_ulong>> {
    if domain.is_empty() {
        return Ok(None);
    }
    number(&PERSONALITIES, domain, "personality").map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_kernels_numbers() {
        let plan = scheduler(&Scheduler {
            policy: "SCHED_BATCH".into(),
            nice: 5,
            flags: vec!["SCHED_FLAG_RESET_ON_FORK".into()],
            ..Default::default()
        });
        let plan = plan.unwrap();
        assert_eq!(
            (plan.size, plan.policy, plan.nice, plan.flags),
            (48, 3, 5, 1)
        );
        let priority = |class: &str, priority| {
            io_priority(&IOPriority {
                class: class.into(),
                priority,
                ..Default::default()
            })
        };
        assert_eq!(priority("IOPRIO_CLASS_BE", 7).unwrap(), 0x4007);
        assert!(priority("IOPRIO_CLASS_BE", 8).is_err());
        assert!(priority("IOPRIO_CLASS_VIP", 0).is_err());
        assert_eq!(personality("LINUX32").unwrap(), Some(8));
        assert_eq!(personality("").unwrap(), None);
    }

    #[test]
    fn a_name_that_nobody_knows_is_said() {
        let error = scheduler(&Scheduler {
            policy: "SCHED_ISO".into(),
            ..Default::default()
        });
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "unknown scheduling policy \"SCHED_ISO\"");
        assert!(personality("SOLARIS").is_err());
    }
}
