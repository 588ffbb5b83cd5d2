//! What may happen in which state, as containerd and its users see it.

use std::time::SystemTime;

use ttrpc::Code;

use super::*;

const VM: u32 = 100;

fn exit(status: u32) -> Exit {
    Exit {
        pid: 0,
        status,
        at: SystemTime::UNIX_EPOCH,
    }
}

fn init() -> ProcessId {
    ProcessId::init("web")
}

fn exec(id: &str) -> ProcessId {
    ProcessId::of_request("web", id)
}

fn created() -> State {
    let mut state = State::default();
    state.create("web", "/b", Stdio::default()).unwrap();
    state.created("web", VM, TaskKind::Container);
    state
}

fn running() -> State {
    let mut state = created();
    state.start(&init()).unwrap();
    state.started(&init()).unwrap();
    state
}

fn running_with_exec() -> State {
    let mut state = running();
    state.exec(&exec("e"), Stdio::default()).unwrap();
    state.start(&exec("e")).unwrap();
    state.started(&exec("e")).unwrap();
    state
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
    result.unwrap_err().code()
}

fn order(exits: &[(ProcessId, Exit)]) -> Vec<(&str, u32)> {
    exits
        .iter()
        .map(|(key, exit)| (key.exec_id(), exit.status))
        .collect()
}

#[test]
fn a_task_lives_from_create_to_delete() {
    let mut state = State::default();
    state.create("web", "/b", Stdio::default()).unwrap();
    assert_eq!(state.created("web", VM, TaskKind::Container), VM);
    assert_eq!(state.status(&init()), Ok(Status::Created));
    state.start(&init()).unwrap();
    assert_eq!(state.started(&init()).unwrap(), (VM, None));
    assert_eq!(state.status(&init()), Ok(Status::Running));
    let exits = state.exited(&init(), exit(3));
    assert_eq!(order(&exits), [("", 3)]);
    assert_eq!(exits[0].1.pid, VM);
    assert_eq!(state.delete(&init()).unwrap().unwrap().status, 3);
    state.deleted(&init());
    assert!(state.is_empty());
    assert_eq!(code(state.status(&init())), Code::NOT_FOUND);
}

#[test]
fn pids_are_unique_and_never_zero() {
    let mut state = running();
    state.create("db", "/b2", Stdio::default()).unwrap();
    let second = state.created("db", VM, TaskKind::Container);
    state.exec(&exec("e"), Stdio::default()).unwrap();
    let third = state.process(&exec("e")).unwrap().pid;
    assert!(second > FIRST_PID && third > FIRST_PID && second != third);
}

#[test]
fn a_second_task_of_the_same_name_is_refused() {
    assert_eq!(
        code(created().create("web", "/b", Stdio::default())),
        Code::ALREADY_EXISTS
    );
    let mut state = running_with_exec();
    assert_eq!(
        code(state.exec(&exec("e"), Stdio::default())),
        Code::ALREADY_EXISTS
    );
}

#[test]
fn a_failed_create_leaves_the_name_free() {
    let mut state = State::default();
    state.create("web", "/b", Stdio::default()).unwrap();
    assert_eq!(code(state.kill(&init())), Code::FAILED_PRECONDITION);
    state.create_failed("web");
    state.create("web", "/b", Stdio::default()).unwrap();
}

#[test]
fn an_exit_never_overtakes_its_start() {
    let mut state = created();
    state.start(&init()).unwrap();
    assert!(state.exited(&init(), exit(0)).is_empty());
    assert_eq!(state.status(&init()), Ok(Status::Created));
    let (_, early) = state.started(&init()).unwrap();
    assert_eq!(order(&state.exited(&init(), early.unwrap())), [("", 0)]);
}

#[test]
fn the_exit_of_init_is_the_last_of_its_container() {
    let mut state = running_with_exec();
    assert!(state.exited(&init(), exit(0)).is_empty());
    assert!(state.is_held("web"));
    assert_eq!(
        code(state.exec(&exec("late"), Stdio::default())),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        order(&state.exited(&exec("e"), exit(137))),
        [("e", 137), ("", 0)]
    );
    assert!(!state.is_held("web"));
}

#[test]
fn an_exec_that_is_never_heard_of_again_does_not_hold_init_for_ever() {
    let mut state = running_with_exec();
    state.exited(&init(), exit(5));
    assert_eq!(
        order(&state.release_held("web", SystemTime::now())),
        [("e", 137), ("", 5)]
    );
    assert!(state.release_held("web", SystemTime::now()).is_empty());
    assert!(
        state.exited(&exec("e"), exit(0)).is_empty(),
        "its exit is told once"
    );
}

#[test]
fn a_created_task_can_be_killed_and_deleted() {
    let mut state = created();
    state.kill(&init()).unwrap();
    assert_eq!(order(&state.exited(&init(), exit(137))), [("", 137)]);
    assert_eq!(code(state.start(&init())), Code::FAILED_PRECONDITION);
    assert_eq!(created().delete(&init()).unwrap(), None);
}

#[test]
fn a_running_task_is_not_deleted() {
    let mut state = running_with_exec();
    assert_eq!(code(state.delete(&init())), Code::FAILED_PRECONDITION);
    assert_eq!(code(state.delete(&exec("e"))), Code::FAILED_PRECONDITION);
}

#[test]
fn what_has_ended_is_gone_for_kill() {
    let mut state = running();
    state.exited(&init(), exit(0));
    assert_eq!(code(state.kill(&init())), Code::NOT_FOUND);
    state.delete(&init()).unwrap();
    assert_eq!(code(state.kill(&init())), Code::NOT_FOUND);
    assert_eq!(code(state.delete(&init())), Code::FAILED_PRECONDITION);
    assert_eq!(code(state.kill(&ProcessId::init("other"))), Code::NOT_FOUND);
}

#[test]
fn an_exec_needs_a_running_container() {
    assert_eq!(
        code(created().exec(&exec("e"), Stdio::default())),
        Code::FAILED_PRECONDITION
    );
    let mut state = running();
    state.exec(&exec("e"), Stdio::default()).unwrap();
    assert_eq!(code(state.kill(&exec("e"))), Code::FAILED_PRECONDITION);
    state.exited(&init(), exit(0));
    assert_eq!(code(state.start(&exec("e"))), Code::FAILED_PRECONDITION);
    assert_eq!(state.delete(&exec("e")).unwrap(), None);
    state.deleted(&exec("e"));
    assert_eq!(code(state.status(&exec("e"))), Code::NOT_FOUND);
}

#[test]
fn a_failed_exec_can_be_deleted() {
    let mut state = running();
    state.exec(&exec("e"), Stdio::default()).unwrap();
    state.start(&exec("e")).unwrap();
    assert_eq!(state.start_failed(&exec("e")), []);
    state.delete(&exec("e")).unwrap();
}

#[test]
fn a_paused_task_takes_no_exec_until_resumed() {
    let mut state = running();
    state.exec(&exec("e"), Stdio::default()).unwrap();
    assert_eq!(
        code(state.may_set_freezer("web", Freezer::Thawed)),
        Code::FAILED_PRECONDITION
    );
    state.may_set_freezer("web", Freezer::Frozen).unwrap();
    state.set_freezer("web", Freezer::Frozen);
    assert_eq!(state.status(&init()), Ok(Status::Paused));
    assert_eq!(
        code(state.may_set_freezer("web", Freezer::Frozen)),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code(state.start(&exec("e"))), Code::FAILED_PRECONDITION);
    state.may_set_freezer("web", Freezer::Thawed).unwrap();
    state.set_freezer("web", Freezer::Thawed);
    state.start(&exec("e")).unwrap();
}

#[test]
fn the_death_of_the_machine_is_the_death_of_all() {
    let mut state = running_with_exec();
    state.create("db", "/b2", Stdio::default()).unwrap();
    state.created("db", VM, TaskKind::Container);
    state.create("unfinished", "/b3", Stdio::default()).unwrap();
    let exits = state.vm_died("QEMU was killed", SystemTime::now());
    let told: Vec<_> = exits
        .iter()
        .map(|(key, exit)| (key.container.as_str(), key.exec_id(), exit.status))
        .collect();
    assert_eq!(told, [("db", "", 137), ("web", "e", 137), ("web", "", 137)]);
    assert_eq!(code(state.kill(&init())), Code::NOT_FOUND);
    state.delete(&init()).unwrap();
    let refused = state.create("new", "/b", Stdio::default()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the sandbox's virtual machine has ended: QEMU was killed"
    );
    assert!(state.vm_died("again", SystemTime::now()).is_empty());
}

#[test]
fn pids_lists_what_lives() {
    let mut state = running_with_exec();
    state.exec(&exec("announced"), Stdio::default()).unwrap();
    let pids = state.pids("web").unwrap();
    let ids: Vec<_> = pids.iter().map(|(_, id)| id.as_deref()).collect();
    assert_eq!(ids, [None, Some("e")]);
    state.exited(&exec("e"), exit(0));
    assert_eq!(state.pids("web").unwrap(), [(VM, None)]);
    state.exited(&init(), exit(0));
    assert_eq!(
        state.pids("web").unwrap(),
        [(VM, None)],
        "an exit that nobody has taken is no leak"
    );
}

#[test]
fn a_pods_sandbox_has_no_processes_to_join_or_to_freeze() {
    let mut state = State::default();
    state.create("pod", "/b", Stdio::default()).unwrap();
    state.created("pod", VM, TaskKind::PodSandbox);
    let init = ProcessId::init("pod");
    state.start(&init).unwrap();
    state.started(&init).unwrap();
    assert!(state.is_pod_sandbox("pod") && !state.is_pod_sandbox("web"));
    assert_eq!((state.owner(VM), state.owner(1)), (Some("pod"), None));
    assert_eq!(
        code(state.exec(&ProcessId::exec("pod", "e"), Stdio::default())),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        code(state.may_set_freezer("pod", Freezer::Frozen)),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(state.exited(&init, exit(137)).len(), 1);
}

#[test]
fn out_of_memory_is_told_once_and_only_of_what_is_there() {
    let mut state = running();
    assert_eq!(state.out_of_memory("web"), Ok(true));
    assert_eq!(state.out_of_memory("web"), Ok(false));
    for other in ["", "we", "web ", "another-pods"] {
        assert_eq!(code(state.out_of_memory(other)), Code::NOT_FOUND);
    }
    state.exited(&init(), exit(137));
    assert_eq!(state.out_of_memory("web"), Ok(false));
    state.delete(&init()).unwrap();
    state.deleted(&init());
    assert_eq!(code(state.out_of_memory("web")), Code::NOT_FOUND);
    state.create("web", "/b", Stdio::default()).unwrap();
    assert_eq!(
        code(state.out_of_memory("web")),
        Code::NOT_FOUND,
        "nothing of it is in the guest"
    );
    state.created("web", VM, TaskKind::Container);
    assert_eq!(
        state.out_of_memory("web"),
        Ok(true),
        "a new container of the same name"
    );
    state.created("web", VM, TaskKind::PodSandbox);
    assert_eq!(
        code(state.out_of_memory("web")),
        Code::NOT_FOUND,
        "a pod's sandbox has no memory of its own"
    );
}

#[test]
fn only_what_has_not_ended_can_be_late_with_its_end() {
    let mut state = State::default();
    assert!(!state.is_unfinished("web"));
    state.create("web", "/b", Stdio::default()).unwrap();
    assert!(!state.is_unfinished("web"), "nothing of it is in the guest");
    assert!(created().is_unfinished("web") && running().is_unfinished("web"));
    let mut state = created();
    state.start(&init()).unwrap();
    assert!(state.is_unfinished("web"));
    state.exited(&init(), exit(137));
    assert!(
        state.is_unfinished("web"),
        "its exit waits for an answer that may never come"
    );
    let mut state = running_with_exec();
    state.exited(&init(), exit(137));
    assert!(!state.is_unfinished("web"), "its exit waits for an exec");
    let mut state = created();
    state.delete(&init()).unwrap();
    assert!(!state.is_unfinished("web"));
}

#[test]
fn a_pods_sandbox_dies_after_its_containers() {
    let mut state = running_with_exec();
    for (id, kind) in [("a-pod", TaskKind::PodSandbox), ("z", TaskKind::Container)] {
        state.create(id, "/b", Stdio::default()).unwrap();
        state.created(id, VM, kind);
    }
    let exits = state.vm_died("QEMU was killed", SystemTime::now());
    let told: Vec<_> = exits
        .iter()
        .map(|(key, _)| (key.container.as_str(), key.exec_id()))
        .collect();
    assert_eq!(told, [("web", "e"), ("web", ""), ("z", ""), ("a-pod", "")]);
}
