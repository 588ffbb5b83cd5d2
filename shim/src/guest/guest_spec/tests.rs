//! What of a spec reaches the guest, and what only our own agent does.

use serde_json::json;

use super::*;

fn convert(json: serde_json::Value) -> proto::Spec {
    let from: oci::Spec = serde_json::from_value(json).unwrap();
    let place = GuestView {
        rootfs: "/guest/rootfs".into(),
        mounts: Vec::new(),
        devices: from.linux().as_ref().unwrap().devices().clone().unwrap(),
        device_rules: from
            .linux()
            .as_ref()
            .unwrap()
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .clone()
            .unwrap(),
        pid_namespace: String::new(),
        sysctls: [("net.core.somaxconn", "1"), ("net.ipv4.ip_forward", "1")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        cgroup: "/cofferdam/web".into(),
        seccomp: true,
    };
    spec(&from, place)
}

#[test]
fn the_guest_gets_what_the_client_asked_for() {
    let spec = convert(json!({
        "ociVersion": "1.1.0", "hostname": "web", "root": {"path": "rootfs", "readonly": true},
        "process": {
            "terminal": true, "consoleSize": {"height": 24, "width": 80},
            "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6]}, "args": ["sh", "-c",
                "id"],
            "env": ["A=b"], "cwd": "/tmp", "noNewPrivileges": true, "oomScoreAdj": -5,
            "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"], "ambient": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}]
        },
        "linux": {
            "namespaces": [
                {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "network"},
                    {"type": "time"}, {"type": "mount"}
            ],
            "cgroupsPath": "/default/web", "sysctl": {"net.core.somaxconn": "7"},
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
                "fileMode": 438}],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c",
                    "major": 1, "minor": 0}],
                "memory": {"limit": 64}, "cpu": {"shares": 2, "quota": 5, "period": 6,
                    "cpus": "0-3"},
                "pids": {"limit": 9}
            },
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [{
                    "names": ["personality"], "action": "SCMP_ACT_ALLOW", "errnoRet": 0,
                    "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]
                },
                {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
                {"names": ["link"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
            }
        }
    }));
    let process = &spec.Process;
    assert!(process.Terminal && process.NoNewPrivileges && spec.Root.Readonly);
    assert_eq!(
        (
            process.ConsoleSize.Height,
            process.ConsoleSize.Width,
            process.OOMScoreAdj
        ),
        (24, 80, -5)
    );
    assert_eq!(
        (
            process.User.UID,
            process.User.GID,
            process.User.AdditionalGids.as_slice()
        ),
        (1000, 100, &[5, 6][..])
    );
    assert_eq!(process.Capabilities.Bounding, ["CAP_CHOWN", "CAP_KILL"]);
    assert_eq!(
        (process.Rlimits[0].Type.as_str(), process.Rlimits[0].Hard),
        ("RLIMIT_NOFILE", 2)
    );
    assert_eq!(
        (spec.Root.Path.as_str(), spec.Hostname.as_str()),
        ("/guest/rootfs", "web")
    );
    let linux = &spec.Linux;
    let namespaces: Vec<_> = linux
        .Namespaces
        .iter()
        .map(|ns| (ns.Type.as_str(), ns.Path.as_str()))
        .collect();
    assert_eq!(namespaces, [("mount", "")]);
    assert_eq!(linux.CgroupsPath, "/cofferdam/web");
    assert_eq!(
        (
            linux.Sysctl["net.core.somaxconn"].as_str(),
            linux.Sysctl["net.ipv4.ip_forward"].as_str()
        ),
        ("7", "1")
    );
    assert_eq!(
        (linux.Devices[0].Type.as_str(), linux.Devices[0].FileMode),
        ("c", 438)
    );
    let resources = &linux.Resources;
    assert_eq!(
        (resources.Devices[0].Major, resources.Devices[1].Minor),
        (-1, 0)
    );
    assert_eq!(
        (
            resources.Memory.Limit,
            resources.CPU.Quota,
            resources.Pids.Limit
        ),
        (64, 5, 9)
    );
    assert_eq!(
        resources.CPU.Cpus, "",
        "host CPU numbers mean nothing in the guest"
    );
    let rule = &linux.Seccomp.Syscalls[0];
    assert!(rule.has_errnoret());
    assert_eq!(
        (rule.Action.as_str(), rule.Args[0].Op.as_str()),
        ("SCMP_ACT_ALLOW", "SCMP_CMP_EQ")
    );
    let errors = linux.Seccomp.Syscalls[1..].iter();
    let errors: Vec<u32> = errors.map(|rule| rule.errnoret()).collect();
    assert_eq!(errors, [1, 1 << 16, 38], "EPERM is said, and a 0 is not 0");
    assert_eq!(linux.Seccomp.Flags, ["SECCOMP_FILTER_FLAG_LOG"]);
}

#[test]
fn what_only_our_own_agent_does_is_named() {
    let minimal = json!({
        "ociVersion": "1.2.0", "root": {"path": "rootfs"}, "domainname": "nis",
        "process": {"user": {"uid": 0, "gid": 0, "umask": 18}, "args": ["sh"], "cwd": "/",
            "oomScoreAdj": 0},
        "linux": {"namespaces": [], "devices": [], "personality": {"domain": "LINUX"},
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1},
            "resources": {"devices": [], "cpu": {"idle": 0, "burst": 0}, "unified": {}}},
    });
    let spec = convert(minimal.clone());
    assert_eq!(own_fields(&spec), None, "what every agent does by itself");
    assert_eq!(spec.Linux.Sysctl["kernel.domainname"], "nis");
    for (field, value) in [
        ("process.user.umask", json!(0o77)),
        ("process.scheduler", json!({"policy": "SCHED_BATCH"})),
        ("process.ioPriority", json!({"class": "IOPRIO_CLASS_IDLE"})),
        ("linux.personality", json!({"domain": "LINUX32"})),
        ("linux.seccomp.defaultErrnoRet", json!(38)),
        ("linux.resources.unified", json!({"memory.oom.group": "1"})),
        ("linux.resources.cpu.burst", json!(1000)),
        ("linux.resources.cpu.idle", json!(1)),
        ("linux.resources.memory.checkBeforeUpdate", json!(true)),
    ] {
        let mut spec = minimal.clone();
        let mut place = &mut spec;
        for name in field.split('.') {
            place = &mut place[name];
        }
        *place = value;
        assert_eq!(own_fields(&convert(spec)), Some(field));
    }
}

#[test]
fn scheduling_goes_by_the_names_of_the_specification() {
    let process = json!({
        "user": {"uid": 0, "gid": 0, "umask": 63}, "args": ["sh"], "cwd": "/",
        "scheduler": {"policy": "SCHED_DEADLINE", "nice": -3, "priority": 2, "runtime": 5,
            "deadline": 6, "period": 7,
            "flags": ["SCHED_RESET_ON_FORK", "SCHED_FLAG_D_L_OVERRUN", "SCHED_FLAG_RECLAIM"]},
        "ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": -1},
    });
    let own = process_of(process).Own.unwrap();
    let scheduler = own.scheduler.unwrap();
    assert_eq!(own.umask, Some(0o77));
    assert_eq!(
        (
            scheduler.policy.as_str(),
            scheduler.nice,
            scheduler.priority
        ),
        ("SCHED_DEADLINE", -3, 2)
    );
    assert_eq!(
        (scheduler.runtime, scheduler.deadline, scheduler.period),
        (5, 6, 7)
    );
    assert_eq!(
        scheduler.flags,
        [
            "SCHED_FLAG_RESET_ON_FORK",
            "SCHED_FLAG_DL_OVERRUN",
            "SCHED_FLAG_RECLAIM"
        ]
    );
    let priority = own.io_priority.unwrap();
    assert_eq!(
        (priority.class.as_str(), priority.priority),
        ("IOPRIO_CLASS_RT", u32::MAX),
        "which no class has"
    );
}

fn process_of(json: serde_json::Value) -> proto::Process {
    process(&serde_json::from_value(json).unwrap())
}
