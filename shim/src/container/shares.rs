//! Files and directories of the host that the guest sees: each is bound below the shared directory once, however many of
//! the sandbox's containers use it.
//!
//! Once, because a file that the guest saw through two binds would be two files to it: containers of one pod could
//! neither meet at a unix socket of a shared volume, nor lock each other's files, nor share a mapping.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use agent_client::GUEST_SHARE;

use super::volumes::Pinned;
use crate::error::{IoContext, Result};
use crate::sandbox::mounts::{self, Bind};

/// Directory of the binds below the shared one. No container's id begins with a dot.
const NAME: &str = ".volumes";

/// All that a sandbox shares.
#[derive(Debug)]
pub struct Shares {
    dir: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    live: HashMap<Key, Weak<Share>>,
}

/// The source as it was found: a path may lead elsewhere later.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    source: PathBuf,
    device: u64,
    inode: u64,
    how: Bind,
}

/// One bind. The last user's drop takes it off.
#[derive(Debug)]
pub struct Share {
    place: PathBuf,
    guest: String,
}

impl Shares {
    /// Nothing yet, below the directory that the guest sees.
    pub fn new(shared_dir: &Path) -> Shares {
        Shares { dir: shared_dir.join(NAME), inner: Mutex::default() }
    }

    /// A number that no other use of this sandbox gets.
    pub fn number(&self) -> u64 {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.next += 1;
        inner.next
    }

    /// The bind of a source, made if there is none like it.
    ///
    /// # Errors
    /// One line that names the source or the place.
    pub fn get(&self, source: &Pinned, how: Bind) -> Result<Arc<Share>> {
        let metadata = &source.metadata;
        let key = Key { source: source.is_at.clone(), device: metadata.dev(), inode: metadata.ino(), how };
        let number = self.number();
        // Held over the bind, which waits for nothing: two containers that are made at a time get the same one.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = inner.live.get(&key).and_then(Weak::upgrade) {
            return Ok(share);
        }
        let place = self.dir.join(number.to_string());
        let doing = || format!("make {}", place.display());
        if metadata.is_dir() {
            std::fs::create_dir_all(&place).doing(doing)?;
        } else {
            std::fs::create_dir_all(&self.dir).and_then(|()| File::create_new(&place)).doing(doing)?;
        }
        // From here on its drop undoes it.
        let share = Arc::new(Share { place, guest: format!("{GUEST_SHARE}/{NAME}/{number}") });
        mounts::bind(&source.path(), &share.place, how)
            .map_err(|error| error.context(format!("share {}", source.is_at.display())))?;
        inner.live.retain(|_, share| share.strong_count() > 0);
        inner.live.insert(key, Arc::downgrade(&share));
        Ok(share)
    }
}

impl Share {
    /// Where the guest sees it.
    pub fn guest_path(&self) -> &str {
        &self.guest
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let removed = mounts::unmount_tree(&self.place).and_then(|()| {
            let doing = || format!("remove {}", self.place.display());
            // What is left is an empty mount point, one or the other.
            std::fs::remove_dir(&self.place).or_else(|_| std::fs::remove_file(&self.place)).doing(doing)
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "a volume is shared until the sandbox ends");
        }
    }
}
