//! The life of pods as a user of `crictl` sees it: containers that come and go and share things,
//! exec, attach, logs, stop, removal in any order, restarts of containerd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cofferdam_tests::command::Running;
use cofferdam_tests::pod::{Member, Pod, mode};
use cofferdam_tests::pty::Terminal;
use cofferdam_tests::{Env, PATIENCE, Release, Suite, cases, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Core: full_cycle, five_containers_share_their_host_name_network_and_ipc,
            only_container_is_replaced,
            shared_pid_namespace_has_a_reaper, containerd_crashes_and_the_pod_stays,
            containers_outlive_the_task_of_their_sandbox;
        Once: pid_namespace_of_ones_own, pid_namespace_of_another_container, terminal_and_its_size,
            exec_with_input, exec_times_out, attach_reads_and_writes, logs_go_on_after_rotation,
            stop_waits_for_a_trapped_signal, stop_in_a_shared_pid_namespace_is_a_sigterm, stop_kills_after_the_grace_period, fifty_execs_at_once,
            container_starts_again_after_its_end, pod_is_stopped_before_its_containers,
            removal_by_force,
            containers_are_removed_in_any_order, pause_and_resume, container_and_pod_statistics,
            twenty_pods_one_after_another, eight_pods_at_once;
        Ours: exit_code_is_kept_while_containerd_is_away, host_namespaces_are_refused;
    ])
}

fn full_cycle(env: &Env) {
    let pod = Pod::new(env);
    let script = "trap 'exit 5' TERM; echo out; echo err >&2; while :; do sleep 0.1; done";
    let container = pod.run("main", &["sh", "-c", script]);
    container.wait_for_log("err");
    assert_eq!(container.logs(), "outerr");
    assert_eq!(container.sh("cat /proc/1/comm; hostname"), "sh\npod");
    let errors = container
        .exec(&["sh", "-c", "echo err >&2; exit 3"])
        .errors();
    assert!(
        errors.contains("exited with 3") && errors.contains(": err"),
        "{errors}"
    );
    assert_eq!(container.state(), "CONTAINER_RUNNING");
    container.stop(20);
    assert_eq!(container.exit_code(), 5);
    container.remove(&[]);
    pod.stop();
    assert_eq!(pod.inspect()["status"]["state"], "SANDBOX_NOTREADY");
    pod.remove(&[]);
    assert!(!env.crictl(&["pods", "-q"]).ok().text().contains(&pod.id));
}

/// containerd deletes that task when it ends, and runs the shim's `delete` for it.
fn containers_outlive_the_task_of_their_sandbox(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    env.ctr(&["task", "kill", "--signal", "SIGKILL", &pod.id])
        .ok();
    eventually("the sandbox is not ready", PATIENCE, || {
        (pod.inspect()["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
    });
    // What `delete` would have ended is ended within this time.
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        assert_eq!(container.sh("echo here"), "here");
    }
    container.stop(0);
}

fn five_containers_share_their_host_name_network_and_ipc(env: &Env) {
    let pod = Pod::new(env);
    let server = pod.run("server", &["talk", "serve", "tcp", "127.0.0.1", "7000"]);
    let others: Vec<Member> = (0..4)
        .map(|number| pod.idle(&format!("other{number}")))
        .collect();
    server.sh("echo from the server >/dev/shm/note; echo private >/tmp/note");
    let namespaces = "for n in net ipc uts; do readlink /proc/self/ns/$n; done; hostname";
    let expected = server.sh(namespaces);
    assert!(expected.ends_with("\npod"), "{expected}");
    for (number, other) in others.iter().enumerate() {
        assert_eq!(other.sh(namespaces), expected);
        let answer = other.sh(&format!("talk ask tcp 127.0.0.1 7000 hello{number}"));
        assert_eq!(answer, format!("you said hello{number}"));
        assert_eq!(
            other.sh("cat /dev/shm/note; ls /tmp; hostname"),
            "from the server\npod"
        );
    }
}

fn only_container_is_replaced(env: &Env) {
    let pod = Pod::new(env);
    let addresses = pod.addresses();
    for round in 0..3 {
        let container = pod.run(
            "only",
            &["sh", "-c", "ip -o addr; touch /root/mark; sleep 3600"],
        );
        container.wait_until("test -e /root/mark");
        assert!(
            container.logs().contains(&addresses[0]),
            "round {round}: {addresses:?} in {}",
            container.logs()
        );
        container.stop(0);
        assert_eq!(container.exit_code(), 137);
        container.remove(&[]);
    }
    assert_eq!(pod.inspect()["status"]["state"], "SANDBOX_READY");
}

fn stop_in_a_shared_pid_namespace_is_a_sigterm(env: &Env) {
    let pod = Pod::with(env, shares_pids());
    let container = pod.run("main", &["sleep", "3600"]);
    let took = container.stop(30);
    assert!(took.as_secs() < 25, "it had to be killed: {took:?}");
    assert_eq!(container.exit_code(), 143, "it is not the first process");
}

fn shared_pid_namespace_has_a_reaper(env: &Env) {
    let pod = Pod::with(env, shares_pids());
    let (one, two) = (
        pod.run("one", &["sleep", "3601"]),
        pod.run("two", &["sleep", "3602"]),
    );
    let seen = one.sh("ps -o pid,args");
    assert!(
        seen.contains("sleep 3601") && seen.contains("sleep 3602"),
        "{seen}"
    );
    assert!(
        !seen
            .lines()
            .any(|line| line.trim_start().starts_with("1 sleep")),
        "a container is PID 1: {seen}"
    );
    // An orphan whose parent has gone: who is PID 1 has to wait for it.
    one.sh("for i in 1 2 3; do sh -c 'sleep 0.1 & exec true' & done; wait");
    two.wait_until("! ps -o stat,args | grep -q '^Z'");
    two.sh(
        "kill -KILL $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 3601 /proc/$p/cmdline \
         && echo $p; done)",
    );
    assert_eq!(one.exit_code(), 137);
    two.exec(&["true"]).ok();
}

fn shares_pids() -> serde_json::Value {
    json!({"linux": {"security_context": {"namespace_options": {"pid": mode::POD}}}})
}

fn pid_namespace_of_ones_own(env: &Env) {
    let pod = Pod::new(env);
    let (one, two) = (
        pod.run("one", &["sleep", "3601"]),
        pod.run("two", &["sleep", "3602"]),
    );
    for (container, own, other) in [(&one, "3601", "3602"), (&two, "3602", "3601")] {
        let seen = container.sh("cat /proc/1/cmdline | tr '\\0' ' '; echo; ps -o args");
        assert!(
            seen.starts_with(&format!("sleep {own}")) && !seen.contains(other),
            "{seen}"
        );
    }
}

fn pid_namespace_of_another_container(env: &Env) {
    let pod = Pod::new(env);
    let one = pod.run("one", &["sleep", "3601"]);
    let options = json!({"pid": mode::TARGET, "target_id": one.id});
    let debugger = pod.run_with(
        "debugger",
        &["sleep", "3602"],
        json!({"linux": {"security_context": {"namespace_options": options}}}),
    );
    let seen = debugger.sh("cat /proc/1/cmdline | tr '\\0' ' '; echo; ps -o args");
    assert!(
        seen.starts_with("sleep 3601") && seen.contains("sleep 3602"),
        "{seen}"
    );
    assert!(one.sh("ps -o args").contains("sleep 3602"));
}

fn terminal_and_its_size(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let mut terminal = Terminal::run(container.exec_command(&["-i", "-t"], &["sh"]), 31, 97);
    terminal.send("stty size; tty\n");
    terminal.expect("31 97");
    terminal.expect("/dev/pts/");
    terminal.resize(42, 133);
    terminal.send("while ! stty size | grep '42 133'; do sleep 0.2; done; echo ch'an'ged\n");
    terminal.expect("changed");
    terminal.send("exit 0\n");
    assert_eq!(terminal.wait(), 0);
}

fn exec_with_input(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let text = "0123456789abcde\n".repeat(64 << 10);
    let mut exec =
        Running::start_piped(container.exec_command(&["-i"], &["sh", "-c", "md5sum; exit 4"]));
    let mut input = exec.child.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = exec.wait(PATIENCE);
    let expected = container.sh("yes 0123456789abcde | head -n 65536 | md5sum");
    assert_eq!(output.text(), expected, "{}", output.errors());
    assert_ne!(output.status, 0, "exit code 4 is not seen");
    assert!(output.errors().contains('4'), "{}", output.errors());
}

fn exec_times_out(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let exec = Running::start(
        container.exec_command(&["--sync", "--timeout", "2"], &["sleep", "3602"]),
        None,
    );
    let output = exec.wait(PATIENCE);
    assert_ne!(output.status, 0);
    assert!(
        output.errors().to_lowercase().contains("timeout") || output.errors().contains("timed out"),
        "{output:?}"
    );
    container.wait_until("! ps -o args | grep -q '[s]leep 3602'");
}

fn attach_reads_and_writes(env: &Env) {
    let pod = Pod::new(env);
    let script = "read line; echo got $line; read line; echo got $line";
    let container = pod.run_with("main", &["sh", "-c", script], json!({"stdin": true}));
    let mut attach = Running::start_piped(env.cri().command(["attach", "-i", &container.id]));
    let mut input = attach.child.stdin.take().unwrap();
    input.write_all(b"one\n").unwrap();
    container.wait_for_log("got one");
    input.write_all(b"two\n").unwrap();
    assert_eq!(container.exit_code(), 0);
    // Not before: containerd gives up output that is on its way when the input of attach ends.
    let output = attach.wait(PATIENCE);
    drop(input);
    assert!(output.text().contains("got two"), "{output:?}");
    assert_eq!(container.logs(), "got one\ngot two");
}

fn logs_go_on_after_rotation(env: &Env) {
    let pod = Pod::new(env);
    let script = "n=0; while :; do echo line $n; n=$((n+1)); sleep 0.05; done";
    let container = pod.run("main", &["sh", "-c", script]);
    container.wait_for_log("line 5");
    let rotated = container.log.with_extension("old");
    std::fs::rename(&container.log, &rotated).unwrap();
    env.crictl(&["logs", "--reopen", &container.id]).ok();
    eventually("lines in the new file", PATIENCE, || {
        std::fs::metadata(&container.log)
            .is_ok_and(|file| file.len() > 200)
            .then_some(())
    });
    container.stop(0);
    let lines = |path| {
        std::fs::read_to_string(path)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let all = [lines(&rotated), lines(&container.log)].concat();
    for (number, line) in all.iter().enumerate() {
        assert!(
            line.ends_with(&format!(" stdout F line {number}")),
            "line {number} of {}: {line}",
            all.len()
        );
    }
}

fn stop_waits_for_a_trapped_signal(env: &Env) {
    let pod = Pod::new(env);
    let script = "trap 'sleep 2; echo done; exit 6' TERM; echo ready; while :; do sleep 0.1; done";
    let container = pod.run("main", &["sh", "-c", script]);
    container.wait_for_log("ready");
    container.stop(30);
    assert_eq!(container.exit_code(), 6);
    container.wait_for_log("done");
}

fn stop_kills_after_the_grace_period(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run(
        "main",
        &[
            "sh",
            "-c",
            "trap '' TERM; echo ready; while :; do sleep 0.1; done",
        ],
    );
    container.wait_for_log("ready");
    let took = container.stop(2);
    assert!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(20),
        "{took:?}"
    );
    let status = container.wait();
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(137), Some("Error"))
    );
}

fn fifty_execs_at_once(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let start = |number: usize| {
        let command = container.exec_command(&["--sync"], &["echo", "-n", &number.to_string()]);
        (number, Running::start(command, None))
    };
    let running: Vec<_> = (0..50).map(start).collect();
    for (number, exec) in running {
        assert_eq!(
            exec.wait(Duration::from_secs(180)).ok().text(),
            number.to_string()
        );
    }
}

fn container_starts_again_after_its_end(env: &Env) {
    let pod = Pod::new(env);
    let first = pod.run("main", &["sh", "-c", "echo x >/root/mark; exit 1"]);
    let status = first.wait();
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(1), Some("Error"))
    );
    let second = pod.run("main", &["sh", "-c", "test -e /root/mark || exit 0"]);
    let status = second.wait();
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(0), Some("Completed"))
    );
    assert_eq!(second.inspect()["status"]["metadata"]["attempt"], 1);
    assert_eq!(first.exit_code(), 1);
}

fn pod_is_stopped_before_its_containers(env: &Env) {
    let pod = Pod::new(env);
    let (one, two) = (pod.idle("one"), pod.idle("two"));
    pod.stop();
    assert_eq!((one.exit_code(), two.exit_code()), (137, 137));
    // 2.1 creates one, but starts it no more than the others do.
    let (three, _) = pod.try_create("three", &["true"], json!({}));
    assert!(
        three.status != 0 || env.crictl(&["start", &three.text()]).status != 0,
        "a container started: {three:?}"
    );
    pod.stop();
    pod.remove(&[]);
    assert!(
        !env.crictl(&["ps", "-a", "-q"])
            .ok()
            .text()
            .contains(&one.id)
    );
}

fn removal_by_force(env: &Env) {
    let pod = Pod::new(env);
    let (_running, _made) = (
        pod.idle("running"),
        pod.create("made", &["true"], json!({})),
    );
    assert_ne!(
        env.crictl(&["rmp", &pod.id]).status,
        0,
        "a pod that runs is removed without force"
    );
    pod.remove(&["-f"]);
    assert!(!env.crictl(&["pods", "-q"]).ok().text().contains(&pod.id));
}

fn containers_are_removed_in_any_order(env: &Env) {
    let pod = Pod::new(env);
    let (one, two, three) = (
        pod.idle("one"),
        pod.create("two", &["true"], json!({})),
        pod.run("three", &["true"]),
    );
    assert_eq!(three.exit_code(), 0);
    two.remove(&[]);
    assert_ne!(
        env.crictl(&["rm", &one.id]).status,
        0,
        "a container that runs is removed without force"
    );
    one.remove(&["-f"]);
    three.remove(&[]);
    pod.idle("four").exec(&["true"]).ok();
}

fn containerd_crashes_and_the_pod_stays(env: &Env) {
    let env = env.with_own_daemon(None);
    let pod = Pod::new(&env);
    let script = "trap 'exit 9' TERM; n=0; while :; do echo line $n; n=$((n+1)); sleep 0.1; done";
    let (one, two) = (pod.run("one", &["sh", "-c", script]), pod.idle("two"));
    one.wait_for_log("line 3");
    env.daemon.stop(Signal::SIGKILL);
    env.daemon.start_again();
    assert_eq!(pod.inspect()["status"]["state"], "SANDBOX_READY");
    assert_eq!(
        (one.state().as_str(), two.state().as_str()),
        ("CONTAINER_RUNNING", "CONTAINER_RUNNING")
    );
    assert_eq!(one.sh("hostname"), "pod");
    let lines = || std::fs::read_to_string(&one.log).unwrap().lines().count();
    let before = lines();
    eventually("more lines in the log", PATIENCE, || {
        (lines() > before + 3).then_some(())
    });
    one.stop(20);
    assert_eq!(one.exit_code(), 9);
    pod.idle("three").exec(&["true"]).ok();
    pod.stop();
    assert_eq!(two.exit_code(), 137);
}

fn exit_code_is_kept_while_containerd_is_away(env: &Env) {
    let env = env.with_own_daemon(None);
    let pod = Pod::new(&env);
    let gate = env.dir.join("gate");
    std::fs::create_dir(&gate).unwrap();
    let script =
        "while ! test -e /gate/open; do sleep 0.1; done; echo bye; touch /gate/passed; exit 8";
    let mounts = json!({"mounts": [{"container_path": "/gate", "host_path": gate}]});
    let container = pod.run_with("main", &["sh", "-c", script], mounts);
    env.daemon.stop(Signal::SIGKILL);
    std::fs::write(gate.join("open"), "").unwrap();
    eventually("the container has seen it", PATIENCE, || {
        gate.join("passed").exists().then_some(())
    });
    env.daemon.start_again();
    assert_eq!(container.exit_code(), 8);
}

fn pause_and_resume(env: &Env) {
    let pod = Pod::new(env);
    let (one, two) = (
        pod.run(
            "one",
            &["sh", "-c", "while :; do date +%s%N; sleep 0.05; done"],
        ),
        pod.idle("two"),
    );
    env.ctr(&["tasks", "pause", &one.id]).ok();
    let size = || std::fs::metadata(&one.log).unwrap().len();
    // What was on its way may still come.
    eventually("its log stands still", PATIENCE, || {
        let before = size();
        two.exec(&["sleep", "0.5"]).ok();
        (size() == before).then_some(())
    });
    let before = size();
    env.ctr(&["tasks", "resume", &one.id]).ok();
    eventually("it runs on", PATIENCE, || (size() > before).then_some(()));
}

fn host_namespaces_are_refused(env: &Env) {
    for (namespace, word) in [("network", "network"), ("pid", "PID"), ("ipc", "IPC")] {
        let message = Pod::refused(
            env,
            json!({"linux": {"security_context": {"namespace_options": {namespace: mode::NODE}}}}),
        );
        assert!(
            message.to_lowercase().contains(&word.to_lowercase()),
            "{namespace}: {message}"
        );
    }
    assert_eq!(
        env.crictl(&["pods", "-q", "--name", "host_namespaces"])
            .ok()
            .text(),
        ""
    );
}

fn container_and_pod_statistics(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run(
        "main",
        &[
            "sh",
            "-c",
            "head -c 64m /dev/zero >/dev/shm/x; while :; do :; done",
        ],
    );
    container.wait_until("test $(stat -c %s /dev/shm/x) = 67108864");
    let cpu = || {
        let stats = env
            .crictl(&["stats", "-o", "json", "--id", &container.id])
            .ok()
            .text();
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
        let stats = &stats["stats"][0];
        let number =
            |value: &serde_json::Value| value["value"].as_str().and_then(|n| n.parse::<u64>().ok());
        let memory = number(&stats["memory"]["workingSetBytes"])
            .unwrap_or_else(|| panic!("no memory in {stats}"));
        assert!(memory > 60 << 20, "64 MiB of shared memory count: {memory}");
        number(&stats["cpu"]["usageCoreNanoSeconds"]).unwrap_or_else(|| panic!("no CPU in {stats}"))
    };
    let first = cpu();
    eventually("CPU time grows", PATIENCE, || (cpu() > first).then_some(()));
    if env.daemon.release != Release::V1_6 {
        let stats = env
            .crictl(&["statsp", "-o", "json", "--id", &pod.id])
            .ok()
            .text();
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
        let linux = &stats["stats"][0]["linux"];
        assert!(
            linux["memory"]["workingSetBytes"]["value"].is_string(),
            "{stats}"
        );
        assert!(
            linux["network"]["defaultInterface"]["rxBytes"]["value"].is_string(),
            "{stats}"
        );
    }
}

fn twenty_pods_one_after_another(env: &Env) {
    for _ in 0..20 {
        let pod = Pod::new(env);
        assert_eq!(pod.idle("main").sh("hostname"), "pod");
    }
}

fn eight_pods_at_once(env: &Env) {
    let one = |number: usize| {
        let pod = Pod::with(env, json!({"hostname": format!("pod{number}")}));
        assert_eq!(pod.idle("main").sh("hostname"), format!("pod{number}"));
    };
    std::thread::scope(|scope| {
        for number in 0..8 {
            scope.spawn(move || one(number));
        }
    });
}
