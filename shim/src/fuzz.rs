//! What fuzz targets call: everything of the shim that reads bytes of a guest's, a tenant's or an
//! administrator's. None of it touches the host.

use std::collections::HashMap;

use guest_protocol::HostSocketRequest;
use guest_protocol::protocols::agent::{AgentDetails, StatsContainerResponse, WaitProcessResponse};
use protobuf::Message;

use crate::config::Config;
use crate::container::role::{self, Role};
use crate::container::{devices, spec};
use crate::from_guest::{Features, Stats, judge, text};
use crate::guest::guest_spec;
use crate::host::ledger;
use crate::metrics;

/// Longest text of a guest's that anything keeps.
const TEXT: usize = 1024;

/// Answers of the agent, and what is made of them.
pub fn agent(bytes: &[u8]) {
    if let Ok(answer) = StatsContainerResponse::parse_from_bytes(bytes) {
        let mut stats = Stats::of(&answer.cgroup_stats);
        let again = Stats::of(&answer.cgroup_stats);
        stats.add(&again);
        for host_is_v2 in [true, false] {
            let packed = metrics::pack(&stats, host_is_v2).map(|any| any.value.len());
            assert!(
                packed.is_ok_and(|length| length < 64 << 10),
                "statistics are bounded"
            );
        }
    }
    if let Ok(details) = AgentDetails::parse_from_bytes(bytes) {
        assert!(Features::of(&details).version.len() <= TEXT);
    }
    let _ = WaitProcessResponse::parse_from_bytes(bytes);
    let said = String::from_utf8_lossy(bytes);
    let shown = text(&said, TEXT);
    assert!(
        shown.len() <= TEXT && !shown.contains(char::is_control),
        "{shown:?}"
    );
    let status = ttrpc::get_status(ttrpc::Code::INTERNAL, said);
    let (error, _) = judge("Fuzz", &ttrpc::Error::RpcStatus(status));
    assert!(!error.to_string().contains('\n'));
}

/// The first line of a connection to a socket of the host.
pub fn socket_line(bytes: &[u8]) {
    let mut bytes = bytes;
    let _ = futures::executor::block_on(guest_protocol::read_line::<HostSocketRequest>(&mut bytes));
}

/// A container's spec, and what the agent gets of it.
pub fn spec(bytes: &[u8]) {
    let Ok(spec) = spec::parse(bytes) else { return };
    let role = Role::of(&spec);
    let _ = role::namespaces(&spec, role, false, &[], |pid| {
        (pid % 2 == 0).then(String::new)
    });
    let devices = devices::classify(&spec).unwrap_or_default();
    let place = guest_spec::GuestView {
        rootfs: "/rootfs".to_owned(),
        mounts: Vec::new(),
        devices: devices.entries,
        device_rules: devices.rules,
        pid_namespace: String::new(),
        sysctls: HashMap::new(),
        cgroup: "/c".to_owned(),
        seccomp: true,
    };
    let _ = guest_spec::spec(&spec, place).write_to_bytes();
}

/// A configuration and the annotations of a pod.
pub fn config(bytes: &[u8]) {
    let Ok(mut config) = Config::load(None, bytes) else {
        return;
    };
    config.enable_annotations = vec!["memory_mib".to_owned(), "kernel_params".to_owned()];
    let value = String::from_utf8_lossy(bytes).into_owned();
    for key in ["memory_mib", "kernel_params", "qemu"] {
        let _ = config.clone().annotated(&HashMap::from([(
            format!("io.cofferdam.{key}"),
            value.clone(),
        )]));
    }
}

/// What a sandbox has on the host.
pub fn ledger(bytes: &[u8]) {
    ledger::parse(bytes);
}
