//! The life of containers as a user of `ctr` sees it: run, exec, kill, pause, limits, users,
//! restarts of containerd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::process::ExitCode;
use std::time::Duration;

use cofferdam_tests::command::{Running, run};
use cofferdam_tests::daemon::Daemon;
use cofferdam_tests::{Container, Env, PATIENCE, Release, Suite, assets, cases, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn main() -> ExitCode {
    Suite::new().run(cases![
        Core: output_and_exit_code, exec_kill_and_remove_in_the_background,
            memory_limit_ends_in_137,
            containerd_restarts_and_the_container_stays;
        Ours: guest_has_its_own_kernel, exit_code_is_kept_while_containerd_is_away,
            first_container_of_a_group_goes_before_the_others;
        Once: signals_reach_the_process, signal_to_the_pid_of_a_task_reaches_it, containerd_crashes_and_the_container_stays,
            pause_and_resume, metrics, read_only_root, capability_is_dropped,
            seccomp_and_privileged, user_of_run_and_exec,
            environment_and_directory, bind_mounts, root_file_system_of_ones_own, devices,
            missing_command, missing_exec_command,
            id_that_is_taken, kill_everything_in_it, signal_to_all_reaches_children,
            kill_of_what_has_ended, processes_are_listed, large_exec_arguments,
            fifty_execs_at_once, two_at_once, created_started_and_started_again,
            host_processes_are_not_visible, clock_is_the_hosts;
    ])
}

/// containerd runs the shim's `delete` after every deletion, with the id that the group has too.
fn first_container_of_a_group_goes_before_the_others(env: &Env) {
    let id = env.id();
    let group = format!("io.containerd.runc.v2.group={id}");
    let flags = ["-d", "--null-io", "--annotation", &group];
    run(env.run_command(&id, &flags, &["sleep", "3600"]), PATIENCE).ok();
    let first = Container::adopt(env, &id);
    let second = env.detached(&flags[1..], &["sleep", "3600"]);
    first.kill("SIGKILL", &[]).ok();
    first.finish();
    // A `delete` that takes the group for dead gives its server 2 s.
    let until = std::time::Instant::now() + Duration::from_secs(4);
    while std::time::Instant::now() < until {
        second.exec(&["true"]).ok();
    }
    second.kill("SIGKILL", &[]).ok();
    second.finish();
}

/// As make and tar see it, which complain of files that come from the future.
fn clock_is_the_hosts(env: &Env) {
    let dir = env.dir.join("volume");
    std::fs::create_dir(&dir).unwrap();
    let mount = format!("type=bind,src={},dst=/v,options=rbind:rw", dir.display());
    let container = env.detached(&["--null-io", "--mount", &mount], &["sleep", "3600"]);
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_micros();
    let in_time = || {
        std::fs::write(dir.join("new"), "").unwrap();
        let before = now();
        let script = "adjtimex | awk '/tv_sec/ {s = $2} /tv_usec/ {printf \"%d%06d\", s, $2}'; \
                      touch /dev/shm/now; test /v/new -nt /dev/shm/now && echo future";
        let seen = container.exec(&["sh", "-c", script]).text();
        let (seen, after): (u128, _) = (seen.parse().expect(&seen), now());
        let wrong = before.saturating_sub(seen).max(seen.saturating_sub(after));
        assert!(wrong < 5000, "{wrong} µs from {before} to {after}: {seen}");
    };
    in_time();
    env.ctr(&["tasks", "pause", &container.id]).ok();
    std::thread::sleep(Duration::from_secs(2));
    env.ctr(&["tasks", "resume", &container.id]).ok();
    in_time();
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

fn output_and_exit_code(env: &Env) {
    let output = env
        .run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"])
        .exits(7);
    assert_eq!(
        (output.text().as_str(), output.errors().as_str()),
        ("out", "err")
    );
}

fn guest_has_its_own_kernel(env: &Env) {
    let guest = env.run(&[], &["uname", "-r"]).ok().text();
    let host = nix::sys::utsname::uname()
        .unwrap()
        .release()
        .to_string_lossy()
        .into_owned();
    assert!(
        !guest.is_empty() && guest != host,
        "the guest's kernel is {guest:?}, the host's {host:?}"
    );
}

fn host_processes_are_not_visible(env: &Env) {
    let seen = env
        .run(&[], &["sh", "-c", "ps -o pid,comm; cat /proc/1/cgroup"])
        .ok()
        .text();
    assert!(
        seen.lines().nth(1).unwrap().trim().starts_with("1 "),
        "the command is not PID 1: {seen}"
    );
    assert!(
        seen.lines().take_while(|line| !line.contains('/')).count() < 6,
        "other processes are visible: {seen}"
    );
}

fn exec_kill_and_remove_in_the_background(env: &Env) {
    let container = env.idle();
    let (pid, status) = container.listed().unwrap();
    assert!(pid != 0 && status == "RUNNING", "{pid} {status}");
    let output = container
        .exec(&[
            "sh",
            "-c",
            "echo in; cat /proc/1/comm; echo err >&2; exit 3",
        ])
        .exits(3);
    assert_eq!(
        (output.text().as_str(), output.errors().as_str()),
        ("in\nsleep", "err")
    );
    container.kill("SIGKILL", &[]).ok();
    assert_eq!(container.finish(), 137);
    env.ctr(&["containers", "rm", &container.id]).ok();
}

fn signals_reach_the_process(env: &Env) {
    for (signal, code) in [("SIGTERM", 31), ("SIGHUP", 30)] {
        let script =
            "trap 'exit 30' HUP; trap 'exit 31' TERM; touch /ready; while :; do sleep 0.1; done";
        let container = env.detached(&["--null-io"], &["sh", "-c", script]);
        container.wait_for_file("/ready");
        container.kill(signal, &[]).ok();
        assert_eq!(container.finish(), code);
    }
    let output = env
        .run(&[], &["sh", "-c", "sh -c 'kill -9 $$'; echo $?"])
        .ok();
    assert_eq!(output.text(), "137");
}

/// `kill -HUP $(docker inspect -f '{{.State.Pid}}' web)` is how many reload a server.
fn signal_to_the_pid_of_a_task_reaches_it(env: &Env) {
    let script = "trap 'touch /reloaded' HUP; touch /ready; while :; do sleep 0.1; done";
    let container = env.detached(&["--null-io"], &["sh", "-c", script]);
    container.wait_for_file("/ready");
    let pid = Pid::from_raw(container.listed().unwrap().0.cast_signed());
    kill(pid, Signal::SIGHUP).unwrap();
    container.wait_for_file("/reloaded");
    kill(pid, Signal::SIGKILL).unwrap();
    assert_eq!(container.finish(), 137);
}

fn memory_limit_ends_in_137(env: &Env) {
    env.run(&["--memory-limit", "33554432"], &["tail", "/dev/zero"])
        .exits(137);
}

const EXIT_9_ON_TERM: &str = "trap 'exit 9' TERM; touch /ready; while :; do sleep 0.1; done";

/// Stops containerd with `signal` while a container runs, and goes on with it afterwards.
fn away_and_back(env: &Env, signal: Signal) {
    let env = env.with_own_daemon(None);
    let container = env.detached(&["--null-io"], &["sh", "-c", EXIT_9_ON_TERM]);
    let before = container.listed();
    container.wait_for_file("/ready");
    env.daemon.stop(signal);
    env.daemon.start_again();
    assert_eq!(
        container.listed(),
        before,
        "pid and status are the same after the restart"
    );
    assert_eq!(
        container.exec(&["echo", "still here"]).ok().text(),
        "still here"
    );
    container.kill("SIGTERM", &[]).ok();
    assert_eq!(container.finish(), 9);
}

fn containerd_restarts_and_the_container_stays(env: &Env) {
    away_and_back(env, Signal::SIGTERM);
}

fn containerd_crashes_and_the_container_stays(env: &Env) {
    away_and_back(env, Signal::SIGKILL);
}

fn exit_code_is_kept_while_containerd_is_away(env: &Env) {
    let env = env.with_own_daemon(None);
    let container = env.detached(&["--null-io"], &["sh", "-c", EXIT_9_ON_TERM]);
    container.wait_for_file("/ready");
    let task = container.task();
    env.daemon.stop(Signal::SIGKILL);
    task.kill("", 15, false).unwrap();
    assert_eq!(task.wait("").unwrap().exit_status, 9);
    env.daemon.start_again();
    assert_eq!(container.finish(), 9);
}

fn pause_and_resume(env: &Env) {
    let container = env.detached(
        &["--null-io"],
        &["sh", "-c", "while :; do date +%s%N >/now; sleep 0.05; done"],
    );
    container.wait_for_file("/now");
    env.ctr(&["tasks", "pause", &container.id]).ok();
    container.wait_for("PAUSED");
    let error = container.exec(&["true"]);
    assert_ne!(error.status, 0, "exec in a paused container has to fail");
    env.ctr(&["tasks", "resume", &container.id]).ok();
    container.wait_for("RUNNING");
    let first = container.exec(&["cat", "/now"]).ok().text();
    eventually("it runs on", PATIENCE, || {
        (container.exec(&["cat", "/now"]).ok().text() != first).then_some(())
    });
}

fn metrics(env: &Env) {
    let container = env.idle();
    let metrics = env
        .ctr(&["tasks", "metrics", "--format", "json", &container.id])
        .ok()
        .text();
    let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap();
    let usage = [
        &metrics["memory"]["usage"]["usage"],
        &metrics["memory"]["usage"],
    ]
    .into_iter()
    .find_map(number);
    assert!(usage.unwrap() > 0.0, "memory usage: {metrics}");
    let cpu = [
        &metrics["cpu"]["usage"]["total"],
        &metrics["cpu"]["usage_usec"],
    ]
    .into_iter()
    .find_map(number);
    assert!(cpu.unwrap() > 0.0, "CPU usage: {metrics}");
    assert!(
        number(&metrics["pids"]["current"]).unwrap() >= 1.0,
        "processes: {metrics}"
    );
}

fn number(value: &serde_json::Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

fn read_only_root(env: &Env) {
    let output = env
        .run(
            &["--read-only"],
            &["sh", "-c", "touch /x || touch /dev/shm/y && echo shm"],
        )
        .ok();
    assert!(
        output.errors().contains("Read-only file system"),
        "{}",
        output.errors()
    );
    assert_eq!(output.text(), "shm", "/dev/shm stays writable");
}

fn capability_is_dropped(env: &Env) {
    let effective = |flags: &[&str]| {
        let line = env
            .run(flags, &["grep", "CapEff", "/proc/self/status"])
            .ok()
            .text();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    let (all, less) = (
        effective(&[]),
        effective(&["--cap-drop", "CAP_CHOWN", "--cap-add", "CAP_SYS_ADMIN"]),
    );
    assert_eq!(all & 1, 1, "CAP_CHOWN is there by default: {all:x}");
    assert_eq!(less & 1, 0, "CAP_CHOWN is dropped: {less:x}");
    assert_eq!(less & 1 << 21, 1 << 21, "CAP_SYS_ADMIN is added: {less:x}");
}

fn seccomp_and_privileged(env: &Env) {
    let status = env
        .run(&["--seccomp"], &["grep", "Seccomp:", "/proc/self/status"])
        .ok()
        .text();
    assert!(
        status.ends_with('2'),
        "the default profile filters: {status}"
    );
    let status = env.run(
        &["--privileged"],
        &[
            "sh",
            "-c",
            "grep -E 'CapEff|Seccomp:' /proc/self/status; mount -t tmpfs t /tmp",
        ],
    );
    let status = status.ok().text();
    assert!(status.ends_with('0') && status.contains("ff"), "{status}");
}

fn user_of_run_and_exec(env: &Env) {
    // `ctr run` of 1.6 knows no --user.
    if env.daemon.release != Release::V1_6 {
        assert_eq!(
            env.run(&["--user", "65534:1000"], &["sh", "-c", "id -u; id -g"])
                .ok()
                .text(),
            "65534\n1000"
        );
    }
    let container = env.idle();
    let output = container.exec_with(&["--user", "65534"], &["sh", "-c", "id -u; touch /root/x"]);
    assert_eq!(output.text(), "65534");
    assert!(
        output.errors().contains("Permission denied"),
        "{}",
        output.errors()
    );
}

fn environment_and_directory(env: &Env) {
    let output = env
        .run(
            &["--env", "A=b c", "--cwd", "/tmp"],
            &["sh", "-c", "echo \"$A\"; pwd"],
        )
        .ok();
    assert_eq!(output.text(), "b c\n/tmp");
    let container = env.idle();
    assert_eq!(
        container
            .exec_with(&["--cwd", "/usr"], &["pwd"])
            .ok()
            .text(),
        "/usr"
    );
}

fn bind_mounts(env: &Env) {
    let (file, dir) = (env.dir.join("file"), env.dir.join("dir"));
    std::fs::write(&file, "from the host").unwrap();
    std::fs::create_dir(&dir).unwrap();
    let mount = |source: &std::path::Path, to: &str, mode: &str| {
        format!(
            "type=bind,src={},dst={to},options=rbind:{mode}",
            source.display()
        )
    };
    let (one, two) = (mount(&file, "/file", "ro"), mount(&dir, "/dir", "rw"));
    let script = "cat /file; echo from the guest >/dir/new; echo x >/file";
    let output = env.run(&["--mount", &one, "--mount", &two], &["sh", "-c", script]);
    assert_eq!(output.text(), "from the host");
    assert!(
        output.errors().contains("Read-only file system"),
        "{}",
        output.errors()
    );
    assert_eq!(
        std::fs::read_to_string(dir.join("new")).unwrap(),
        "from the guest\n"
    );
}

fn root_file_system_of_ones_own(env: &Env) {
    let tree = env.dir.join("tree");
    assets::busybox_tree(&tree);
    std::fs::write(tree.join("mark"), "mine").unwrap();
    let path = tree.to_string_lossy().into_owned();
    let script = "cat /mark; echo written >/new";
    assert_eq!(
        env.run(
            &["--env", "PATH=/bin", "--rootfs", &path],
            &["sh", "-c", script]
        )
        .ok()
        .text(),
        "mine"
    );
    assert_eq!(
        std::fs::read_to_string(tree.join("new")).unwrap(),
        "written\n"
    );
}

fn devices(env: &Env) {
    let script = "echo x >/dev/null && head -c 3 /dev/zero | wc -c; echo x >/dev/full; \
                  for d in random urandom tty ptmx; do test -e /dev/$d || echo no $d; done; test \
                  -w /dev/shm && echo shm";
    let output = env.run(&[], &["sh", "-c", script]).ok();
    assert_eq!(output.text(), "3\nshm");
    assert!(
        output.errors().contains("No space left"),
        "{}",
        output.errors()
    );
}

fn missing_command(env: &Env) {
    env.run(&[], &["/no/such/program"])
        .fails_with(&["/no/such/program", "no such file or directory"]);
    env.run(&[], &["no-such-program"])
        .fails_with(&["no-such-program", "executable file not found in $PATH"]);
    env.run(&[], &["/etc/passwd"])
        .fails_with(&["/etc/passwd", "permission denied"]);
}

fn missing_exec_command(env: &Env) {
    let container = env.idle();
    container
        .exec(&["/no/such/program"])
        .fails_with(&["/no/such/program", "no such file or directory"]);
    container
        .exec(&["/etc/passwd"])
        .fails_with(&["/etc/passwd", "permission denied"]);
    container.exec(&["echo", "fine"]).ok();
}

fn id_that_is_taken(env: &Env) {
    let container = env.idle();
    let again = run(env.run_command(&container.id, &["-d"], &["true"]), PATIENCE);
    again.fails_with(&[&container.id, "already exists"]);
    let task = env.ctr(&["tasks", "start", "-d", &container.id]);
    task.fails_with(&["already exists"]);
    container.exec(&["true"]).ok();
}

fn kill_everything_in_it(env: &Env) {
    let container = env.detached(
        &["--null-io"],
        &["sh", "-c", "sleep 3600 & sleep 3600 & wait"],
    );
    container.kill("SIGKILL", &["--all"]).ok();
    assert_eq!(container.finish(), 137);
}

fn signal_to_all_reaches_children(env: &Env) {
    let container = env.detached(
        &["--null-io"],
        &[
            "sh",
            "-c",
            "sleep 3600 & touch /ready; wait; touch /ended; sleep 3600",
        ],
    );
    container.wait_for_file("/ready");
    container.kill("SIGTERM", &["--all"]).ok();
    container.wait_for_file("/ended");
}

fn kill_of_what_has_ended(env: &Env) {
    let container = env.detached(&["--null-io"], &["true"]);
    container.wait_for("STOPPED");
    container.kill("SIGKILL", &[]).fails_with(&["not found"]);
    container.exec(&["true"]).fails_with(&[]);
    assert_eq!(container.finish(), 0);
}

fn processes_are_listed(env: &Env) {
    let container = env.idle();
    let exec_id = env.id();
    run(
        container.exec_command(&exec_id, &["-d"], &["sleep", "3600"]),
        PATIENCE,
    )
    .ok();
    let pids = container.pids();
    assert!(
        pids.len() >= 2 && pids.contains(&container.listed().unwrap().0),
        "{pids:?}"
    );
    assert!(pids.iter().all(|pid| *pid != 0), "{pids:?}");
    container.kill("SIGKILL", &["--exec-id", &exec_id]).ok();
    eventually("the exec is gone from the list", PATIENCE, || {
        (container.pids().len() < pids.len()).then_some(())
    });
    container.exec(&["true"]).ok();
}

fn large_exec_arguments(env: &Env) {
    let container = env.idle();
    let large = "x".repeat(100 << 10);
    let mut command = vec!["sh", "-c", "echo ${#1} ${#8}", "sh"];
    command.extend([large.as_str(); 8]);
    assert_eq!(container.exec(&command).ok().text(), "102400 102400");
}

fn fifty_execs_at_once(env: &Env) {
    let container = env.idle();
    let start = |number: usize| {
        let command = container.exec_command(
            &format!("exec{number}"),
            &[],
            &["echo", "-n", &number.to_string()],
        );
        (number, Running::start(command, None))
    };
    let running: Vec<_> = (0..50).map(start).collect();
    for (number, exec) in running {
        assert_eq!(
            exec.wait(Duration::from_secs(120)).ok().text(),
            number.to_string()
        );
    }
}

fn two_at_once(env: &Env) {
    let (one, two) = (env.idle(), env.idle());
    one.exec(&["sh", "-c", "echo one >/tmp/mark"]).ok();
    assert_ne!(
        two.exec(&["cat", "/tmp/mark"]).status,
        0,
        "they share a file system"
    );
    assert_ne!(
        one.listed().unwrap().0,
        two.listed().unwrap().0,
        "they share a pid"
    );
    one.kill("SIGKILL", &[]).ok();
    assert_eq!(one.finish(), 137);
    two.exec(&["true"]).ok();
}

fn created_started_and_started_again(env: &Env) {
    let id = env.id();
    let Daemon { snapshotter, .. } = &*env.daemon;
    let runtime = env.runtime.name();
    let create = [
        "containers",
        "create",
        "--snapshotter",
        snapshotter,
        "--runtime",
        runtime,
        assets::IMAGE,
        &id,
    ];
    env.ctr(&[&create[..], &["echo", "started"]].concat()).ok();
    let container = Container::adopt(env, &id);
    for _ in 0..2 {
        // `ctr task start` without -d removes the task at its end.
        assert_eq!(
            env.ctr(&["tasks", "start", &container.id]).ok().text(),
            "started"
        );
    }
}
