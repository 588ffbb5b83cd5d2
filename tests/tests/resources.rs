//! Memory and CPU of a pod: what its containers see, what is enforced, what an update changes, and
//! where QEMU is counted.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use cofferdam_tests::daemon::namespace;
use cofferdam_tests::events::{Event, Events};
use cofferdam_tests::pod::{Member, Pod};
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, eventually, procs};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Core: container_uses_its_gibibyte, memory_is_raised_and_lowered;
        Once: each_container_has_its_own_limit, cpu_is_raised_and_lowered,
            update_of_one_limit_keeps_the_others, cpus_of_a_cpuset_without_a_quota,
            without_a_limit_a_container_gets_what_it_uses;
        // The control has to have cgroup v2.
        Ours: out_of_memory_kills_the_whole_container,
            machine_has_the_cpus_of_its_containers, refused_update_leaves_the_machine_as_it_was,
            qemu_and_its_helpers_are_in_the_cgroup_of_the_pod,
            idle_pod_uses_no_cpu, processes_on_the_host_are_limited_and_scored_as_the_container,
            cgroup_of_somebody_else_keeps_its_limits,
            cgroup_with_a_name_of_systemds_is_made_through_it, kill_by_the_host_for_memory_is_told,
            growth_stops_at_the_configured_share;
        Long: memory_that_is_no_longer_used_goes_back;
    ])
}

const MIB: u64 = 1 << 20;

fn limits(limits: Value) -> Value {
    json!({"linux": {"resources": limits}})
}

fn memory(mib: u64) -> Value {
    limits(json!({"memory_limit_in_bytes": mib * MIB}))
}

/// What the container's own cgroup says, v2 or v1.
fn memory_limit(container: &Member) -> u64 {
    let cat = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    container.sh(cat).parse().unwrap()
}

/// The CPU quota in thousandths of a CPU.
fn cpu_limit(container: &Member) -> u64 {
    let cat = "cat /sys/fs/cgroup/cpu.max 2>/dev/null || { cd /sys/fs/cgroup/cpu; cat cpu.cfs_quota_us cpu.cfs_period_us; }";
    let numbers: Vec<u64> = container
        .sh(cat)
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    numbers[0] * 1000 / numbers[1]
}

/// The CPU time it has used, in microseconds.
fn cpu_time(container: &Member) -> u128 {
    let text =
        container.sh("cd /sys/fs/cgroup; cat cpu.stat 2>/dev/null || cat cpuacct/cpuacct.usage");
    match text.strip_prefix("usage_usec ") {
        Some(micros) => micros.lines().next().unwrap().parse().unwrap(),
        None => text.parse::<u128>().unwrap() / 1000,
    }
}

/// Touches this much memory all at once; whether the container may.
fn can_use(container: &Member, mib: u64) -> bool {
    container
        .exec(&[
            "dd",
            "if=/dev/zero",
            "of=/dev/null",
            "count=1",
            &format!("bs={mib}M"),
        ])
        .status
        == 0
}

fn update(env: &Env, container: &Member, flags: &[&str]) {
    env.crictl(&[&["update"], flags, &[&container.id]].concat())
        .ok();
}

fn container_uses_its_gibibyte(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run_with("main", &["sleep", "3600"], memory(1024));
    assert_eq!(memory_limit(&container), 1024 * MIB);
    assert!(can_use(&container, 900), "900 MiB of 1 GiB");
    assert!(!can_use(&container, 1100), "1100 MiB of 1 GiB");
    container.exec(&["true"]).ok();
}

fn without_a_limit_a_container_gets_what_it_uses(env: &Env) {
    let pod = Pod::new(env);
    let (large, small) = (pod.idle("large"), pod.idle("small"));
    assert!(can_use(&large, 1200), "1200 MiB");
    assert!(can_use(&small, 1500), "1500 MiB beside it");
    // What can be read again is no reason to grow, and no reason to fail.
    let read = "dd if=/dev/zero of=/f bs=1M count=600 && cat /f /f >/dev/null && rm /f";
    small.exec(&["sh", "-c", read]).ok();
}

fn memory_total(container: &Member) -> u64 {
    let text = container.sh("awk '/^MemTotal/{print $2}' /proc/meminfo");
    text.parse::<u64>().unwrap() / 1024
}

fn memory_that_is_no_longer_used_goes_back(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    let before = memory_total(&container);
    assert!(can_use(&container, 1200), "1200 MiB");
    assert!(memory_total(&container) > before + 512);
    eventually("the memory is given back", 3 * PATIENCE, || {
        (memory_total(&container) < before + 256).then_some(())
    });
    assert!(can_use(&container, 1200), "1200 MiB again");
}

fn growth_stops_at_the_configured_share(env: &Env) {
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let host_kib: u64 = info.split_whitespace().nth(1).unwrap().parse().unwrap();
    let share = (host_kib / 1024 / 100 * 4).max(512);
    let config = env.dir.join("cofferdam.toml");
    fs::write(&config, "max_memory_percent = 4\n").unwrap();
    let config = config.to_string_lossy();
    let flags = ["--null-io", "--runtime-config-path", &config];
    let container = env.detached(&flags, &["sleep", "3600"]);
    let use_mib = |mib: u64| {
        let size = format!("bs={mib}M");
        container.exec(&["dd", "if=/dev/zero", "of=/dev/null", "count=1", &size])
    };
    assert!(use_mib(share + 100).status != 0, "more than its share");
    use_mib(200).ok();
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

fn each_container_has_its_own_limit(env: &Env) {
    let pod = Pod::new(env);
    let (small, large) = (
        pod.run_with("small", &["sleep", "3600"], memory(64)),
        pod.run_with("large", &["sleep", "3600"], memory(512)),
    );
    assert_eq!(
        (memory_limit(&small), memory_limit(&large)),
        (64 * MIB, 512 * MIB)
    );
    assert!(!can_use(&small, 128), "128 MiB of 64 MiB");
    assert!(can_use(&large, 400), "400 MiB of 512 MiB");
    assert!(can_use(&small, 32), "32 MiB of 64 MiB");
}

fn memory_is_raised_and_lowered(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run_with("main", &["sleep", "3600"], memory(128));
    assert!(!can_use(&container, 400));
    for (mib, fits) in [(768, true), (128, false), (512, true)] {
        update(env, &container, &["--memory", &(mib * MIB).to_string()]);
        assert_eq!(memory_limit(&container), mib * MIB);
        assert_eq!(can_use(&container, 400), fits, "400 MiB of {mib} MiB");
    }
    assert_eq!(container.state(), "CONTAINER_RUNNING");
}

fn cpu_is_raised_and_lowered(env: &Env) {
    let pod = Pod::new(env);
    let half = limits(json!({"cpu_quota": 50_000, "cpu_period": 100_000}));
    let container = pod.run_with("main", &["sleep", "3600"], half);
    assert_eq!(cpu_limit(&container), 500);
    for quota in [200_000, 30_000] {
        update(
            env,
            &container,
            &["--cpu-quota", &quota.to_string(), "--cpu-period", "100000"],
        );
        assert_eq!(cpu_limit(&container), quota / 100);
    }
    // A third of a CPU: the loop gets no more, whatever the machine has.
    let before = cpu_time(&container);
    let output = container.exec(&["timeout", "3", "sh", "-c", "while :; do :; done"]);
    let (spent, limit) = (
        cpu_time(&container) - before,
        output.took.as_micros() * 45 / 100,
    );
    assert!(
        spent <= limit,
        "{spent} µs of CPU within {:?}, more than 45 %",
        output.took
    );
}

fn update_of_one_limit_keeps_the_others(env: &Env) {
    let pod = Pod::new(env);
    let both = limits(
        json!({"cpu_quota": 50_000, "cpu_period": 100_000, "memory_limit_in_bytes": 256 * MIB}),
    );
    let container = pod.run_with("main", &["sleep", "3600"], both);
    update(
        env,
        &container,
        &["--cpu-quota", "80000", "--cpu-period", "100000"],
    );
    assert_eq!(
        (cpu_limit(&container), memory_limit(&container)),
        (800, 256 * MIB)
    );
    update(env, &container, &["--memory", &(192 * MIB).to_string()]);
    assert_eq!(
        (cpu_limit(&container), memory_limit(&container)),
        (800, 192 * MIB)
    );
}

fn machine_has_the_cpus_of_its_containers(env: &Env) {
    let pod = Pod::new(env);
    let cpus = |count: u64| limits(json!({"cpu_quota": count * 100_000, "cpu_period": 100_000}));
    let one = pod.run_with("one", &["sleep", "3600"], cpus(1));
    let before: u64 = one.sh("nproc").parse().unwrap();
    let two = pod.run_with("two", &["sleep", "3600"], cpus(1));
    let expected = before.max(2);
    eventually("the CPUs of both", PATIENCE, || {
        (two.sh("nproc") == expected.to_string()).then_some(())
    });
}

fn refused_update_leaves_the_machine_as_it_was(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run_with("main", &["sleep", "3600"], memory(128));
    let total = || container.sh("grep MemTotal /proc/meminfo");
    let before = total();
    // Less than the millisecond that the kernel insists on.
    let flags = [
        "--memory",
        &(1024 * MIB).to_string(),
        "--cpu-quota",
        "10",
        "--cpu-period",
        "100000",
    ];
    let refused = env.crictl(&[&["update"], &flags[..], &[&container.id]].concat());
    assert!(
        refused.status != 0 && refused.errors().contains("cpu.max"),
        "{}",
        refused.errors()
    );
    eventually("the memory is given back", PATIENCE, || {
        (total() == before).then_some(())
    });
    // Nor does it come with the next update.
    update(
        env,
        &container,
        &["--cpu-quota", "80000", "--cpu-period", "100000"],
    );
    assert_eq!(total(), before);
}

fn qemu_and_its_helpers_are_in_the_cgroup_of_the_pod(env: &Env) {
    let pod = Pod::new(env);
    let _container = pod.idle("main");
    let cgroups =
        |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let wanted = format!("/{}/", namespace());
    for program in ["qemu-system", "virtiofsd"] {
        let found = procs::named(program);
        let ours = found
            .iter()
            .filter(|process| cgroups(process.pid).contains(&pod.id))
            .count();
        assert!(
            ours >= 1,
            "no {program} in the cgroup of {}: {found:?}",
            pod.id
        );
        for process in &found {
            assert!(
                cgroups(process.pid).contains(&wanted),
                "{process:?}: {}",
                cgroups(process.pid)
            );
        }
    }
}

fn idle_pod_uses_no_cpu(env: &Env) {
    let pod = Pod::new(env);
    let _container = pod.idle("main");
    // A guest that has just begun still has things to do.
    procs::come_to_rest(&procs::family(&pod.id));
}

/// The root of a controller's hierarchy on the host: its own, or the unified one.
fn hierarchy(controller: &str) -> PathBuf {
    let old = PathBuf::from("/sys/fs/cgroup").join(controller);
    if old.is_dir() {
        old
    } else {
        PathBuf::from("/sys/fs/cgroup")
    }
}

/// A container's directory there.
fn host_cgroup(controller: &str, id: &str) -> PathBuf {
    hierarchy(controller).join(namespace()).join(id)
}

/// The content of the first of these files that is there.
#[track_caller]
fn either(dir: &std::path::Path, files: [&str; 2]) -> String {
    let text = files
        .iter()
        .find_map(|file| fs::read_to_string(dir.join(file)).ok());
    text.unwrap_or_else(|| panic!("none of {files:?} in {}", dir.display()))
        .trim()
        .to_owned()
}

fn host_memory_limit(id: &str) -> u64 {
    let limit = either(
        &host_cgroup("memory", id),
        ["memory.max", "memory.limit_in_bytes"],
    );
    limit.parse().unwrap_or(u64::MAX) / MIB
}

fn processes_on_the_host_are_limited_and_scored_as_the_container(env: &Env) {
    let flags = [
        "--memory-limit",
        &(64 * MIB).to_string(),
        "--cpu-quota",
        "50000",
        "--cpu-period",
        "100000",
    ];
    let container = env.detached(&flags, &["sleep", "3600"]);
    let limit = host_memory_limit(&container.id);
    assert!((64..1024).contains(&limit), "{limit} MiB for 64 MiB");
    let quota = either(
        &host_cgroup("cpu", &container.id),
        ["cpu.max", "cpu.cfs_quota_us"],
    );
    assert_eq!(
        quota.split(' ').next(),
        Some("75000"),
        "half a CPU and a quarter of QEMU's own"
    );
    assert_eq!(
        either(
            &host_cgroup("pids", &container.id),
            ["pids.max", "pids.max"]
        ),
        "512"
    );
    // What is written to files fills the page cache, not the limit.
    container
        .exec(&[
            "sh",
            "-c",
            "dd if=/dev/zero of=/fill bs=1M count=300 2>/dev/null && rm /fill",
        ])
        .ok();
    // `ctr` says nothing of a score: it is 0, whatever containerd's own is.
    let pids = procs::family(&container.id);
    let scores: Vec<String> = pids[1..]
        .iter()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok())
        .collect();
    assert!(
        scores.len() >= 2 && scores.iter().all(|score| score.trim() == "0"),
        "{scores:?}"
    );
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

fn cgroup_of_somebody_else_keeps_its_limits(env: &Env) {
    let id = env.id();
    let dirs = ["memory", "cpu", "pids"].map(|controller| host_cgroup(controller, &id));
    dirs.iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
    let before = host_memory_limit(&id);
    let container = Container::adopt(env, &id);
    let flags = ["-d", "--memory-limit", &(64 * MIB).to_string()];
    cofferdam_tests::command::run(env.run_command(&id, &flags, &["sleep", "3600"]), PATIENCE).ok();
    assert_eq!(host_memory_limit(&id), before);
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    drop(container);
    dirs.iter().for_each(|dir| {
        eventually("its maker removes it", PATIENCE, || {
            (!dir.exists() || fs::remove_dir(dir).is_ok()).then_some(())
        })
    });
}

fn cgroup_with_a_name_of_systemds_is_made_through_it(env: &Env) {
    let id = env.id();
    let container = Container::adopt(env, &id);
    let (path, unit) = (
        format!("cofferdam-e2e.slice:test:{id}"),
        format!("test-{id}.scope"),
    );
    let flags = [
        "-d",
        "--cgroup",
        &path,
        "--memory-limit",
        &(64 * MIB).to_string(),
    ];
    cofferdam_tests::command::run(env.run_command(&id, &flags, &["sleep", "3600"]), PATIENCE).ok();
    let dir = hierarchy("memory")
        .join("cofferdam.slice/cofferdam-e2e.slice")
        .join(&unit);
    let limit = either(&dir, ["memory.max", "memory.limit_in_bytes"]);
    assert!(
        (64 * MIB..1024 * MIB).contains(&limit.parse().unwrap()),
        "{limit} bytes for 64 MiB"
    );
    // Where systemd does not run, only its form of a path is to be understood.
    if std::path::Path::new("/run/systemd/system").is_dir() {
        let systemctl = |words: &[&str]| {
            let output = std::process::Command::new("systemctl")
                .args(words)
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        systemctl(&["daemon-reload"]);
        let shown = systemctl(&["show", "--property=ActiveState,MemoryMax,Slice", &unit]);
        for line in [
            "ActiveState=active",
            "Slice=cofferdam-e2e.slice",
            &format!("MemoryMax={limit}"),
        ] {
            assert!(
                shown.lines().any(|shown| shown == line),
                "no {line}: {shown}"
            );
        }
        assert_eq!(
            either(&dir, ["memory.max", "memory.limit_in_bytes"]),
            limit,
            "after systemd has read it all again"
        );
    }
    container.exec(&["true"]).ok();
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    drop(container);
    eventually("the scope goes", PATIENCE, || (!dir.exists()).then_some(()));
}

fn kill_by_the_host_for_memory_is_told(env: &Env) {
    let events = Events::subscribe(&env.daemon);
    let container = env.detached(&[], &["sleep", "3600"]);
    let dir = host_cgroup("memory", &container.id);
    let used: u64 = either(&dir, ["memory.current", "memory.usage_in_bytes"])
        .parse()
        .unwrap();
    let file = ["memory.max", "memory.limit_in_bytes"]
        .map(|file| dir.join(file))
        .into_iter()
        .find(|file| file.exists());
    fs::write(file.unwrap(), (used + 8 * MIB).to_string()).unwrap();
    container.exec(&["dd", "if=/dev/zero", "of=/dev/null", "count=1", "bs=150M"]);
    container.wait_for("STOPPED");
    let seen: Vec<String> = events.of(&container.id).iter().map(Event::brief).collect();
    let place = |topic: &str| seen.iter().position(|seen| seen == topic);
    assert!(
        place("oom").is_some() && place("oom") < place("exit"),
        "{seen:?}"
    );
    let log = env.daemon.log_about(&container.id);
    assert!(
        log.contains("killed by the host for lack of memory in the sandbox's cgroup"),
        "{log}"
    );
}

fn cpus_of_a_cpuset_without_a_quota(env: &Env) {
    let pod = Pod::new(env);
    let bound = |cpus: &str| limits(json!({"cpuset_cpus": cpus}));
    let both = pod.run_with("both", &["sleep", "3600"], bound("0-1"));
    eventually("two CPUs", PATIENCE, || {
        (both.sh("nproc") == "2").then_some(())
    });
    if !env.is_vm() {
        // Containers of one machine see all of its CPUs.
        let one = pod.run_with("one", &["sleep", "3600"], bound("0"));
        assert_eq!(one.sh("nproc"), "1");
    }
}

fn out_of_memory_kills_the_whole_container(env: &Env) {
    let pod = Pod::new(env);
    // What the kubelet says for every container since 1.28, on cgroup v2.
    let group = limits(json!({
        "memory_limit_in_bytes": 64 * MIB,
        "unified": {"memory.oom.group": "1"},
    }));
    let script = "tail /dev/zero; sleep 1; echo survived; sleep 3600";
    let container = pod.run_with("main", &["sh", "-c", script], group);
    let status = container.wait();
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(137), Some("OOMKilled")),
        "{status}"
    );
    assert_eq!(container.logs(), "");
}
