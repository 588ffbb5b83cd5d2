//! The owner with a host and a guest that do what the test says (`double`): late answers, machines
//! that die, requests side by side, guests that do not do what they are told.

use std::path::Path;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::LinuxResources;
use tokio::sync::oneshot::Receiver;
use tokio::time::timeout_at;
use ttrpc::Code;

use super::*;
use crate::model::{Exit, ProcessId, SignalScope};
use crate::sandbox::double::{Call, HostDouble, Script, VM_PID};
use crate::sandbox::request::Quiet;
use crate::sandbox::state::{KILLED, Stage, Status};

const TIMEOUT: Duration = Duration::from_secs(10);

/// An owner that is driven by hand.
pub(super) struct Lab {
    pub(super) owner: SandboxOwner,
    pub(super) requests: Requests,
    handle: SandboxHandle,
    pub(super) script: Arc<Script>,
    dir: tempfile::TempDir,
}

impl Lab {
    /// An owner of nothing yet, with a host and a guest that answer at once what `prompt` says.
    pub(super) fn new(prompt: fn(&Call) -> bool) -> Lab {
        // In memory, as /run is: the ledger is synced to its disk.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let spec = serde_json::json!({"ociVersion": "1.1.0", "root": {"path": "r"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"},
            "linux": {"namespaces":
                [{"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}]}});
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        // A root file system that is plugged in: nothing is mounted on the host.
        std::fs::write(dir.path().join("disk"), "").unwrap();
        let identity = SandboxIdentity::new("/run/containerd/containerd.sock", "default", "web");
        let ledger = Ledger::create(&dir.path().join("state")).unwrap();
        let script = Script::new(prompt);
        let host = Arc::new(HostDouble {
            script: script.clone(),
        });
        let (owner, handle, requests) =
            SandboxOwner::new(identity, ledger, Publisher::recording(), host);
        Lab {
            owner,
            requests,
            handle,
            script,
            dir,
        }
    }

    /// A running task `web` with an exec `e`, in a guest that obeys and whose processes do not end.
    async fn running() -> Lab {
        let mut lab = Lab::new(|call| !matches!(call, Call::Wait(_)));
        let created = lab.create("web");
        lab.settle().await;
        assert_eq!(answer(created).unwrap(), VM_PID);
        let started = lab.start(ProcessId::init("web"));
        lab.settle().await;
        answer(started).unwrap();
        lab.exec("web", "e");
        let started = lab.start(ProcessId::exec("web", "e"));
        lab.settle().await;
        answer(started).unwrap();
        lab
    }

    pub(super) fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Receiver<Result<T>> {
        let (reply, answer) = Reply::new();
        self.handle.tell(request(reply));
        answer
    }

    pub(super) fn create(&self, id: &str) -> Receiver<Result<u32>> {
        let bundle = self.dir.path().to_string_lossy().into_owned();
        let request = CreateTaskRequest {
            id: id.to_owned(),
            rootfs: vec![Mount {
                type_: "ext4".to_owned(),
                source: format!("{bundle}/disk"),
                ..Default::default()
            }],
            bundle,
            ..Default::default()
        };
        self.ask(|reply| Request::Create {
            request: Quiet::new(request, "create"),
            config: Quiet::new(Ok(Config::default()), ".."),
            reply,
        })
    }

    pub(super) fn start(&self, process: ProcessId) -> Receiver<Result<u32>> {
        self.ask(|reply| Request::Start { process, reply })
    }

    pub(super) fn exec(&self, id: &str, exec_id: &str) -> Receiver<Result<()>> {
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.ask(|reply| Request::Exec {
            request: Quiet::new(request, "exec"),
            spec: Quiet::new(oci_spec::runtime::Process::default(), ".."),
            reply,
        })
    }

    pub(super) fn delete(&self, process: ProcessId) -> Receiver<Result<Exit>> {
        self.ask(|reply| Request::Delete { process, reply })
    }

    pub(super) fn kill(&self, process: ProcessId, signal: u32) -> Receiver<Result<()>> {
        self.ask(|reply| Request::Kill {
            process,
            signal,
            scope: SignalScope::Process,
            reply,
        })
    }

    /// Lets everything go on that can without a clock or an answer.
    pub(super) async fn settle(&mut self) {
        loop {
            work_begun().await;
            if self.owner.step(&mut self.requests).now_or_never().is_none() {
                return;
            }
        }
    }

    /// The guest or the host answers a call, and everything goes on from there.
    async fn answers(&mut self, call: &Call, result: Result<u32>) {
        self.script.answer(call, result);
        self.settle().await;
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

    /// Topics and subjects of the events since the last call.
    fn told(&self) -> Vec<String> {
        let events = self.owner.events.take();
        events.iter().map(|event| event.topic.clone()).collect()
    }

    fn is_alive(&self) -> bool {
        self.owner.state.alive().is_ok()
    }
}

/// Lets work that was begun go on as far as it can: a clock that stands moves on only when all
/// tasks, and those of the blocking threads, are idle.
pub(super) async fn work_begun() {
    sleep(Duration::from_millis(1)).await;
}

pub(super) fn answer<T>(mut answer: Receiver<Result<T>>) -> Result<T> {
    answer.try_recv().unwrap()
}

fn status(exit: Receiver<Result<Exit>>) -> u32 {
    answer(exit).unwrap().status
}

fn gone() -> Error {
    Error::internal("the guest said no")
}

/// Nothing is answered at once but what no test of this file is about.
fn waits(call: &Call) -> bool {
    matches!(
        call,
        Call::Prepare(_)
            | Call::Fit
            | Call::Grow
            | Call::AddLinks
            | Call::AttachDisk
            | Call::DetachDisk
    )
}

#[tokio::test(start_paused = true)]
async fn two_creates_at_once_share_one_machine() {
    let mut lab = Lab::new(waits);
    let (web, db) = (lab.create("web"), lab.create("db"));
    lab.settle().await;
    assert_eq!(lab.script.waiting(), [Call::Launch]);
    lab.answers(&Call::Launch, Ok(0)).await;
    // The guest answers in the other order.
    lab.answers(&Call::Create("db".into()), Ok(0)).await;
    lab.answers(&Call::Create("web".into()), Ok(0)).await;
    let (web, db) = (answer(web).unwrap(), answer(db).unwrap());
    assert_eq!(db, VM_PID, "the first one has the machine's pid");
    assert_ne!(web, db);
    assert_eq!(lab.told(), ["/tasks/create", "/tasks/create"]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_does_not_come_up_fails_every_create_and_the_next_one_tries_again() {
    let mut lab = Lab::new(waits);
    let (web, db) = (lab.create("web"), lab.create("db"));
    lab.settle().await;
    lab.answers(&Call::Launch, Err(gone())).await;
    assert_eq!(answer(web).unwrap_err(), gone());
    assert_eq!(answer(db).unwrap_err(), gone());
    assert!(lab.owner.state.is_empty() && lab.told().is_empty());
    let again = lab.create("web");
    lab.settle().await;
    lab.answers(&Call::Launch, Ok(0)).await;
    lab.answers(&Call::Create("web".into()), Ok(0)).await;
    answer(again).unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_asks_after_a_container_that_is_being_made_hears_whether_it_was() {
    for (answered, known) in [(Ok(0), true), (Err(gone()), false)] {
        let mut lab = Lab::new(waits);
        let created = lab.create("web");
        lab.settle().await;
        lab.answers(&Call::Launch, Ok(0)).await;
        let pids = lab.ask(|reply| Request::Pids {
            container: "web".into(),
            reply,
        });
        let state = lab.ask(|reply| Request::State {
            process: ProcessId::init("web"),
            reply,
        });
        lab.settle().await;
        assert_eq!(lab.owner.deferred.len(), 2, "neither is answered");
        lab.answers(&Call::Create("web".into()), answered).await;
        assert_eq!(answer(created).is_ok(), known);
        if known {
            assert_eq!(answer(pids).unwrap(), [(VM_PID, None)]);
            assert_eq!(answer(state).unwrap().status, Status::Created);
        } else {
            assert_eq!(answer(pids).unwrap_err().code(), Code::NOT_FOUND);
            assert_eq!(answer(state).unwrap_err().code(), Code::NOT_FOUND);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_while_it_makes_a_container_fails_the_create_and_tells_nothing() {
    let mut lab = Lab::new(waits);
    let created = lab.create("web");
    lab.settle().await;
    lab.answers(&Call::Launch, Ok(0)).await;
    lab.script.die("QEMU was killed");
    lab.settle().await;
    assert_eq!(answer(created).unwrap_err().code(), Code::UNAVAILABLE);
    assert!(lab.owner.state.is_empty() && lab.told().is_empty());
    let next = lab.create("web");
    lab.settle().await;
    let error = answer(next).unwrap_err();
    assert!(error.to_string().contains("QEMU was killed"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_container_that_was_made_before_its_machine_died_is_told_as_made_and_ended() {
    let mut lab = Lab::new(waits);
    let created = lab.create("web");
    lab.settle().await;
    lab.answers(&Call::Launch, Ok(0)).await;
    // The answer is there, and the death is heard of first.
    lab.script.answer(&Call::Create("web".into()), Ok(0));
    lab.owner.vm_died("QEMU was killed");
    lab.settle().await;
    answer(created).unwrap();
    assert_eq!(lab.told(), ["/tasks/create", "/tasks/exit"]);
    let deleted = lab.delete(ProcessId::init("web"));
    lab.settle().await;
    assert_eq!(status(deleted), KILLED);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_being_made_can_neither_be_killed_nor_deleted() {
    let mut lab = Lab::new(waits);
    let created = lab.create("web");
    lab.settle().await;
    let killed = lab.kill(ProcessId::init("web"), 9);
    let deleted = lab.delete(ProcessId::init("web"));
    let again = lab.create("web");
    lab.settle().await;
    assert_eq!(
        answer(killed).unwrap_err().code(),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        answer(deleted).unwrap_err().code(),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(answer(again).unwrap_err().code(), Code::ALREADY_EXISTS);
    lab.answers(&Call::Launch, Ok(0)).await;
    lab.answers(&Call::Create("web".into()), Ok(0)).await;
    answer(created).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_end_that_overtakes_the_answer_to_the_start_is_told_after_it() {
    let mut lab = Lab::new(waits);
    let created = lab.create("web");
    lab.settle().await;
    lab.answers(&Call::Launch, Ok(0)).await;
    lab.answers(&Call::Create("web".into()), Ok(0)).await;
    answer(created).unwrap();
    let started = lab.start(ProcessId::init("web"));
    lab.settle().await;
    lab.answers(&Call::Wait(ProcessId::init("web")), Ok(3))
        .await;
    assert_eq!(lab.told(), ["/tasks/create"]);
    lab.answers(&Call::Start("web".into()), Ok(0)).await;
    answer(started).unwrap();
    assert_eq!(lab.told(), ["/tasks/start", "/tasks/exit"]);
}

#[tokio::test(start_paused = true)]
async fn an_exec_whose_container_ended_while_it_was_started_is_never_told_as_started() {
    let mut lab = Lab::running().await;
    lab.told();
    lab.exec("web", "late");
    lab.settle().await;
    lab.owner
        .state
        .start(&ProcessId::exec("web", "late"))
        .unwrap();
    lab.script.die("QEMU was killed");
    lab.settle().await;
    let told = lab.told();
    assert_eq!(
        told.iter().filter(|topic| *topic == "/tasks/exit").count(),
        2,
        "{told:?}"
    );
    assert!(!told.contains(&"/tasks/exec-started".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn an_exec_without_an_id_is_refused_and_told_nobody() {
    let mut lab = Lab::running().await;
    lab.told();
    let announced = lab.exec("web", "");
    lab.settle().await;
    let error = answer(announced).unwrap_err();
    assert_eq!(error.code(), Code::INVALID_ARGUMENT);
    assert!(lab.told().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_update_beside_a_create_waits_for_nothing_and_a_refused_one_is_taken_back() {
    let mut lab =
        Lab::new(|call| !matches!(call, Call::Wait(_) | Call::Update(_) | Call::Create(_)));
    let web = lab.create("web");
    lab.settle().await;
    lab.answers(&Call::Create("web".into()), Ok(0)).await;
    answer(web).unwrap();
    let before = lab.owner.wanted.get();
    let db = lab.create("db");
    lab.settle().await;
    let update = |bytes: i64| {
        let resources = serde_json::json!({"memory": {"limit": bytes}});
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();
        let container = "web".to_owned();
        let resources = Box::new(resources);
        lab.ask(|reply| Request::Update {
            container,
            resources,
            reply,
        })
    };
    let (first, second) = (update(1 << 32), update(2 << 32));
    lab.settle().await;
    assert!(lab.owner.wanted.get().memory_mib >= before.memory_mib + 8192);
    // The older one fails, and the newer one's limits stay.
    lab.answers(&Call::Update("web".into()), Err(gone())).await;
    assert_eq!(answer(first).unwrap_err(), gone());
    assert!(lab.owner.wanted.get().memory_mib >= before.memory_mib + 8192);
    // So does the newer one: then it is as the older one wanted, whose limits came first.
    lab.script.answer(&Call::Update("web".into()), Err(gone()));
    lab.answers(&Call::Create("db".into()), Ok(0)).await;
    assert_eq!(answer(second).unwrap_err(), gone());
    answer(db).unwrap();
    assert!(lab.owner.wanted.get().memory_mib < before.memory_mib + 8192);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_remove_a_container_loses_its_machine() {
    let mut lab = Lab::new(|call| !matches!(call, Call::Wait(_) | Call::Remove(_)));
    let created = lab.create("web");
    lab.settle().await;
    answer(created).unwrap();
    lab.answers(&Call::Wait(ProcessId::init("web")), Ok(0))
        .await;
    let deleted = lab.delete(ProcessId::init("web"));
    lab.settle().await;
    let pids = lab.ask(|reply| Request::Pids {
        container: "web".into(),
        reply,
    });
    lab.settle().await;
    assert_eq!(lab.owner.deferred.len(), 1, "there are none in a moment");
    lab.answers(&Call::Remove("web".into()), Err(gone())).await;
    answer(deleted).unwrap();
    assert_eq!(answer(pids).unwrap_err().code(), Code::NOT_FOUND);
    assert!(!lab.is_alive());
    assert_eq!(lab.told().last().unwrap(), "/tasks/delete");
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_is_told_to_stop_answers_a_create_that_still_waits() {
    let mut lab = Lab::new(waits);
    let created = lab.create("web");
    lab.settle().await;
    assert_eq!(lab.script.waiting(), [Call::Launch]);
    let (reply, _answer) = Reply::new();
    lab.handle.tell(Request::Shutdown { now: true, reply });
    lab.owner.run(lab.requests).await;
    // Its reply was dropped with the owner, which the service tells as the sandbox's end.
    assert!(created.await.map_or(true, |answer| answer.is_err()));
}

#[tokio::test(start_paused = true)]
async fn a_sigkill_that_is_not_obeyed_ends_the_machine_and_every_wait() {
    let mut lab = Lab::running().await;
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
    let mut lab = Lab::running().await;
    lab.owner.begin_to_end("web");
    lab.owner.exited(&ProcessId::exec("web", "e"), KILLED);
    lab.owner.exited(&ProcessId::init("web"), KILLED);
    lab.drive(TIMEOUT * 2).await;
    assert!(lab.is_alive());
}

#[tokio::test(start_paused = true)]
async fn the_next_task_of_the_same_name_is_not_killed_for_the_last_one() {
    let mut lab = Lab::running().await;
    lab.owner.begin_to_end("web");
    lab.owner.exited(&ProcessId::exec("web", "e"), KILLED);
    lab.owner.exited(&ProcessId::init("web"), KILLED);
    lab.owner.forget(&ProcessId::init("web"));
    let created = lab.create("web");
    lab.settle().await;
    answer(created).unwrap();
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
    let mut lab = Lab::running().await;
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
    let mut lab = Lab::running().await;
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
    let mut lab = Lab::running().await;
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
        let mut lab = Lab::running().await;
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
    let mut lab = Lab::running().await;
    lab.drive(IDLE_SANDBOX * 2).await;
    assert!(!lab.owner.ended, "it has a task");
    lab.owner.exited(&ProcessId::exec("web", "e"), 0);
    lab.owner.exited(&ProcessId::init("web"), 0);
    lab.handle.tell(Request::SandboxStats {
        reply: Reply::new().0,
    });
    lab.drive(Duration::ZERO).await;
    lab.owner.forget(&ProcessId::init("web"));
    lab.drive(IDLE_SANDBOX / 2).await;
    assert!(!lab.owner.ended);
    lab.drive(IDLE_SANDBOX / 2).await;
    assert!(lab.owner.ended);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_sandbox_does_not_wait_for_clocks() {
    let mut lab = Lab::running().await;
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
    let lab = Lab::running().await;
    let found = lab
        .owner
        .process_state(&ProcessId::exec("web", "e"))
        .unwrap();
    assert_eq!(Path::new(&found.bundle), lab.dir.path());
    assert_eq!(lab.owner.task_pid("web"), VM_PID);
    assert_eq!(lab.owner.task_pid("other"), 0);
}
