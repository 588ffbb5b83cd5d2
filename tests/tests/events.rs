//! Events: each once, in order, also over a restart of containerd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::process::ExitCode;
use std::time::Duration;

use cofferdam_tests::bundle::Bundle;
use cofferdam_tests::command::run;
use cofferdam_tests::events::{Event, Events, Sink};
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, procs};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Core: events_of_a_run;
        Once: events_of_an_exec, pause_and_resume_are_told;
        Ours: execs_end_before_their_container, oom_is_told_before_the_exit,
            death_of_the_machine_is_an_exit,
            death_of_the_shim_is_an_exit, events_wait_for_containerd, two_hundred_short_processes;
        Long: a_thousand_short_processes;
    ])
}

fn briefs(events: &[Event]) -> Vec<String> {
    events.iter().map(Event::brief).collect()
}

/// A container's own exit status, from the only exit event it may have.
#[track_caller]
fn exit_status(events: &[Event]) -> u64 {
    let exits: Vec<&Event> = events
        .iter()
        .filter(|event| event.brief() == "exit")
        .collect();
    assert_eq!(exits.len(), 1, "{events:?}");
    exits[0].body["exit_status"].as_u64().unwrap_or(0)
}

fn events_of_a_run(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let id = env.id();
    let _container = Container::adopt(env, &id);
    run(
        env.run_command(&id, &["--rm"], &["sh", "-c", "exit 7"]),
        PATIENCE,
    )
    .exits(7);
    let seen = events.until_delete(&id);
    assert_eq!(briefs(&seen), ["create", "start", "exit", "delete"]);
    assert_eq!(exit_status(&seen), 7);
    let pid = |event: &Event| event.body["pid"].as_u64().unwrap_or(0);
    assert!(
        pid(&seen[0]) > 0 && seen[1..3].iter().all(|event| pid(event) == pid(&seen[0])),
        "{seen:?}"
    );
    assert!(
        seen[0].body["bundle"].as_str().unwrap().ends_with(&id),
        "{seen:?}"
    );
}

fn events_of_an_exec(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let container = env.idle();
    run(
        container.exec_command("one", &[], &["sh", "-c", "exit 3"]),
        PATIENCE,
    )
    .exits(3);
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    let seen = events.until_delete(&container.id);
    let wanted = [
        "create",
        "start",
        "exec-added one",
        "exec-started one",
        "exit one",
        "exit",
        "delete",
    ];
    assert_eq!(briefs(&seen), wanted);
}

fn execs_end_before_their_container(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let container = env.idle();
    for exec in ["one", "two"] {
        run(
            container.exec_command(exec, &["-d"], &["sleep", "3600"]),
            PATIENCE,
        )
        .ok();
    }
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    let mut seen = briefs(&events.until_delete(&container.id));
    seen.retain(|brief| brief.starts_with("exit"));
    let last = seen.pop();
    seen.sort();
    assert_eq!(
        (seen, last.as_deref()),
        (
            vec!["exit one".to_owned(), "exit two".to_owned()],
            Some("exit")
        )
    );
}

fn pause_and_resume_are_told(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let container = env.idle();
    env.ctr(&["tasks", "pause", &container.id]).ok();
    env.ctr(&["tasks", "resume", &container.id]).ok();
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    let seen = briefs(&events.until_delete(&container.id));
    assert_eq!(
        seen,
        ["create", "start", "paused", "resumed", "exit", "delete"]
    );
}

fn oom_is_told_before_the_exit(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let container = env.detached(
        &["--null-io", "--memory-limit", "33554432"],
        &["tail", "/dev/zero"],
    );
    assert_eq!(container.finish(), 137);
    let seen = events.until_delete(&container.id);
    assert_eq!(briefs(&seen), ["create", "start", "oom", "exit", "delete"]);
}

fn death_of_the_machine_is_an_exit(env: &Env) {
    let env = env.with_own_daemon(None);
    let events = Events::subscribe(&env.daemon);
    let container = env.idle();
    run(
        container.exec_command("one", &["-d"], &["sleep", "3600"]),
        PATIENCE,
    )
    .ok();
    machines_of(&env).iter().for_each(procs::Proc::kill9);
    assert_eq!(container.finish(), 137);
    let seen = events.until_delete(&container.id);
    assert_eq!(briefs(&seen)[4..], ["exit one", "exit", "delete"]);
    assert_eq!(exit_status(&seen), 137);
}

/// QEMU of this daemon's only container: the one whose shim has this daemon's address.
fn machines_of(env: &Env) -> Vec<procs::Proc> {
    let socket = env.daemon.socket.to_string_lossy().into_owned();
    let shims = procs::named("containerd-shim")
        .into_iter()
        .filter(|shim| shim.args.contains(&socket));
    let parents: Vec<String> = shims.map(|shim| shim.pid.to_string()).collect();
    let is_child = |process: &procs::Proc| {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1).map(str::to_owned));
        parent.is_some_and(|parent| parents.contains(&parent))
    };
    let found: Vec<_> = procs::named("qemu-system")
        .into_iter()
        .filter(is_child)
        .collect();
    assert!(!found.is_empty(), "no QEMU below the shims {parents:?}");
    found
}

fn death_of_the_shim_is_an_exit(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let container = env.idle();
    let shim = procs::named("containerd-shim")
        .into_iter()
        .find(|shim| shim.args.contains(&container.id))
        .unwrap();
    shim.kill9();
    let seen = events.until_delete(&container.id);
    assert_eq!(briefs(&seen), ["create", "start", "exit", "delete"]);
    assert_eq!(exit_status(&seen), 137);
}

fn process(args: &[&str]) -> Value {
    json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
}

fn events_wait_for_containerd(env: &Env) {
    let mut bundle = Bundle::new(env, &["sleep", "3600"]);
    bundle.address = env.dir.join("c.sock");
    let task = bundle.start();
    task.create().unwrap();
    let sink = Sink::listen(&bundle.address);
    task.start("").unwrap();
    sink.until("start");
    // containerd goes away, and comes back.
    drop(sink);
    let _ = std::fs::remove_file(format!("{}.ttrpc", bundle.address.display()));
    for exec in ["one", "two"] {
        task.exec(exec, &process(&["true"])).unwrap();
        task.start(exec).unwrap();
        task.wait(exec).unwrap();
    }
    task.kill("", 9, false).unwrap();
    task.wait("").unwrap();
    task.delete("").unwrap();
    std::thread::sleep(Duration::from_secs(2)); // an absence longer than a first retry
    let sink = Sink::listen(&bundle.address);
    let seen = sink.until("delete");
    let of =
        |exec: &str| ["exec-added", "exec-started", "exit"].map(|topic| format!("{topic} {exec}"));
    let wanted: Vec<String> = [of("one"), of("two")]
        .concat()
        .into_iter()
        .chain(["exit".into(), "delete".into()])
        .collect();
    assert_eq!(seen, wanted);
}

fn short_processes(env: &Env, count: usize) {
    let mut bundle = Bundle::new(env, &["sleep", "3600"]);
    bundle.address = env.dir.join("c.sock");
    let sink = Sink::listen(&bundle.address);
    let task = bundle.start();
    task.create().unwrap();
    task.start("").unwrap();
    let exec = |number: usize| format!("exec{number}");
    // Four at a time, so that they overlap.
    for batch in (0..count).collect::<Vec<_>>().chunks(4) {
        for number in batch {
            task.exec(&exec(*number), &process(&["true"])).unwrap();
            task.start(&exec(*number)).unwrap();
        }
        for number in batch {
            task.wait(&exec(*number)).unwrap();
            task.delete(&exec(*number)).unwrap();
        }
    }
    task.kill("", 9, false).unwrap();
    task.wait("").unwrap();
    task.delete("").unwrap();
    let seen = sink.until("delete");
    for number in 0..count {
        let mine: Vec<&str> = seen
            .iter()
            .filter_map(|topic| topic.strip_suffix(&format!(" {}", exec(number))))
            .collect();
        assert_eq!(
            mine,
            ["exec-added", "exec-started", "exit"],
            "of exec {number}"
        );
    }
    assert_eq!(
        (&seen[..2], &seen[seen.len() - 2..]),
        (
            &["create", "start"].map(String::from)[..],
            &["exit", "delete"].map(String::from)[..]
        )
    );
    assert_eq!(seen.len(), count * 3 + 4);
}

fn two_hundred_short_processes(env: &Env) {
    short_processes(env, 200);
}

fn a_thousand_short_processes(env: &Env) {
    short_processes(env, 1000);
}
