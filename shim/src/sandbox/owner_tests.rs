//! What the owner does about a guest that does not do what it is told, or says what is not so. No
//! machine is needed: one that has ended is asked nothing, and a clock asks nobody.

use tokio::time::timeout;
use ttrpc::Code;

use super::*;
use crate::events::Publisher;
use crate::model::Stdio;
use crate::sandbox::state::{KILLED, Stage};

/// A running task `web` with an exec, and the handle to its owner.
async fn running(dir: &Path) -> Handle {
    let identity = SandboxIdentity::new("/run/containerd/containerd.sock", "default", "web");
    let ledger = Ledger::create(&dir.join("state")).unwrap();
    let (mut driver, handle, jobs) = Driver::new(identity, ledger, Publisher::start("", "default"));
    driver
        .state
        .create("web", &dir.to_string_lossy(), Stdio::default())
        .unwrap();
    driver.state.created("web", 100, false);
    let (init, exec) = (ProcessId::new("web", ""), ProcessId::new("web", "e"));
    driver.state.start(&init).unwrap();
    driver.state.started(&init).unwrap();
    driver.state.exec(&exec, Stdio::default()).unwrap();
    driver.state.start(&exec).unwrap();
    driver.state.started(&exec).unwrap();
    tokio::spawn(driver.run(jobs));
    handle
}

async fn exit(handle: &Handle, exec: &str) -> Exit {
    let key = ProcessId::new("web", exec);
    handle
        .ask(|driver, reply| driver.wait(key, reply))
        .await
        .unwrap()
}

async fn reason(handle: &Handle) -> String {
    handle
        .ask(|driver, reply| answer(reply, driver.state.alive()))
        .await
        .unwrap_err()
        .message
}

async fn is_alive(handle: &Handle) -> bool {
    handle
        .ask(|driver, reply| answer(reply, driver.state.alive()))
        .await
        .is_ok()
}

const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn a_sigkill_that_is_not_obeyed_ends_the_machine_and_every_wait() {
    let dir = tempfile::tempdir().unwrap();
    let handle = running(dir.path()).await;
    handle.tell(|driver| driver.begin_to_end("web"));
    // A second one does not give it more time.
    tokio::time::sleep(TIMEOUT / 2).await;
    handle.tell(|driver| driver.begin_to_end("web"));
    let begun = Instant::now();
    assert_eq!(
        timeout(TIMEOUT, exit(&handle, "")).await.unwrap().status,
        KILLED
    );
    assert_eq!(exit(&handle, "e").await.status, KILLED);
    assert_eq!(begun.elapsed().as_secs(), 5);
    assert!(
        reason(&handle)
            .await
            .contains("task web did not end within 10 s of a SIGKILL")
    );
    let kill = |driver: &mut Driver, reply| driver.kill(ProcessId::new("web", ""), 9, true, reply);
    assert_eq!(
        handle.ask(kill).await.unwrap_err().code,
        Code::NOT_FOUND,
        "it has ended: nothing is to be done"
    );
}

#[tokio::test(start_paused = true)]
async fn a_sigkill_that_works_ends_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let handle = running(dir.path()).await;
    handle.tell(|driver| {
        driver.begin_to_end("web");
        driver.exited(&ProcessId::new("web", "e"), KILLED);
        driver.exited(&ProcessId::new("web", ""), KILLED);
    });
    tokio::time::sleep(TIMEOUT * 2).await;
    assert!(is_alive(&handle).await);
}

#[tokio::test(start_paused = true)]
async fn the_next_task_of_the_same_name_is_not_killed_for_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let handle = running(dir.path()).await;
    handle.tell(|driver| {
        driver.begin_to_end("web");
        driver.exited(&ProcessId::new("web", "e"), KILLED);
        driver.exited(&ProcessId::new("web", ""), KILLED);
        driver.forget(&ProcessId::new("web", ""));
        driver
            .state
            .create("web", "/nowhere", Stdio::default())
            .unwrap();
        driver.state.created("web", 100, false);
    });
    tokio::time::sleep(TIMEOUT * 2).await;
    let stage = handle
        .ask(|driver, reply| answer(reply, driver.state.task("web").map(|task| task.init.stage)))
        .await;
    assert_eq!(stage, Ok(Stage::Created));
    // It has a clock of its own.
    handle.tell(|driver| driver.begin_to_end("web"));
    tokio::time::sleep(TIMEOUT * 2).await;
    assert!(!is_alive(&handle).await);
}
