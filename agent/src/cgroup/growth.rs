//! How much memory the machine should have, by what its containers use.
//!
//! A machine that can have more slows its containers down before the memory is used up, because
//! they could use it up faster than more can come:
//!
//! ```text
//!  0            what containers use           memory.high      MemTotal
//!  ├──────────────────────────────┬───────────────┤◀── RESERVE ──▶│
//!                      less than GROW_BELOW available: more is asked for
//! ```
//!
//! Beyond `memory.high` the kernel takes back what it can, such as copies of files, and lets the
//! containers wait for the rest; `memory.events.local` tells of it. Where no more can come, there is
//! no such limit, and the kernel kills as it does on a host.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_protocol::protocols::memory::MemoryState;
use tokio::io::Interest;
use tokio::time::{Instant, sleep, timeout};

use crate::cgroup::watch;
use crate::deadlines;
use crate::error::{Context, Result};
use crate::guest::boot::CONTAINERS;
use crate::log::log;

const MIB: u64 = 1 << 20;

/// What is left to the kernel, and to the containers until they are slowed down: the kernel does so
/// by how much they are above their limit, in proportion to it. At least this, and an eighth.
///
/// The kernel's own part is what describes added memory (a 64th of it) and maps it. It comes from
/// the memory of the boot alone as long as what is added is at most three times as much
/// (`memory_hotplug.auto_movable_ratio`): so much of it, and half as much again, has to be free
/// there before the first addition.
const RESERVE: u64 = 64 * MIB;

/// What the containers may use in any case before they are slowed down: to set a limit that they
/// are above already takes as long as the kernel needs to take memory away.
const SLACK: u64 = 8 * MIB;

/// Whether one mapping may be larger than all memory: 0, it may not; 1, it may.
const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";

/// Memory grows when less than one of so many parts of it is available.
const GROW_BELOW: u64 = 4;

/// The least that it grows by. Beyond that by half of what there is.
const LEAST_GROWTH: u64 = 512 * MIB;

/// The least that it shrinks by. It keeps as much available as is used, so that it does not have to
/// grow again at once.
const LEAST_SHRINKING: u64 = 256 * MIB;

/// Bytes of memory in the machine.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    total: u64,
    free: u64,
    /// Free, or used for what can be read again (`MemAvailable`).
    available: u64,
    /// What the containers use.
    used: u64,
}

impl Memory {
    fn read(group: &Path) -> Result<Memory> {
        let file = "/proc/meminfo";
        let text = fs::read_to_string(file).context(|| format!("read {file}"))?;
        let current = group.join("memory.current");
        let used =
            fs::read_to_string(&current).context(|| format!("read {}", current.display()))?;
        Ok(Memory {
            used: used.trim().parse().unwrap_or_default(),
            ..Memory::parse(&text)
        })
    }

    fn parse(meminfo: &str) -> Memory {
        let bytes = |key: &str| {
            let mut lines = meminfo.lines();
            let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            let kib = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            kib.unwrap_or_default().saturating_mul(1024)
        };
        Memory {
            total: bytes("MemTotal"),
            free: bytes("MemFree"),
            available: bytes("MemAvailable"),
            used: 0,
        }
    }

    /// From here on the containers wait.
    fn high(&self) -> u64 {
        let reserve = RESERVE.max(self.total / 8);
        self.used + self.free.saturating_sub(reserve).max(SLACK)
    }

    /// What is left when so many bytes have gone.
    fn without(self, bytes: u64) -> Memory {
        Memory {
            total: self.total.saturating_sub(bytes),
            free: self.free.saturating_sub(bytes),
            ..self
        }
    }

    /// By how many bytes it should grow.
    fn missing(&self) -> u64 {
        if self.available >= self.total / GROW_BELOW {
            return 0;
        }
        (self.total / 2).max(LEAST_GROWTH)
    }

    /// By how many bytes it could shrink, of those that can be taken away.
    fn idle(&self, removable: u64) -> u64 {
        let used = self.total.saturating_sub(self.available);
        let idle = self.available.saturating_sub(used).min(removable);
        if idle < LEAST_SHRINKING { 0 } else { idle }
    }
}

/// Waits until the machine should have more or less memory, or for a while, and returns by how many
/// MiB its size should change. `group` is the cgroup above all containers.
///
/// # Errors
/// A kernel without the memory controller. Nobody is slowed down then.
pub async fn need(group: &Path, state: &MemoryState) -> Result<i64> {
    if state.can_grow {
        match missing(group).await {
            Ok(0) => {}
            Ok(mib) => return Ok(mib),
            Err(error) => {
                set_high(group, None)?;
                return Err(error);
            }
        }
    } else {
        set_high(group, None)?;
        promise_what_can_come(group, false);
        sleep(deadlines::MEMORY_NEED).await;
    }
    let memory = Memory::read(group)?;
    let idle = memory.idle(state.can_shrink_mib.saturating_mul(MIB));
    if idle > 0 {
        // While it goes the containers must not use it.
        set_high(group, Some(memory.without(idle)))?;
    }
    Ok(-mib(idle))
}

/// Slows the containers down when little is left, and waits for that, or for a while.
async fn missing(group: &Path) -> Result<i64> {
    let path = group.join("memory.events.local");
    let events = watch(&path).context(|| format!("watch {}", path.display()))?;
    let end = Instant::now() + deadlines::MEMORY_NEED;
    while Instant::now() < end {
        let memory = Memory::read(group)?;
        set_high(group, Some(memory))?;
        promise_what_can_come(group, true);
        let missing = memory.missing();
        if missing > 0 {
            return Ok(mib(missing));
        }
        let slowed = async {
            let ready = events.ready(Interest::PRIORITY).await;
            ready.map(|mut ready| ready.clear_ready())
        };
        let slowed = timeout(deadlines::MEMORY_LOOK, slowed).await;
        if let Ok(slowed) = slowed {
            slowed.context(|| format!("watch {}", path.display()))?;
            // Copies of files are taken back again and again while a large one is read.
            sleep(deadlines::MEMORY_PAUSE).await;
        }
    }
    Ok(0)
}

/// The limit for what there is, or none.
fn set_high(group: &Path, memory: Option<Memory>) -> Result<()> {
    let file = group.join("memory.high");
    let value = memory.map_or("max".into(), |memory| memory.high().to_string());
    fs::write(&file, &value).context(|| format!("set {} to {value}", file.display()))
}

/// The kernel refuses a mapping that is larger than what there is now, unless it is told to refuse
/// none.
fn promise_what_can_come(group: &Path, can_grow: bool) {
    /// The 1 is ours.
    static PROMISED: AtomicBool = AtomicBool::new(false);
    // As a process the agent runs on somebody's own system.
    if group != Path::new(CONTAINERS) {
        return;
    }
    let now = fs::read_to_string(OVERCOMMIT).unwrap_or_default();
    let (from, to) = if can_grow { ("0", "1") } else { ("1", "0") };
    if now.trim() == from && (can_grow || PROMISED.load(Ordering::Relaxed)) {
        match fs::write(OVERCOMMIT, to) {
            Ok(()) => PROMISED.store(can_grow, Ordering::Relaxed),
            Err(error) => log!("set {OVERCOMMIT} to {to}: {error}"),
        }
    }
}

fn mib(bytes: u64) -> i64 {
    i64::try_from(bytes / MIB).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_much_there_is() {
        let text = "MemTotal:         499048 kB\nMemFree:          440000 kB\n\
                    MemAvailable:     430000 kB\nHugetlb:               0 kB\n";
        let memory = Memory::parse(text);
        assert_eq!(memory.total, 499_048 * 1024);
        assert_eq!(memory.free, 440_000 * 1024);
        assert_eq!(memory.available, 430_000 * 1024);
    }

    fn memory(total: u64, available: u64) -> Memory {
        let (total, available) = (total * MIB, available * MIB);
        Memory {
            total,
            available,
            free: available / 2,
            used: total - available,
        }
    }

    #[test]
    fn more_is_missing_when_little_is_available() {
        assert_eq!(memory(480, 400).missing(), 0);
        assert_eq!(memory(480, 119).missing(), 512 * MIB);
        assert_eq!(memory(4000, 100).missing(), 2000 * MIB);
    }

    #[test]
    fn containers_are_slowed_down_while_something_is_free() {
        let memory = memory(480, 400);
        assert_eq!(memory.high(), (80 + 200 - 64) * MIB);
        assert_eq!(super::Memory { free: 0, ..memory }.high(), 88 * MIB);
        assert_eq!(memory.without(100 * MIB).high(), (80 + 100 - 64) * MIB);
    }

    #[test]
    fn what_is_idle_can_go_but_as_much_as_is_used_stays() {
        assert_eq!(memory(2000, 1900).idle(1500 * MIB), 1500 * MIB);
        assert_eq!(memory(2000, 1400).idle(1500 * MIB), 800 * MIB);
        assert_eq!(memory(2000, 1100).idle(1500 * MIB), 0, "not worth it");
        assert_eq!(memory(2000, 500).idle(1500 * MIB), 0);
        assert_eq!(memory(480, 470).idle(0), 0);
        // After that it does not grow at once.
        let after = memory(1200, 600);
        assert_eq!((after.missing(), after.idle(1 << 40)), (0, 0));
    }
}
