//! What a process of a container is under and may do, as under runc: fields of the runtime
//! specification that `ctr` has no flag for, limits of the kernel, signals, and many execs at once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Duration;

use cofferdam_tests::assets::{busybox_tree, program};
use cofferdam_tests::command::{Output, Running, run};
use cofferdam_tests::daemon::namespace;
use cofferdam_tests::pod::merge;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, eventually};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Once: files_have_the_mask_of_the_spec, exec_has_the_mask_of_the_container,
            call_that_is_newer_than_the_seccomp_profile_does_not_exist,
            error_of_a_seccomp_rule_is_what_a_call_fails_with,
            sigterm_to_a_first_process_without_a_handler_is_ignored,
            signal_ends_an_exec_as_itself,
            three_thousand_threads_of_a_user,
            mappings_as_many_as_the_node_allows, memory_is_overcommitted_as_on_the_node,
            core_dump_has_the_name_that_the_node_gives,
            hundred_and_fifty_execs_each_with_its_output;
        // The control has to have cgroup v2, a newer runc, or CAP_SYS_RESOURCE.
        Ours: exec_into_a_container_that_divided_its_cgroup, killed_exec_in_a_divided_cgroup,
            out_of_memory_kills_all_of_it_if_it_says_so,
            scheduler_io_priority_and_personality, more_open_files_than_the_node_has_by_default,
            hundred_thousand_open_files_in_a_small_container,
            limit_that_is_no_limit_is_named, field_that_no_machine_can_keep_is_named;
        Long: systemd_starts_answers_and_stops;
    ])
}

/// A whole spec of the test's own: containerd's default with `patch` in it.
struct Spec<'e> {
    env: &'e Env,
    id: String,
    file: PathBuf,
}

impl<'e> Spec<'e> {
    fn new(env: &'e Env, patch: Value, command: &[&str]) -> Spec<'e> {
        let id = env.id();
        let tree = env.dir.join(&id);
        busybox_tree(&tree);
        program(&tree.join("bin"), "limits");
        let mut spec: Value = serde_json::from_str(&env.ctr(&["oci", "spec"]).ok().text()).unwrap();
        let mut own = json!({
            "root": {"path": tree},
            "process": {"terminal": false, "args": command, "env": ["PATH=/bin"]},
            "linux": {"cgroupsPath": format!("/{}/{id}", namespace())},
        });
        merge(&mut own, patch);
        merge(&mut spec, own);
        let file = env.dir.join(format!("{id}.json"));
        fs::write(&file, spec.to_string()).unwrap();
        Spec { env, id, file }
    }

    fn command(&self, flags: &[&str]) -> Command {
        let base = ["run", "--runtime", self.env.runtime.name()];
        let last = ["--config", self.file.to_str().unwrap(), self.id.as_str()];
        self.env
            .daemon
            .ctr_command([&base[..], flags, &last].concat())
    }

    #[track_caller]
    fn run(&self) -> Output {
        run(self.command(&["--rm"]), PATIENCE)
    }

    #[track_caller]
    fn detached(&self) -> Container<'e> {
        run(self.command(&["-d", "--null-io"]), PATIENCE).ok();
        Container::adopt(self.env, &self.id)
    }
}

/// A volume with the program that tries limits, and the flag that binds it to /limits.
fn limits_mount(env: &Env) -> String {
    let dir = env.dir.join("limits");
    fs::create_dir_all(&dir).unwrap();
    program(&dir, "limits");
    format!(
        "--mount=type=bind,src={},dst=/limits,options=rbind:ro",
        dir.display()
    )
}

/// A sysctl of the node that a test changes; one test at a time does, and it is put back.
struct NodeSysctl {
    path: PathBuf,
    before: String,
    _alone: std::sync::MutexGuard<'static, ()>,
}

impl NodeSysctl {
    fn set(name: &str, value: &str) -> NodeSysctl {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        let before = fs::read_to_string(&path).unwrap().trim().to_owned();
        fs::write(&path, value).unwrap();
        NodeSysctl {
            path,
            before,
            _alone: alone,
        }
    }
}

impl Drop for NodeSysctl {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.before);
    }
}

fn files_have_the_mask_of_the_spec(env: &Env) {
    let umask = json!({"process": {"user": {"umask": 0o027}}});
    let script = "umask; touch /tmp/x; stat -c %a /tmp/x";
    let output = Spec::new(env, umask, &["sh", "-c", script]).run();
    assert_eq!(output.ok().text(), "0027\n640");
    let output = Spec::new(env, json!({}), &["sh", "-c", "umask"]).run();
    assert_eq!(output.ok().text(), "0022");
}

fn exec_has_the_mask_of_the_container(env: &Env) {
    let umask = json!({"process": {"user": {"umask": 0o077}}});
    // ctr's exec is the container's process with another command.
    let container = Spec::new(env, umask, &["sleep", "3600"]).detached();
    if env.is_vm() {
        // runc 1.1 sets the mask of a first process only.
        assert_eq!(container.exec(&["sh", "-c", "umask"]).ok().text(), "0077");
    }
    let script = "touch /tmp/x && stat -c %u /tmp/x";
    assert_eq!(container.exec(&["sh", "-c", script]).ok().text(), "0");
}

fn call_that_is_newer_than_the_seccomp_profile_does_not_exist(env: &Env) {
    let mount = limits_mount(env);
    let script =
        "for call in 462 9999; do /limits/limits call $call; done; /limits/limits call 134";
    let output = env.run(&["--seccomp", &mount], &["sh", "-c", script]);
    // 134 is uselib(2), which the profile knows and does not allow.
    assert_eq!(
        output.ok().text(),
        "call 462: Function not implemented\ncall 9999: Function not implemented\n\
         call 134: Operation not permitted"
    );
}

fn error_of_a_seccomp_rule_is_what_a_call_fails_with(env: &Env) {
    let profile = json!({"linux": {"seccomp": {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["uselib"], "action": "SCMP_ACT_ERRNO", "errnoRet": 25},
            {"names": ["sysfs"], "action": "SCMP_ACT_ERRNO"}],
    }}});
    let script = "limits call 134; limits call 139";
    let output = Spec::new(env, profile, &["sh", "-c", script]).run();
    assert_eq!(
        output.ok().text(),
        "call 134: Inappropriate ioctl for device\ncall 139: Operation not permitted"
    );
}

fn sigterm_to_a_first_process_without_a_handler_is_ignored(env: &Env) {
    let container = env.idle();
    for signal in ["SIGTERM", "SIGUSR1", "SIGINT"] {
        container.kill(signal, &[]).ok();
    }
    std::thread::sleep(Duration::from_secs(1));
    container.exec(&["true"]).ok();
    assert_eq!(container.listed().unwrap().1, "RUNNING");
    container.kill("SIGKILL", &[]).ok();
    assert_eq!(container.finish(), 137);
}

fn signal_ends_an_exec_as_itself(env: &Env) {
    let container = env.idle();
    for (signal, status) in [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)] {
        let exec_id = env.id();
        let command = container.exec_command(&exec_id, &[], &["sleep", "3600"]);
        let exec = Running::start(command, None);
        eventually("the exec takes a signal", PATIENCE, || {
            let killed = container.kill(signal, &["--exec-id", &exec_id]);
            (killed.status == 0).then_some(())
        });
        exec.wait(PATIENCE).exits(status);
    }
}

fn three_thousand_threads_of_a_user(env: &Env) {
    let mount = limits_mount(env);
    let flags = ["--user", "1000:1000", "--memory-limit", "268435456", &mount];
    let output = env.run(&flags, &["/limits/limits", "threads", "3000"]);
    assert_eq!(output.ok().text(), "3000 threads");
}

fn hundred_thousand_open_files_in_a_small_container(env: &Env) {
    let limits = json!({
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100_100, "hard": 100_100}],
        },
        "linux": {"resources": {"memory": {"limit": 134_217_728}}},
    });
    let output = Spec::new(env, limits, &["limits", "files", "100000"]).run();
    assert_eq!(output.ok().text(), "100000 files");
}

fn mappings_as_many_as_the_node_allows(env: &Env) {
    let _raised = NodeSysctl::set("vm.max_map_count", "262144");
    let mount = limits_mount(env);
    let script = "cat /proc/sys/vm/max_map_count; /limits/limits mappings 200000";
    let output = env.run(&[&mount], &["sh", "-c", script]);
    assert_eq!(output.ok().text(), "262144\n200000 mappings");
}

fn memory_is_overcommitted_as_on_the_node(env: &Env) {
    let _node = NodeSysctl::set("vm.overcommit_memory", "1");
    let output = env.run(&[], &["cat", "/proc/sys/vm/overcommit_memory"]);
    assert_eq!(output.ok().text(), "1");
}

fn core_dump_has_the_name_that_the_node_gives(env: &Env) {
    let _node = NodeSysctl::set("kernel.core_pattern", "core.%e");
    let (limits, dir) = (limits_mount(env), env.dir.join("cores"));
    fs::create_dir(&dir).unwrap();
    let cores = format!(
        "--mount=type=bind,src={},dst=/cores,options=rbind:rw",
        dir.display()
    );
    let script = "cd /cores; ulimit -c unlimited; /limits/limits abort; echo $?";
    let output = env.run(&[&limits, &cores], &["sh", "-c", script]).ok();
    assert!(output.text().ends_with("134"), "{}", output.text());
    assert!(dir.join("core.limits").exists(), "{:?}", fs::read_dir(dir));
}

fn hundred_and_fifty_execs_each_with_its_output(env: &Env) {
    let container = env.idle();
    let start = |number: usize| {
        let script = format!("echo out {number}; echo err {number} >&2; exit 3");
        let exec_id = format!("exec{number}");
        let command = container.exec_command(&exec_id, &[], &["sh", "-c", &script]);
        (number, Running::start(command, None))
    };
    let running: Vec<_> = (0..150).map(start).collect();
    for (number, exec) in running {
        let output = exec.wait(Duration::from_secs(300)).exits(3);
        assert_eq!(output.text(), format!("out {number}"));
        assert_eq!(output.errors(), format!("err {number}"));
    }
    assert_eq!(
        container.exec(&["echo", "one more"]).ok().text(),
        "one more"
    );
}

/// A container whose first process has moved all of its processes into a cgroup of their own, as
/// systemd and dockerd do.
fn divided(env: &Env) -> Container<'_> {
    let cgroup = json!({
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
            {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["rw", "nosuid", "noexec", "nodev"]},
        ],
    });
    // As long as an exec that looks for the file is in the upper cgroup, the kernel refuses.
    let script = "cd /sys/fs/cgroup && mkdir init && echo 1 >init/cgroup.procs &&
        until echo '+memory +pids' >cgroup.subtree_control; do sleep 0.1; done 2>/dev/null
        touch /divided; exec sleep 3600";
    let container = Spec::new(env, cgroup, &["sh", "-c", script]).detached();
    container.wait_for_file("/divided");
    container
}

fn exec_into_a_container_that_divided_its_cgroup(env: &Env) {
    let container = divided(env);
    // Until the control is written, an exec still has the container's own.
    eventually("an exec is where the first process is", PATIENCE, || {
        let cgroup = container.exec(&["cat", "/proc/self/cgroup"]).ok().text();
        (cgroup == "0::/init").then_some(())
    });
    container.kill("SIGKILL", &[]).ok();
    assert_eq!(container.finish(), 137);
}

fn killed_exec_in_a_divided_cgroup(env: &Env) {
    let container = divided(env);
    let exec_id = env.id();
    let exec = Running::start(
        container.exec_command(&exec_id, &[], &["sleep", "3600"]),
        None,
    );
    eventually("the exec runs", PATIENCE, || {
        (container.exec(&["pidof", "sleep"]).text().contains(' ')).then_some(())
    });
    container.kill("SIGKILL", &["--all"]).ok();
    exec.wait(PATIENCE).exits(137);
    assert_eq!(container.finish(), 137);
}

fn out_of_memory_kills_all_of_it_if_it_says_so(env: &Env) {
    let limits = |unified: Value| json!({"linux": {"resources": {"memory": {"limit": 64 << 20}, "unified": unified}}});
    let script = ["sh", "-c", "limits memory 200; sleep 1; echo survived"];
    let group = limits(json!({"memory.oom.group": "1"}));
    let output = Spec::new(env, group, &script).run().exits(137);
    assert!(!output.text().contains("survived"), "{}", output.text());
    let output = Spec::new(env, limits(json!({})), &script).run();
    assert!(
        output.ok().text().contains("survived"),
        "only the child is killed"
    );
}

fn scheduler_io_priority_and_personality(env: &Env) {
    let fields = json!({
        "process": {
            "scheduler": {"policy": "SCHED_BATCH", "nice": 7},
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
        },
        "linux": {"personality": {"domain": "LINUX32"}},
    });
    // Of stat, 19 is nice and 41 the policy.
    let script = "cut -d ' ' -f 19,41 /proc/self/stat; cat /proc/self/personality; limits ioprio";
    let expected = "7 3\n00000008\nI/O priority 0x4006";
    let container = Spec::new(env, fields.clone(), &["sleep", "3600"]).detached();
    let output = container.exec(&["sh", "-c", script]);
    assert_eq!(output.ok().text(), expected, "of an exec");
    let output = Spec::new(env, fields, &["sh", "-c", script]).run();
    assert_eq!(output.ok().text(), expected);
}

fn more_open_files_than_the_node_has_by_default(env: &Env) {
    let limit = json!({"process": {"rlimits": [
        {"type": "RLIMIT_NOFILE", "soft": 2_000_000, "hard": 2_000_000}]}});
    let output = Spec::new(env, limit, &["sh", "-c", "ulimit -n"]).run();
    assert_eq!(output.ok().text(), "2000000");
}

fn limit_that_is_no_limit_is_named(env: &Env) {
    for key in [
        "cgroup.procs",
        "memory.reclaim",
        "cpuset.cpus",
        "galaxy",
        "../x.y",
    ] {
        let unified = json!({"linux": {"resources": {"unified": {key: "1"}}}});
        let output = Spec::new(env, unified, &["true"]).run();
        output.fails_with(&["linux.resources.unified", key, "leave it out"]);
    }
    let unified = json!({"linux": {"resources": {"unified": {"memory.high": "much"}}}});
    let output = Spec::new(env, unified, &["true"]).run();
    output.fails_with(&["memory.high", "much", "invalid argument"]);
}

fn field_that_no_machine_can_keep_is_named(env: &Env) {
    let huge = json!([{"pageSize": "2MB", "limit": 4 << 20}]);
    let huge = json!({"linux": {"resources": {"hugepageLimits": huge}}});
    let output = Spec::new(env, huge, &["true"]).run();
    output.fails_with(&["huge pages of 2MB", "leave them out"]);
    let rdt = json!({"linux": {"intelRdt": {"closID": "gold"}}});
    let output = Spec::new(env, rdt, &["true"]).run();
    output.fails_with(&["linux.intelRdt", "leave that out"]);
}

/// With this machine's own system as the root, read from below a tmpfs.
fn systemd_starts_answers_and_stops(env: &Env) {
    let upper = env.dir.join("systemd");
    let script = r#"set -e; mkdir "$1"; mount -t tmpfs -o size=1g tmpfs "$1"; cd "$1"; mkdir u w root
        mount -t overlay -o "lowerdir=/,upperdir=$1/u,workdir=$1/w" overlay root
        rm -f root/etc/systemd/system/*.wants/*; echo uninitialized >root/etc/machine-id"#;
    let mut made = Command::new("sh");
    made.args(["-c", script, "sh"]).arg(&upper);
    run(made, PATIENCE).ok();
    let root = upper.join("root");
    let flags = [
        "--privileged",
        "--env=container=docker",
        "--env=PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "--mount=type=tmpfs,src=tmpfs,dst=/run,options=mode=755",
        "--mount=type=tmpfs,src=tmpfs,dst=/tmp,options=mode=1777",
        "--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw",
        "--null-io",
        "--rootfs",
        root.to_str().unwrap(),
    ];
    let command = ["/lib/systemd/systemd", "--unit=basic.target"];
    let container = env.detached(&flags, &command);
    eventually("systemd answers an exec", Duration::from_secs(240), || {
        let state = container.exec(&["systemctl", "is-system-running"]).text();
        (state == "running" || state == "degraded").then_some(())
    });
    let journal = container.exec(&["systemctl", "is-active", "systemd-journald"]);
    assert_eq!(journal.ok().text(), "active");
    // SIGRTMIN+3: halt. The kernel tells reboot(2) of a pid namespace as SIGINT.
    container.kill("37", &[]).ok();
    assert_eq!(container.finish(), 130);
    let mut unmount = Command::new("umount");
    unmount.arg(&root).arg(&upper);
    run(unmount, PATIENCE).ok();
}
