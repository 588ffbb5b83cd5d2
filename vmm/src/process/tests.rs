//! Tests of child processes, against real ones.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::*;

const SOON: Duration = Duration::from_secs(10);

fn sh(script: &str) -> Spawn {
    Spawn::new("/bin/sh", vec!["-c".into(), script.into()])
}

async fn exit_of(child: &Child) -> Exit {
    tokio::time::timeout(SOON, child.exited())
        .await
        .expect("the child should have ended")
}

#[tokio::test]
async fn every_waiter_learns_the_status_and_the_last_lines() {
    let child = Child::spawn(sh("seq 1 30 >&2; printf 'no \\033 newline' >&2; exit 3")).unwrap();
    let (first, second) = tokio::join!(exit_of(&child), exit_of(&child));
    assert_eq!(
        (first, second, exit_of(&child).await),
        (Exit::Code(3), Exit::Code(3), Exit::Code(3))
    );
    let tail = child.stderr_tail();
    assert_eq!(
        (tail.len(), tail[0].as_str(), tail[20].as_str()),
        (21, "11", "no   newline")
    );
    assert!(!child.identity().is_alive());
}

#[tokio::test]
async fn a_killed_child_names_the_signal() {
    let child = Child::spawn(sh("exec sleep 1000")).unwrap();
    assert!(child.identity().is_alive());
    child.kill();
    child.kill();
    assert_eq!(
        exit_of(&child).await.to_string(),
        "was killed by signal 9 (SIGKILL)"
    );
}

#[tokio::test]
async fn a_dropped_child_dies_and_is_reaped() {
    let child = Child::spawn(sh("exec sleep 1000")).unwrap();
    let identity = child.identity();
    drop(child);
    let until = Instant::now() + SOON;
    while Identity::of(identity.pid).is_ok_and(|now| now == identity) {
        assert!(Instant::now() < until, "still there, as a zombie at least");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_grandchild_that_holds_stderr_does_not_delay_the_end() {
    let child = Child::spawn(sh("sleep 1000 & echo $! >&2; exit 0")).unwrap();
    assert_eq!(exit_of(&child).await, Exit::Code(0));
    let pid = child.stderr_tail()[0].parse().unwrap();
    Identity::of(pid).unwrap().kill_and_wait(SOON).unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_one_line() {
    let spawn = Spawn::new("/no/qemu", Vec::new());
    assert_eq!(
        Child::spawn(spawn).unwrap_err().to_string(),
        "cannot start /no/qemu: No such file or directory (os error 2)"
    );
    let spawn = Spawn {
        cgroup_procs: vec!["/no/cgroup.procs".into()],
        ..sh("true")
    };
    assert!(
        Child::spawn(spawn)
            .unwrap_err()
            .to_string()
            .contains("open /no/cgroup.procs: ")
    );
}

#[tokio::test]
async fn stdout_is_read_after_the_end_and_a_hang_is_a_deadline() {
    let text = stdout_of(
        Path::new("/bin/sh"),
        &["-c", "echo one; echo two; echo three >&2"],
        SOON,
    )
    .await
    .unwrap();
    assert_eq!(text, "one\ntwo\n");
    let late = stdout_of(Path::new("/bin/sleep"), &["100"], Duration::from_millis(50))
        .await
        .unwrap_err();
    assert_eq!(late.to_string(), "run /bin/sleep 100 took longer than 50ms");
}

#[tokio::test]
async fn only_named_descriptors_reach_the_child() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (_other, secret) = std::os::unix::net::UnixStream::pair().unwrap();
    let number = theirs.as_raw_fd();
    let mut spawn = sh("ls /proc/self/fd >&2");
    spawn.fds = vec![theirs.into()];
    let child = Child::spawn(spawn).unwrap();
    exit_of(&child).await;
    // ls has one of its own: the directory it reads.
    let seen = child.stderr_tail();
    assert!(seen.contains(&number.to_string()), "{seen:?}");
    assert!(
        seen.len() <= 5 && !seen.contains(&secret.as_raw_fd().to_string()),
        "{seen:?}"
    );
    drop(ours);
}

#[tokio::test]
async fn a_process_with_a_reused_number_is_left_alone() {
    let child = Child::spawn(sh("exec sleep 1000")).unwrap();
    let other = Identity {
        start_time: child.identity().start_time + 1,
        ..child.identity()
    };
    assert!(!other.is_alive());
    other.kill_and_wait(SOON).unwrap();
    assert!(child.identity().is_alive());
    child.identity().kill_and_wait(SOON).unwrap();
    child.identity().kill_and_wait(SOON).unwrap();
    assert_eq!(exit_of(&child).await, Exit::Signal(9));
}

/// The kernel does this, whatever happens to the code of the parent.
#[test]
fn a_child_dies_with_the_thread_that_spawned_it() {
    let spawner = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let child = runtime.block_on(async { Child::spawn(sh("exec sleep 1000")).unwrap() });
        let identity = child.identity();
        let name = format!("/proc/{}/comm", identity.pid);
        while std::fs::read_to_string(&name).unwrap() != "sleep\n" {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::mem::forget(child);
        identity
    });
    let orphan = spawner.join().unwrap();
    let until = Instant::now() + SOON;
    while orphan.is_alive() {
        assert!(
            Instant::now() < until,
            "outlived the thread that spawned it"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
