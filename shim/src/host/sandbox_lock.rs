//! One lock for each sandbox of the node. Whoever makes its server has it, and whoever undoes what
//! a dead server left: so neither takes the other's for its own, and a sandbox whose left-overs
//! hang holds up no other one.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sys::byte_lock::ByteLocks;

use crate::deadlines::{SANDBOX_LOCK, SANDBOX_LOCK_LOOK_AGAIN};
use crate::error::{Error, IoContext, Result};

/// The lock, until it is dropped or the process ends.
#[derive(Debug)]
pub struct SandboxLock(#[expect(dead_code, reason = "holds the lock")] ByteLocks);

impl SandboxLock {
    /// Takes the lock of the sandbox whose state directory is `state_dir`.
    ///
    /// # Errors
    /// `DEADLINE_EXCEEDED`: somebody else has it.
    pub fn take(state_dir: &Path) -> Result<SandboxLock> {
        SandboxLock::take_within(state_dir, SANDBOX_LOCK)
    }

    /// The same, with another deadline.
    ///
    /// # Errors
    /// `DEADLINE_EXCEEDED`: somebody else has it.
    pub fn take_within(state_dir: &Path, deadline: Duration) -> Result<SandboxLock> {
        let end = Instant::now() + deadline;
        loop {
            match SandboxLock::try_take(state_dir)? {
                Some(lock) => return Ok(lock),
                None if Instant::now() < end => std::thread::sleep(SANDBOX_LOCK_LOOK_AGAIN),
                None => {
                    return Err(Error::deadline(format!(
                        "another start has had the lock of {} for {deadline:?}",
                        state_dir.display()
                    )));
                }
            }
        }
    }

    /// Takes the lock if nobody else has it.
    pub fn try_take(state_dir: &Path) -> Result<Option<SandboxLock>> {
        let cache = state_dir.parent().unwrap_or(state_dir).join("cache");
        let doing = || format!("lock {}", state_dir.display());
        let mut private = DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(&cache).doing(doing)?;
        let locks = ByteLocks::open(&cache.join("locks")).doing(doing)?;
        let taken = locks.try_take(number(state_dir)).doing(doing)?;
        Ok(taken.then_some(SandboxLock(locks)))
    }
}

/// The directory's name is a digest in hexadecimal; 60 bits of it are as good as a name.
fn number(state_dir: &Path) -> u64 {
    let name = state_dir.file_name().unwrap_or_default().to_string_lossy();
    let digits = name.get(..15).unwrap_or(&name);
    u64::from_str_radix(digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sandbox_is_locked_once_and_holds_up_no_other() {
        let root = tempfile::tempdir().unwrap();
        let [one, other] = [
            "0123456789abcdef0123456789abcdef",
            "f123456789abcdef0123456789abcdef",
        ]
        .map(|name| root.path().join(name));
        let held = SandboxLock::take(&one).unwrap();
        assert!(SandboxLock::try_take(&one).unwrap().is_none());
        assert!(SandboxLock::try_take(&other).unwrap().is_some());
        drop(held);
        assert!(SandboxLock::try_take(&one).unwrap().is_some());
    }
}
