//! Sizes of machines, by what is known of their pods.

use serde_json::json;

use super::*;

fn need(resources: serde_json::Value) -> ResourceLimits {
    let spec = json!({"ociVersion": "1.1.0", "root": {"path": "r"},
        "linux": {"resources": resources}});
    ResourceLimits::of_container(&serde_json::from_value(spec).unwrap())
}

fn sizing(pod: ResourceLimits, containers: &[ResourceLimits]) -> MachineSize {
    MachineSize::of(&Config::default(), pod, containers)
}

#[test]
fn the_resources_of_a_pod_of_crio_are_read() {
    let json = r#"{"cpu_period":100000,"cpu_quota":50000,"memory_limit_in_bytes":67108864}"#;
    let limits = ResourceLimits::of_crio(json);
    assert_eq!(
        (limits.memory, limits.quota, limits.period),
        (64 << 20, 50000, 100_000)
    );
    assert_eq!(ResourceLimits::of_crio("null"), ResourceLimits::default());
}

#[test]
fn a_machine_has_room_for_limits_and_little_more() {
    let base = Config::default().memory_mib;
    let none = ResourceLimits::default();
    let size = MachineSize {
        memory_mib: base,
        most_mib: host_memory_mib() / 100 * 50,
        vcpus: 1,
        milli_cpus: None,
        oom_score_adj: 0,
    };
    assert_eq!(sizing(none, &[]), size);
    let small = need(json!({"memory": {"limit": 64 << 20}}));
    assert_eq!(sizing(none, &[small, small]).memory_mib, OWN_MIB + 128);
    let pod = ResourceLimits {
        memory: 300 << 20,
        ..none
    };
    assert_eq!(sizing(pod, &[]).memory_mib, OWN_MIB + 300);
    assert_eq!(sizing(pod, &[small, small]).memory_mib, OWN_MIB + 300);
}

#[test]
fn a_container_without_a_limit_gets_the_configured_size() {
    let base = Config::default().memory_mib;
    let none = ResourceLimits::default();
    let small = need(json!({"memory": {"limit": 64 << 20}}));
    for unlimited in [-1, i64::MAX, 0] {
        let unlimited = need(json!({"memory": {"limit": unlimited}}));
        assert_eq!(sizing(none, &[unlimited]).memory_mib, base);
        assert_eq!(sizing(none, &[unlimited, small]).memory_mib, base + 64);
    }
}

#[test]
fn only_a_machine_with_a_container_without_a_limit_grows() {
    let none = ResourceLimits::default();
    let small = need(json!({"memory": {"limit": 64 << 20}}));
    let base = Config::default().memory_mib;
    let sizing = |containers: &[ResourceLimits]| MachineSize {
        most_mib: sizing(none, containers).most_mib.min(2000),
        ..sizing(none, containers)
    };
    let wanted = WantedSize::new(sizing(&[none]));
    assert_eq!(wanted.grow_by(601, base), 600);
    assert_eq!(wanted.get().memory_mib, base + 600);
    let state = wanted.growth();
    assert_eq!((state.can_grow, state.can_shrink_mib), (true, 600));

    assert!(wanted.grow_by(i64::MAX, base) > 0);
    assert_eq!(wanted.get().memory_mib, 2000);
    assert!(!wanted.growth().can_grow);
    assert_eq!(wanted.grow_by(1000, base), 0, "there is no more");
    assert!(wanted.set(sizing(&[none, small])));
    assert_eq!(wanted.get().memory_mib, 2000, "the limit is part of it");

    assert!(wanted.set(sizing(&[small])));
    assert_eq!(wanted.get().memory_mib, OWN_MIB + 64);
    assert_eq!(wanted.grow_by(600, base), 0);
    let state = wanted.growth();
    assert_eq!((state.can_grow, state.can_shrink_mib), (false, 0));

    assert!(wanted.set(sizing(&[none])));
    wanted.grow_by(i64::MAX, base);
    wanted.grow_by(i64::MIN, base);
    assert_eq!(wanted.get().memory_mib, base);
    assert_eq!(wanted.grow_by(100, base + 300), 400, "it had kept 300");
    let fixed = Config {
        max_memory_percent: 0,
        ..Config::default()
    };
    let fixed = WantedSize::new(MachineSize::of(&fixed, none, &[none]));
    assert_eq!(fixed.grow_by(600, base), 0);
    assert_eq!(fixed.get().memory_mib, base, "it is not made smaller");
}

#[test]
fn quotas_add_up_to_cpus_but_never_more_than_the_host_has() {
    let none = ResourceLimits::default();
    let half = need(json!({"cpu": {"quota": 50_000, "period": 100_000}}));
    assert_eq!(sizing(none, &[half, half]).vcpus, 1);
    assert_eq!(sizing(none, &[half, half, half]).vcpus, 2.min(host_cpus()));
    assert_eq!(
        sizing(none, &[need(json!({"cpu": {"quota": -1}}))]).vcpus,
        1
    );
    assert_eq!(
        sizing(
            none,
            &[need(json!({"cpu": {"quota": 900_000_000, "period": 0}}))]
        )
        .vcpus,
        host_cpus()
    );
}

#[test]
fn a_container_without_a_limit_has_the_hosts_cpus() {
    let none = ResourceLimits::default();
    let half = need(json!({"cpu": {"quota": 50_000, "period": 100_000}}));
    let of = |vcpus, containers: &[ResourceLimits]| {
        let config = Config {
            vcpus,
            vcpus_without_limit: host_cpus(),
            ..Config::default()
        };
        MachineSize::of(&config, none, containers).vcpus
    };
    for containers in [&[][..], &[none], &[half, none]] {
        assert_eq!(of(None, containers), host_cpus());
        assert_eq!(of(Some(1), containers), 1, "as configured");
    }
    assert_eq!(of(None, &[half]), 1);
    assert_eq!(vcpus_without_limit(Accelerator::Tcg), 1);
}

#[test]
fn without_a_quota_the_cpus_count_that_a_container_is_bound_to() {
    let none = ResourceLimits::default();
    for (list, count) in [("0", 1), ("0-1", 2), ("0,2-3,7", 4), ("", 0), ("a-b", 0)] {
        assert_eq!(cpu_count(list), count, "{list:?}");
    }
    for absurd in ["3-1", "0-4294967295", "0-4294967294,1"] {
        assert_eq!(cpu_count(absurd), 0, "{absurd:?}");
    }
    let bound = need(json!({"cpu": {"cpus": "0-1"}}));
    assert_eq!(sizing(none, &[bound]).vcpus, 2.min(host_cpus()));
    assert_eq!(sizing(none, &[bound]).milli_cpus, None, "no limit of time");
    let half = need(json!({"cpu": {"cpus": "0-3", "quota": 50_000, "period": 100_000}}));
    assert_eq!(sizing(none, &[half]).vcpus, 1);
    let update = serde_json::from_value(json!({"cpu": {"cpus": "1"}})).unwrap();
    assert_eq!(bound.updated(&update).cpus, 1);
}

#[test]
fn limits_of_unified_are_limits() {
    let base = Config::default().memory_mib;
    let none = ResourceLimits::default();
    let unified = |key: &str, value: &str| need(json!({"unified": {key: value}}));
    let memory = |value| sizing(none, &[unified("memory.max", value)]).memory_mib;
    assert_eq!(memory("67108864"), OWN_MIB + 64);
    assert_eq!(memory("64M"), OWN_MIB + 64);
    assert_eq!(memory("max"), base);
    let cpu = unified("cpu.max", "150000 100000");
    assert_eq!((cpu.quota, cpu.period), (150_000, 100_000));
    assert_eq!(unified("cpu.max", "max 100000").quota, 0);
}

#[test]
fn a_pod_is_as_large_as_its_annotations_say() {
    let spec = json!({"ociVersion": "1.1.0", "root": {"path": "r"}, "annotations": {
        POD_MEMORY: "1073741824", POD_QUOTA: "150000", POD_PERIOD: "100000"}});
    let need = ResourceLimits::of_pod(&serde_json::from_value(spec).unwrap());
    assert_eq!(
        need,
        ResourceLimits {
            memory: 1 << 30,
            quota: 150_000,
            period: 100_000,
            cpus: 0,
            oom_score_adj: 0
        }
    );
}

#[test]
fn processes_are_protected_and_limited_as_the_containers_together() {
    let none = ResourceLimits::default();
    let half = need(json!({"cpu": {"quota": 50_000, "period": 100_000}}));
    assert_eq!(sizing(none, &[half, half]).milli_cpus, Some(1000));
    assert_eq!(sizing(none, &[half, none]).milli_cpus, None);
    let score = |oom_score_adj| ResourceLimits {
        oom_score_adj,
        ..none
    };
    assert_eq!(sizing(none, &[score(1000), score(999)]).oom_score_adj, 999);
    assert_eq!(sizing(none, &[]).oom_score_adj, 0);
}

#[test]
fn an_update_of_one_limit_keeps_the_others() {
    let before = need(json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 5, "period": 10}}));
    let update =
        serde_json::from_value(json!({"memory": {"limit": 128 << 20}, "cpu": {}})).unwrap();
    assert_eq!(
        before.updated(&update),
        ResourceLimits {
            memory: 128 << 20,
            ..before
        }
    );
    let update = serde_json::from_value(json!({"memory": {"limit": -1}})).unwrap();
    assert_eq!(
        before.updated(&update),
        ResourceLimits {
            memory: 0,
            ..before
        }
    );
}
