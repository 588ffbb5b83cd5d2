//! A user id for each sandbox, from a range that is nobody else's.

use std::io;
use std::path::Path;

use sys::byte_lock::ByteLocks;

/// The ids from `first` on, `count` of them; users and groups alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    /// The lowest.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// An id that no other sandbox has while this lives.
#[derive(Debug)]
pub struct UidLease {
    /// User and group id.
    pub uid: u32,
    /// Holds the lock of this number.
    _locks: ByteLocks,
}

impl UidRange {
    /// Takes a free id. `file` is where sandboxes keep out of each other's way; it stays empty.
    ///
    /// # Errors
    /// The file cannot be opened, or all ids are taken.
    pub fn lease(self, file: &Path) -> io::Result<UidLease> {
        let locks = ByteLocks::open(file)?;
        // Where to begin to look: a number that was used lately is the least likely one.
        let begin = std::process::id() % self.count.max(1);
        for offset in 0..self.count {
            let uid = self.first + (begin + offset) % self.count;
            if locks.try_take(uid.into())? {
                return Ok(UidLease { uid, _locks: locks });
            }
        }
        let last = self.first + self.count.saturating_sub(1);
        Err(io::Error::other(format!(
            "every user id from {} to {last} has a sandbox",
            self.first
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_sandboxes_have_one_id_and_a_full_range_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let range = UidRange {
            first: 1000,
            count: 3,
        };
        let file = dir.path().join("uids");
        let leases: Vec<_> = (0..3).map(|_| range.lease(&file).unwrap()).collect();
        let mut uids: Vec<_> = leases.iter().map(|lease| lease.uid).collect();
        uids.sort_unstable();
        assert_eq!(uids, [1000, 1001, 1002]);
        assert!(
            range
                .lease(&file)
                .unwrap_err()
                .to_string()
                .contains("from 1000 to 1002")
        );
        drop(leases);
        range.lease(&file).unwrap();
    }
}
