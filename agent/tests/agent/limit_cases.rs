//! Limits of cgroup v2, in a machine that has its controllers; and how long things take there.

use std::time::{Duration, Instant};

use guest_protocol::context;
use guest_protocol::protocols::agent::{
    CreateContainerRequest, Device, GetOOMEventRequest, StatsContainerRequest, Storage,
    UpdateContainerRequest,
};
use guest_protocol::protocols::oci::{
    LinuxCPU, LinuxDevice, LinuxDeviceCgroup, LinuxMemory, LinuxPids, LinuxResources, Spec,
};
use guest_protocol::stdio::Channel;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::client::{Client, DEADLINE, linux, mount, read_all, refusal, resources, soon};

pub async fn a_memory_limit_kills_and_the_event_comes_before_the_exit(client: &Client<'_>) {
    for round in 0..3 {
        let id = format!("oom-{round}");
        let mut spec = client.spec(&["tail", "/dev/zero"]);
        resources(&mut spec).Memory = Some(LinuxMemory {
            Limit: 32 << 20,
            Swap: 32 << 20,
            ..Default::default()
        })
        .into();
        client.create(&id, spec).await.unwrap();
        let order = std::sync::Mutex::new(Vec::new());
        let event = async {
            let event = client
                .rpc
                .agent
                .get_oom_event(context(None), &GetOOMEventRequest::default())
                .await
                .unwrap();
            assert_eq!(event.container_id, id);
            order.lock().unwrap().push("oom");
        };
        let exit = async {
            assert_eq!(client.wait(&id, "").await.unwrap(), 137);
            order.lock().unwrap().push("exit");
        };
        let start = async { client.start(&id).await.unwrap() };
        timeout(DEADLINE, async { tokio::join!(event, exit, start) })
            .await
            .expect("no OOM event or exit");
        assert_eq!(*order.lock().unwrap(), ["oom", "exit"]);
        let request = StatsContainerRequest {
            container_id: id.clone(),
            ..Default::default()
        };
        let stats = client
            .rpc
            .agent
            .stats_container(soon(), &request)
            .await
            .unwrap()
            .cgroup_stats
            .unwrap();
        assert_eq!(
            (
                stats.memory_stats.usage.limit,
                stats.memory_stats.stats["oom_kill"]
            ),
            (32 << 20, 1)
        );
        client.remove(&id).await.unwrap();
    }
}

pub async fn unified_sets_what_the_cgroup_has_and_refuses_the_rest(client: &Client<'_>) {
    let unified = |spec: &mut Spec, key: &str, value: &str| {
        let own = resources(spec).Own.mut_or_insert_default();
        own.unified.insert(key.into(), value.into());
    };
    // The shell would live on without its child.
    let mut spec = client.spec(&["sh", "-c", "tail /dev/zero; sleep 1; exit 3"]);
    resources(&mut spec).Memory = Some(LinuxMemory {
        Limit: 32 << 20,
        ..Default::default()
    })
    .into();
    unified(&mut spec, "memory.oom.group", "1");
    client.create("group", spec).await.unwrap();
    client.start("group").await.unwrap();
    assert_eq!(client.wait("group", "").await.unwrap(), 137);
    client.remove("group").await.unwrap();
    for (key, value, words) in [
        ("cgroup.procs", "1", "no limit of a cgroup"),
        ("../memory.max", "1", "no limit of a cgroup"),
        ("memory.wishes", "1", "of this guest do not have"),
        (
            "memory.high",
            "much",
            "set memory.high to \"much\": invalid argument",
        ),
    ] {
        let mut spec = client.spec(&["true"]);
        unified(&mut spec, key, value);
        let (_, text) = refusal(client.create("refused", spec).await);
        assert!(text.contains(words), "{key}: {text}");
    }
}

pub async fn an_exec_joins_a_container_that_divided_its_cgroup(client: &Client<'_>) {
    let script = "cd /sys/fs/cgroup && mkdir init && echo 1 >init/cgroup.procs &&
        echo +memory >cgroup.subtree_control && echo divided; exec sleep 1000";
    let mut spec = client.spec(&["sh", "-c", script]);
    let cgroup = mount("/sys/fs/cgroup", "cgroup", "cgroup", &["rw", "nosuid"]);
    spec.Mounts.push(cgroup);
    let mut stdout = client.stream(Channel::Stdout, "divided", "").await;
    client.create("divided", spec).await.unwrap();
    client.start("divided").await.unwrap();
    let mut said = [0; 8];
    stdout.read_exact(&mut said).await.unwrap();
    let output = client
        .exec_script("divided", "e1", "grep ^0: /proc/self/cgroup; exit 4")
        .await;
    assert_eq!((output.status, output.stdout.as_str()), (4, "0::/init\n"));
    client.kill("divided", "", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("divided", "").await.unwrap(), 137);
    client.remove("divided").await.unwrap();
}

pub async fn a_memory_limit_below_the_usage_ends_the_container(client: &Client<'_>) {
    const BUFFER: u64 = 32 << 20;
    let copy = [
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=32M",
        "count=1000000",
    ];
    client.create("shrunk", client.spec(&copy)).await.unwrap();
    client.start("shrunk").await.unwrap();
    let request = StatsContainerRequest {
        container_id: "shrunk".into(),
        ..Default::default()
    };
    let grown = async {
        loop {
            let stats = client.rpc.agent.stats_container(soon(), &request).await;
            let stats = stats.unwrap().cgroup_stats.unwrap();
            if stats.memory_stats.usage.usage > BUFFER {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, grown).await.expect("dd has no buffer");
    let limit = LinuxResources {
        Memory: Some(LinuxMemory {
            Limit: 16 << 20,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let update = UpdateContainerRequest {
        container_id: "shrunk".into(),
        resources: Some(limit).into(),
        ..Default::default()
    };
    client
        .rpc
        .agent
        .update_container(soon(), &update)
        .await
        .unwrap();
    let exit = timeout(DEADLINE, client.wait("shrunk", "")).await;
    assert_eq!(exit.expect("it still runs").unwrap(), 137);
    client.remove("shrunk").await.unwrap();
}

pub async fn limits_reach_the_kernel_and_can_be_changed(client: &Client<'_>) {
    let mut spec = client.spec(&["sleep", "1000"]);
    *resources(&mut spec) = LinuxResources {
        Memory: Some(LinuxMemory {
            Limit: 64 << 20,
            Reservation: 16 << 20,
            ..Default::default()
        })
        .into(),
        CPU: Some(LinuxCPU {
            Shares: 512,
            Quota: 50_000,
            Period: 100_000,
            Cpus: "0-63".into(),
            ..Default::default()
        })
        .into(),
        Pids: Some(LinuxPids {
            Limit: 77,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    client.create("limits", spec).await.unwrap();
    client.start("limits").await.unwrap();
    let look = "cd /sys/fs/cgroup; cat memory.max memory.low cpu.weight cpu.max pids.max";
    let output = client.exec_script("limits", "e1", look).await;
    assert_eq!(
        output.stdout, "67108864\n16777216\n20\n50000 100000\n77\n",
        "{output:?}"
    );
    let change = LinuxResources {
        Memory: Some(LinuxMemory {
            Limit: 128 << 20,
            ..Default::default()
        })
        .into(),
        CPU: Some(LinuxCPU {
            Quota: -1,
            ..Default::default()
        })
        .into(),
        Pids: Some(LinuxPids {
            Limit: -1,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let request = UpdateContainerRequest {
        container_id: "limits".into(),
        resources: Some(change).into(),
        ..Default::default()
    };
    client
        .rpc
        .agent
        .update_container(soon(), &request)
        .await
        .unwrap();
    let output = client.exec_script("limits", "e2", look).await;
    assert_eq!(
        output.stdout, "134217728\n16777216\n20\nmax 100000\nmax\n",
        "{output:?}"
    );
    client.remove("limits").await.unwrap();
}

pub async fn a_disk_of_the_guest_cannot_be_opened(client: &Client<'_>) {
    // The machine's memory as a device stands for any device nobody allowed.
    let script = "mknod /run/mem c 1 1 && (cat /run/mem) 2>&1; mknod /run/zero c 1 5 && head -c 1 /run/zero | wc -c";
    let output = client.script("no-disk", script, |_| {}).await;
    assert_eq!(
        output.stdout, "cat: can't open '/run/mem': Operation not permitted\n1\n",
        "{output:?}"
    );
}

pub async fn a_disk_is_mounted_or_passed_on(client: &Client<'_>) {
    let place = "/run/kata-containers/sandbox/storage/disk";
    let storage = |source: &str| Storage {
        driver: "blk".into(),
        source: source.into(),
        fstype: "ext4".into(),
        mount_point: place.into(),
        ..Default::default()
    };
    let mut spec = client.spec(&[
        "sh",
        "-c",
        "echo kept >/disk/file; cat /disk/file; mount | grep -o '/disk type ext4'",
    ]);
    spec.Mounts.push(mount("/disk", "bind", place, &["rbind"]));
    let request = |source: &str| CreateContainerRequest {
        container_id: "disk".into(),
        OCI: Some(spec.clone()).into(),
        storages: vec![storage(source)],
        ..Default::default()
    };
    let (_, text) = refusal(
        client
            .rpc
            .agent
            .create_container(soon(), &request("06/00"))
            .await,
    );
    assert_eq!(text, "no block device at PCI path 06/00 within 3s");
    let streams = client.streams("disk", "").await;
    client
        .rpc
        .agent
        .create_container(soon(), &request("05/00"))
        .await
        .unwrap();
    client.start("disk").await.unwrap();
    assert_eq!(streams.finish(b"").await.stdout, "kept\n/disk type ext4\n");
    client.wait("disk", "").await.unwrap();
    client.remove("disk").await.unwrap();

    // The same disk as a device: the host does not know its number, the guest does.
    let device = Device {
        id: "05/00".into(),
        type_: "blk".into(),
        container_path: "/dev/data".into(),
        ..Default::default()
    };
    let script = "dd if=/dev/data bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1; stat -c %F /dev/data; \
                  dd if=/dev/zero of=/dev/data count=0 conv=notrunc 2>&1 | grep -o 'not permitted'";
    let mut spec = client.spec(&["sh", "-c", script]);
    let node = LinuxDevice {
        Path: "/dev/data".into(),
        Type: "b".into(),
        Major: 8,
        Minor: 99,
        ..Default::default()
    };
    linux(&mut spec).Devices.push(node);
    let rule = LinuxDeviceCgroup {
        Allow: true,
        Type: "b".into(),
        Major: 8,
        Minor: 99,
        Access: "r".into(),
        ..Default::default()
    };
    linux(&mut spec)
        .Resources
        .mut_or_insert_default()
        .Devices
        .push(rule);
    let request = CreateContainerRequest {
        container_id: "disk".into(),
        OCI: Some(spec).into(),
        devices: vec![device],
        ..Default::default()
    };
    let streams = client.streams("disk", "").await;
    client
        .rpc
        .agent
        .create_container(soon(), &request)
        .await
        .unwrap();
    client.start("disk").await.unwrap();
    // The magic number of ext4.
    assert_eq!(
        streams.finish(b"").await.stdout,
        " 53 ef\nblock special file\nnot permitted\n"
    );
    client.wait("disk", "").await.unwrap();
    client.remove("disk").await.unwrap();
}

pub async fn a_pids_limit_holds(client: &Client<'_>) {
    let output = client
        .script(
            "pids",
            "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done",
            |spec| {
                resources(spec).Pids = Some(LinuxPids {
                    Limit: 4,
                    ..Default::default()
                })
                .into();
            },
        )
        .await;
    assert!(output.stderr.contains("can't fork"), "{output:?}");
}

/// Prints what the numbers are; fails only where something is far off.
pub async fn making_containers_and_processes_is_quick(client: &Client<'_>) {
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (mut create, mut start, mut exec) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..15 {
        let id = format!("quick-{round}");
        let mut spec = client.spec(&["true"]);
        resources(&mut spec).Memory = Some(LinuxMemory {
            Limit: 64 << 20,
            ..Default::default()
        })
        .into();
        let begun = Instant::now();
        client.create(&id, spec).await.unwrap();
        create.push(begun.elapsed());
        let begun = Instant::now();
        client.start(&id).await.unwrap();
        client.wait(&id, "").await.unwrap();
        start.push(begun.elapsed());
        client.remove(&id).await.unwrap();
    }
    client.sleeper("quick").await;
    for round in 0..15 {
        let id = format!("e{round}");
        let begun = Instant::now();
        client
            .exec("quick", &id, client.process(&["true"]))
            .await
            .unwrap();
        client.wait("quick", &id).await.unwrap();
        exec.push(begun.elapsed());
    }
    client.remove("quick").await.unwrap();
    let mut ping = Vec::new();
    for _ in 0..15 {
        let begun = Instant::now();
        client
            .rpc
            .health
            .check(soon(), &Default::default())
            .await
            .unwrap();
        ping.push(begun.elapsed());
    }
    let rate = |bytes: usize, time: Duration| bytes as u128 / time.as_micros().max(1);
    let size = 32 << 20;
    let stdout = client.stream(Channel::Stdout, "quick-out", "").await;
    client
        .create(
            "quick-out",
            client.spec(&[
                "dd",
                "if=/dev/zero",
                "bs=64k",
                &format!("count={}", size >> 16),
            ]),
        )
        .await
        .unwrap();
    let begun = Instant::now();
    client.start("quick-out").await.unwrap();
    assert_eq!(read_all(Some(stdout)).await.len(), size);
    let out = rate(size, begun.elapsed());
    client.remove("quick-out").await.unwrap();
    let mut stdin = client.stream(Channel::Stdin, "quick-in", "").await;
    client
        .create("quick-in", client.spec(&["cat"]))
        .await
        .unwrap();
    client.start("quick-in").await.unwrap();
    let begun = Instant::now();
    stdin.write_all(&vec![0; size]).await.unwrap();
    drop(stdin);
    client.wait("quick-in", "").await.unwrap();
    eprintln!(
        "stdout {out} MB/s, stdin {} MB/s",
        rate(size, begun.elapsed())
    );
    client.remove("quick-in").await.unwrap();
    let first = create[0];
    let all = [
        median(ping),
        first,
        median(create),
        median(start),
        median(exec),
    ];
    eprintln!(
        "ping {:?}, first create {:?}, create {:?}, start+wait {:?}, exec+wait {:?}",
        all[0], all[1], all[2], all[3], all[4]
    );
    assert!(all.iter().all(|time| *time < Duration::from_secs(1)));
}
