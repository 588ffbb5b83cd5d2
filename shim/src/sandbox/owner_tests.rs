//! What the owner does about a guest that does not do what it is told, or says what is not so. No
//! machine is needed: one that has ended is asked nothing, and a clock asks nobody.

use tokio::time::timeout;
use ttrpc::Code;

use super::*;
use crate::events::Publisher;
use crate::model::Stdio;
use crate::sandbox::state::{KILLED, Stage};

/// A running task `web` with an exec, and the handle to its owner.
async fn running(dir: &Path) -> SandboxHandle {
    let identity = SandboxIdentity::new("/run/containerd/containerd.sock", "default", "web");
    let ledger = Ledger::create(&dir.join("state")).unwrap();
    let (mut owner, handle, jobs) =
        SandboxOwner::new(identity, ledger, Publisher::start("", "default"));
    owner
        .state
        .create("web", &dir.to_string_lossy(), Stdio::default())
        .unwrap();
    owner.state.created("web", 100, false);
    let (init, exec) = (ProcessId::new("web", ""), ProcessId::new("web", "e"));
    owner.state.start(&init).unwrap();
    owner.state.started(&init).unwrap();
    owner.state.exec(&exec, Stdio::default()).unwrap();
    owner.state.start(&exec).unwrap();
    owner.state.started(&exec).unwrap();
    tokio::spawn(owner.run(jobs));
    handle
}

async fn exit(handle: &SandboxHandle, exec: &str) -> Exit {
    let key = ProcessId::new("web", exec);
    handle
        .ask(|owner, reply| owner.wait(key, reply))
        .await
        .unwrap()
}

async fn reason(handle: &SandboxHandle) -> String {
    handle
        .ask(|owner, reply| answer(reply, owner.state.alive()))
        .await
        .unwrap_err()
        .message
}

async fn is_alive(handle: &SandboxHandle) -> bool {
    handle
        .ask(|owner, reply| answer(reply, owner.state.alive()))
        .await
        .is_ok()
}

const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn a_sigkill_that_is_not_obeyed_ends_the_machine_and_every_wait() {
    let dir = tempfile::tempdir().unwrap();
    let handle = running(dir.path()).await;
    handle.tell(|owner| owner.begin_to_end("web"));
    // A second one does not give it more time.
    tokio::time::sleep(TIMEOUT / 2).await;
    handle.tell(|owner| owner.begin_to_end("web"));
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
    let kill =
        |owner: &mut SandboxOwner, reply| owner.kill(ProcessId::new("web", ""), 9, true, reply);
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
    handle.tell(|owner| {
        owner.begin_to_end("web");
        owner.exited(&ProcessId::new("web", "e"), KILLED);
        owner.exited(&ProcessId::new("web", ""), KILLED);
    });
    tokio::time::sleep(TIMEOUT * 2).await;
    assert!(is_alive(&handle).await);
}

#[tokio::test(start_paused = true)]
async fn the_next_task_of_the_same_name_is_not_killed_for_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let handle = running(dir.path()).await;
    handle.tell(|owner| {
        owner.begin_to_end("web");
        owner.exited(&ProcessId::new("web", "e"), KILLED);
        owner.exited(&ProcessId::new("web", ""), KILLED);
        owner.forget(&ProcessId::new("web", ""));
        owner
            .state
            .create("web", "/nowhere", Stdio::default())
            .unwrap();
        owner.state.created("web", 100, false);
    });
    tokio::time::sleep(TIMEOUT * 2).await;
    let stage = handle
        .ask(|owner, reply| answer(reply, owner.state.task("web").map(|task| task.init.stage)))
        .await;
    assert_eq!(stage, Ok(Stage::Created));
    // It has a clock of its own.
    handle.tell(|owner| owner.begin_to_end("web"));
    tokio::time::sleep(TIMEOUT * 2).await;
    assert!(!is_alive(&handle).await);
}
