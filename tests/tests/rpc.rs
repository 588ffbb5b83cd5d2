//! The task API where `ctr` cannot ask: codes, orders and corners that containerd's clients depend
//! on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cofferdam_tests::bundle::{Bundle, tree};
use cofferdam_tests::task::{Task, drain, end, fifo, join, refused};
use cofferdam_tests::{Env, PATIENCE, Suite, cases, eventually, procs};
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::cgroups::metrics::Metrics as V1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as V2;
use containerd_shim_protos::shim::oci::ProcessDetails;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use ttrpc::Code;

const KILL: u32 = 9;
const SLEEP: [&str; 2] = ["sleep", "3600"];

fn main() -> ExitCode {
    Suite::new().run(cases![
        Once: states_of_a_task, created_task_can_be_deleted, created_task_can_be_killed,
            exec_from_start_to_delete,
            exec_that_fails_to_start, pids_name_their_execs, pause_is_a_state,
            size_of_a_terminal_any_time,
            input_ends_after_what_is_buffered, output_is_complete_before_it_ends,
            stats_are_of_the_hosts_kind,
            state_answers_beside_parked_waits;
        Ours: duplicate_ids, terminal_of_an_exec_begins_with_its_size, delete_of_what_runs, unknown_ids, exec_after_the_end,
            what_is_not_implemented,
            both_versions_answer_the_same, connect_knows_the_sandbox,
            shutdown_waits_for_the_last_task, shutdown_now,
            oom_kill_is_counted_after_the_end, options_of_create, unknown_names_in_a_spec,
            update_keeps_the_rest,
            many_execs_leave_nothing_open, unknown_stdio_scheme, sigterm_ends_the_sandbox;
    ])
}

fn process(args: &[&str]) -> Value {
    json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
}

/// A task that runs.
fn running(bundle: &Bundle) -> Task {
    let task = bundle.start();
    task.create().unwrap();
    task.start("").unwrap();
    task
}

fn states_of_a_task(env: &Env) {
    let bundle = Bundle::new(
        env,
        &[
            "sh",
            "-c",
            "while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 7",
        ],
    );
    let task = bundle.start();
    let pid = task.create().unwrap().pid;
    assert!(pid > 0);
    let state = task.state("").unwrap();
    assert_eq!(
        (state.pid, state.id.as_str(), task.status("").as_str()),
        (pid, task.id.as_str(), "CREATED")
    );
    let waiting = task.wait_beside("");
    assert_eq!(task.start("").unwrap().pid, pid);
    assert_eq!(task.status(""), "RUNNING");
    task.exec("go", &process(&["touch", "/tmp/go"])).unwrap();
    task.start("go").unwrap();
    let exit = join(waiting, PATIENCE).unwrap();
    assert_eq!(exit.exit_status, 7);
    assert!(
        exit.exited_at.seconds > 1_600_000_000,
        "{:?}",
        exit.exited_at
    );
    fs::remove_file(tree().join("tmp/go")).unwrap();
    let state = task.state("").unwrap();
    assert_eq!(
        (task.status("").as_str(), state.exit_status),
        ("STOPPED", 7)
    );
    assert_eq!(state.exited_at, exit.exited_at);
    refused(task.kill("", KILL, false), Code::NOT_FOUND);
    assert_eq!(
        task.wait("").unwrap().exit_status,
        7,
        "a second Wait after the end"
    );
    let deleted = task.delete("").unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 7));
    refused(task.state(""), Code::NOT_FOUND);
    refused(task.wait(""), Code::NOT_FOUND);
    task.shutdown(false).unwrap();
}

fn created_task_can_be_deleted(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    let pid = task.create().unwrap().pid;
    assert_eq!(task.delete("").unwrap().pid, pid);
    refused(task.state(""), Code::NOT_FOUND);
}

fn created_task_can_be_killed(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    task.create().unwrap();
    let waiting = task.wait_beside("");
    task.kill("", KILL, false).unwrap();
    assert_eq!(join(waiting, PATIENCE).unwrap().exit_status, 137);
    task.delete("").unwrap();
}

fn duplicate_ids(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    assert!(refused(task.create(), Code::ALREADY_EXISTS).contains(&task.id));
    task.exec("one", &process(&SLEEP)).unwrap();
    assert!(refused(task.exec("one", &process(&SLEEP)), Code::ALREADY_EXISTS).contains("one"));
    end(&task);
}

fn delete_of_what_runs(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.exec("one", &process(&SLEEP)).unwrap();
    refused(task.kill("one", KILL, false), Code::FAILED_PRECONDITION);
    task.start("one").unwrap();
    refused(task.delete("one"), Code::FAILED_PRECONDITION);
    refused(task.delete(""), Code::FAILED_PRECONDITION);
    assert_eq!(task.status(""), "RUNNING");
    end(&task);
}

fn unknown_ids(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    for (task, exec) in [
        (&task, "none"),
        (&task.other("none"), ""),
        (&task.other("none"), "none"),
    ] {
        refused(task.state(exec), Code::NOT_FOUND);
        refused(task.kill(exec, KILL, false), Code::NOT_FOUND);
        refused(task.wait(exec), Code::NOT_FOUND);
        refused(task.delete(exec), Code::NOT_FOUND);
        refused(task.start(exec), Code::NOT_FOUND);
    }
    refused(task.other("none").pids(), Code::NOT_FOUND);
    refused(task.other("none").stats(), Code::NOT_FOUND);
    refused(
        task.other("none").exec("x", &process(&SLEEP)),
        Code::NOT_FOUND,
    );
    end(&task);
}

fn exec_from_start_to_delete(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.exec("one", &process(&["sh", "-c", "exit 5"])).unwrap();
    assert_eq!(task.status("one"), "CREATED");
    let waiting = task.wait_beside("one");
    let pid = task.start("one").unwrap().pid;
    assert!(pid > 0 && pid != task.state("").unwrap().pid);
    assert_eq!(join(waiting, PATIENCE).unwrap().exit_status, 5);
    let state = task.state("one").unwrap();
    assert_eq!(
        (state.exit_status, task.status("one").as_str()),
        (5, "STOPPED")
    );
    refused(task.kill("one", KILL, false), Code::NOT_FOUND);
    assert_eq!(task.delete("one").unwrap().exit_status, 5);
    refused(task.state("one"), Code::NOT_FOUND);
    // The id is free again, and an exec that was never started can be deleted.
    task.exec("one", &process(&SLEEP)).unwrap();
    task.delete("one").unwrap();
    task.exec("one", &process(&SLEEP)).unwrap();
    task.start("one").unwrap();
    task.kill("one", KILL, false).unwrap();
    assert_eq!(task.wait("one").unwrap().exit_status, 137);
    assert_eq!(task.status(""), "RUNNING");
    end(&task);
}

fn exec_that_fails_to_start(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.exec("bad", &process(&["/no/such"])).unwrap();
    let error = task.start("bad").unwrap_err();
    assert!(error.message.contains("/no/such"), "{error:?}");
    task.delete("bad").unwrap();
    end(&task);
}

fn exec_after_the_end(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.exec("late", &process(&SLEEP)).unwrap();
    task.kill("", KILL, false).unwrap();
    task.wait("").unwrap();
    refused(task.start("late"), Code::FAILED_PRECONDITION);
    refused(
        task.exec("later", &process(&SLEEP)),
        Code::FAILED_PRECONDITION,
    );
    task.delete("late").unwrap();
    task.delete("").unwrap();
}

fn pids_name_their_execs(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.exec("one", &process(&SLEEP)).unwrap();
    let exec_pid = task.start("one").unwrap().pid;
    let pids = task.pids().unwrap().processes;
    assert!(
        pids.iter()
            .any(|process| process.pid == task.state("").unwrap().pid),
        "{pids:?}"
    );
    let exec = pids.iter().find(|process| process.pid == exec_pid).unwrap();
    assert_eq!(exec.info.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(
        ProcessDetails::parse_from_bytes(&exec.info.value)
            .unwrap()
            .exec_id,
        "one"
    );
    end(&task);
}

fn pause_is_a_state(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.pause().unwrap();
    assert_eq!(task.status(""), "PAUSED");
    task.resume().unwrap();
    assert_eq!(task.status(""), "RUNNING");
    end(&task);
}

fn size_of_a_terminal_any_time(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    task.create().unwrap();
    task.resize("", 0, 0).unwrap();
    task.start("").unwrap();
    task.resize("", 80, 24).unwrap();
    end(&task);
}

fn terminal_of_an_exec_begins_with_its_size(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    let mut process = process(&["sh", "-c", "test \"$(stty size)\" = '24 80'"]);
    process["terminal"] = json!(true);
    task.exec("one", &process).unwrap();
    task.resize("one", 80, 24).unwrap();
    task.start("one").unwrap();
    assert_eq!(task.wait("one").unwrap().exit_status, 0);
    end(&task);
}

fn input_ends_after_what_is_buffered(env: &Env) {
    let bundle = Bundle::new(env, &["cat"]);
    let ((stdin, _), (stdout, mut output), (stderr, _errors)) =
        (fifo(env, "in"), fifo(env, "out"), fifo(env, "err"));
    let task = bundle.start();
    let mut input = File::options().read(true).write(true).open(&stdin).unwrap();
    task.create_with(|request| {
        (request.stdin, request.stdout, request.stderr) = (stdin, stdout, stderr)
    })
    .unwrap();
    input.write_all(b"buffered").unwrap();
    task.start("").unwrap();
    drop(input);
    // CloseIO may come before anything was read; what is in the pipe still has to arrive.
    task.close_io("").unwrap();
    assert_eq!(task.wait("").unwrap().exit_status, 0);
    assert_eq!(drain(&mut output), b"buffered");
    end(&task);
}

fn output_is_complete_before_it_ends(env: &Env) {
    let bundle = Bundle::new(
        env,
        &[
            "sh",
            "-c",
            "dd if=/dev/zero bs=1k count=60 2>/dev/null; echo error >&2",
        ],
    );
    let ((stdout, mut output), (stderr, mut errors)) = (fifo(env, "out"), fifo(env, "err"));
    let task = bundle.start();
    task.create_with(|request| (request.stdout, request.stderr) = (stdout, stderr))
        .unwrap();
    task.start("").unwrap();
    assert_eq!(
        task.wait("").unwrap().exit_status,
        0,
        "the exit does not wait for a reader"
    );
    assert_eq!(
        (drain(&mut output).len(), drain(&mut errors)),
        (60 << 10, b"error\n".to_vec())
    );
    end(&task);
}

/// Memory usage and limit in bytes, CPU time, and the number of OOM kills, from either kind of
/// metrics.
fn numbers(stats: &Any) -> (u64, u64, u64, u64) {
    let host_is_v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    if host_is_v2 {
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = V2::parse_from_bytes(&stats.value).unwrap();
        let (memory, oom) = (metrics.memory, metrics.memory_events.oom_kill);
        (
            memory.usage,
            memory.usage_limit,
            metrics.cpu.usage_usec,
            oom,
        )
    } else {
        assert_eq!(stats.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = V1::parse_from_bytes(&stats.value).unwrap();
        let oom = metrics.memory_oom_control.oom_kill;
        (
            metrics.memory.usage.usage,
            metrics.memory.usage.limit,
            metrics.cpu.usage.total,
            oom,
        )
    }
}

fn stats_are_of_the_hosts_kind(env: &Env) {
    let bundle = Bundle::new(env, &["sh", "-c", "while :; do :; done"]);
    let task = running(&bundle);
    let (usage, limit, cpu, _) = numbers(&task.stats().unwrap());
    assert!(
        usage > 0 && limit > 1 << 62,
        "usage {usage}, no limit: {limit}"
    );
    eventually("CPU time grows", PATIENCE, || {
        (numbers(&task.stats().unwrap()).2 > cpu).then_some(())
    });
    end(&task);
}

fn oom_kill_is_counted_after_the_end(env: &Env) {
    let bundle = Bundle::new(env, &["tail", "/dev/zero"]);
    bundle.edit(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20}));
    let task = running(&bundle);
    assert_eq!(task.wait("").unwrap().exit_status, 137);
    let (_, limit, _, kills) = numbers(&task.stats().unwrap());
    assert_eq!((limit, kills), (32 << 20, 1));
    end(&task);
}

fn state_answers_beside_parked_waits(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    let waits: Vec<_> = (0..100).map(|_| task.wait_beside("")).collect();
    let mut times: Vec<Duration> = (0..21)
        .map(|_| {
            let began = Instant::now();
            task.state("").unwrap();
            began.elapsed()
        })
        .collect();
    times.sort();
    assert!(
        times[10] < Duration::from_millis(50),
        "State beside 100 parked Waits: {times:?}"
    );
    task.kill("", KILL, false).unwrap();
    for wait in waits {
        assert_eq!(join(wait, PATIENCE).unwrap().exit_status, 137);
    }
    end(&task);
}

fn what_is_not_implemented(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    refused(task.checkpoint(), Code::UNIMPLEMENTED);
    for (service, method) in [
        ("containerd.task.v2.Task", "Teleport"),
        ("containerd.task.v3.Task", "Teleport"),
        ("containerd.runtime.sandbox.v1.Sandbox", "Teleport"),
        ("containerd.services.streaming.v1.Streaming", "Stream"),
    ] {
        refused(
            task.call::<Empty>(service, method, &Empty::default()),
            Code::UNIMPLEMENTED,
        );
    }
    end(&task);
}

fn both_versions_answer_the_same(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let mut task = running(&bundle);
    let mut answers = [2, 3].map(|version| {
        task.version = version;
        let refusal = task.state("none").unwrap_err();
        (
            task.state("").unwrap(),
            task.pids().unwrap(),
            task.connected().unwrap(),
            refusal,
        )
    });
    let (v2, v3) = answers.split_at_mut(1);
    assert_eq!(v2, v3);
    end(&task);
}

fn connect_knows_the_sandbox(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    let before = task.connected().unwrap();
    assert!(before.shim_pid > 0 && before.task_pid == 0, "{before:?}");
    let pid = task.create().unwrap().pid;
    assert_eq!(task.connected().unwrap().task_pid, pid);
    let server = procs::named("containerd-shim")
        .into_iter()
        .find(|process| process.pid == before.shim_pid);
    assert!(server.is_some(), "no process {}", before.shim_pid);
    // As runc's shim: its own pid is for whoever asks.
    let other = task.other("none").connected().unwrap();
    assert_eq!((other.shim_pid, other.task_pid), (before.shim_pid, 0));
}

fn gone_within(bundle: &Bundle, deadline: Duration) {
    eventually("the server's end", deadline, || {
        bundle.processes().is_empty().then_some(())
    });
}

fn shutdown_waits_for_the_last_task(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    let socket = fs::read_to_string(bundle.dir.join("address")).unwrap();
    task.shutdown(false).unwrap();
    assert_eq!(task.status(""), "RUNNING");
    task.kill("", KILL, false).unwrap();
    task.wait("").unwrap();
    task.delete("").unwrap();
    task.shutdown(false).unwrap();
    gone_within(&bundle, Duration::from_secs(2));
    assert!(
        !Path::new(socket.trim_start_matches("unix://")).exists(),
        "the socket is left"
    );
    bundle.delete();
}

fn shutdown_now(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.shutdown(true).unwrap();
    gone_within(&bundle, Duration::from_secs(10));
}

fn sigterm_ends_the_sandbox(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    let pid = Pid::from_raw(task.connected().unwrap().shim_pid.cast_signed());
    kill(pid, Signal::SIGPIPE).unwrap();
    assert_eq!(task.status(""), "RUNNING", "SIGPIPE is ignored");
    kill(pid, Signal::SIGTERM).unwrap();
    gone_within(&bundle, Duration::from_secs(10));
}

fn options_of_create(env: &Env) {
    let any = |type_url: &str, value: &[u8]| Any {
        type_url: type_url.into(),
        value: value.into(),
        ..Default::default()
    };
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    let error = refused(
        task.create_with(|request| request.options = Some(any("windows.Options", b"")).into()),
        Code::INVALID_ARGUMENT,
    );
    assert!(error.contains("windows.Options"), "{error}");
    let garbage = any("runtimeoptions.v1.Options", b"\x12\xff");
    refused(
        task.create_with(|request| request.options = Some(garbage).into()),
        Code::INVALID_ARGUMENT,
    );
    let runc = any("containerd.runc.v1.Options", b"\x1a\x03abc");
    task.create_with(|request| request.options = Some(runc).into())
        .unwrap();
    task.delete("").unwrap();
}

fn unknown_names_in_a_spec(env: &Env) {
    let bundle = Bundle::new(env, &["sh", "-c", "exit 3"]);
    bundle.edit(|spec| {
        let process = &mut spec["process"];
        process["capabilities"]["bounding"]
            .as_array_mut()
            .unwrap()
            .push(json!("CAP_TIME_TRAVEL"));
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_ABACUS"],
            "syscalls": [{"names": ["no_such_call"], "action": "SCMP_ACT_SHRUG"}],
        });
        spec["linux"]["gadgets"] = json!({"eth9": {"name": "eth0"}});
    });
    let task = running(&bundle);
    assert_eq!(task.wait("").unwrap().exit_status, 3);
    task.delete("").unwrap();
    // A limit is a restriction: it is kept or refused, as with runc.
    let limited = Bundle::new(env, &["true"]);
    limited.edit(|spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_PATIENCE", "hard": 1, "soft": 1}])
    });
    let error = refused(limited.start().create(), Code::INVALID_ARGUMENT);
    assert!(error.contains("RLIMIT_PATIENCE"), "{error}");
}

fn update_keeps_the_rest(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    task.update(&json!({"memory": {"limit": 64 << 20}}))
        .unwrap();
    assert_eq!(numbers(&task.stats().unwrap()).1, 64 << 20);
    task.update(&json!({"cpu": {"shares": 512}, "pids": {"limit": 100}}))
        .unwrap();
    assert_eq!(
        numbers(&task.stats().unwrap()).1,
        64 << 20,
        "the memory limit stays"
    );
    end(&task);
}

fn many_execs_leave_nothing_open(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = running(&bundle);
    let fds = format!("/proc/{}/fd", task.connected().unwrap().shim_pid);
    let count = || fs::read_dir(&fds).unwrap().count();
    let once = |number: usize| {
        let exec = format!("exec{number}");
        task.exec(&exec, &process(&["true"])).unwrap();
        task.start(&exec).unwrap();
        assert_eq!(task.wait(&exec).unwrap().exit_status, 0);
        task.delete(&exec).unwrap();
    };
    (0..5).for_each(once);
    let before = count();
    (5..105).for_each(once);
    eventually(&format!("descriptors back to {before}"), PATIENCE, || {
        (count() <= before + 1).then_some(())
    });
    end(&task);
}

fn unknown_stdio_scheme(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    let error = task
        .create_with(|request| request.stdout = "pigeon:///x".into())
        .unwrap_err();
    assert!(error.message.contains("pigeon"), "{error:?}");
    refused(task.state(""), Code::NOT_FOUND);
}
