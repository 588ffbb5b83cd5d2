//! What the host sets of the running machine: CPUs and memory, random numbers, the clock.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use sys::check;
use tokio::time::{Instant, sleep};

use crate::deadlines;
use crate::error::{Context, Error, Result};

/// What is to come online.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Online {
    Cpus,
    CpusAndMemory,
}

const CPUS: &str = "/sys/devices/system/cpu";

/// Brings CPUs online as they appear, until `cpus` of them are, and then all memory that is there.
///
/// # Errors
/// Fewer CPUs that come in time.
pub async fn online(cpus: u32, wanted: Online) -> Result<()> {
    let by = Instant::now() + deadlines::CPUS_ONLINE;
    // By the kernel's own list: a CPU that has just appeared has no control file yet.
    let missing = || -> Result<usize> { Ok((cpus as usize).saturating_sub(online_cpus()?)) };
    let missing = loop {
        // Bringing a CPU online may take long: those that appear meanwhile have one more pass.
        let is_last = Instant::now() >= by;
        let off = offline(CPUS, "cpu", "online", "0").into_iter();
        let came = off
            .take(missing()?)
            .filter(|file| fs::write(file, "1").is_ok());
        let nothing_came = came.count() == 0;
        let missing = missing()?;
        if missing == 0 || is_last {
            break missing;
        }
        if nothing_came {
            sleep(deadlines::CPUS_ONLINE_PAUSE).await;
        }
    };
    if missing > 0 {
        return Err(Error::Failed(format!(
            "{missing} of {cpus} CPUs did not come online"
        )));
    }
    if wanted == Online::CpusAndMemory {
        for file in offline("/sys/devices/system/memory", "memory", "state", "offline") {
            let _ = fs::write(file, "online");
        }
    }
    Ok(())
}

fn online_cpus() -> Result<usize> {
    let file = format!("{CPUS}/online");
    let list = fs::read_to_string(&file).context(|| format!("read {file}"))?;
    Ok(listed(&list))
}

/// How many CPUs a list of the kernel's has, such as `0-2,7`.
fn listed(list: &str) -> usize {
    let count = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        Some((last + 1).saturating_sub(first))
    };
    list.trim().split(',').filter_map(count).sum()
}

/// Control files of the numbered entries of `dir` that contain `off`.
fn offline(dir: &str, prefix: &'static str, file: &str, off: &str) -> Vec<PathBuf> {
    numbered(dir, prefix)
        .map(|entry| entry.join(file))
        .filter(|path| fs::read_to_string(path).is_ok_and(|state| state.trim() == off))
        .collect()
}

/// The entries of `dir` that are `prefix` and a number.
fn numbered(dir: &str, prefix: &'static str) -> impl Iterator<Item = PathBuf> {
    let is_numbered = move |name: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.parse::<u32>().is_ok())
    };
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_numbered))
        .map(|entry| entry.path())
}

/// Mixes `data` into the kernel's random numbers and makes it reseed from them: a clone must not
/// repeat its template.
///
/// # Errors
/// No data, or the kernel's refusal.
pub fn reseed(data: &[u8]) -> Result<()> {
    // linux/random.h
    const RNDADDTOENTCNT: libc::Ioctl = 0x4004_5201;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    if data.is_empty() {
        return Err(Error::Invalid("no random data was sent".into()));
    }
    let device = "/dev/random";
    fs::write(device, data).context(|| format!("write {device}"))?;
    let file = fs::File::open(device).context(|| format!("open {device}"))?;
    let bits = i32::try_from(data.len().saturating_mul(8)).unwrap_or(i32::MAX);
    let ioctls = || -> io::Result<()> {
        // SAFETY: ioctls of the random device with arguments of their types.
        unsafe {
            check(libc::ioctl(file.as_raw_fd(), RNDADDTOENTCNT, &raw const bits).into())?;
            check(libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG).into())?;
        }
        Ok(())
    };
    ioctls().context(|| "reseed the random numbers".into())
}

/// Sets the guest's clock (CLOCK_REALTIME) to a time since 1970. The monotonic clocks, and with
/// them every deadline of the agent, stay as they are.
///
/// # Errors
/// Numbers that are not a time since 1970; a time that the kernel refuses, because it is before the
/// boot.
pub fn set_clock(seconds: i64, microseconds: i64) -> Result<()> {
    if seconds < 0 || !(0..1_000_000).contains(&microseconds) {
        return Err(Error::Invalid(format!(
            "{seconds} s and {microseconds} µs are not a time since 1970"
        )));
    }
    let time = libc::timeval {
        tv_sec: seconds,
        tv_usec: microseconds,
    };
    // SAFETY: the time lives over the call; no time zone.
    check(unsafe { libc::settimeofday(&raw const time, std::ptr::null()) }.into())
        .context(|| format!("set the clock to {seconds} s since 1970"))
        .map(|_| ())
}

/// The guest's clock (CLOCK_REALTIME) in nanoseconds since 1970.
///
/// # Errors
/// A time that has more of them than fit.
pub fn read_clock() -> Result<i64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .context(|| "read the clock".into())?;
    now.tv_sec()
        .checked_mul(1_000_000_000)
        .and_then(|seconds| seconds.checked_add(now.tv_nsec()))
        .ok_or_else(|| Error::Failed("the clock is centuries away from 1970".into()))
}

/// Changes the guest's clock by some nanoseconds, at once or `slowly`: then no time comes twice,
/// and none is left out. A later call replaces what is left of a slow one. Whole microseconds of
/// it: to count in nanoseconds is a state of the kernel's that others in the guest would see.
///
/// # Errors
/// The kernel's: a time that is before the boot.
pub fn correct_clock(nanoseconds: i64, slowly: bool) -> Result<()> {
    let microseconds = nanoseconds.div_euclid(1000);
    // SAFETY: an all-zero `timex` is one that changes nothing.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    if slowly {
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        change.offset = microseconds;
    } else {
        change.modes = libc::ADJ_SETOFFSET;
        // Of a time before zero the microseconds count up all the same (adjtimex(2)).
        change.time.tv_sec = microseconds.div_euclid(1_000_000);
        change.time.tv_usec = microseconds.rem_euclid(1_000_000);
    }
    // SAFETY: the struct lives over the call.
    check(unsafe { libc::adjtimex(&raw mut change) }.into())
        .context(|| format!("change the clock by {nanoseconds} ns"))
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_of_a_list_are_counted() {
        for (list, count) in [("0\n", 1), ("0-1\n", 2), ("0,2-3,7\n", 4), ("\n", 0)] {
            assert_eq!(listed(list), count, "{list:?}");
        }
    }
}
