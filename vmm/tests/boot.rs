//! A whole machine, with the helpers beside it: how it comes up, what a failure leaves, and whose
//! end is told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use common::{Lab, SOON, installed, program};
use vmm::boot::{Config, Share, Vsock, spawn};
use vmm::process::{Exit, Identity};
use vmm::{Error, FsCache, Result};

/// A guest that mounts both directories.
const SCRIPT: &str = "mount -t virtiofs one /mnt && cat /mnt/file\n\
                      mkdir /two && mount -t virtiofs two /two && cat /two/file";

fn config(lab: &Lab, shared: &Path) -> Config {
    let share = |tag: &str, cache| Share {
        tag: tag.into(),
        dir: shared.join(tag),
        socket: lab.dir.path().join(format!("{tag}.sock")),
        cache,
    };
    let mut machine = lab.config.clone();
    machine.root_ports = 1;
    Config {
        machine,
        virtiofsd: installed("libexec/cofferdam/virtiofsd"),
        shares: [share("one", FsCache::Auto), share("two", FsCache::Always)],
        vsock: Vsock::Daemon {
            binary: installed("libexec/cofferdam/vhost-device-vsock"),
            dir: lab.sockets(),
            name: "vm".into(),
        },
    }
}

fn shared() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for tag in ["one", "two"] {
        std::fs::create_dir(dir.path().join(tag)).unwrap();
        std::fs::write(
            dir.path().join(tag).join("file"),
            format!("this is {tag}\n"),
        )
        .unwrap();
    }
    dir
}

/// Who was started.
#[derive(Default)]
struct Told(Mutex<Vec<Identity>>);

impl Told {
    fn tell(&self, identity: Identity) -> Result<()> {
        self.0.lock().unwrap().push(identity);
        Ok(())
    }

    fn all(&self) -> Vec<Identity> {
        self.0.lock().unwrap().clone()
    }

    async fn are_gone(&self, count: usize) {
        let until = Instant::now() + SOON;
        assert_eq!(self.all().len(), count);
        while self.all().iter().any(Identity::is_alive) {
            assert!(Instant::now() < until, "a process is left");
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test]
async fn a_machine_comes_up_with_its_helpers_and_stops_with_all_of_them() {
    let (lab, shared, told) = (Lab::new(SCRIPT).await, shared(), Told::default());
    let spawned = spawn(config(&lab, shared.path()), |one| {
        assert!(one.is_alive());
        told.tell(one)
    });
    let (built, cards) = spawned.await.unwrap().attach(Vec::new()).await.unwrap();
    assert!(cards.is_empty());
    let machine = built.run().await.unwrap();
    lab.prints("this is one").await;
    lab.prints("this is two").await;
    let mut identities = machine.identities();
    assert_eq!((identities.len(), identities[0]), (4, machine.qemu()));
    let mut started = told.all();
    identities.sort_by_key(|one| one.pid);
    started.sort_by_key(|one| one.pid);
    assert_eq!(identities, started, "each of them was told, once");
    machine.stop().await;
    assert!(!told.all().iter().any(Identity::is_alive));
    assert!(machine.died().await.ends_with("it was asked to quit"));
    machine.stop().await;
}

#[tokio::test]
async fn the_end_of_a_helper_is_the_end_of_the_machine() {
    let (lab, shared, told) = (Lab::new("").await, shared(), Told::default());
    let spawned = spawn(config(&lab, shared.path()), |one| told.tell(one));
    let (built, _) = spawned.await.unwrap().attach(Vec::new()).await.unwrap();
    let machine = built.run().await.unwrap();
    // QEMU is the first of them; any other is a helper.
    let helper = machine.identities()[3];
    helper.kill_and_wait(SOON).unwrap();
    let why = tokio::time::timeout(SOON, machine.died()).await.unwrap();
    let wanted = format!("vhost-device-vsock {}", Exit::Signal(9));
    assert!(why.ends_with(&wanted), "{why}");
    drop(machine);
    told.are_gone(4).await;
}

#[tokio::test]
async fn each_phase_that_is_dropped_leaves_no_process() {
    let (lab, shared) = (Lab::new("").await, shared());
    for attach in [false, true] {
        let told = Told::default();
        let spawned = spawn(config(&lab, shared.path()), |one| told.tell(one));
        let spawned = spawned.await.unwrap();
        if attach {
            drop(spawned.attach(Vec::new()).await.unwrap());
        } else {
            drop(spawned);
        }
        told.are_gone(4).await;
    }
}

#[tokio::test]
async fn a_ledger_that_cannot_be_written_ends_what_was_started() {
    let (lab, shared) = (Lab::new("").await, shared());
    for count in 1..=4 {
        let told = Told::default();
        let error = spawn(config(&lab, shared.path()), |one| {
            told.tell(one)?;
            if told.all().len() < count {
                Ok(())
            } else {
                Err(Error::Unsupported("the ledger is full".into()))
            }
        });
        let error = error.await.unwrap_err();
        assert_eq!(error.to_string(), "the ledger is full");
        told.are_gone(count).await;
    }
}

#[tokio::test]
async fn a_refused_device_is_explained_by_its_helper() {
    let (lab, shared, told) = (Lab::new("").await, shared(), Told::default());
    let mut config = config(&lab, shared.path());
    config.shares[1].dir = "/no/such/directory".into();
    let spawned = spawn(config, |one| told.tell(one)).await.unwrap();
    let error = spawned.attach(Vec::new()).await.unwrap_err().to_string();
    assert!(
        error.contains("exited with status 126: launcher: cannot take /no/such/directory: "),
        "{error}"
    );
    told.are_gone(4).await;
}

#[tokio::test]
async fn a_helper_that_does_not_start_is_the_error_and_qemu_goes() {
    let (lab, shared, told) = (Lab::new("").await, shared(), Told::default());
    let mut config = config(&lab, shared.path());
    config.machine.confinement = None;
    config.vsock = Vsock::Daemon {
        binary: program(
            lab.dir.path(),
            "daemon",
            "echo 'no socket for you' >&2; exit 3",
        ),
        dir: lab.sockets(),
        name: "vm".into(),
    };
    let error = spawn(config, |one| told.tell(one)).await.unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("exited with status 3: no socket for you"),
        "{error}"
    );
    told.are_gone(told.all().len()).await;
}

#[tokio::test]
async fn a_qemu_without_the_vsock_device_is_said_before_it_starts() {
    let (lab, shared, told) = (Lab::new("").await, shared(), Told::default());
    let mut config = config(&lab, shared.path());
    let types = &mut config.machine.capabilities.types;
    assert!(types.remove("vhost-user-vsock-pci"));
    let error = spawn(config, |one| told.tell(one)).await.unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("has no vhost-user-vsock-pci: use another, or set vsock = \"vhost\""),
        "{error}"
    );
    told.are_gone(0).await;
}
