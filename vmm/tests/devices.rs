//! Devices of a real machine with a real guest: attached before the CPUs run and after, and
//! detached again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Lab, SOON, cache_dir, installed, names, program};
use vmm::deadlines::HELPER_LAST_WORDS;
use vmm::parts::{
    VirtioFs, Virtiofsd, VirtiofsdConfig, Vm, VsockDaemon, VsockDaemonConfig, VsockDevice,
};
use vmm::{Block, Device, FsCache};

async fn virtiofsd(lab: &Lab, binary: &Path, shared: &Path) -> (Virtiofsd, VirtioFs) {
    let config = VirtiofsdConfig {
        binary: binary.into(),
        cache_dir: cache_dir(),
        socket: lab.dir.path().join("fs.sock"),
        shared_dir: shared.into(),
        cache: FsCache::Auto,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: lab.config.confinement.clone(),
    };
    let (virtiofsd, connection) = Virtiofsd::spawn(&config).await.unwrap();
    (
        virtiofsd,
        VirtioFs {
            tag: "share".into(),
            connection,
            queue_size: 1024,
        },
    )
}

async fn vsock_daemon(lab: &Lab) -> VsockDaemon {
    VsockDaemon::spawn(&VsockDaemonConfig {
        binary: installed("libexec/cofferdam/vhost-device-vsock"),
        cache_dir: cache_dir(),
        dir: lab.sockets(),
        name: "vm".into(),
        guest_cid: 3,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: lab.config.confinement.clone(),
    })
    .await
    .unwrap()
}

fn block(path: &Path) -> Device {
    Device::Block(Block {
        number: None,
        path: path.into(),
        read_only: false,
    })
}

fn empty_image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    image
}

/// Waits until `done` says so.
async fn until_true<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let until = Instant::now() + SOON;
    while !done().await {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_guest_finds_what_was_attached_before_it_ran() {
    let lab =
        Lab::new("mount -t virtiofs share /mnt && cat /mnt/file && echo from guest >/mnt/answer")
            .await;
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), "from host\n").unwrap();
    let daemon = vsock_daemon(&lab).await;
    let (virtiofsd, fs) = virtiofsd(
        &lab,
        &installed("libexec/cofferdam/virtiofsd"),
        shared.path(),
    )
    .await;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let attach_vsock = async {
        let connection = daemon.connect(SOON).await.unwrap();
        vm.attach(Device::Vsock(VsockDevice::User { connection }))
            .await
            .unwrap()
    };
    let (vsock, fs) = tokio::join!(attach_vsock, async {
        vm.attach(Device::VirtioFs(fs)).await.unwrap()
    });
    assert_ne!(vsock.pci_path, fs.pci_path);
    let can_tell = lab.config.capabilities.virtio_status();
    assert_eq!(
        vm.driver_ok(&vsock.id).await.unwrap(),
        can_tell.then_some(false)
    );
    vm.cont().await.unwrap();
    lab.prints("from host").await;
    until_true("the guest's file did not come", || async {
        shared.path().join("answer").exists()
    })
    .await;
    until_true("no driver", || async {
        vm.driver_ok(&vsock.id).await.unwrap() == can_tell.then_some(true)
    })
    .await;
    assert_eq!(vm.driver_ok("nothing").await.is_err(), can_tell);
    vm.stop(SOON).await.unwrap();
    // It ends with its connection: a helper never outlives its machine.
    let why = tokio::time::timeout(SOON, virtiofsd.process.ended())
        .await
        .expect("virtiofsd should end with QEMU");
    assert!(why.to_string().ends_with(" exited with status 0"), "{why}");
    daemon.process.kill_and_wait(SOON).await.unwrap();
    assert!(!daemon.process.identity().is_alive());
}

#[tokio::test]
async fn the_c_virtiofsd_is_refused() {
    let lab = Lab::new("").await;
    let binary = program(
        lab.dir.path(),
        "virtiofsd",
        "echo virtiofsd version 7.2.22; echo Copyright",
    );
    let config = VirtiofsdConfig {
        binary,
        cache_dir: lab.dir.path().join("cache"),
        socket: lab.dir.path().join("fs.sock"),
        shared_dir: lab.dir.path().into(),
        cache: FsCache::Auto,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: None,
    };
    let error = Virtiofsd::spawn(&config)
        .await
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("is not maintained: install virtiofsd 1.10 or later"),
        "{error}"
    );
}

#[tokio::test]
async fn disks_come_and_go_while_the_guest_runs() {
    let script = "while :; do for d in /sys/block/vd*; do [ -e $d ] && echo size:$(cat $d/size) && readlink -f $d | sed s/^/at:/; done; echo round; usleep 20000; done";
    let lab = Lab::new(script).await;
    let mut image = tempfile::NamedTempFile::new().unwrap();
    image.write_all(&[7; 1 << 20]).unwrap();
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    vm.cont().await.unwrap();
    lab.prints("round").await;
    for _ in 0..2 {
        let disk = vm.attach(block(image.path())).await.unwrap();
        lab.prints("size:2048").await;
        let slot = disk.pci_path.strip_suffix("/00").unwrap();
        lab.prints(&format!("at:/sys/devices/pci0000:00/0000:00:{slot}.0/"))
            .await;
        vm.detach(&disk.id, SOON).await.unwrap();
        assert!(
            vm.detach(&disk.id, SOON)
                .await
                .unwrap_err()
                .to_string()
                .contains("no device")
        );
        std::fs::write(lab.dir.path().join("console.log"), "").unwrap();
    }
    vm.stop(SOON).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_answer_keeps_its_device_and_a_deadline_says_so() {
    let lab = Lab::new("").await;
    let image = empty_image();
    // Its CPUs never run, so it cannot let go of anything.
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let disk = vm.attach(block(image.path())).await.unwrap();
    let error = vm
        .detach(&disk.id, Duration::from_millis(100))
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(error, "the guest to let go of blk1 took longer than 100ms");
}

#[tokio::test]
async fn a_device_that_fails_leaves_nothing_and_takes_no_port() {
    let lab = Lab::new("").await;
    let image = empty_image();
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    assert_eq!(
        vm.attach(block(image.path())).await.unwrap().pci_path,
        "04/00"
    );
    for _ in 0..10 {
        let error = vm
            .attach(block(Path::new("/no/disk")))
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("cannot open the disk /no/disk: "),
            "{error}"
        );
        // The same file for a second writer fails at the last step, when the block node is made
        // already.
        let error = vm
            .attach(block(image.path()))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("QEMU refused device_add: "), "{error}");
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let gone = VirtioFs {
            tag: "share".into(),
            connection: ours.into(),
            queue_size: 128,
        };
        let error = vm
            .attach(Device::VirtioFs(gone))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("QEMU refused "), "{error}");
    }
    let images: Vec<_> = (0..3).map(|_| empty_image()).collect();
    let mut paths = Vec::new();
    for image in &images {
        paths.push(vm.attach(block(image.path())).await.unwrap().pci_path);
    }
    assert_eq!(paths, ["05/00", "06/00", "07/00"]);
    let error = vm
        .attach(block(image.path()))
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(error, "every PCI slot of the virtual machine has a device");
}

#[tokio::test]
async fn a_helper_that_dies_says_why() {
    let lab = Lab::new("").await;
    let binary = program(lab.dir.path(), "vsockd", "echo >&2 'bad socket'; exit 4");
    let config = VsockDaemonConfig {
        binary,
        cache_dir: cache_dir(),
        dir: lab.sockets(),
        name: "vm".into(),
        guest_cid: 3,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: None,
    };
    let daemon = VsockDaemon::spawn(&config).await.unwrap();
    let error = daemon.connect(SOON).await.unwrap_err().to_string();
    assert!(
        error.ends_with("vsockd exited with status 4: bad socket"),
        "{error}"
    );
    let sleeps = program(lab.dir.path(), "sleeps", "exec sleep 1000");
    let daemon = VsockDaemon::spawn(&VsockDaemonConfig {
        binary: sleeps,
        ..config
    })
    .await
    .unwrap();
    let error = daemon
        .connect(Duration::from_millis(50))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("the socket ") && error.ends_with("device took longer than 50ms"),
        "{error}"
    );
}

#[tokio::test]
async fn a_virtiofsd_that_cannot_serve_says_why() {
    let lab = Lab::new("").await;
    let binary = installed("libexec/cofferdam/virtiofsd");
    let (virtiofsd, fs) = virtiofsd(&lab, &binary, Path::new("/no/such/directory")).await;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let error = vm.attach(Device::VirtioFs(fs)).await.unwrap_err();
    let error = virtiofsd.process.explain(error, SOON).await.to_string();
    assert!(
        error.contains("exited with status 126: launcher: cannot take /no/such/directory: "),
        "{error}"
    );
    // One that lives has nothing to add.
    let shared = tempfile::tempdir().unwrap();
    let (lives, _connection) = self::virtiofsd(&lab, &binary, shared.path()).await;
    assert_eq!(
        lives
            .process
            .explain(vmm::Error::Unsupported("no".into()), HELPER_LAST_WORDS)
            .await
            .to_string(),
        "no"
    );
}

#[tokio::test]
async fn a_stopped_virtiofsd_is_gone_as_a_whole() {
    for stop_qemu_first in [true, false] {
        let lab = Lab::new("").await;
        let shared = tempfile::tempdir().unwrap();
        let (virtiofsd, fs) = virtiofsd(
            &lab,
            &installed("libexec/cofferdam/virtiofsd"),
            shared.path(),
        )
        .await;
        let vm = Vm::spawn(&lab.config)
            .await
            .unwrap()
            .connect(SOON)
            .await
            .unwrap();
        vm.attach(Device::VirtioFs(fs)).await.unwrap();
        let serving = virtiofsd.process.identity();
        assert!(serving.is_alive());
        if stop_qemu_first {
            vm.stop(SOON).await.unwrap();
        }
        virtiofsd.stop(SOON).await.unwrap();
        virtiofsd.stop(SOON).await.unwrap();
        assert!(!serving.is_alive() && !virtiofsd.process.identity().is_alive());
        assert!(!names(lab.dir.path()).contains(&"fs.sock".to_owned()));
    }
}

/// The shim's way: a mount namespace of its own, in which the shared directory propagates its
/// mounts.
#[test]
fn mounts_made_later_reach_the_guest() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let nothing = None::<&str>;
    let script = "mount -t virtiofs share /mnt; until cat /mnt/later/file; do usleep 20000; done 2>/dev/null; \
                  while [ -e /mnt/later/file ]; do usleep 20000; done; echo gone again";
    // A thread of its own: no other test may see these mounts.
    let test = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            nothing,
            "/",
            nothing,
            MsFlags::MS_SLAVE | MsFlags::MS_REC,
            nothing,
        )
        .unwrap();
        let shared = tempfile::tempdir().unwrap();
        let later = shared.path().join("later");
        std::fs::create_dir(&later).unwrap();
        mount(
            Some(shared.path()),
            shared.path(),
            nothing,
            MsFlags::MS_BIND,
            nothing,
        )
        .unwrap();
        mount(nothing, shared.path(), nothing, MsFlags::MS_SHARED, nothing).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let lab = Lab::new(script).await;
            let (_virtiofsd, fs) = virtiofsd(
                &lab,
                &installed("libexec/cofferdam/virtiofsd"),
                shared.path(),
            )
            .await;
            let vm = Vm::spawn(&lab.config)
                .await
                .unwrap()
                .connect(SOON)
                .await
                .unwrap();
            vm.attach(Device::VirtioFs(fs)).await.unwrap();
            vm.cont().await.unwrap();
            lab.prints("guest is up").await;
            mount(
                Some("none"),
                &later,
                Some("tmpfs"),
                MsFlags::empty(),
                nothing,
            )
            .unwrap();
            std::fs::write(later.join("file"), "mounted later\n").unwrap();
            lab.prints("mounted later").await;
            umount2(&later, MntFlags::MNT_DETACH).unwrap();
            lab.prints("gone again").await;
            vm.stop(SOON).await.unwrap();
        });
        umount2(shared.path(), MntFlags::MNT_DETACH).unwrap();
    });
    test.join().unwrap();
}
