//! Files and directories of the host that the guest sees: each is bound below the shared directory
//! once, however many of the sandbox's containers use it.
//!
//! Once, because a file that the guest saw through two binds would be two files to it: containers
//! of one pod could neither meet at a unix socket of a shared volume, nor lock each other's files,
//! nor share a mapping. So a container that only reads and one that writes have the same bind too,
//! which can be written to from then on; the guest keeps the reader from it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use guest_protocol::GUEST_SHARE;

use crate::container::volumes::Pinned;
use crate::error::{IoContext, Result};
use crate::host::dir::{Dir, Entry};
use crate::host::mounts::{self, Bind};

/// Directory of the binds below the shared one. No container's id begins with a dot.
const NAME: &str = ".volumes";

/// All that a sandbox shares.
#[derive(Debug)]
pub struct SharedVolumes {
    /// For volumes, and root file systems that others may change.
    pub share: Arc<Dir>,
    /// For root file systems that are a container's own.
    pub rootfs: Arc<Dir>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    live: HashMap<ShareKey, Weak<SharedVolume>>,
}

/// The source as it was found: a path may lead elsewhere later.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ShareKey {
    source: PathBuf,
    device: u64,
    inode: u64,
    how: Bind,
}

/// One bind. The last user's drop takes it off.
#[derive(Debug)]
pub struct SharedVolume {
    place: Entry,
    /// Where that is.
    dir: Arc<Dir>,
    name: String,
    guest: String,
    /// Whether the bind is one to read from only.
    made_read_only: bool,
}

impl SharedVolumes {
    /// Nothing yet, below the directories that the guest sees.
    pub fn new(share: Dir, rootfs: Dir) -> SharedVolumes {
        SharedVolumes {
            share: share.into(),
            rootfs: rootfs.into(),
            inner: Mutex::default(),
        }
    }

    /// A number that no other use of this sandbox gets.
    pub fn next_id(&self) -> u64 {
        let mut inner = sys::lock(&self.inner);
        inner.next += 1;
        inner.next
    }

    /// The bind of a source, made if there is none like it. It may be one that the guest cannot
    /// write to yet, or one that it can, whatever `how` says.
    ///
    /// # Errors
    /// One line that names the source or the place.
    pub fn get(&self, source: &Pinned, how: Bind) -> Result<Arc<SharedVolume>> {
        let metadata = &source.metadata;
        let key = ShareKey {
            source: source.is_at.clone(),
            device: metadata.dev(),
            inode: metadata.ino(),
            how,
        };
        let number = self.next_id();
        // Held over the bind, which waits for nothing: two containers that are made at a time get
        // the same one.
        let mut inner = sys::lock(&self.inner);
        if let Some(share) = inner.live.get(&key).and_then(Weak::upgrade) {
            return Ok(share);
        }
        let other = ShareKey {
            how: Bind {
                read_only: !how.read_only,
                ..how
            },
            ..key.clone()
        };
        // What is mounted below stays as writable as it is, for which host and guest have to differ.
        if !how.read_only_below
            && let Some(share) = inner.live.get(&other).and_then(Weak::upgrade)
            && !share.has_mounts_below()?
        {
            return Ok(share);
        }
        let (dir, name) = (Arc::new(self.share.make(NAME)?), number.to_string());
        // From here on its drop undoes it.
        let place = Entry::new(&dir, &name);
        let share = Arc::new(SharedVolume {
            place,
            dir: dir.clone(),
            name: name.clone(),
            guest: format!("{GUEST_SHARE}/{NAME}/{name}"),
            made_read_only: how.read_only,
        });
        let bound = if metadata.is_dir() {
            mounts::bind(source, &dir.make(&name)?, how)
        } else {
            mounts::bind(source, &dir.make_file(&name)?, how)
        };
        bound.doing(|| format!("share {}", source.is_at.display()))?;
        inner.live.retain(|_, share| share.strong_count() > 0);
        inner.live.insert(key, Arc::downgrade(&share));
        Ok(share)
    }
}

impl SharedVolume {
    /// Where the guest sees it.
    pub fn guest_path(&self) -> &str {
        &self.guest
    }

    /// Its path below the shared directory, if it was made for readers only.
    pub fn read_only_path(&self) -> Option<&Path> {
        let below = Path::new(&self.guest).strip_prefix(GUEST_SHARE).ok();
        below.filter(|_| self.made_read_only)
    }

    /// What is bound there, as the guest has it.
    ///
    /// # Errors
    /// One line that names the place.
    pub fn open(&self) -> Result<File> {
        self.dir.hold(&self.name)
    }

    /// Whether anything is mounted below it.
    ///
    /// # Errors
    /// The mount table cannot be read.
    pub fn has_mounts_below(&self) -> Result<bool> {
        mounts::has_mounts_below(&self.place.path())
    }
}
