//! What the tests against a real QEMU share: where its pieces are, and a guest whose init is a
//! shell script.

pub mod tap;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmm::{Accelerator, Confinement, MachineConfig, capabilities};

/// More than anything here takes, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(30);

/// QEMU, from PATH.
pub fn qemu() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("qemu-system-x86_64"))
        .find(|path| path.is_file())
        .expect("qemu-system-x86_64 is missing: run scripts/setup")
}

/// A file of an installation: the one that `make test` makes, or the one in `COFFERDAM_PREFIX`.
pub fn installed(relative: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/prefix");
    let prefix = std::env::var_os("COFFERDAM_PREFIX").map_or(built, PathBuf::from);
    let file = prefix.join(relative);
    assert!(
        file.is_file(),
        "{} is missing: run make install PREFIX=target/prefix",
        file.display()
    );
    file
}

/// One for all tests of a run, so that QEMU is asked once.
pub fn cache_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cache")
}

/// A directory for sockets and logs, the guest in it, and a configuration that boots it.
pub struct Lab {
    pub dir: TempDir,
    pub config: MachineConfig,
}

impl Lab {
    /// `script` is what the guest's init does, in busybox's shell; its output is the console.
    pub async fn new(script: &str) -> Lab {
        Lab::with(qemu(), script).await
    }

    /// The same with this QEMU.
    pub async fn with(qemu: PathBuf, script: &str) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let initramfs = dir.path().join("initramfs.cpio");
        std::fs::write(&initramfs, initramfs_of(script)).unwrap();
        let jail = dir.path().join("jail");
        std::fs::create_dir(&jail).unwrap();
        let config = MachineConfig {
            capabilities: capabilities::query(&qemu, &cache_dir()).await.unwrap(),
            qemu,
            accel: Accelerator::Auto.resolve().unwrap(),
            name: "lab".into(),
            kernel: installed("share/cofferdam/vmlinux"),
            initramfs: Some(initramfs),
            kernel_params: Vec::new(),
            memory_mib: 256,
            max_memory_mib: 256,
            vcpus: 1,
            max_vcpus: 1,
            root_ports: 4,
            bridges: 0,
            console: Some(dir.path().join("console.log")),
            cgroup_procs: Vec::new(),
            oom_score_adj: None,
            netns: None,
            confinement: Some(Confinement {
                mount_point: jail,
                uid: 1_900_000_000,
                user_namespace: None,
                seccomp: true,
            }),
            cache_dir: cache_dir(),
        };
        Lab { dir, config }
    }

    /// A directory for a vsock daemon.
    pub fn sockets(&self) -> PathBuf {
        let dir = self.dir.path().join("vsock");
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.dir.path().join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest has printed `text`.
    pub async fn prints(&self, text: &str) {
        let until = Instant::now() + SOON;
        while !self.console().contains(text) {
            assert!(
                Instant::now() < until,
                "the guest did not print {text:?} but:\n{}",
                self.console()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// A cpio archive (newc) with busybox and an init script.
fn initramfs_of(script: &str) -> Vec<u8> {
    let busybox =
        std::fs::read("/bin/busybox").expect("/bin/busybox is missing: run scripts/setup");
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox mkdir -p /proc /sys /dev /mnt\n/bin/busybox mount -t \
         proc proc /proc\n\
         /bin/busybox mount -t sysfs sys /sys\n/bin/busybox mount -t devtmpfs dev /dev\n\
         exec >/dev/hvc0 2>&1 </dev/null\nexport PATH=/bin\nbusybox --install -s /bin\necho guest \
         is up\n{script}\nexec sleep 1000000\n"
    );
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, data: &[u8]| {
        let fields = [
            0,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        archive.extend_from_slice(b"070701");
        fields
            .iter()
            .for_each(|field| archive.extend_from_slice(format!("{field:08x}").as_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    entry("bin", 0o040_755, b"");
    entry("bin/busybox", 0o100_755, &busybox);
    entry("init", 0o100_755, init.as_bytes());
    entry("TRAILER!!!", 0, b"");
    archive
}

/// An executable shell script.
pub fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Names in a directory.
pub fn names(dir: impl AsRef<OsStr>) -> Vec<String> {
    let entries = std::fs::read_dir(Path::new(dir.as_ref())).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
