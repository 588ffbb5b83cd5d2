//! A file system that works until it is dead, as a hard mount of an NFS server that is gone:
//! whoever asks it for anything then waits, until he is killed. It is the smallest that FUSE knows:
//! an empty directory.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, poll};

// linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// A mounted storage. Dropping it takes it off and ends what waits for it.
pub struct Storage {
    /// Where it is mounted.
    pub path: PathBuf,
    dead: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
    /// Keeps the connection open: whoever waits goes on waiting.
    _connection: File,
}

impl Storage {
    /// Mounts it at a directory that is made.
    pub fn mount(path: &Path) -> Storage {
        std::fs::create_dir_all(path).unwrap();
        let connection = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            connection.as_raw_fd()
        );
        mount(
            Some("storage"),
            path,
            Some("fuse"),
            MsFlags::MS_NOSUID,
            Some(options.as_str()),
        )
        .unwrap();
        let dead = Arc::new(AtomicBool::new(false));
        let (ours, is_dead) = (connection.try_clone().unwrap(), dead.clone());
        let server = std::thread::spawn(move || serve(ours, &is_dead));
        Storage {
            path: path.to_owned(),
            dead,
            server: Some(server),
            _connection: connection,
        }
    }

    /// From now on nobody gets an answer.
    pub fn die(&mut self) {
        self.dead.store(true, Ordering::Release);
        if let Some(server) = self.server.take() {
            server.join().unwrap();
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        self.die();
    }
}

fn serve(mut connection: File, dead: &AtomicBool) {
    let mut request = vec![0; 1 << 17];
    while !dead.load(Ordering::Acquire) {
        // A request that is read and not answered could not even be killed, so none is read that
        // will not be answered.
        let ready = poll(
            &mut [PollFd::new(connection.as_fd(), PollFlags::POLLIN)],
            20_u8,
        );
        if ready != Ok(1) {
            continue;
        }
        // Unmounted, or a request that was interrupted.
        let Ok(length) = connection.read(&mut request) else {
            continue;
        };
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        assert!(length >= 40, "a request of {length} bytes");
        let (opcode, unique) = (number(4), &request[8..16]);
        let (error, answer) = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => (0, init()),
            GETATTR => (0, [vec![0; 16], directory()].concat()),
            STATFS => (0, vec![0; 80]),
            LOOKUP => (-nix::libc::ENOENT, Vec::new()),
            _ => (-nix::libc::ENOSYS, Vec::new()),
        };
        let length = u32::try_from(16 + answer.len()).unwrap();
        let message = [&length.to_ne_bytes(), &error.to_ne_bytes(), unique, &answer].concat();
        // Who asked may be gone.
        let _ = connection.write_all(&message);
    }
}

/// struct fuse_init_out of version 7.31: 4 KiB at a time and no features.
fn init() -> Vec<u8> {
    let mut out = vec![0; 64];
    for (at, value) in [(0, 7_u32), (4, 31), (20, 4096), (24, 1)] {
        out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    out
}

/// struct fuse_attr of the root, which nobody may keep.
fn directory() -> Vec<u8> {
    let mut out = vec![0; 88];
    out[..8].copy_from_slice(&1_u64.to_ne_bytes());
    for (at, value) in [(60, nix::libc::S_IFDIR | 0o755), (64, 2), (80, 4096)] {
        out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    out
}
