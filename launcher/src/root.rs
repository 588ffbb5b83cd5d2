//! What a confined program finds at `/`, and the steps that put it there.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sys::mount::{Attributes, Extent, clone_tree, set_attributes};

use crate::c_string;

/// One thing in a program's root.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A file or directory of the host at the same path, read-only.
    ReadOnly(PathBuf),
    /// An open file of the host, read-only.
    Descriptor {
        /// Opened before, so that nobody can put another file in its place.
        file: Arc<OwnedFd>,
        /// Where it is in the root.
        to: PathBuf,
    },
    /// A directory of the host, as writable as it is there, with what is mounted below it now and,
    /// if it is a shared mount, later.
    Directory {
        /// On the host.
        from: PathBuf,
        /// In the root.
        to: PathBuf,
    },
    /// A character device at the same path, which the program's user may read and write.
    Device(PathBuf),
    /// What a file server needs of /proc: its own descriptors and mounts, and the system's limit of
    /// descriptors.
    OwnDescriptors,
    /// A directory of the host as the root itself, with what is mounted below it. Nothing in it can
    /// be executed.
    Root {
        /// Opened before.
        directory: Arc<OwnedFd>,
        /// Nothing can be written to it.
        read_only: bool,
    },
    /// A file or directory of the host at a path in that root, which somebody else may change
    /// meanwhile: its links are followed in the root only, and where nothing is there nothing is
    /// mounted. Comes after [`Entry::Root`].
    Within {
        /// Opened before; with what is mounted below it now and, if it is a shared mount, later.
        from: Arc<OwnedFd>,
        /// In the root.
        to: PathBuf,
        /// Nothing can be written to it.
        read_only: bool,
    },
}

/// Where a bind comes from.
#[derive(Debug)]
pub(crate) enum Source {
    Path(CString),
    /// A mount that is nowhere yet (open_tree(2)): a descriptor's own mount is one of the parent's
    /// namespace, from which the child cannot take any more.
    Tree(OwnedFd),
}

/// What the child does, one after the other. Paths are absolute and below the mount point.
#[derive(Debug)]
pub(crate) enum Step {
    Directory(CString),
    File(CString),
    Node {
        path: CString,
        device: libc::dev_t,
        owner: (u32, u32),
    },
    Bind {
        source: Source,
        to: CString,
        attributes: Attributes,
        extent: Extent,
    },
    MountProc(CString),
    Unmount(CString),
    /// In the place of the root.
    Root(OwnedFd),
    /// At a path that is looked for in the root, as it is then.
    Within {
        tree: OwnedFd,
        to: CString,
    },
}

const LOCKED: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// Directory in the root for the instance of proc that [`Entry::OwnDescriptors`] takes its files
/// from.
const WHOLE_PROC: &str = "/.proc";

/// The steps that make a root of `entries`.
///
/// # Errors
/// A file that is not there, by its path.
pub(crate) fn steps(
    mount_point: &Path,
    entries: &[Entry],
    owner: (u32, u32),
) -> io::Result<Vec<Step>> {
    let mut steps = Steps {
        mount_point,
        made: BTreeSet::new(),
        steps: Vec::new(),
    };
    for entry in entries {
        steps.add(entry, owner)?;
    }
    Ok(steps.steps)
}

struct Steps<'a> {
    mount_point: &'a Path,
    made: BTreeSet<PathBuf>,
    steps: Vec<Step>,
}

impl Steps<'_> {
    fn add(&mut self, entry: &Entry, owner: (u32, u32)) -> io::Result<()> {
        match entry {
            Entry::ReadOnly(path) => {
                let is_dir = metadata(path)?.is_dir();
                let extent = if is_dir { Extent::Tree } else { Extent::Mount };
                let source = Source::Path(c_string(path)?);
                let attributes = LOCKED | libc::MOUNT_ATTR_RDONLY;
                self.bind(source, path, is_dir, attributes, extent)
            }
            Entry::Descriptor { file, to } => {
                let attributes = LOCKED | libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC;
                let tree = Source::Tree(clone_tree(file, Extent::Mount)?);
                self.bind(tree, to, false, attributes, Extent::Mount)
            }
            Entry::Directory { from, to } => {
                let attributes = LOCKED | libc::MOUNT_ATTR_NOEXEC;
                let source = Source::Path(c_string(from)?);
                self.bind(source, to, true, attributes, Extent::Tree)
            }
            Entry::Device(path) => {
                let metadata = metadata(path)?;
                if !metadata.file_type().is_char_device() {
                    return Err(io::Error::other(format!(
                        "{} is not a character device",
                        path.display()
                    )));
                }
                self.parents(path)?;
                self.steps.push(Step::Node {
                    path: self.below(path)?,
                    device: metadata.rdev(),
                    owner,
                });
                Ok(())
            }
            Entry::OwnDescriptors => {
                // In a pid namespace of its own the program is number 1.
                let whole = Path::new(WHOLE_PROC);
                self.directory(whole)?;
                self.steps.push(Step::MountProc(self.below(whole)?));
                for (from, to, is_dir) in [
                    ("1/fd", "/proc/self/fd", true),
                    ("1/mountinfo", "/proc/self/mountinfo", false),
                    ("sys/fs/nr_open", "/proc/sys/fs/nr_open", false),
                ] {
                    let source = Source::Path(self.below(&whole.join(from))?);
                    self.bind(
                        source,
                        Path::new(to),
                        is_dir,
                        LOCKED | libc::MOUNT_ATTR_RDONLY,
                        Extent::Mount,
                    )?;
                }
                self.steps.push(Step::Unmount(self.below(whole)?));
                Ok(())
            }
            Entry::Root {
                directory,
                read_only,
            } => {
                self.steps.push(Step::Root(slave(directory, *read_only)?));
                Ok(())
            }
            Entry::Within {
                from,
                to,
                read_only,
            } => {
                self.steps.push(Step::Within {
                    tree: slave(from, *read_only)?,
                    to: c_string(to)?,
                });
                Ok(())
            }
        }
    }

    fn bind(
        &mut self,
        source: Source,
        to: &Path,
        is_dir: bool,
        attributes: u64,
        extent: Extent,
    ) -> io::Result<()> {
        if !self.made.contains(to) {
            match is_dir {
                true => self.directory(to)?,
                false => {
                    self.parents(to)?;
                    self.made.insert(to.to_owned());
                    self.steps.push(Step::File(self.below(to)?));
                }
            }
        } else if !is_dir {
            // The same file, named twice.
            return Ok(());
        }
        self.steps.push(Step::Bind {
            source,
            to: self.below(to)?,
            attributes: Attributes::set(attributes),
            extent,
        });
        Ok(())
    }

    fn parents(&mut self, path: &Path) -> io::Result<()> {
        path.parent()
            .map_or(Ok(()), |parent| self.directory(parent))
    }

    fn directory(&mut self, path: &Path) -> io::Result<()> {
        if path == Path::new("/") || self.made.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.made.insert(path.to_owned());
        // `..` is there by itself.
        if path.file_name().is_some() {
            self.steps.push(Step::Directory(self.below(path)?));
        }
        Ok(())
    }

    fn below(&self, path: &Path) -> io::Result<CString> {
        c_string(
            &self
                .mount_point
                .join(path.strip_prefix("/").unwrap_or(path)),
        )
    }
}

/// A copy of a mount in which nothing can be executed. What is mounted in it here does not come
/// back.
fn slave(from: &OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    let tree = clone_tree(from, Extent::Tree)?;
    let mut attributes = Attributes::set(LOCKED | libc::MOUNT_ATTR_NOEXEC);
    if read_only {
        attributes.set |= libc::MOUNT_ATTR_RDONLY;
    }
    attributes.propagation = libc::MS_SLAVE;
    set_attributes(&tree, &attributes, Extent::Tree)?;
    Ok(tree)
}

fn metadata(path: &Path) -> io::Result<std::fs::Metadata> {
    std::fs::metadata(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
