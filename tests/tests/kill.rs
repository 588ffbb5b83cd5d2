//! kill -9 of the shim, of QEMU and of its helpers, at any moment: nothing stays, and containerd
//! and the next container do not notice. `COFFERDAM_KILLS` is the number of rounds,
//! `COFFERDAM_SEED` where the sequence begins.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cofferdam_tests::bundle::Bundle;
use cofferdam_tests::command::Running;
use cofferdam_tests::leftovers::Snapshot;
use cofferdam_tests::procs::{self, Proc};
use cofferdam_tests::random::{Random, number};
use cofferdam_tests::storage::Storage;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, eventually};

const PARTS: [&str; 4] = [
    "containerd-shim-cofferdam",
    "qemu-system",
    "virtiofsd",
    "vhost-device-vsock",
];

/// How long cleaning up may take: containerd gives `delete` 5 s, and notices the death first.
const CLEAN: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    Suite::new().run(cases![Ours: at_random_moments, every_order_and_then_delete,
        one_part_of_a_running_container,
        next_sandbox_takes_what_a_killed_delete_left, same_sandbox_again_after_a_killed_delete,
        sigkill_of_what_hangs_in_a_file_server, removal_of_what_hangs_in_a_file_server,
        sigkill_of_what_hangs_in_a_stopped_machine, sigkill_of_what_hangs_in_a_dead_storage])
}

/// These tests compare the whole machine before and after: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn at_random_moments(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let seed = number("COFFERDAM_SEED", 1);
    for round in seed..seed + number("COFFERDAM_KILLS", 12) {
        let mut random = Random::new(round);
        // One part, sometimes two at once; the moment lies anywhere from before the boot to after
        // the end.
        let victims: Vec<&str> = (0..=random.below(4) / 3)
            .map(|_| PARTS[usize::try_from(random.below(4)).unwrap()])
            .collect();
        let delay = Duration::from_millis(random.below(3500));
        let what = format!("seed {round}: {victims:?} after {delay:?}");
        let before = Snapshot::take();
        {
            let container = Container::adopt(env, &env.id());
            let run = Running::start(
                env.run_command(&container.id, &["--rm"], &["sleep", "1"]),
                None,
            );
            let began = Instant::now();
            while began.elapsed() < delay {
                std::thread::sleep(Duration::from_millis(5));
            }
            for victim in &victims {
                // `delete` has a test of its own: containerd does not run it again.
                procs::named(victim)
                    .iter()
                    .filter(|victim| !victim.args.ends_with(" delete"))
                    .for_each(Proc::kill9);
            }
            // Whatever `ctr run` says of it, it has to say something.
            run.outcome(PATIENCE)
                .unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        before
            .wait_gone(CLEAN)
            .unwrap_or_else(|left| panic!("{what}: {left}"));
        if round % 4 == 0 {
            assert_eq!(
                env.run(&[], &["echo", "next"]).ok().text(),
                "next",
                "{what}: the next container"
            );
        }
    }
}

fn one_part_of_a_running_container(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    for part in PARTS {
        let before = Snapshot::take();
        {
            let container = env.idle();
            let victims = procs::named(part);
            // A host with a vsock of its own needs no daemon for it.
            assert!(
                !victims.is_empty() || part == "vhost-device-vsock",
                "no {part} runs"
            );
            victims.iter().for_each(Proc::kill9);
            if victims.is_empty() {
                continue;
            }
            if part == PARTS[0] {
                eventually("containerd drops the task of a dead shim", PATIENCE, || {
                    container.listed().is_none().then_some(())
                });
            } else {
                assert_eq!(container.finish(), 137, "after the death of {part}");
            }
        }
        before
            .wait_gone(CLEAN)
            .unwrap_or_else(|left| panic!("{part}: {left}"));
    }
}

fn every_order_and_then_delete(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let orders = [vec![0], vec![0, 1, 2, 3], vec![1, 0], vec![3, 2, 0, 1]];
    for order in orders {
        let bundle = Bundle::new(env, &["sleep", "3600"]);
        let before = Snapshot::take();
        let task = bundle.start();
        task.create().unwrap();
        task.start("").unwrap();
        for part in &order {
            procs::named(PARTS[*part]).iter().for_each(Proc::kill9);
        }
        let began = Instant::now();
        assert_eq!(bundle.delete().exit_status, 137);
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{order:?}: delete took {:?}",
            began.elapsed()
        );
        before
            .wait_gone(Duration::from_secs(1))
            .unwrap_or_else(|left| panic!("{order:?}: {left}"));
    }
}

fn next_sandbox_takes_what_a_killed_delete_left(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let bundle = Bundle::new(env, &["sleep", "3600"]);
    let before = Snapshot::take();
    bundle.start().create().unwrap();
    procs::named(PARTS[0]).iter().for_each(Proc::kill9);
    eventually("QEMU dies with its shim", PATIENCE, || {
        procs::named(PARTS[1]).is_empty().then_some(())
    });
    assert!(!before.more_than().is_empty());
    assert_eq!(env.run(&[], &["echo", "next"]).ok().text(), "next");
    before.wait_gone(CLEAN).unwrap();
}

fn same_sandbox_again_after_a_killed_delete(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let bundle = Bundle::new(env, &["sleep", "3600"]);
    let before = Snapshot::take();
    for _ in 0..3 {
        let task = bundle.start();
        task.create().unwrap();
        task.start("").unwrap();
        procs::named(PARTS[0]).iter().for_each(Proc::kill9);
        eventually("QEMU dies with its shim", PATIENCE, || {
            procs::named(PARTS[1]).is_empty().then_some(())
        });
        // The first thread's end is QEMU's; the others hold the socket for a moment longer.
        let address = std::fs::read_to_string(bundle.dir.join("address")).unwrap();
        let refused = || {
            UnixStream::connect(address.trim_start_matches("unix://"))
                .is_err()
                .then_some(())
        };
        eventually("its socket closes", PATIENCE, refused);
    }
    assert_eq!(bundle.delete().exit_status, 137);
    before.wait_gone(CLEAN).unwrap();
}

/// How long a container may take to be killed and removed, whatever hangs.
const KILLED: Duration = Duration::from_secs(15);

/// Every process of both file servers, the one that serves too.
fn stop_file_servers() {
    let servers = procs::named("virtiofsd");
    assert!(servers.len() >= 2, "{servers:?}");
    servers.iter().for_each(Proc::stop);
}

/// A container whose processes always want something of a file server.
fn busy(env: &Env) -> Container<'_> {
    let container = env.detached(
        &["--null-io"],
        &[
            "sh",
            "-c",
            "touch /up; while :; do ls /$RANDOM$RANDOM; done",
        ],
    );
    container.wait_for_file("/up");
    container
}

fn sigkill_of_what_hangs_in_a_file_server(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let before = Snapshot::take();
    {
        let container = busy(env);
        stop_file_servers();
        // Nothing says that a request of the guest's is on its way; one every few milliseconds is.
        std::thread::sleep(Duration::from_secs(1));
        let began = Instant::now();
        container.kill("9", &[]).ok();
        assert_eq!(container.finish(), 137);
        assert!(
            began.elapsed() < KILLED,
            "killed and removed after {:?}",
            began.elapsed()
        );
        assert!(
            env.daemon
                .log_about(&container.id)
                .contains("of a SIGKILL, so the virtual machine was ended")
        );
    }
    before.wait_gone(Duration::from_secs(5)).unwrap();
}

fn removal_of_what_hangs_in_a_file_server(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let before = Snapshot::take();
    {
        // Its process can be killed, and looks at no file: only what removes it does.
        let container = env.idle();
        stop_file_servers();
        let began = Instant::now();
        env.ctr(&["tasks", "rm", "-f", &container.id]).ok();
        assert!(
            began.elapsed() < KILLED,
            "removed after {:?}",
            began.elapsed()
        );
    }
    before.wait_gone(Duration::from_secs(5)).unwrap();
}

fn sigkill_of_what_hangs_in_a_stopped_machine(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let before = Snapshot::take();
    {
        // An agent that takes everything and answers nothing.
        let container = env.idle();
        procs::named("qemu-system").iter().for_each(Proc::stop);
        let began = Instant::now();
        container.kill("9", &["--all"]).ok();
        assert_eq!(container.finish(), 137);
        assert!(
            began.elapsed() < KILLED,
            "killed and removed after {:?}",
            began.elapsed()
        );
        let log = env.daemon.log_about(&container.id);
        assert!(log.contains("the guest did not obey a SIGKILL"), "{log}");
    }
    before.wait_gone(Duration::from_secs(5)).unwrap();
}

fn sigkill_of_what_hangs_in_a_dead_storage(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut storage = Storage::mount(&env.dir.join("storage"));
    let before = Snapshot::take();
    {
        let volume = format!(
            "type=bind,src={},dst=/mnt,options=rbind:rw",
            storage.path.display()
        );
        let command = "test -d /mnt && touch /up; while :; do ls /mnt/$RANDOM$RANDOM; done";
        let container = env.detached(&["--null-io", "--mount", &volume], &["sh", "-c", command]);
        container.wait_for_file("/up");
        storage.die();
        std::thread::sleep(Duration::from_secs(1));
        let began = Instant::now();
        container.kill("9", &[]).ok();
        assert_eq!(container.finish(), 137);
        assert!(
            began.elapsed() < KILLED,
            "killed and removed after {:?}",
            began.elapsed()
        );
    }
    before.wait_gone(Duration::from_secs(5)).unwrap();
}
