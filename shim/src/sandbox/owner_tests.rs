//! What the owner does about a guest that does not do what it is told, or says what is not so. No
//! machine is needed: one that has ended is asked nothing, and a clock asks nobody.

use std::path::Path;

use tokio::sync::oneshot::Receiver;
use tokio::time::timeout_at;
use ttrpc::Code;

use super::*;
use crate::model::SignalScope;
use crate::model::{Exit, ProcessId, Stdio};
use crate::sandbox::state::{KILLED, Stage};

const TIMEOUT: Duration = Duration::from_secs(10);

/// An owner that is driven by hand.
struct Lab {
    owner: SandboxOwner,
    requests: Requests,
    handle: SandboxHandle,
    _dir: tempfile::TempDir,
}

impl Lab {
    /// A running task `web` with an exec `e`.
    fn running() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let identity = SandboxIdentity::new("/run/containerd/containerd.sock", "default", "web");
        let ledger = Ledger::create(&dir.path().join("state")).unwrap();
        let events = Publisher::start("", "default");
        let (owner, handle, requests) = SandboxOwner::new(
            identity,
            ledger,
            events,
            Box::new(crate::guest::boot::start),
        );
        let mut lab = Lab {
            owner,
            requests,
            handle,
            _dir: dir,
        };
        lab.create();
        let (init, exec) = (ProcessId::init("web"), ProcessId::exec("web", "e"));
        let state = &mut lab.owner.state;
        state.start(&init).unwrap();
        state.started(&init).unwrap();
        state.exec(&exec, Stdio::default()).unwrap();
        state.start(&exec).unwrap();
        state.started(&exec).unwrap();
        lab
    }

    fn create(&mut self) {
        let bundle = self._dir.path().to_string_lossy().into_owned();
        let state = &mut self.owner.state;
        state.create("web", &bundle, Stdio::default()).unwrap();
        state.created("web", 100, false);
    }

    /// Lets it work for so long.
    async fn drive(&mut self, time: Duration) {
        let end = Instant::now() + time + Duration::from_millis(1);
        while timeout_at(end, self.owner.step(&mut self.requests))
            .await
            .is_ok()
        {}
    }

    fn wait(&mut self, exec: &str) -> Receiver<Result<Exit>> {
        let (reply, answer) = Reply::new();
        self.owner.wait(&ProcessId::of_request("web", exec), reply);
        answer
    }

    fn is_alive(&self) -> bool {
        self.owner.state.alive().is_ok()
    }
}

fn status(mut answer: Receiver<Result<Exit>>) -> u32 {
    answer.try_recv().unwrap().unwrap().status
}

#[tokio::test(start_paused = true)]
async fn a_sigkill_that_is_not_obeyed_ends_the_machine_and_every_wait() {
    let mut lab = Lab::running();
    let (init, exec) = (lab.wait(""), lab.wait("e"));
    lab.owner.begin_to_end("web");
    // A second one does not give it more time.
    lab.drive(TIMEOUT / 2).await;
    lab.owner.begin_to_end("web");
    lab.drive(TIMEOUT / 2 - Duration::from_millis(10)).await;
    assert!(lab.is_alive());
    lab.drive(Duration::from_millis(10)).await;
    assert_eq!((status(init), status(exec)), (KILLED, KILLED));
    let reason = lab.owner.state.alive().unwrap_err().to_string();
    assert!(
        reason.contains("task web did not end within 10 s of a SIGKILL"),
        "{reason}"
    );
    let (reply, mut killed) = Reply::new();
    let process = ProcessId::init("web");
    lab.owner.kill(process, 9, SignalScope::Container, reply);
    let error = killed.try_recv().unwrap().unwrap_err();
    assert_eq!(
        error.code(),
        Code::NOT_FOUND,
        "it has ended: nothing is to be done"
    );
}

#[tokio::test(start_paused = true)]
async fn a_sigkill_that_works_ends_nothing_else() {
    let mut lab = Lab::running();
    lab.owner.begin_to_end("web");
    lab.owner.exited(&ProcessId::exec("web", "e"), KILLED);
    lab.owner.exited(&ProcessId::init("web"), KILLED);
    lab.drive(TIMEOUT * 2).await;
    assert!(lab.is_alive());
}

#[tokio::test(start_paused = true)]
async fn the_next_task_of_the_same_name_is_not_killed_for_the_last_one() {
    let mut lab = Lab::running();
    lab.owner.begin_to_end("web");
    lab.owner.exited(&ProcessId::exec("web", "e"), KILLED);
    lab.owner.exited(&ProcessId::init("web"), KILLED);
    lab.owner.forget(&ProcessId::init("web"));
    lab.create();
    lab.drive(TIMEOUT * 2).await;
    assert_eq!(
        lab.owner.state.task("web").unwrap().init.stage,
        Stage::Created
    );
    // It has a clock of its own.
    lab.owner.begin_to_end("web");
    lab.drive(TIMEOUT).await;
    assert!(!lab.is_alive());
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_task_that_is_deleted_gets_an_answer() {
    let mut lab = Lab::running();
    let (init, mut exec) = (lab.wait(""), lab.wait("e"));
    lab.owner.exited(&ProcessId::init("web"), 3);
    lab.owner.forget(&ProcessId::exec("web", "e"));
    assert_eq!(
        exec.try_recv().unwrap().unwrap_err().code(),
        Code::NOT_FOUND
    );
    // The init's exit is told after that of its execs, or when they are not heard of.
    lab.drive(Duration::from_secs(3)).await;
    assert_eq!(status(init), 3);
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_the_shim_itself_ends_every_wait() {
    let mut lab = Lab::running();
    let init = lab.wait("");
    lab.owner.begin(async { panic!("a fault") });
    lab.drive(Duration::from_secs(1)).await;
    assert_eq!(status(init), KILLED);
    let reason = lab.owner.state.alive().unwrap_err().to_string();
    assert!(reason.contains("the shim has failed"), "{reason}");
    assert!(
        lab.owner.ended,
        "what is being made or deleted never would be"
    );
}

#[tokio::test(start_paused = true)]
async fn input_closed_before_there_is_any_stays_closed() {
    let mut lab = Lab::running();
    let process = ProcessId::exec("web", "e");
    lab.owner.close_stdin(&process).unwrap();
    assert!(lab.owner.runtimes.process(&process).stdin_closed);
    let error = lab
        .owner
        .close_stdin(&ProcessId::exec("web", "x"))
        .unwrap_err();
    assert_eq!(error.code(), Code::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_sandbox_waits_for_the_work_that_it_began_but_not_for_ever() {
    for (takes, done) in [(100, true), (100_000, false)] {
        let mut lab = Lab::running();
        let (sender, mut receiver) = tokio::sync::oneshot::channel();
        lab.owner.begin(async move {
            sleep(Duration::from_millis(takes)).await;
            let _ = sender.send(());
            Outcome::Done
        });
        let (reply, _answer) = Reply::new();
        lab.handle.tell(Request::Shutdown { now: true, reply });
        let begun = Instant::now();
        lab.owner.run(lab.requests).await;
        assert_eq!(receiver.try_recv().is_ok(), done);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_nobody_knows_ends_by_itself() {
    let mut lab = Lab::running();
    lab.drive(IDLE_DEADLINE * 2).await;
    assert!(!lab.owner.ended, "it has a task");
    lab.owner.exited(&ProcessId::exec("web", "e"), 0);
    lab.owner.exited(&ProcessId::init("web"), 0);
    lab.handle.tell(Request::SandboxStats {
        reply: Reply::new().0,
    });
    lab.drive(Duration::ZERO).await;
    lab.owner.forget(&ProcessId::init("web"));
    lab.drive(IDLE_DEADLINE / 2).await;
    assert!(!lab.owner.ended);
    lab.drive(IDLE_DEADLINE / 2).await;
    assert!(lab.owner.ended);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_sandbox_does_not_wait_for_clocks() {
    let mut lab = Lab::running();
    lab.owner.begin_to_end("web");
    lab.owner.exited(&ProcessId::init("web"), KILLED);
    let (reply, _answer) = Reply::new();
    lab.handle.tell(Request::Shutdown { now: true, reply });
    let begun = Instant::now();
    lab.owner.run(lab.requests).await;
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_log_of_requests_has_no_environment() {
    let (reply, _answer) = Reply::new();
    let request = containerd_shim_protos::api::ExecProcessRequest {
        id: "web".into(),
        spec: Some(protobuf::well_known_types::any::Any {
            value: b"PASSWORD=hunter2".to_vec(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let spec = crate::sandbox::request::Quiet::new(oci_spec::runtime::Process::default(), "..");
    let request = Request::Exec {
        request: crate::sandbox::request::Quiet::new(request, "exec e of task web"),
        spec,
        reply,
    };
    let shown = format!("{request:?}");
    assert_eq!(
        shown,
        "Exec { request: exec e of task web, spec: .., reply: .. }"
    );
}

#[tokio::test(start_paused = true)]
async fn states_are_told_as_they_are() {
    let lab = Lab::running();
    let found = lab
        .owner
        .process_state(&ProcessId::exec("web", "e"))
        .unwrap();
    assert_eq!(Path::new(&found.bundle), lab._dir.path());
    assert_eq!(lab.owner.task_pid("web"), Ok(100));
    assert_eq!(
        lab.owner.task_pid("other").unwrap_err().code(),
        Code::NOT_FOUND
    );
}
