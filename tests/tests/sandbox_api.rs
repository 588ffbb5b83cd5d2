//! Pods whose sandbox is no task: containerd's Sandbox API, which it offers from 2.1 on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use cofferdam_tests::pod::{Pod, one_line};
use cofferdam_tests::procs::{self, Proc};
use cofferdam_tests::suite::Release;
use cofferdam_tests::{Env, PATIENCE, Suite, cases, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

fn main() -> ExitCode {
    Suite::of_pods().run_on(
        &[Release::V2_1, Release::V2_4, Release::V2_2, Release::V2_3],
        cases![
            Ours: the_guest_makes_the_pods_files, containers_come_and_go,
                the_pod_outlives_containerd,
                a_dead_machine_makes_the_pod_not_ready, host_namespaces_are_refused,
                a_hung_machine_keeps_no_pod;
        ],
    )
}

fn the_guest_makes_the_pods_files(env: &Env) {
    let dns = json!({"servers": ["10.96.0.10"], "searches": ["e2e.svc"], "options": ["ndots:5"]});
    let pod = Pod::without_task(
        env,
        json!({"dns_config": dns, "linux": {"sysctls": {"net.core.somaxconn": "77"}}}),
    );
    let container = pod.idle("main");
    let seen = container
        .sh("cat /etc/hostname; hostname; cat /etc/resolv.conf; cat /proc/sys/net/core/somaxconn");
    assert_eq!(
        seen,
        "pod\npod\nsearch e2e.svc\nnameserver 10.96.0.10\noptions ndots:5\n77"
    );
    assert!(container.sh("cat /etc/hosts").contains("localhost"));
    let shm = container.sh("stat -f -c %T /dev/shm; df -k /dev/shm | tail -n1 | awk '{print $2}'");
    assert_eq!(shm, "tmpfs\n65536");
}

fn containers_come_and_go(env: &Env) {
    let pod = Pod::without_task(env, json!({}));
    let first = pod.idle("first");
    let second = pod.idle("second");
    first.sh("echo shared >/dev/shm/file");
    assert_eq!(second.sh("cat /dev/shm/file"), "shared");
    drop((first, second));
    let third = pod.run("third", &["sh", "-c", "exit 3"]);
    assert_eq!(third.exit_code(), 3);
    let inspected = pod.inspect();
    assert_eq!(inspected["status"]["state"], "SANDBOX_READY");
    let info = &inspected["info"];
    assert_eq!(info["processStatus"], "running", "{info}");
    let machine = info["pid"].as_u64().unwrap();
    let program = std::fs::read_to_string(format!("/proc/{machine}/comm")).unwrap();
    assert!(program.starts_with("qemu-system"), "{program}");
    env.crictl(&["stopp", &pod.id]).ok();
    assert_eq!(pod.inspect()["status"]["state"], "SANDBOX_NOTREADY");
}

fn the_pod_outlives_containerd(env: &Env) {
    let env = &env.with_own_daemon(None);
    let pod = Pod::without_task(env, json!({}));
    let container = pod.idle("main");
    container.sh("touch /here");
    env.daemon.stop(Signal::SIGKILL);
    env.daemon.start_again();
    assert_eq!(pod.inspect()["status"]["state"], "SANDBOX_READY");
    assert_eq!(container.sh("ls /here"), "/here");
}

fn a_dead_machine_makes_the_pod_not_ready(env: &Env) {
    let pod = Pod::without_task(env, json!({}));
    let container = pod.idle("main");
    let machine = cofferdam_tests::procs::ours().into_iter().find(|process| {
        process.program.starts_with("qemu-system") && process.args.contains(&pod.id)
    });
    machine.unwrap().kill9();
    eventually("the pod is not ready", PATIENCE, || {
        (pod.inspect()["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
    });
    eventually("its container has ended", PATIENCE, || {
        (container.state() == "CONTAINER_EXITED").then_some(())
    });
}

fn host_namespaces_are_refused(env: &Env) {
    let patch = json!({"linux": {"security_context": {"namespace_options": {"ipc": cofferdam_tests::pod::mode::NODE}}}});
    let (pod, output) = Pod::try_without_task(env, patch);
    assert!(one_line(&output).contains("hostIPC"), "{}", output.errors());
    drop(pod);
}

fn a_hung_machine_keeps_no_pod(env: &Env) {
    let pod = Pod::without_task(env, json!({}));
    pod.idle("main");
    let family = procs::family(&pod.id);
    let qemu: Vec<Proc> = procs::named("qemu")
        .into_iter()
        .filter(|proc| family.contains(&proc.pid))
        .collect();
    assert_eq!(qemu.len(), 1);
    qemu.iter().for_each(Proc::stop);
    let began = Instant::now();
    pod.stop();
    eventually("the pod is removed", PATIENCE, || {
        (env.crictl(&["rmp", &pod.id]).status == 0).then_some(())
    });
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "stopped and removed after {:?}",
        began.elapsed()
    );
    std::mem::forget(pod);
}
