//! CPUs and memory of a real machine with a real guest, added and taken away while it runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Lab, SOON, cache_dir, installed};
use vmm::parts::{
    VirtioFs, Virtiofsd, VirtiofsdConfig, Vm, VsockDaemon, VsockDaemonConfig, VsockDevice,
};
use vmm::{Device, FsCache};

/// A guest that sets each CPU online once when it comes, and tells how many it has and how much
/// memory.
const TELLS: &str = "mkdir /seen; cd /sys/devices/system/cpu; while :; do \
    for c in cpu[1-9]; do [ -e /seen/$c ] || { echo 1 >$c/online && : >/seen/$c; }; done; \
    for s in /seen/*; do [ -e ${s##*/} ] || rm $s; done; \
    echo cpus $(grep -c ^processor /proc/cpuinfo) mib $(($(sed -n 's/^MemTotal: *\\([0-9]*\\) \
    kB/\\1/p' /proc/meminfo) >> 10)); \
    usleep 20000; done 2>/dev/null";

/// What the guest has told last, as numbers of CPUs and MiB.
fn told(lab: &Lab) -> (u64, u64) {
    let console = lab.console();
    let mut lines = console
        .lines()
        .rev()
        .filter_map(|line| line.trim().strip_prefix("cpus ")?.split_once(" mib "));
    lines
        .find_map(|(cpus, mib)| Some((cpus.parse().ok()?, mib.parse().ok()?)))
        .unwrap_or_default()
}

async fn tells(lab: &Lab, what: &str, wanted: impl Fn((u64, u64)) -> bool) {
    let until = Instant::now() + SOON;
    while !wanted(told(lab)) {
        assert!(
            Instant::now() < until,
            "{what}: {:?}\n{}",
            told(lab),
            lab.console()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn cpus_come_and_go_while_the_guest_runs() {
    let mut lab = Lab::new(TELLS).await;
    lab.config.max_vcpus = 3;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    assert_eq!(vm.resize_vcpus(0, SOON).await.unwrap(), 1);
    vm.cont().await.unwrap();
    tells(&lab, "one CPU", |(cpus, _)| cpus == 1).await;
    assert_eq!(vm.resize_vcpus(2, SOON).await.unwrap(), 2);
    tells(&lab, "two CPUs", |(cpus, _)| cpus == 2).await;
    assert_eq!(vm.resize_vcpus(99, SOON).await.unwrap(), 3);
    tells(&lab, "three CPUs", |(cpus, _)| cpus == 3).await;
    // Emulated CPUs stay, because QEMU does not survive it when others come after them.
    let fewest = if lab.config.accel.kvm { 1 } else { 3 };
    assert_eq!(vm.resize_vcpus(0, SOON).await.unwrap(), fewest);
    tells(&lab, "the fewest CPUs", |(cpus, _)| {
        cpus == u64::from(fewest)
    })
    .await;
    assert_eq!(vm.resize_vcpus(3, SOON).await.unwrap(), 3);
    tells(&lab, "three CPUs again", |(cpus, _)| cpus == 3).await;
    vm.stop(SOON).await.unwrap();
    assert!(
        vm.resize_vcpus(1, SOON)
            .await
            .unwrap_err()
            .to_string()
            .contains("exited with status 0")
    );
}

#[tokio::test]
async fn cpus_that_come_before_the_guest_runs_are_there() {
    let mut lab = Lab::new(TELLS).await;
    lab.config.max_vcpus = 2;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    assert_eq!(vm.resize_vcpus(2, SOON).await.unwrap(), 2);
    vm.cont().await.unwrap();
    tells(&lab, "two CPUs", |(cpus, _)| cpus == 2).await;
}

#[tokio::test]
async fn memory_comes_and_goes_while_the_guest_runs() {
    let mut lab = Lab::new(TELLS).await;
    lab.config.max_memory_mib = 1280;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    vm.cont().await.unwrap();
    tells(&lab, "a running guest", |(_, mib)| mib > 0).await;
    let (_, boot) = told(&lab);
    assert_eq!(
        vm.resize_memory(100, SOON).await.unwrap(),
        256,
        "no less than it began with, and no device for that"
    );
    assert_eq!(vm.resize_memory(511, SOON).await.unwrap(), 512);
    tells(&lab, "256 MiB more", |(_, mib)| mib == boot + 256).await;
    assert_eq!(vm.resize_memory(u64::MAX, SOON).await.unwrap(), 1280);
    tells(&lab, "1 GiB more", |(_, mib)| mib == boot + 1024).await;
    let shrunk = vm.resize_memory(256, SOON).await.unwrap();
    assert!(
        shrunk < 512,
        "an idle guest gives most of it back, not {shrunk}"
    );
    tells(&lab, "what was given back is gone", |(_, mib)| {
        mib == boot + shrunk - 256
    })
    .await;
    assert_eq!(vm.resize_memory(768, SOON).await.unwrap(), 768);
    vm.stop(SOON).await.unwrap();
    assert!(
        vm.resize_memory(256, SOON)
            .await
            .unwrap_err()
            .to_string()
            .contains("exited with status 0")
    );
}

#[tokio::test]
async fn a_guest_that_does_not_run_takes_no_memory_and_the_size_says_so() {
    let mut lab = Lab::new("").await;
    lab.config.max_memory_mib = 512;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    assert_eq!(
        vm.resize_memory(512, Duration::from_millis(100))
            .await
            .unwrap(),
        256
    );
    lab.config.root_ports = 1;
    let full = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = vmm::Block {
        number: None,
        path: image.path().into(),
        read_only: false,
    };
    full.attach(Device::Block(disk)).await.unwrap();
    let error = full.resize_memory(512, SOON).await.unwrap_err().to_string();
    assert_eq!(error, "every PCI slot of the virtual machine has a device");
}

/// virtiofsd is told of the new memory and reaches buffers in it: with 256 MiB to begin with, a
/// file of 300 MiB that stays in a tmpfs of the guest cannot but use what came later.
#[tokio::test]
async fn shared_directories_work_in_memory_that_was_added() {
    const MIB: u64 = 300;
    let script = "mount -t virtiofs share /mnt; mkdir /big; mount -t tmpfs -o size=1g tmpfs /big; \
         until [ -e /mnt/go ]; do usleep 20000; done; \
         cp /mnt/in /big/file && cp /big/file /mnt/out && echo copied $(stat -c %s /big/file)";
    let mut lab = Lab::new(script).await;
    lab.config.max_memory_mib = 1536;
    let shared = tempfile::tempdir().unwrap();
    let mut pattern = vec![0x5a; (MIB << 20) as usize];
    for (number, page) in pattern.chunks_exact_mut(4096).enumerate() {
        page[..8].copy_from_slice(&number.to_le_bytes());
    }
    std::fs::write(shared.path().join("in"), &pattern).unwrap();
    let config = VirtiofsdConfig {
        binary: installed("libexec/cofferdam/virtiofsd"),
        cache_dir: cache_dir(),
        socket: lab.dir.path().join("fs.sock"),
        shared_dir: shared.path().into(),
        cache: FsCache::Auto,
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        confinement: lab.config.confinement.clone(),
    };
    let (_virtiofsd, connection) = Virtiofsd::spawn(&config).await.unwrap();
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    vm.attach(Device::VirtioFs(VirtioFs {
        tag: "share".into(),
        connection,
        queue_size: 1024,
    }))
    .await
    .unwrap();
    vm.cont().await.unwrap();
    lab.prints("guest is up").await;
    assert_eq!(vm.resize_memory(1536, SOON).await.unwrap(), 1536);
    std::fs::write(shared.path().join("go"), "").unwrap();
    lab.prints(&format!("copied {}", MIB << 20)).await;
    assert!(
        std::fs::read(shared.path().join("out")).unwrap() == pattern,
        "the file came back changed"
    );
    // What the tmpfs holds cannot be given back, and the guest says how far it came.
    let left = vm.resize_memory(256, SOON).await.unwrap();
    assert!((MIB..1536).contains(&left), "{left} MiB left");
    vm.stop(SOON).await.unwrap();
}

/// Whether the guest takes a connection to this port.
fn answers(uds_path: &Path, port: u32) -> bool {
    let mut guest = UnixStream::connect(uds_path).unwrap();
    guest
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let mut answer = String::new();
    let told = writeln!(guest, "CONNECT {port}")
        .and_then(|()| BufReader::new(guest).read_line(&mut answer));
    told.is_ok() && answer.starts_with("OK ")
}

/// The real agent, which speaks over the socket of vhost-device-vsock.
#[tokio::test]
async fn the_agent_is_reached_after_memory_was_added_and_taken_away() {
    const READY_PORT: u32 = 1029;
    const AGENT_PORT: u32 = 1024;
    let mut lab = Lab::new("").await;
    lab.config.initramfs = Some(installed("share/cofferdam/initramfs.cpio"));
    lab.config.kernel_params = vec![format!("cofferdam.ready_port={READY_PORT}")];
    lab.config.max_memory_mib = 1280;
    let uds_path = lab.sockets().join("vm");
    let ready = UnixListener::bind(lab.sockets().join(format!("vm_{READY_PORT}"))).unwrap();
    // The daemon is not root.
    std::fs::set_permissions(
        lab.sockets().join(format!("vm_{READY_PORT}")),
        std::fs::Permissions::from_mode(0o666),
    )
    .unwrap();
    let daemon = VsockDaemon::spawn(&VsockDaemonConfig {
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
    .unwrap();
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    let connection = daemon.connect(SOON).await.unwrap();
    vm.attach(Device::Vsock(VsockDevice::User { connection }))
        .await
        .unwrap();
    vm.cont().await.unwrap();
    ready.set_nonblocking(true).unwrap();
    let until = Instant::now() + SOON;
    let mut notice = loop {
        match ready.accept() {
            Ok((notice, _)) => break notice,
            Err(_) => assert!(
                Instant::now() < until,
                "no ready notice:\n{}",
                lab.console()
            ),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    notice.set_nonblocking(false).unwrap();
    notice.set_read_timeout(Some(SOON)).unwrap();
    let mut line = String::new();
    notice.read_to_string(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    for wanted in [1280, 256, 768] {
        let now = vm.resize_memory(wanted, SOON).await.unwrap();
        assert!(now >= wanted, "{now} MiB");
        for _ in 0..20 {
            let until = Instant::now() + SOON;
            // The daemon now and then drops a connection at once, with or without a change of
            // memory: then again.
            while !answers(&uds_path, AGENT_PORT) {
                assert!(
                    Instant::now() < until,
                    "the agent cannot be reached with {now} MiB:\n{}",
                    lab.console()
                );
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    assert!(daemon.process.identity().is_alive());
    vm.stop(SOON).await.unwrap();
}
