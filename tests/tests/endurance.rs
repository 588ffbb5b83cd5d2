//! A hostile or unlucky environment: containerd that crashes in the middle of things, full and
//! read-only disks, few descriptors, greedy containers, and a thousand of the same, after which
//! nothing has grown.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_tests::leftovers::Snapshot;
use cofferdam_tests::pod::Pod;
use cofferdam_tests::random::{Random, number};
use cofferdam_tests::{Env, PATIENCE, Suite, assets, cases, eventually, procs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::json;

const PARTS: [&str; 4] = [
    "containerd-shim-cofferdam",
    "qemu-system",
    "virtiofsd",
    "vhost-device-vsock",
];

const STATE: &str = "/run/cofferdam";

/// Tests here take the state directory of the whole machine away, so one runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Ours: few_descriptors, no_room_for_the_state, pod_whose_guest_hangs_is_removed;
        Long: greedy_containers_do_not_stop_their_pod, containerd_crashes_at_any_step,
            a_thousand_execs_leave_nothing, hundreds_of_containers_leave_nothing
    ])
}

/// Descriptors of all processes of the pod, by program, and mounts of its shim.
fn held() -> Vec<(String, usize)> {
    let count = |dir: String| {
        fs::read_dir(dir)
            .map(|entries| entries.count())
            .unwrap_or(0)
    };
    let mut held = Vec::new();
    for part in PARTS {
        for (number, process) in procs::named(part).iter().enumerate() {
            held.push((
                format!("{part} {number}: descriptors"),
                count(format!("/proc/{}/fd", process.pid)),
            ));
            held.push((
                format!("{part} {number}: threads"),
                count(format!("/proc/{}/task", process.pid)),
            ));
            if part == PARTS[0] {
                let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid))
                    .unwrap_or_default();
                held.push((format!("{part} {number}: mounts"), mounts.lines().count()));
            }
        }
    }
    held
}

fn insist_on_no_growth(before: &[(String, usize)], kib: u64) {
    let pss: Vec<u64> = procs::named(PARTS[0])
        .iter()
        .map(|shim| procs::pss_kib(shim.pid))
        .collect();
    eprintln!(
        "shim {kib} KiB before, {pss:?} KiB after; before {before:?}, after {:?}",
        held()
    );
    eventually("nothing has grown", Duration::from_secs(20), || {
        let grown = held()
            .iter()
            .zip(before)
            .any(|(now, before)| now.1 > before.1 + 4);
        (!grown && held().len() == before.len()).then_some(())
    });
}

fn a_thousand_execs_leave_nothing(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let inside = "ls /proc | grep -c '^[0-9]'; ls /proc/1/fd | wc -l; grep -c . /proc/self/mountinfo; find /run /tmp | wc -l";
    let exec = |number: u64| {
        assert_eq!(
            container.exec(&["echo", &number.to_string()]).ok().text(),
            number.to_string()
        )
    };
    (0..20).for_each(exec);
    let (before, guest) = (held(), container.sh(inside));
    let kib = procs::named(PARTS[0])
        .iter()
        .map(|shim| procs::pss_kib(shim.pid))
        .sum();
    let began = Instant::now();
    (0..number("COFFERDAM_ROUNDS", 1000)).for_each(exec);
    eprintln!(
        "execs took {:?}; guest before {guest:?} after {:?}",
        began.elapsed(),
        container.sh(inside)
    );
    insist_on_no_growth(&before, kib);
    assert_eq!(container.sh(inside), guest);
}

fn hundreds_of_containers_leave_nothing(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = env.dir.join("volume");
    fs::create_dir_all(&dir).unwrap();
    let pod = Pod::new(env);
    let watch = pod.idle("watch");
    let memory = || {
        watch.sh("grep -E 'MemAvailable|SUnreclaim' /proc/meminfo | tr '\\n' ' '; grep memory /proc/cgroups")
    };
    let cycle = |number: u64| {
        let mounts = json!({"mounts": [{"host_path": dir, "container_path": "/v"}]});
        let container = pod.run_with("cycle", &["sh", "-c", "echo x >/v/x; exit 3"], mounts);
        assert_eq!(container.exit_code(), 3, "round {number}");
        container.remove(&[]);
    };
    (0..10).for_each(cycle);
    let (before, guest) = (held(), memory());
    let kib = procs::named(PARTS[0])
        .iter()
        .map(|shim| procs::pss_kib(shim.pid))
        .sum();
    let began = Instant::now();
    (0..number("COFFERDAM_ROUNDS", 300)).for_each(cycle);
    eprintln!(
        "cycles took {:?}; guest before {guest} after {}",
        began.elapsed(),
        memory()
    );
    insist_on_no_growth(&before, kib);
}

fn greedy_containers_do_not_stop_their_pod(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pod = Pod::new(env);
    let other = pod.idle("other");
    let limit = json!({"linux": {"resources": {"memory_limit_in_bytes": 64 << 20}}});
    let hog = pod.run_with(
        "hog",
        &["sh", "-c", "x=$(yes | head -c 200000000); echo survived"],
        limit.clone(),
    );
    assert_eq!(hog.exit_code(), 137);
    assert_eq!(hog.inspect()["status"]["reason"], "OOMKilled");
    let bomb = pod.run_with(
        "bomb",
        &["sh", "-c", "trap '' TERM; f() { f | f & }; f; sleep 3600"],
        limit,
    );
    let endless = pod.run("endless", &["yes"]);
    for _ in 0..5 {
        other.exec(&["true"]).ok();
    }
    bomb.stop(1);
    endless.stop(1);
    assert_eq!(
        endless.exit_code(),
        137 + i64::from(endless.exit_code() == 143) * 6
    );
    bomb.exit_code();
    bomb.remove(&[]);
    other.exec(&["true"]).ok();
    // Nobody reads what this one writes.
    let silent = env.detached(&[], &["yes"]);
    std::thread::sleep(Duration::from_secs(2));
    let kib: u64 = procs::named(PARTS[0])
        .iter()
        .map(|shim| procs::pss_kib(shim.pid))
        .max()
        .unwrap();
    assert!(kib < 64 << 10, "a shim has {kib} KiB");
    silent.kill("KILL", &[]).ok();
    assert_eq!(silent.finish(), 137);
}

fn few_descriptors(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = env.dir.join("bin");
    fs::create_dir_all(&dir).unwrap();
    let wrapper = dir.join("containerd-shim-cofferdam-v2");
    let shim = assets::prefix().join("bin/containerd-shim-cofferdam-v2");
    fs::write(
        &wrapper,
        format!(
            "#!/bin/sh\nulimit -S -n 200\nexec {} \"$@\"\n",
            shim.display()
        ),
    )
    .unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let env = env.with_own_daemon(Some(&dir));
    let before = Snapshot::take();
    {
        let pod = Pod::new(&env);
        let container = pod.idle("main");
        let start = |number: usize| {
            let script = format!("sleep 5; echo {number}");
            cofferdam_tests::command::Running::start(
                container.exec_command(&["--sync"], &["sh", "-c", &script]),
                None,
            )
        };
        let running: Vec<_> = (0..100).map(start).collect();
        let failed = running
            .into_iter()
            .map(|exec| exec.wait(PATIENCE * 2))
            .filter(|exec| exec.status != 0);
        let errors: Vec<String> = failed.map(|exec| exec.errors()).collect();
        assert!(
            errors.is_empty(),
            "{} of 100 failed: {}",
            errors.len(),
            errors[0]
        );
        container.exec(&["true"]).ok();
        container.stop(0);
        assert_eq!(container.exit_code(), 137);
    }
    let bridge = format!("network link {}", env.cri().bridge());
    eventually("nothing is left", Duration::from_secs(10), || {
        before
            .more_than()
            .iter()
            .all(|left| *left == bridge)
            .then_some(())
    });
}

fn no_room_for_the_state(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let run = |what: &str| {
        let output = env.run(&[], &["echo", "hello"]);
        eprintln!(
            "{what}: {} {:?} {:?}",
            output.status,
            output.text(),
            output.errors()
        );
        output
    };
    run("before").ok();
    let env_before = Snapshot::take();
    fs::create_dir_all(STATE).unwrap();
    for (what, options, flags) in [
        ("read-only", "size=1m,mode=700", MsFlags::MS_RDONLY),
        ("full", "size=4k,mode=700", MsFlags::empty()),
        ("nearly full", "size=8k,mode=700", MsFlags::empty()),
        ("no inodes", "nr_inodes=2,mode=700", MsFlags::empty()),
        ("few inodes", "nr_inodes=6,mode=700", MsFlags::empty()),
    ] {
        mount(Some("tmpfs"), STATE, Some("tmpfs"), flags, Some(options)).unwrap();
        if what == "full" {
            let _ = fs::write(Path::new(STATE).join("ballast"), [0; 4096]);
        }
        let output = run(what);
        let left: Vec<_> = fs::read_dir(STATE)
            .unwrap()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        eprintln!("{what}: left {left:?}");
        umount2(STATE, MntFlags::MNT_DETACH).unwrap();
        assert!(
            output.status == 0 || output.errors().contains(STATE),
            "{what}: {}",
            output.errors()
        );
        env_before
            .wait_gone(Duration::from_secs(10))
            .unwrap_or_else(|left| panic!("{what}: {left}"));
    }
    run("after").ok();
}

fn containerd_crashes_at_any_step(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let env = env.with_own_daemon(None);
    drop(Pod::new(&env));
    let seed = number("COFFERDAM_SEED", 1);
    for seed in seed..seed + number("COFFERDAM_KILLS", 10) {
        let mut random = Random::new(seed);
        let before = Snapshot::take();
        let moment = Duration::from_millis(random.below(4500));
        let what = format!("seed {seed}: after {moment:?}");
        let pod = Pod::new(&env);
        let script = "n=0; trap 'echo line end; exit 7' TERM; while :; do echo line $n; n=$((n+1)); sleep 0.05; done";
        let kept = pod.run("kept", &["sh", "-c", script]);
        kept.wait_for_log("line 3");
        std::thread::scope(|scope| {
            let life = scope.spawn(|| {
                let (second, made) = Pod::try_with(&env, json!({}));
                if made.status == 0 {
                    let (created, _) = second.try_create("c", &["sleep", "3600"], json!({}));
                    env.crictl(&["start", &created.text()]);
                    for _ in 0..3 {
                        env.crictl(&["exec", "--sync", &created.text(), "true"]);
                    }
                    env.crictl(&["stop", "--timeout", "1", &created.text()]);
                    env.crictl(&["stopp", &second.id]);
                    env.crictl(&["rmp", &second.id]);
                }
                std::mem::forget(second);
            });
            std::thread::sleep(moment);
            env.daemon.stop(Signal::SIGKILL);
            env.daemon.start_again();
            eventually("CRI answers again", PATIENCE, || {
                (env.crictl(&["pods", "-q"]).status == 0).then_some(())
            });
            assert!(life.join().is_ok(), "{what}: a call did not end");
        });
        assert_eq!(kept.state(), "CONTAINER_RUNNING", "{what}");
        kept.stop(20);
        assert_eq!(kept.exit_code(), 7, "{what}");
        let log = fs::read_to_string(&kept.log).unwrap();
        let lines: Vec<&str> = log
            .lines()
            .filter_map(|line| line.rsplit_once(" F line "))
            .map(|line| line.1)
            .collect();
        assert_eq!(lines.last(), Some(&"end"), "{what}: the last line is lost");
        for (number, line) in lines[..lines.len() - 1].iter().enumerate() {
            assert_eq!(
                *line,
                number.to_string(),
                "{what}: line {number} of {}",
                lines.len()
            );
        }
        eventually(&format!("{what}: no pod is left"), PATIENCE, || {
            let left = env.crictl(&["pods", "-q"]).ok().text();
            left.lines()
                .for_each(|pod| drop(env.crictl(&["rmp", "-f", pod])));
            left.is_empty().then_some(())
        });
        before
            .wait_gone(Duration::from_secs(10))
            .unwrap_or_else(|left| panic!("{what}: {left}"));
    }
}

/// A guest that answers nothing any more, as one whose kernel hangs.
fn pod_whose_guest_hangs_is_removed(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = {
        drop(Pod::new(env)); // CNI makes its bridge
        Snapshot::take()
    };
    let pod = Pod::new(env);
    let container = pod.idle("main");
    for qemu in procs::named(PARTS[1]) {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(qemu.pid.cast_signed()),
            Signal::SIGSTOP,
        )
        .unwrap();
    }
    let began = Instant::now();
    eventually("the pod is removed", PATIENCE * 3, || {
        let output =
            cofferdam_tests::command::run(env.cri().command(["rmp", "-f", &pod.id]), PATIENCE * 2);
        eprintln!(
            "{:?}: {} {}",
            began.elapsed(),
            output.status,
            output.errors()
        );
        (output.status == 0).then_some(())
    });
    assert!(
        !env.crictl(&["ps", "-a", "-q"])
            .ok()
            .text()
            .contains(&container.id)
    );
    before.wait_gone(Duration::from_secs(10)).unwrap();
}
