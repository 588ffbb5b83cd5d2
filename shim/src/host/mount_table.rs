//! The kernel's table of mounts, as bytes: whoever may name a mount point, a guest that renames the
//! directory above one too, can put any byte into it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Where it is, as this process sees it.
    pub point: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// The file system's own options; of a cgroup hierarchy they name its controllers.
    pub options: String,
}

/// What is mounted in this thread's namespace.
///
/// # Errors
/// The table cannot be read.
pub fn read() -> io::Result<Vec<Mounted>> {
    Ok(parse(&std::fs::read("/proc/thread-self/mountinfo")?))
}

/// The lines of a mountinfo file (proc(5)); one that is not understood is passed over.
pub fn parse(mountinfo: &[u8]) -> Vec<Mounted> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
            // Optional fields are in between, as many as there are.
            let end = fields.iter().position(|field| *field == b"-")?;
            let text =
                |index: usize| Some(String::from_utf8_lossy(fields.get(index)?).into_owned());
            Some(Mounted {
                point: unescape(fields.get(4)?),
                kind: text(end + 1)?,
                options: text(end + 3)?,
            })
        })
        .collect()
}

/// Blanks, tabs, line feeds and backslashes are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| byte == b'\\');
        let octal = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(octal.unwrap_or(byte));
        rest = &rest[if octal.is_some() { 4 } else { 1 }..];
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_of_a_mount_point_is_read() {
        let text = b"36 35 98:0 / /run/a\\040b\\134c rw shared:1 master:2 - ext4 /dev/x rw,y\n\
            garbage\n37 36 0:5 / /mnt/\xff\\ rw - proc proc rw\n";
        let (first, second) = (OsString::from("/run/a b\\c"), b"/mnt/\xff\\".to_vec());
        let mounted = |point: OsString, kind: &str, options: &str| Mounted {
            point: point.into(),
            kind: kind.into(),
            options: options.into(),
        };
        assert_eq!(
            parse(text),
            [
                mounted(first, "ext4", "rw,y"),
                mounted(OsString::from_vec(second), "proc", "rw")
            ]
        );
    }

    #[test]
    fn this_system_has_a_root_and_a_proc() {
        let table = read().unwrap();
        assert!(table.iter().any(|mount| mount.point.as_os_str() == "/"));
        assert!(table.iter().any(|mount| mount.kind == "proc"));
    }
}
