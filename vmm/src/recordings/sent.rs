//! All that this crate can send to a recorded QEMU: its code is run, with every option on, against
//! a [`peer`] that takes it all, and once more for each command that may fail.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Recording;
use super::peer::{self, Noted, Sent};
use crate::confine::Confinement;
use crate::devices::block::Block;
use crate::devices::memory::{BLOCK, Memory};
use crate::devices::net::Net;
use crate::devices::virtiofs::VirtioFs;
use crate::devices::vsock::{KernelVsock, VsockDevice};
use crate::devices::{Device, Plug, undo};
use crate::error::Result;
use crate::qemu::accel::Resolved;
use crate::qemu::capabilities::{self, Capabilities, KVM, TCG, interview};
use crate::qemu::capabilities::{VHOST_USER_VSOCK, VHOST_VSOCK, VIRTIO_MEM};
use crate::qemu::{Inherited, MachineConfig, arguments, place};
use crate::qmp::Qmp;
use crate::vm::scripted;

const SOON: Duration = Duration::from_secs(5);

/// What the code finds out of a recorded QEMU, and sends it.
pub(super) struct Everything {
    pub capabilities: Capabilities,
    /// Commands, in their order.
    pub commands: Vec<Sent>,
    /// Command lines.
    pub lines: Vec<Vec<OsString>>,
}

/// Runs it all.
///
/// # Errors
/// The code would not use this QEMU.
pub(super) async fn everything(recording: &Arc<Recording>) -> Result<Everything> {
    let dir = tempfile::tempdir().unwrap();
    let noted = Noted::default();
    let capabilities = capabilities(recording, dir.path(), &noted).await?;
    devices(recording, &capabilities, dir.path(), &noted).await;
    machine(recording, &capabilities, dir.path(), &noted).await;
    let commands = noted.lock().unwrap().drain(..).collect();
    let mut lines = vec![capabilities::arguments(3), vec!["-L".into(), "help".into()]];
    for kvm in [true, false] {
        if capabilities.has(if kvm { KVM } else { TCG }) {
            lines.push(line(&capabilities, kvm, dir.path())?);
        }
    }
    Ok(Everything {
        capabilities,
        commands,
        lines,
    })
}

/// What the code finds out. The recorded QEMU is as well a program that prints where its firmware
/// is.
pub(super) async fn capabilities(
    recording: &Arc<Recording>,
    dir: &Path,
    noted: &Noted,
) -> Result<Capabilities> {
    use std::os::unix::fs::PermissionsExt;
    let qemu = dir.join("qemu");
    std::fs::write(&qemu, format!("#!/bin/sh\necho {}\n", dir.display())).unwrap();
    std::fs::set_permissions(&qemu, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(dir.join("qboot.rom"), "").unwrap();
    interview(&qemu, peer::start(recording, None, noted)).await
}

/// Commands that may fail while a device is added, so that what was done is undone.
const MAY_FAIL: [&str; 5] = [
    "chardev-add",
    "blockdev-add",
    "netdev_add",
    "object-add",
    "device_add",
];

async fn devices(
    recording: &Arc<Recording>,
    capabilities: &Capabilities,
    dir: &Path,
    noted: &Noted,
) {
    for refused in std::iter::once(None).chain(MAY_FAIL.map(Some)) {
        let monitor = peer::start(recording, refused, noted);
        let (qmp, _) = Qmp::open(monitor, SOON).await.unwrap();
        for (number, device) in every_device(dir).into_iter().enumerate() {
            if !is_possible(&device, capabilities) {
                continue;
            }
            let mut plug = Plug {
                qmp: &qmp,
                id: format!("{}{number}", device.kind()),
                place: &place(1, number as u8),
                undo: Vec::new(),
            };
            let plugged = device.plug(&mut plug).await;
            assert!(plugged.is_ok() || refused.is_some(), "{plugged:?}");
            undo(&qmp, plug.undo).await;
        }
    }
}

/// Every kind of device with all that can be said of it.
fn every_device(dir: &Path) -> Vec<Device> {
    let fd = || OwnedFd::from(File::open("/dev/null").unwrap());
    let disk = dir.join("disk");
    std::fs::write(&disk, "").unwrap();
    let net = |queues: usize| Net {
        name: "eth0".into(),
        taps: (0..queues).map(|_| fd()).collect(),
        vhost: (0..queues).map(|_| fd()).collect(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
    };
    let devices = vec![
        Device::Vsock(VsockDevice::Kernel(KernelVsock { fd: fd(), cid: 3 })),
        Device::Vsock(VsockDevice::User { connection: fd() }),
        Device::VirtioFs(VirtioFs {
            tag: "share".into(),
            connection: fd(),
            queue_size: 1024,
        }),
        Device::Block(Block {
            path: disk.clone(),
            number: None,
            read_only: false,
        }),
        Device::Block(Block {
            path: disk,
            number: None,
            read_only: true,
        }),
        Device::Net(net(1)),
        Device::Net(net(2)),
        Device::Memory(Memory {
            size: BLOCK,
            requested: BLOCK,
        }),
    ];
    // A kind that is new here has to be new above.
    let kinds = devices.iter().map(|device| match device {
        Device::Vsock(VsockDevice::Kernel(_)) => 0,
        Device::Vsock(VsockDevice::User { .. }) => 1,
        Device::VirtioFs(_) => 2,
        Device::Block(_) => 3,
        Device::Net(_) => 4,
        Device::Memory(_) => 5,
    });
    assert!((0..6).eq(std::collections::BTreeSet::from_iter(kinds)));
    devices
}

/// Whether the code would add it: what a QEMU may lack is looked for before anything is started.
fn is_possible(device: &Device, capabilities: &Capabilities) -> bool {
    match device {
        Device::Vsock(VsockDevice::Kernel(_)) => capabilities.has(VHOST_VSOCK),
        Device::Vsock(VsockDevice::User { .. }) => capabilities.has(VHOST_USER_VSOCK),
        Device::Memory(_) => capabilities.has(VIRTIO_MEM),
        Device::VirtioFs(_) | Device::Block(_) | Device::Net(_) => true,
    }
}

/// A machine's life: a device that comes and goes, sizes, a look at a driver, the end.
async fn machine(
    recording: &Arc<Recording>,
    capabilities: &Capabilities,
    dir: &Path,
    noted: &Noted,
) {
    let monitor = peer::start(recording, None, noted);
    let vm = scripted::vm(monitor, capabilities.virtio_status()).await;
    let mut devices = every_device(dir).into_iter();
    let disk = devices.find(|device| matches!(device, Device::Block(_)));
    let disk = vm.attach(disk.unwrap()).await.unwrap();
    vm.cont().await.unwrap();
    vm.driver_ok(&disk.id).await.unwrap();
    vm.resize_disk(&disk.id, 1 << 20).await.unwrap();
    vm.detach(&disk.id, SOON).await.unwrap();
    assert_eq!(vm.resize_vcpus(2, SOON).await.unwrap(), 2);
    assert_eq!(vm.resize_vcpus(1, SOON).await.unwrap(), 1);
    if capabilities.has(VIRTIO_MEM) {
        assert_eq!(vm.resize_memory(128, SOON).await.unwrap(), 128);
        assert_eq!(vm.resize_memory(64, SOON).await.unwrap(), 64);
    }
    vm.stop(Duration::from_millis(10)).await.unwrap();
}

/// The longest command line there is.
fn line(capabilities: &Capabilities, kvm: bool, dir: &Path) -> Result<Vec<OsString>> {
    let config = MachineConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        capabilities: capabilities.clone(),
        accel: Resolved {
            kvm,
            reason: String::new(),
        },
        name: "pod".into(),
        kernel: "/vmlinux".into(),
        initramfs: Some("/initramfs".into()),
        kernel_params: Vec::new(),
        memory_mib: 256,
        max_memory_mib: if capabilities.has(VIRTIO_MEM) {
            512
        } else {
            256
        },
        vcpus: 1,
        max_vcpus: 2,
        root_ports: 2,
        bridges: if capabilities.bridges() { 2 } else { 0 },
        console: Some("/console".into()),
        cgroup_procs: Vec::new(),
        oom_score_adj: None,
        netns: None,
        confinement: capabilities.sandbox.then(|| Confinement {
            mount_point: dir.into(),
            uid: 1,
            user_namespace: None,
            seccomp: true,
        }),
        cache_dir: dir.into(),
    };
    let inherited = Inherited {
        monitor: 3,
        console: Some(4),
        kernel: &config.kernel,
        initramfs: config.initramfs.as_deref(),
    };
    arguments(&config, &inherited)
}
