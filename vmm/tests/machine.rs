//! A real QEMU, from start to end: what goes wrong at the start, how its death is told, and how it
//! is stopped.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::time::{Duration, Instant};

use common::{Lab, SOON, program};
use vmm::MachineConfig;
use vmm::parts::Vm;
use vmm::process::Exit;

#[tokio::test]
async fn a_machine_starts_and_quits_and_may_be_stopped_twice() {
    let lab = Lab::new("").await;
    let starting = Vm::spawn(&lab.config).await.unwrap();
    let identity = starting.process.identity();
    assert!(identity.is_alive());
    let vm = starting.connect(SOON).await.unwrap();
    assert_eq!(vm.process.identity(), identity);
    let death = vm.stop(SOON).await.unwrap();
    assert_eq!(
        (death.exit, death.event.as_deref()),
        (Exit::Code(0), Some("it was asked to quit"))
    );
    assert_eq!(vm.stop(SOON).await.unwrap(), death);
    assert_eq!(vm.died().await, death);
    assert!(!identity.is_alive());
}

#[tokio::test]
async fn a_machine_that_hangs_is_killed() {
    let lab = Lab::new("").await;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    // SAFETY: signals a process that this test started and that nobody has reaped.
    unsafe { libc::kill(vm.process.identity().pid, libc::SIGSTOP) };
    let began = Instant::now();
    let death = vm.stop(Duration::from_millis(100)).await.unwrap();
    assert_eq!(death.exit, Exit::Signal(9));
    assert!(began.elapsed() < SOON);
}

#[tokio::test]
async fn a_killed_machine_is_noticed_by_all_and_by_every_command() {
    let lab = Lab::new("").await;
    let vm = Vm::spawn(&lab.config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    vm.process.identity().kill_and_wait(SOON).unwrap();
    let began = Instant::now();
    let (first, second, error) = tokio::join!(vm.died(), vm.died(), vm.cont());
    assert_eq!(first, second);
    let pid = vm.process.identity().pid;
    assert_eq!(
        first.to_string(),
        format!("QEMU (process {pid}) was killed by signal 9 (SIGKILL)")
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .ends_with("was killed by signal 9 (SIGKILL)")
    );
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "took {:?}",
        began.elapsed()
    );
    assert_eq!(vm.stop(SOON).await.unwrap(), first);
}

#[tokio::test]
async fn what_is_wrong_at_the_start_is_said_in_qemus_words() {
    let lab = Lab::new("").await;
    let dir = lab.dir.path();
    // Some of these QEMUs are scripts, which cannot be confined.
    let config = || MachineConfig {
        confinement: None,
        ..lab.config.clone()
    };
    let text = dir.join("text");
    std::fs::write(&text, "no kernel at all").unwrap();
    for (config, wanted) in [
        (
            MachineConfig {
                kernel: "/no/vmlinux".into(),
                ..config()
            },
            "/no/vmlinux",
        ),
        (
            MachineConfig {
                kernel: text,
                ..config()
            },
            "exited with status 1: ",
        ),
        (
            MachineConfig {
                initramfs: Some("/no/initrd".into()),
                ..config()
            },
            "/no/initrd",
        ),
        (
            MachineConfig {
                console: Some("/no/dir/log".into()),
                ..config()
            },
            "/no/dir/log",
        ),
        (
            MachineConfig {
                qemu: program(dir, "dies", "echo >&2 'I am no QEMU'; exit 3"),
                ..config()
            },
            "dies exited with status 3: I am no QEMU",
        ),
        (
            MachineConfig {
                qemu: program(dir, "mute", "exec 2>&-; kill -SEGV $$"),
                ..config()
            },
            "was killed by signal 11 (SIGSEGV)",
        ),
    ] {
        let connected = match Vm::spawn(&config).await {
            Ok(starting) => starting.connect(SOON).await.map(drop),
            Err(error) => Err(error),
        };
        let error = connected.unwrap_err().to_string();
        assert!(
            error.contains(wanted) && !error.contains('\n'),
            "{wanted}: {error}"
        );
    }
    let config = MachineConfig {
        vcpus: 100_000,
        max_vcpus: 100_000,
        ..lab.config.clone()
    };
    assert!(
        Vm::spawn(&config)
            .await
            .unwrap_err()
            .to_string()
            .starts_with("100000 to 100000 CPUs: ")
    );
    let config = MachineConfig {
        qemu: "/no/qemu".into(),
        confinement: None,
        ..lab.config.clone()
    };
    assert!(
        Vm::spawn(&config)
            .await
            .unwrap_err()
            .to_string()
            .starts_with("cannot start /no/qemu: ")
    );
}

#[tokio::test]
async fn one_that_never_answers_is_given_up_and_killed() {
    let lab = Lab::new("").await;
    let config = MachineConfig {
        qemu: program(lab.dir.path(), "sleeps", "exec sleep 1000"),
        confinement: None,
        ..lab.config.clone()
    };
    let starting = Vm::spawn(&config).await.unwrap();
    let identity = starting.process.identity();
    let error = starting
        .connect(Duration::from_millis(100))
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(error, "QEMU's greeting took longer than 100ms");
    let until = Instant::now() + SOON;
    while identity.is_alive() {
        assert!(Instant::now() < until, "it outlived its handle");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_guest_that_powers_off_or_panics_says_so() {
    for (script, wanted) in [
        ("poweroff -f", "exited with status 0: the guest powered off"),
        ("exit 1", "the guest rebooted (its kernel panicked"),
    ] {
        let lab = Lab::new(script).await;
        let vm = Vm::spawn(&lab.config)
            .await
            .unwrap()
            .connect(SOON)
            .await
            .unwrap();
        vm.cont().await.unwrap();
        let death = tokio::time::timeout(SOON, vm.died())
            .await
            .expect("the end of the guest")
            .to_string();
        assert!(
            death.contains(wanted),
            "{script}: {death}\n{}",
            lab.console()
        );
    }
}

#[tokio::test]
async fn qemu_enters_its_cgroup_before_it_runs() {
    let lab = Lab::new("").await;
    // Any file will do to see that the process wrote itself there.
    let procs = lab.dir.path().join("cgroup.procs");
    std::fs::write(&procs, "").unwrap();
    let config = MachineConfig {
        cgroup_procs: vec![procs.clone()],
        ..lab.config.clone()
    };
    let vm = Vm::spawn(&config)
        .await
        .unwrap()
        .connect(SOON)
        .await
        .unwrap();
    assert_eq!(std::fs::read_to_string(&procs).unwrap(), "0");
    vm.stop(SOON).await.unwrap();
}
