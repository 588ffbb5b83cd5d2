//! Mounts below the host's share, looked up again: the guest's kernel forgets of them what the host
//! has taken away, and the host's file server then closes what it holds.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use guest_protocol::GUEST_SHARE;
use tokio::time::Instant;

use crate::deadlines;
use crate::error::{Context, Result};
use crate::spawn::in_child;

/// Looks up each mount below the share. Whether it is still there makes no difference.
///
/// # Errors
/// A file server of the host that does not answer in time.
pub async fn look_up_mounts() -> Result<()> {
    let table = "/proc/self/mountinfo";
    let mounts = below_share(&fs::read(table).context(|| format!("read {table}"))?);
    if mounts.is_empty() {
        return Ok(());
    }
    let by = Instant::now() + deadlines::SHARE_LOOKUPS;
    // A lookup waits for the host's file server.
    in_child(by, move || {
        for mount in mounts {
            let _ = fs::metadata(mount);
        }
        Ok(())
    })
    .await
}

/// The mount points below the share that a mountinfo file (proc(5)) names.
fn below_share(mountinfo: &[u8]) -> Vec<PathBuf> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| Some(unescaped(line.split(|byte| *byte == b' ').nth(4)?)))
        .filter(|path| path.starts_with(GUEST_SHARE) && path != Path::new(GUEST_SHARE))
        .collect()
}

/// Space, tab, line end and backslash are written as three octal digits.
fn unescaped(mut text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    while let Some((first, rest)) = text.split_first() {
        let digits = rest.get(..3).filter(|_| *first == b'\\');
        let byte = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        path.push(byte.unwrap_or(*first));
        text = if byte.is_some() { &rest[3..] } else { rest };
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_the_share_are_found() {
        let table = format!(
            "21 1 0:19 / / rw - rootfs rootfs rw\n\
             22 21 0:30 / {GUEST_SHARE} rw - virtiofs kataShared rw\n\
             23 22 0:31 / {GUEST_SHARE}/a\\040b\\134 rw shared:4 - virtiofs kataShared rw\n\
             24 21 0:32 / {GUEST_SHARE}-else rw - tmpfs tmpfs rw\n\
             25\n"
        );
        let found = [PathBuf::from(format!("{GUEST_SHARE}/a b\\"))];
        assert_eq!(below_share(table.as_bytes()), found);
    }
}
