//! The code against docs/oci-fields.md: each field has a row, and each row that is refused is, in
//! the words that it has.

use serde_json::{Value, json};

use crate::container::spec;

const TABLE: &str = include_str!("../../../../docs/oci-fields.md");

/// The fields of runtime specification 1.2, and those of later ones that are refused.
const FIELDS: &str = "root.path root.readonly mounts[].destination mounts[].source mounts[].type
    mounts[].options mounts[].uidMappings mounts[].gidMappings hostname domainname hooks.prestart
    hooks.createRuntime hooks.createContainer hooks.startContainer hooks.poststart hooks.poststop
    process.terminal process.consoleSize process.cwd process.env process.args process.commandLine
    process.user.uid process.user.gid process.user.umask process.user.additionalGids
    process.user.username process.capabilities process.rlimits process.noNewPrivileges
    process.apparmorProfile process.oomScoreAdj process.scheduler process.selinuxLabel
    process.ioPriority process.execCPUAffinity linux.namespaces linux.uidMappings linux.gidMappings
    linux.timeOffsets linux.devices linux.netDevices linux.cgroupsPath linux.rootfsPropagation
    linux.seccomp.defaultAction linux.seccomp.defaultErrnoRet linux.seccomp.architectures
    linux.seccomp.flags linux.seccomp.listenerPath linux.seccomp.listenerMetadata
    linux.seccomp.syscalls linux.sysctl linux.maskedPaths linux.readonlyPaths linux.mountLabel
    linux.intelRdt linux.memoryPolicy linux.personality.domain linux.personality.flags
    linux.resources.devices linux.resources.memory.limit linux.resources.memory.reservation
    linux.resources.memory.swap linux.resources.memory.kernel linux.resources.memory.kernelTCP
    linux.resources.memory.swappiness linux.resources.memory.disableOOMKiller
    linux.resources.memory.useHierarchy linux.resources.memory.checkBeforeUpdate
    linux.resources.cpu.shares linux.resources.cpu.quota linux.resources.cpu.burst
    linux.resources.cpu.period linux.resources.cpu.realtimeRuntime
    linux.resources.cpu.realtimePeriod linux.resources.cpu.cpus linux.resources.cpu.mems
    linux.resources.cpu.idle linux.resources.pids.limit linux.resources.blockIO.weight
    linux.resources.blockIO.leafWeight linux.resources.blockIO.weightDevice
    linux.resources.blockIO.throttleReadBpsDevice linux.resources.blockIO.throttleWriteBpsDevice
    linux.resources.blockIO.throttleReadIOPSDevice linux.resources.blockIO.throttleWriteIOPSDevice
    linux.resources.hugepageLimits linux.resources.network.classID
    linux.resources.network.priorities linux.resources.rdma linux.resources.unified";

/// Field, what becomes of it, and how, of each row.
fn rows() -> Vec<(&'static str, &'static str, &'static str)> {
    let row = |line: &'static str| {
        let mut cells = line.strip_prefix("| `")?.splitn(3, '|').map(str::trim);
        let field = cells.next()?.strip_suffix('`')?;
        Some((
            field,
            cells.next()?,
            cells.next()?.trim_end_matches(['|', ' ']),
        ))
    };
    TABLE.lines().filter_map(row).collect()
}

fn minimal() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/m", "type": "bind", "source": "/m"}],
        "linux": {"namespaces": [{"type": "mount"}], "resources": {}},
    })
}

/// A value of a field that is refused.
fn value(field: &str) -> Value {
    let mapping = json!([{"hostID": 1, "containerID": 0, "size": 1}]);
    match field.rsplit('.').next().unwrap() {
        "uidMappings" | "gidMappings" => mapping,
        "createContainer" | "startContainer" => json!([{"path": "/bin/true"}]),
        "apparmorProfile" => json!("mine"),
        "selinuxLabel" => json!("system_u:system_r:mine_t:s0"),
        "timeOffsets" => json!({"boottime": {"secs": 1}}),
        "netDevices" => json!({"eth7": {}}),
        "listenerPath" => json!("/run/listener"),
        "intelRdt" => json!({"closID": "gold"}),
        "memoryPolicy" => json!({"mode": "MPOL_BIND", "nodes": "0"}),
        "flags" => json!(["ANY"]),
        "disableOOMKiller" => json!(true),
        "realtimeRuntime" | "realtimePeriod" | "classID" => json!(7),
        "weightDevice" => json!([{"major": 8, "minor": 0, "weight": 10}]),
        "hugepageLimits" => json!([{"pageSize": "2MB", "limit": 4096}]),
        "priorities" => json!([{"name": "eth0", "priority": 1}]),
        "rdma" => json!({"mlx5": {"hcaHandles": 1}}),
        throttle if throttle.starts_with("throttle") => {
            json!([{"major": 8, "minor": 0, "rate": 1}])
        }
        other => panic!("no value for {other}"),
    }
}

fn with(field: &str) -> Value {
    let mut spec = minimal();
    if field.starts_with("linux.seccomp.") {
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    }
    if field.starts_with("linux.personality.") {
        spec["linux"]["personality"] = json!({"domain": "LINUX"});
    }
    let mut place = &mut spec;
    for name in field.split('.') {
        place = match name.strip_suffix("[]") {
            Some(list) => &mut place[list][0],
            None => &mut place[name],
        };
    }
    *place = value(field);
    spec
}

#[test]
fn every_field_has_a_row_and_says_what_becomes_of_it() {
    let rows = rows();
    for field in FIELDS.split_whitespace() {
        let found: Vec<_> = rows.iter().filter(|(name, ..)| *name == field).collect();
        assert_eq!(found.len(), 1, "rows of {field}");
    }
    for (field, kind, _) in rows {
        assert!(
            FIELDS.split_whitespace().any(|name| name == field),
            "{field} is no field"
        );
        let kinds = ["done", "done \\*", "refused", "meaningless"];
        assert!(kinds.contains(&kind), "{field} is {kind:?}");
    }
}

#[test]
fn what_the_table_says_is_refused_is_refused_in_its_words() {
    let refused = rows().into_iter().filter(|(_, kind, _)| *kind == "refused");
    let mut count = 0;
    for (field, _, how) in refused {
        let words = how.split('"').nth(1).unwrap();
        let error = spec::parse(with(field).to_string().as_bytes()).unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{field}");
        assert!(error.to_string().contains(words), "{field}: {error}");
        count += 1;
    }
    assert!(count > 20, "{count} rows");
}

#[test]
fn a_spec_without_them_is_not_refused() {
    let mut spec = minimal();
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 3,
        "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_KEEP_PARAMS"]});
    spec["process"]["user"]["umask"] = 0o77.into();
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    // The kubelet's, on a node with huge pages and cgroup v2.
    spec["linux"]["resources"] = json!({
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}],
        "unified": {"memory.oom.group": "1", "memory.min": "0", "memory.high": "1048576",
            "memory.swap.max": "0", "hugetlb.2MB.max": "0"},
        "network": {"classID": 0, "priorities": []},
        "memory": {"limit": 1_048_576, "disableOOMKiller": false, "swappiness": 60},
        "cpu": {"shares": 2, "cpus": "0-1", "mems": "0", "realtimeRuntime": 0},
    });
    spec::parse(spec.to_string().as_bytes()).unwrap();
}

#[test]
fn an_update_is_refused_as_a_spec_is() {
    for (resources, words) in [
        (
            json!({"unified": {"memory.high": "1", "cgroup.kill": "1"}}),
            "cgroup.kill",
        ),
        (json!({"unified": {"cpuset.cpus": "0"}}), "cpuset.cpus"),
        (
            json!({"unified": {"hugetlb.2MB.max": "4096"}}),
            "hugetlb.2MB.max",
        ),
        (json!({"rdma": {"mlx5": {}}}), "RDMA"),
    ] {
        let error = spec::parse_resources(resources.to_string().as_bytes()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}
