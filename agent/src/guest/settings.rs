//! The guest machine itself: CPUs, memory, random numbers.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::sleep;

use crate::error::{Error, Result, What};
use crate::sys::check;

const ONLINE_TRIES: usize = 100;
const ONLINE_PAUSE: Duration = Duration::from_millis(50);

/// Brings `cpus` more CPUs online, as they appear, and then what there is of memory.
///
/// # Errors
/// When fewer CPUs come within five seconds.
pub async fn online(cpus: u32, memory: bool) -> Result<()> {
    let mut missing = cpus;
    for _ in 0..ONLINE_TRIES {
        for file in offline("/sys/devices/system/cpu", "cpu", "online", "0") {
            if missing > 0 && fs::write(file, "1").is_ok() {
                missing -= 1;
            }
        }
        if missing == 0 {
            break;
        }
        sleep(ONLINE_PAUSE).await;
    }
    if missing > 0 {
        return Err(Error::Failed(format!(
            "{missing} of {cpus} CPUs did not come online"
        )));
    }
    if memory {
        for file in offline("/sys/devices/system/memory", "memory", "state", "offline") {
            let _ = fs::write(file, "online");
        }
    }
    Ok(())
}

/// Control files of the numbered things in `dir` that say `off`.
fn offline(dir: &str, prefix: &str, file: &str, off: &str) -> Vec<PathBuf> {
    let numbered = |name: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.parse::<u32>().is_ok())
    };
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(numbered))
        .map(|entry| entry.path().join(file))
        .filter(|path| fs::read_to_string(path).is_ok_and(|state| state.trim() == off))
        .collect()
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
    fs::write(device, data).what(|| format!("write {device}"))?;
    let file = fs::File::open(device).what(|| format!("open {device}"))?;
    let bits = i32::try_from(data.len().saturating_mul(8)).unwrap_or(i32::MAX);
    let ioctls = || -> io::Result<()> {
        // SAFETY: ioctls of the random device with arguments of their types.
        unsafe {
            check(libc::ioctl(file.as_raw_fd(), RNDADDTOENTCNT, &raw const bits).into())?;
            check(libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG).into())?;
        }
        Ok(())
    };
    ioctls().what(|| "reseed the random numbers".into())
}
