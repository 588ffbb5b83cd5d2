//! What a pod and its containers may ask for by their security context, DNS and sysctls, and how a
//! container's end is told.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::process::ExitCode;

use cofferdam_tests::pod::Pod;
use cofferdam_tests::{Env, Suite, cases};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Core: memory_limit_ends_in_oom_killed, user_and_groups;
        Once: seccomp_profile_of_a_file, seccomp_default_and_none, capabilities, no_new_privileges,
            read_only_root,
            masked_and_read_only_paths, privileged, sysctls_of_the_pod, dns,
            hosts_file_of_the_kubelet,
            termination_message, stop_signal_of_the_image, environment_and_directory,
            missing_command;
    ])
}

fn security(context: Value) -> Value {
    json!({"linux": {"security_context": context}})
}

fn memory_limit_ends_in_oom_killed(env: &Env) {
    let pod = Pod::new(env);
    let limit = json!({"linux": {"resources": {"memory_limit_in_bytes": 64 << 20}}});
    let container = pod.run_with("main", &["tail", "/dev/zero"], limit);
    let status = container.wait();
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(137), Some("OOMKilled")),
        "{status}"
    );
    pod.idle("next").exec(&["true"]).ok();
}

fn user_and_groups(env: &Env) {
    let pod = Pod::new(env);
    let user = security(json!({
        "run_as_user": {"value": 1000}, "run_as_group": {"value": 2000},
            "supplemental_groups": [3000, 4000],
    }));
    let container = pod.run_with(
        "main",
        &["sh", "-c", "id -u; id -g; id -G; sleep 3600"],
        user,
    );
    let expected = "1000\n2000\n2000 3000 4000";
    container.wait_for_log("4000");
    assert_eq!(container.logs(), expected);
    assert_eq!(container.sh("id -u; id -g; id -G"), expected);
    let named = pod.run_with(
        "named",
        &["sleep", "3600"],
        security(json!({"run_as_username": "www-data"})),
    );
    assert_eq!(named.sh("id -u"), "33");
}

fn seccomp_profile_of_a_file(env: &Env) {
    let file = env.dir.join("profile.json");
    let rule = json!({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"});
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    std::fs::write(&file, profile.to_string()).unwrap();
    let pod = Pod::new(env);
    let profile = json!({"seccomp": {"profile_type": 2, "localhost_ref": file}});
    let container = pod.run_with("main", &["sleep", "3600"], security(profile));
    let seen = container.sh("mkdir /tmp/x 2>&1; touch /tmp/y && echo fine");
    assert!(
        seen.contains("Operation not permitted") && seen.ends_with("fine"),
        "{seen}"
    );
}

fn seccomp_default_and_none(env: &Env) {
    let pod = Pod::new(env);
    for (kind, mode) in [(0, "2"), (1, "0")] {
        let profile = security(json!({"seccomp": {"profile_type": kind}}));
        let container = pod.run_with("main", &["sleep", "3600"], profile);
        assert_eq!(
            container.sh("sed -n 's/^Seccomp:[^0-9]*//p' /proc/1/status"),
            mode
        );
    }
}

fn capabilities(env: &Env) {
    let pod = Pod::new(env);
    let effective = |changes: Value| {
        let container = pod.run_with(
            "main",
            &["sleep", "3600"],
            security(json!({"capabilities": changes})),
        );
        u64::from_str_radix(
            &container.sh("sed -n 's/^CapEff:[^0-9a-f]*//p' /proc/1/status"),
            16,
        )
        .unwrap()
    };
    let (default, changed) = (
        effective(json!({})),
        effective(json!({"add_capabilities": ["SYS_TIME"], "drop_capabilities": ["CHOWN"]})),
    );
    assert_eq!(
        default & (1 | 1 << 25),
        1,
        "CHOWN but not SYS_TIME: {default:x}"
    );
    assert_eq!(
        changed & (1 | 1 << 25),
        1 << 25,
        "SYS_TIME but not CHOWN: {changed:x}"
    );
    assert_eq!(
        effective(json!({"drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"]})),
        1 << 10
    );
}

fn no_new_privileges(env: &Env) {
    let pod = Pod::new(env);
    for (wanted, seen) in [(true, "1"), (false, "0")] {
        let container = pod.run_with(
            "main",
            &["sleep", "3600"],
            security(json!({"no_new_privs": wanted})),
        );
        assert_eq!(
            container.sh("sed -n 's/^NoNewPrivs:[^0-9]*//p' /proc/1/status"),
            seen
        );
    }
}

fn read_only_root(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run_with(
        "main",
        &["sleep", "3600"],
        security(json!({"readonly_rootfs": true})),
    );
    let seen = container.sh("touch /x 2>&1; touch /dev/shm/y && echo shm");
    assert!(
        seen.contains("Read-only file system") && seen.ends_with("shm"),
        "{seen}"
    );
}

fn masked_and_read_only_paths(env: &Env) {
    let pod = Pod::new(env);
    let paths = json!({"masked_paths": ["/proc/keys", "/usr"], "readonly_paths": ["/proc/sys"]});
    let container = pod.run_with("main", &["sleep", "3600"], security(paths));
    assert_eq!(
        container.sh("cat /proc/keys; ls -A /usr; touch /usr/x 2>/dev/null || echo masked"),
        "masked"
    );
    let seen =
        container.sh("echo 1 2>&1 >/proc/sys/kernel/domainname; cat /proc/sys/kernel/ostype");
    assert!(seen.ends_with("Linux"), "{seen}");
    let output = container.exec(&["sh", "-c", "echo x >/proc/sys/kernel/domainname"]);
    assert!(
        output.errors().contains("Read-only file system"),
        "{output:?}"
    );
}

fn privileged(env: &Env) {
    let pod = Pod::with(env, security(json!({"privileged": true})));
    let container = pod.run_with(
        "main",
        &["sleep", "3600"],
        security(json!({"privileged": true})),
    );
    let seen = container
        .sh("grep -E '^(CapEff|Seccomp):' /proc/1/status; mount -t tmpfs t /tmp && echo mounted");
    assert!(
        seen.contains("Seccomp:\t0") && seen.ends_with("mounted"),
        "{seen}"
    );
    let capabilities = seen
        .lines()
        .next()
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap();
    let capabilities = u64::from_str_radix(capabilities, 16).unwrap();
    assert_eq!(
        capabilities & 0x203001,
        0x203001,
        "CHOWN, NET_ADMIN, NET_RAW, SYS_ADMIN: {capabilities:x}"
    );
    // The devices of the kernel it runs on, which an ordinary container has not.
    assert_eq!(container.sh("test -c /dev/kmsg || ls /dev"), "");
    assert_eq!(
        pod.idle("ordinary").sh("test -e /dev/kmsg || echo none"),
        "none"
    );
    if env.is_vm() {
        assert_eq!(
            container.sh("ls /dev | grep -c '^[vs]da$' || true"),
            "0",
            "the host's disk is in the container"
        );
    }
}

fn sysctls_of_the_pod(env: &Env) {
    let sysctls = json!({"kernel.shm_rmid_forced": "1", "net.core.somaxconn": "1234",
        "kernel.msgmax": "16384"});
    let pod = Pod::with(env, json!({"linux": {"sysctls": sysctls}}));
    let container = pod.idle("main");
    let read = "cd /proc/sys; cat kernel/shm_rmid_forced net/core/somaxconn kernel/msgmax";
    assert_eq!(container.sh(read), "1\n1234\n16384");
}

fn dns(env: &Env) {
    let dns = json!({"servers": ["10.9.9.9", "fd00::9"], "searches": ["e2e.local"],
        "options": ["ndots:3"]});
    let pod = Pod::with(env, json!({"dns_config": dns}));
    let seen = pod.idle("main").sh("cat /etc/resolv.conf");
    for line in [
        "nameserver 10.9.9.9",
        "nameserver fd00::9",
        "search e2e.local",
        "options ndots:3",
    ] {
        assert!(
            seen.lines().any(|seen| seen == line),
            "no {line:?} in {seen:?}"
        );
    }
}

fn hosts_file_of_the_kubelet(env: &Env) {
    let file = env.dir.join("hosts");
    std::fs::write(&file, "127.0.0.1 localhost\n10.1.2.3 other.e2e\n").unwrap();
    let pod = Pod::new(env);
    let mounts = json!({"mounts": [{"container_path": "/etc/hosts", "host_path": file}]});
    let (given, default) = (
        pod.run_with("given", &["sleep", "3600"], mounts),
        pod.idle("default"),
    );
    assert!(given.sh("cat /etc/hosts").contains("10.1.2.3 other.e2e"));
    let expected = std::fs::read_to_string("/etc/hosts").unwrap();
    assert_eq!(default.sh("cat /etc/hosts"), expected.trim());
    assert!(default.sh("cat /etc/hostname").contains("pod"));
}

fn termination_message(env: &Env) {
    let file = env.dir.join("message");
    std::fs::write(&file, "").unwrap();
    let pod = Pod::new(env);
    let mounts = json!({"mounts": [{"container_path": "/dev/termination-log", "host_path": file}]});
    let container = pod.run_with(
        "main",
        &["sh", "-c", "echo -n why >/dev/termination-log; exit 2"],
        mounts,
    );
    assert_eq!(container.exit_code(), 2);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "why");
}

fn stop_signal_of_the_image(env: &Env) {
    let pod = Pod::new(env);
    let script =
        "trap 'exit 11' TERM; trap 'exit 12' QUIT; echo ready; while :; do sleep 0.1; done";
    let image = json!({"image": {"image": "docker.io/cofferdam/quit:local"}});
    let container = pod.run_with("main", &["sh", "-c", script], image);
    container.wait_for_log("ready");
    container.stop(30);
    assert_eq!(container.exit_code(), 12);
}

fn environment_and_directory(env: &Env) {
    let pod = Pod::new(env);
    let settings = json!({"envs": [{"key": "A", "value": "b c"}], "working_dir": "/tmp"});
    let container = pod.run_with(
        "main",
        &["sh", "-c", "echo \"$A\"; pwd; echo $HOME; sleep 3600"],
        settings,
    );
    container.wait_for_log("/root");
    assert_eq!(container.logs(), "b c\n/tmp\n/root");
    assert_eq!(container.sh("echo \"$A\"; pwd"), "b c\n/tmp");
}

fn missing_command(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.create("main", &["/no/such/program"], json!({}));
    let output = env.crictl(&["start", &container.id]);
    assert!(
        output.status != 0 && output.errors().contains("no such file or directory"),
        "{output:?}"
    );
    let status = container.wait();
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(128), Some("StartError")),
        "{status}"
    );
    let exec = pod.idle("next").exec(&["/no/such/program"]);
    assert!(
        exec.status != 0 && exec.errors().contains("no such file or directory"),
        "{exec:?}"
    );
}
