//! Sockets of the host below a shared volume: for each one a socket of the guest's, mounted over its
//! file.
//!
//! The host says what there is, all of it each time. A mount goes by itself when the kernel finds
//! that the name below it is another's by now; so each time every one is looked at again. Mounts
//! made here appear in the containers that have the volume: theirs are slaves of the agent's
//! (`Sandbox::enter_volume`).
//!
//! Containers may change what is in the volume at any moment: paths are walked beneath it and
//! through no link, and what was found to be a socket is what is mounted on.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};
use std::sync::atomic::{AtomicU64, Ordering};

use guest_protocol::protocols::agent::Storage;
use guest_protocol::{GUEST_SANDBOX, GUEST_SHARE, Transport};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::linkat;
use sys::mount::{Attributes, Extent, attach, clone_tree_at, set_attributes};

use crate::error::{Context, Error, Result};
use crate::log::log;
use crate::relay::unix::{self, Socket};

/// Sockets of one volume.
const MAX_SOCKETS: usize = 64;

/// The joined sockets of each volume, by their paths in it.
#[derive(Debug, Default)]
pub struct SocketsBelow(HashMap<String, HashMap<String, Joined>>);

#[derive(Debug)]
struct Joined {
    /// The host's name for it, and its kind.
    is: String,
    socket: Socket,
}

/// One line of the host's list.
struct Line<'a> {
    source: &'a str,
    /// `type=`, `mode=`, `uid=`, `gid=`.
    options: [String; 4],
    path: &'a str,
}

impl Line<'_> {
    fn parse(line: &str) -> Option<Line<'_>> {
        let mut words = line.splitn(6, ' ');
        let source = words.next()?;
        let options = [
            format!("type={}", words.next()?),
            format!("mode={}", words.next()?),
            format!("uid={}", words.next()?),
            format!("gid={}", words.next()?),
        ];
        let path = words.next()?;
        let plain = Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        (plain && !path.is_empty()).then_some(Line {
            source,
            options,
            path,
        })
    }
}

impl SocketsBelow {
    /// Makes the sockets below a volume those that the storage lists.
    ///
    /// # Errors
    /// A storage that is none of this kind; the first socket that cannot be mounted, after all
    /// others have been.
    pub fn update(&mut self, storage: &Storage, host: &Transport) -> Result<()> {
        let volume = &storage.mount_point;
        let place = Path::new(volume);
        let plain = place
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let bad = |what: &str| Error::Invalid(format!("sockets below {volume}: {what}"));
        if !plain || !place.starts_with(GUEST_SHARE) {
            return Err(bad("not in the shared directory"));
        }
        if storage.options.len() > MAX_SOCKETS {
            return Err(bad("too many"));
        }
        let lines = storage.options.iter().map(|line| Line::parse(line));
        let lines: Option<Vec<Line<'_>>> = lines.collect();
        let lines = lines.ok_or_else(|| bad("a line that is none"))?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let top = nix::fcntl::open(place, flags, nix::sys::stat::Mode::empty())
            .context(|| format!("open the shared volume {volume}"))?;
        // Before anything is mounted in it: what is mounted later is to appear in containers.
        set_attributes(
            &top,
            &Attributes::propagation(libc::MS_SHARED),
            Extent::Mount,
        )
        .context(|| format!("share the mounts of {volume}"))?;
        let known = self.0.entry(volume.clone()).or_default();
        known.retain(|path, joined| {
            let stays = lines
                .iter()
                .any(|line| line.path == path && joined.is == is(line));
            if !stays {
                joined.unmount(&top, path);
            }
            stays
        });
        let mut failed = None;
        for line in &lines {
            let done = join(known, line, storage, host).and_then(|joined| {
                joined
                    .mount(&top, line.path)
                    .context(|| format!("mount a socket on {volume}/{}", line.path))
            });
            if let Err(error) = done {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// A volume that no container has any more: its mounts went with it.
    pub fn forget(&mut self, volume: &str) {
        self.0.remove(volume);
    }
}

fn is(line: &Line<'_>) -> String {
    format!("{} {}", line.source, line.options[0])
}

/// The guest's socket for a line: the one that is there, with the host's present owner, or a new
/// one.
fn join<'a>(
    known: &'a mut HashMap<String, Joined>,
    line: &Line<'_>,
    volume: &Storage,
    host: &Transport,
) -> Result<&'a Joined> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let entry = match known.entry(line.path.to_owned()) {
        std::collections::hash_map::Entry::Occupied(entry) => {
            entry.get().socket.set_owner(&line.options)?;
            entry.into_mut()
        }
        std::collections::hash_map::Entry::Vacant(entry) => {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let storage = Storage {
                source: line.source.to_owned(),
                driver_options: volume.driver_options.clone(),
                options: line.options.to_vec(),
                mount_point: format!("{GUEST_SANDBOX}/uds/below/{number}"),
                ..Default::default()
            };
            entry.insert(Joined {
                is: is(line),
                socket: unix::listen(&storage, host.clone())?,
            })
        }
    };
    Ok(entry)
}

impl Joined {
    /// Mounts the socket on its file in the volume, unless it is there.
    fn mount(&self, top: &OwnedFd, path: &str) -> io::Result<()> {
        let file = find(top, path)?;
        if self.is_seen(&file)? {
            return Ok(());
        }
        if SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
            return Err(io::Error::other("it is no socket any more"));
        }
        let name = CString::new(self.socket.path().as_os_str().as_bytes())?;
        attach(clone_tree_at(&name, Extent::Mount)?, file)
    }

    fn unmount(&self, top: &OwnedFd, path: &str) {
        let unmounted = find(top, path).and_then(|file| {
            if self.is_seen(&file)? {
                let name = format!("/proc/self/fd/{}", file.as_raw_fd());
                umount2(name.as_str(), MntFlags::MNT_DETACH)?;
            }
            Ok(())
        });
        match unmounted {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log!("unmount a socket from {path}: {error}");
            }
            _ => {}
        }
    }

    fn is_seen(&self, file: &OwnedFd) -> io::Result<bool> {
        let (found, own) = (fstat(file)?, fs::symlink_metadata(self.socket.path())?);
        Ok((found.st_dev, found.st_ino) == (own.dev(), own.ino()))
    }
}

/// What is at a path in a volume now.
fn find(top: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let path = Path::new(path);
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent.as_os_str().is_empty() => (Path::new("."), name),
        (Some(parent), Some(name)) => (parent, name),
        _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    let open = |from: &OwnedFd, path: &Path, flags| {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | flags;
        openat2(from, path, OpenHow::new().flags(flags).resolve(resolve))
    };
    let parent = open(top, parent, OFlag::O_DIRECTORY)?;
    // The kernel believes its memory of a name for a second, unless it is to make that name. This
    // one is not made: `/` is another file system, or no file that can have a second name.
    let _ = linkat(AT_FDCWD, "/", &parent, name, AtFlags::empty());
    Ok(open(&parent, Path::new(name), OFlag::O_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_and_its_path_cannot_climb() {
        let line = Line::parse("ab12 datagram 620 0 4 a b/c.sock").unwrap();
        assert_eq!((line.source, line.path), ("ab12", "a b/c.sock"));
        assert_eq!(
            line.options,
            ["type=datagram", "mode=620", "uid=0", "gid=4"]
        );
        for bad in [
            "",
            "ab12 stream 620 0 4",
            "ab12 stream 620 0 4 ",
            "ab12 stream 620 0 4 /etc",
            "ab12 stream 620 0 4 ../etc",
            "ab12 stream 620 0 4 a/../../etc",
        ] {
            assert!(Line::parse(bad).is_none(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn only_shared_volumes_have_sockets_below() {
        let host = Transport::Unix {
            path: "/nowhere".into(),
        };
        for place in ["/etc", "relative", &format!("{GUEST_SHARE}/../x")] {
            let storage = Storage {
                mount_point: place.into(),
                ..Default::default()
            };
            assert!(SocketsBelow::default().update(&storage, &host).is_err());
        }
    }

    /// In a mount namespace of its own, with a shared directory in it.
    fn alone(test: impl FnOnce(&Path) + Send + 'static) {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        let tmpfs = |at: &Path| {
            fs::create_dir_all(at).unwrap();
            let kind = Some("tmpfs");
            mount(kind, at, kind, MsFlags::empty(), None::<&str>).unwrap();
        };
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            tmpfs(Path::new("/run"));
            let volume = Path::new(GUEST_SHARE).join("volume");
            tmpfs(&volume);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async { test(&volume) });
        });
        thread.join().unwrap();
    }

    #[test]
    fn sockets_are_mounted_and_come_and_go_with_the_list() {
        use std::os::unix::fs::symlink;
        use std::os::unix::net::UnixListener;
        alone(|volume| {
            let host = Transport::Unix {
                path: "/nowhere".into(),
            };
            let storage = |lines: &[&str]| Storage {
                mount_point: volume.to_str().unwrap().to_owned(),
                driver_options: vec!["port=1".into()],
                options: lines.iter().map(|line| (*line).to_owned()).collect(),
                ..Default::default()
            };
            let of_volume = fs::metadata(volume).unwrap().dev();
            let seen = |path: &str| {
                let found = fs::symlink_metadata(volume.join(path)).unwrap();
                (found.dev() != of_volume, found.mode() & 0o7777, found.gid())
            };
            fs::create_dir(volume.join("dir")).unwrap();
            let old = ["a", "dir/b"].map(|path| UnixListener::bind(volume.join(path)).unwrap());
            let mut below = SocketsBelow::default();
            let (a, b) = ("n1 stream 660 0 7 a", "n2 datagram 600 0 0 dir/b");
            below.update(&storage(&[a, b]), &host).unwrap();
            assert_eq!(
                (seen("a"), seen("dir/b")),
                ((true, 0o660, 7), (true, 0o600, 0))
            );
            // Another owner, and nothing new.
            below
                .update(&storage(&["n1 stream 666 0 8 a", b]), &host)
                .unwrap();
            assert_eq!(seen("a"), (true, 0o666, 8));
            assert_eq!(
                fs::read_dir("/run/kata-containers/sandbox/uds/below")
                    .unwrap()
                    .count(),
                2
            );
            // One goes from the list, one was made anew by somebody who does not see the mounts.
            below.update(&storage(&[b]), &host).unwrap();
            assert!(!seen("a").0 && seen("dir/b").0);
            drop(old);
            // No socket, or not beneath the volume: the others are mounted all the same.
            fs::write(volume.join("file"), "").unwrap();
            symlink("/run", volume.join("link")).unwrap();
            let lines = ["n3 stream 600 0 0 file", "n4 stream 600 0 0 link/x", a];
            assert!(below.update(&storage(&lines), &host).is_err());
            assert!(!seen("file").0 && seen("a").0 && !seen("dir/b").0);
            below.forget(volume.to_str().unwrap());
            assert_eq!(
                fs::read_dir("/run/kata-containers/sandbox/uds/below")
                    .unwrap()
                    .count(),
                0
            );
        });
    }
}
