//! The key of a boot: what the shim shows at each connection to the agent, so that nobody else on
//! the host gets one.
//!
//! AF_VSOCK knows no permission: every local user can dial a guest. The shim sends the key as the
//! answer to the agent's ready notice, which only the listener that the kernel command line names
//! can get, and from then on as the first line of each connection that it makes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};

/// Kernel command line parameter (`=1`) by which the shim says that it will send a key. An agent
/// without it, and one that is not ours, takes connections as they come.
pub const KEY_PARAMETER: &str = "cofferdam.key";

const MAGIC: &[u8] = b"cofferdam-key/1 ";

/// Hexadecimal digits of 256 bits.
const DIGITS: usize = 64;

/// Bytes of the line, the newline included.
pub const KEY_LINE: usize = MAGIC.len() + DIGITS + 1;

/// A key, as the line that shows it. It is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_LINE]);

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> io::Result<Key> {
        let mut bytes = [0; DIGITS / 2];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let mut line = [b'\n'; KEY_LINE];
        line[..MAGIC.len()].copy_from_slice(MAGIC);
        for (byte, digits) in bytes.iter().zip(line[MAGIC.len()..].chunks_mut(2)) {
            for (digit, half) in digits.iter_mut().zip([byte >> 4, byte & 15]) {
                *digit = b"0123456789abcdef"[usize::from(half)];
            }
        }
        Ok(Key(line))
    }

    /// The line.
    pub fn line(&self) -> &[u8; KEY_LINE] {
        &self.0
    }

    /// Reads a line; none if it is not one.
    pub fn parse(line: [u8; KEY_LINE]) -> Option<Key> {
        let digits = line.strip_prefix(MAGIC)?.strip_suffix(b"\n")?;
        let plain = digits
            .iter()
            .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        plain.then_some(Key(line))
    }

    /// Whether a line shows this key. Takes as long for a wrong one as for the right one.
    pub fn is_shown_by(&self, line: &[u8; KEY_LINE]) -> bool {
        self.0
            .iter()
            .zip(line)
            .fold(0, |all, (ours, theirs)| all | (ours ^ theirs))
            == 0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_back_and_no_other_line_is_one() {
        let key = Key::random().unwrap();
        let read = Key::parse(*key.line()).unwrap();
        assert!(read.is_shown_by(key.line()));
        assert!(!read.is_shown_by(Key::random().unwrap().line()));
        for at in [0, MAGIC.len(), KEY_LINE - 1] {
            let mut line = *key.line();
            line[at] = b'x';
            assert!(!key.is_shown_by(&line) && Key::parse(line).is_none());
        }
        assert_eq!(format!("{key:?}"), "Key");
    }
}
