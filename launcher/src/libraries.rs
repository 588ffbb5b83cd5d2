//! Which files a program needs beside itself: its interpreter and libraries, as the interpreter
//! itself finds them.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What the C library opens by itself when a thread ends early.
const UNWINDER: &str = "libgcc_s.so.1";

/// Index of all libraries, by which the interpreter finds those in unusual places.
pub const INDEX: &str = "/etc/ld.so.cache";

/// The interpreter of an ELF program for x86-64; none if it is linked statically.
///
/// # Errors
/// The file cannot be read, or is not such a program.
pub fn interpreter(program: &Path) -> io::Result<Option<PathBuf>> {
    let file = std::fs::File::open(program)?;
    let not = || {
        io::Error::other(format!(
            "{} is not an ELF program for x86-64",
            program.display()
        ))
    };
    let mut header = [0; 64];
    let at = |bytes: &mut [u8], offset: u64| {
        std::os::unix::fs::FileExt::read_exact_at(&file, bytes, offset)
    };
    at(&mut header, 0).map_err(|_| not())?;
    // elf(5): magic and 64 bits, little endian; e_machine 62.
    if header[..6] != [0x7f, b'E', b'L', b'F', 2, 1] || header[18..20] != [62, 0] {
        return Err(not());
    }
    let word = |bytes: &[u8], offset: usize| {
        let bytes = bytes
            .get(offset..offset + 8)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(not)
    };
    let (table, count) = (
        word(&header, 32)?,
        u16::from_le_bytes([header[56], header[57]]),
    );
    for index in 0..u64::from(count) {
        let mut entry = [0; 56];
        at(&mut entry, table + index * 56).map_err(|_| not())?;
        // PT_INTERP
        if entry[..4] == [3, 0, 0, 0] {
            let (offset, length) = (word(&entry, 8)?, word(&entry, 32)?.min(4096));
            let mut path = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            at(&mut path, offset).map_err(|_| not())?;
            let path = path.strip_suffix(b"\0").unwrap_or(&path);
            return Ok(Some(PathBuf::from(OsStr::from_bytes(path))));
        }
    }
    Ok(None)
}

/// The libraries in what `interpreter --list program` prints, and the one that the C library may
/// open later.
///
/// # Errors
/// A library that is not found, by its name.
pub fn listed(printed: &str) -> io::Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in printed.lines().map(str::trim) {
        let path = match line.split_once(" => ") {
            Some((name, path)) if path.starts_with("not found") => {
                return Err(io::Error::other(format!("its library {name} is not found")));
            }
            Some((_, path)) => path,
            None => line,
        };
        let path = path.rsplit_once(" (0x").map_or(path, |(path, _)| path);
        if path.starts_with('/') {
            libraries.push(PathBuf::from(path));
        }
    }
    let unwinder = libraries
        .iter()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.as_bytes().starts_with(b"libc.so"))
        })
        .and_then(|libc| Some(libc.parent()?.join(UNWINDER)))
        .filter(|path| path.exists() && !libraries.contains(path));
    libraries.extend(unwinder);
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_of_a_shell_is_found_and_a_script_has_none() {
        let shell = interpreter(Path::new("/bin/sh")).unwrap().unwrap();
        assert!(shell.is_absolute() && shell.exists(), "{shell:?}");
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "#!/bin/sh\n").unwrap();
        assert!(
            interpreter(script.path())
                .unwrap_err()
                .to_string()
                .contains("not an ELF program")
        );
    }

    #[test]
    fn libraries_are_read_as_the_interpreter_prints_them() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /no/such/dir/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            listed(text).unwrap(),
            [
                PathBuf::from("/no/such/dir/libc.so.6"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert_eq!(
            listed("\tstatically linked\n").unwrap(),
            Vec::<PathBuf>::new()
        );
        assert!(
            listed("\tlibx.so => not found\n")
                .unwrap_err()
                .to_string()
                .contains("libx.so")
        );
    }
}
