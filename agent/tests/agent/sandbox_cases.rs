//! The sandbox and the wire: what the agent says of itself, storages, pause, stats, refusals.

use std::time::Duration;

use guest_protocol::STDIO_PORT;
use guest_protocol::protocols::agent::{
    AddSwapPathRequest, AddSwapRequest, CreateContainerRequest, CreateSandboxRequest,
    DestroySandboxRequest, GetDiagnosticDataRequest, GetIPTablesRequest, GuestDetailsRequest,
    MemAgentCompactConfig, MemAgentMemcgConfig, MemHotplugByProbeRequest, PauseContainerRequest,
    ReseedRandomDevRequest, ResizeVolumeRequest, ResumeContainerRequest, SetGuestDateTimeRequest,
    SetIPTablesRequest, SetPolicyRequest, StatsContainerRequest, Storage, UpdateContainerRequest,
};
use guest_protocol::protocols::clock::Correction;
use guest_protocol::protocols::health::CheckRequest;
use guest_protocol::stdio::Channel;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::Code;

use super::client::{Client, DEADLINE, mount, refusal, soon, strings};

pub async fn the_guest_tells_what_it_is(client: &Client<'_>) {
    let request = GuestDetailsRequest {
        mem_block_size: true,
        mem_hotplug_probe: true,
        ..Default::default()
    };
    let details = client
        .rpc
        .agent
        .get_guest_details(soon(), &request)
        .await
        .unwrap()
        .agent_details
        .unwrap();
    assert_eq!(details.init_daemon, client.guest.is_vm);
    assert!(
        details.supports_seccomp
            && details
                .extra_features
                .contains(&guest_protocol::FEATURE_RAW_STDIO.to_owned())
    );
    assert!(details.storage_handlers.contains(&"virtio-fs".to_owned()));
    let health = client
        .rpc
        .health
        .check(soon(), &CheckRequest::default())
        .await
        .unwrap();
    assert_eq!(health.status.value(), 1);
    let version = client
        .rpc
        .health
        .version(soon(), &CheckRequest::default())
        .await
        .unwrap();
    assert_eq!(version.grpc_version, "0.0.1");
    let seed = ReseedRandomDevRequest {
        data: vec![7; 64],
        ..Default::default()
    };
    client
        .rpc
        .agent
        .reseed_random_dev(soon(), &seed)
        .await
        .unwrap();
}

pub async fn calls_that_are_missing_say_so(client: &Client<'_>) {
    let agent = &client.rpc.agent;
    /// The name of each call, how it is made, and its request.
    macro_rules! missing {
        ($($name:literal $call:ident $request:ident;)*) => {
            $(
                let answer = agent.$call(soon(), &$request::default()).await;
                let (code, text) = refusal(answer);
                assert_eq!(code, Code::UNIMPLEMENTED, "{text}");
                assert!(text.contains($name), "{text}");
            )*
        };
    }
    missing! {
        "GetIPTables" get_ip_tables GetIPTablesRequest;
        "SetIPTables" set_ip_tables SetIPTablesRequest;
        "ResizeVolume" resize_volume ResizeVolumeRequest;
        "GetDiagnosticData" get_diagnostic_data GetDiagnosticDataRequest;
        "AddSwap" add_swap AddSwapRequest;
        "AddSwapPath" add_swap_path AddSwapPathRequest;
        "SetPolicy" set_policy SetPolicyRequest;
        "MemAgentMemcgSet" mem_agent_memcg_set MemAgentMemcgConfig;
        "MemAgentCompactSet" mem_agent_compact_set MemAgentCompactConfig;
        "MemHotplugByProbe" mem_hotplug_by_probe MemHotplugByProbeRequest;
    }
    let unknown = UpdateContainerRequest {
        container_id: "nobody".into(),
        ..Default::default()
    };
    assert_eq!(
        refusal(agent.update_container(soon(), &unknown).await).0,
        Code::INVALID_ARGUMENT
    );
}

pub async fn ids_must_be_names(client: &Client<'_>) {
    for id in ["", "-x", "../up", "a/b", ".hidden", "two words"] {
        let (code, text) = refusal(client.create(id, client.spec(&["true"])).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    }
    client.sleeper("twice").await;
    let (code, text) = refusal(client.create("twice", client.spec(&["true"])).await);
    assert_eq!(
        (code, text.as_str()),
        (Code::INTERNAL, "container twice exists already")
    );
    let (code, _) = refusal(
        client
            .exec("twice", "../e", client.process(&["true"]))
            .await,
    );
    assert_eq!(code, Code::INVALID_ARGUMENT);
    client.remove("twice").await.unwrap();
}

/// What a container with the storage at /cache prints until it ends; the container stays.
async fn run_with_storage(
    client: &Client<'_>,
    id: &str,
    script: &str,
    storage: &Storage,
) -> String {
    let mut spec = client.spec(&["sh", "-c", script]);
    spec.Mounts
        .push(mount("/cache", "bind", &storage.mount_point, &["rbind"]));
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: Some(spec).into(),
        storages: vec![storage.clone()],
        ..Default::default()
    };
    let streams = client.streams(id, "").await;
    client
        .rpc
        .agent
        .create_container(soon(), &request)
        .await
        .unwrap();
    client.start(id).await.unwrap();
    let output = streams.finish(b"").await;
    client.wait(id, "").await.unwrap();
    output.stdout
}

pub async fn a_storage_can_be_shared_and_goes_with_its_last_user(client: &Client<'_>) {
    let place = "/run/kata-containers/sandbox/ephemeral/cache";
    let storage = Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options: strings(&["size=1m", "mode=1770", "fsgid=33"]),
        mount_point: place.into(),
        ..Default::default()
    };
    let create =
        async |id: &str, script: &str| run_with_storage(client, id, script, &storage).await;
    let first =
        create("writer",
            "echo kept >/cache/file; df -k /cache | tail -n 1 | awk '{print $2}'; stat -c '%a %g' /cache")
            .await;
    assert_eq!(first, "1024\n3770 33\n");
    assert_eq!(create("reader", "cat /cache/file").await, "kept\n");
    client.remove("writer").await.unwrap();
    client.remove("reader").await.unwrap();
    assert_eq!(create("later", "ls /cache").await, "");
    client.remove("later").await.unwrap();
}

pub async fn a_shared_storage_outlives_its_containers(client: &Client<'_>) {
    let place = "/run/kata-containers/sandbox/ephemeral/pods-own";
    let storage = Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options: strings(&["size=64k", "mode=0711"]),
        mount_point: place.into(),
        shared: true,
        ..Default::default()
    };
    let run = async |id: &str, script: &str| {
        let output = run_with_storage(client, id, script, &storage).await;
        client.remove(id).await.unwrap();
        output
    };
    let script = "stat -c %a /cache; echo kept >/cache/file; head -c 100000 /dev/zero 2>/dev/null >/cache/big; \
                  stat -c %s /cache/big; rm /cache/big";
    // One page is the first file's.
    assert_eq!(run("shared-1", script).await, "711\n61440\n");
    assert_eq!(run("shared-2", "cat /cache/file").await, "kept\n");
}

pub async fn a_root_can_be_an_overlay_made_in_the_guest(client: &Client<'_>) {
    let root = "/run/kata-containers/layered/rootfs";
    let lower = client.guest.rootfs.display().to_string();
    let storage = Storage {
        driver: "overlayfs".into(),
        source: "overlay".into(),
        fstype: "overlay".into(),
        options: vec![
            format!("lowerdir={lower}"),
            "io.katacontainers.fs-opt.overlay-rw".into(),
        ],
        mount_point: root.into(),
        ..Default::default()
    };
    let mut spec = client.spec(&[
        "sh",
        "-c",
        "echo mine >/seed/own && rm /etc/plain && ls /seed",
    ]);
    spec.Root.mut_or_insert_default().Path = root.into();
    let request = CreateContainerRequest {
        container_id: "layered".into(),
        OCI: Some(spec).into(),
        storages: vec![storage],
        ..Default::default()
    };
    let streams = client.streams("layered", "").await;
    client
        .rpc
        .agent
        .create_container(soon(), &request)
        .await
        .unwrap();
    client.start("layered").await.unwrap();
    assert_eq!(streams.finish(b"").await.stdout, "file\nlink\nown\n");
    client.wait("layered", "").await.unwrap();
    client.remove("layered").await.unwrap();
    let below = client.script("below", "ls /seed /etc/plain", |_| {}).await;
    assert_eq!(below.stdout, "/etc/plain\n\n/seed:\nfile\nlink\n");
}

pub async fn pausing_stops_and_resuming_goes_on(client: &Client<'_>) {
    let mut stdout = client.stream(Channel::Stdout, "paused", "").await;
    client
        .create(
            "paused",
            client.spec(&["sh", "-c", "while :; do echo tick; sleep 0.01; done"]),
        )
        .await
        .unwrap();
    client.start("paused").await.unwrap();
    let mut buffer = vec![0; 4096];
    stdout.read_exact(&mut buffer[..5]).await.unwrap();
    let pause = PauseContainerRequest {
        container_id: "paused".into(),
        ..Default::default()
    };
    client
        .rpc
        .agent
        .pause_container(soon(), &pause)
        .await
        .unwrap();
    // What was on its way arrives; then it is quiet.
    while timeout(Duration::from_millis(300), stdout.read(&mut buffer))
        .await
        .is_ok()
    {}
    let (_, text) = refusal(client.exec("paused", "e1", client.process(&["true"])).await);
    assert_eq!(text, "container paused is paused");
    let resume = ResumeContainerRequest {
        container_id: "paused".into(),
        ..Default::default()
    };
    client
        .rpc
        .agent
        .resume_container(soon(), &resume)
        .await
        .unwrap();
    timeout(DEADLINE, stdout.read(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    // A paused container can be killed and removed.
    client
        .rpc
        .agent
        .pause_container(soon(), &pause)
        .await
        .unwrap();
    client.kill("paused", "", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("paused", "").await.unwrap(), 137);
    client.remove("paused").await.unwrap();
}

pub async fn stats_are_there_until_removal(client: &Client<'_>) {
    client
        .create(
            "counted",
            client.spec(&[
                "sh",
                "-c",
                "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done",
            ]),
        )
        .await
        .unwrap();
    client.start("counted").await.unwrap();
    client.wait("counted", "").await.unwrap();
    let request = StatsContainerRequest {
        container_id: "counted".into(),
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
    assert!(stats.cpu_stats.cpu_usage.total_usage > 0, "{stats:?}");
    if client.guest.is_vm {
        assert!(
            stats.memory_stats.usage.max_usage > 0 && stats.memory_stats.stats.contains_key("anon"),
            "{stats:?}"
        );
        assert_eq!(stats.memory_stats.usage.limit, u64::MAX);
    }
    client.remove("counted").await.unwrap();
    assert_eq!(
        refusal(client.rpc.agent.stats_container(soon(), &request).await).0,
        Code::INVALID_ARGUMENT
    );
}

pub async fn garbage_on_the_stdio_port_is_dropped(client: &Client<'_>) {
    for garbage in ["GET / HTTP/1.1\n", &"x".repeat(5000)] {
        let mut stream = client
            .guest
            .transport
            .dial(STDIO_PORT, DEADLINE)
            .await
            .unwrap();
        let _ = stream.write_all(garbage.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut answer))
            .await
            .expect("the stream stays open");
        assert!(answer.is_empty());
    }
    // A stream whose container never comes goes with its removal.
    let mut parked = client.stream(Channel::Stdout, "parked", "e1").await;
    client.sleeper("parked").await;
    client.remove("parked").await.unwrap();
    assert_eq!(
        timeout(DEADLINE, parked.read(&mut [0]))
            .await
            .unwrap()
            .unwrap_or(0),
        0
    );
}

pub async fn nothing_is_left_of_many_processes(client: &Client<'_>) {
    if client.guest.is_vm {
        return;
    }
    let round = async |number: usize| {
        let id = format!("many-{number}");
        client.sleeper(&id).await;
        for exec in 0..5 {
            let exec_id = format!("e{exec}");
            assert_eq!(
                client.exec_script(&id, &exec_id, "echo x").await.stdout,
                "x\n"
            );
        }
        client
            .exec(&id, "polled", client.process(&["true"]))
            .await
            .unwrap();
        client.remove(&id).await.unwrap();
        assert_eq!(
            client
                .script(&id, "exit 1", |spec| spec
                    .Root
                    .mut_or_insert_default()
                    .Readonly = true)
                .await
                .status,
            1
        );
        let _ = refusal(client.create(&id, client.spec(&["levitate"])).await);
    };
    round(0).await;
    let before = client.guest.holdings();
    for number in 1..10 {
        round(number).await;
    }
    // The last pumps and watchers end a moment later.
    let end = std::time::Instant::now() + DEADLINE;
    while client.guest.holdings() != before {
        assert!(
            std::time::Instant::now() < end,
            "{before:?} became {:?}",
            client.guest.holdings()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Not one of the cases: nothing runs after it.
pub async fn destroying_the_sandbox_is_answered(client: &Client<'_>) {
    let storage = Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: strings(&["noexec", "nosuid", "nodev", "mode=1777", "size=2m"]),
        mount_point: "/run/kata-containers/sandbox/shm".into(),
        ..Default::default()
    };
    let request = CreateSandboxRequest {
        hostname: "pier".into(),
        sandbox_id: "sandbox".into(),
        dns: strings(&["nameserver 10.0.0.10 "]),
        storages: vec![storage],
        ..Default::default()
    };
    client
        .rpc
        .agent
        .create_sandbox(soon(), &request)
        .await
        .unwrap();
    let (_, text) = refusal(client.rpc.agent.create_sandbox(soon(), &request).await);
    assert_eq!(text, "the sandbox exists already");
    let output = client
        .script(
            "named",
            "hostname; stat -c %a /dev/shm; df -k /dev/shm | tail -n 1 | awk '{print $2}'",
            |spec| {
                spec.Mounts.push(mount(
                    "/dev/shm",
                    "bind",
                    "/run/kata-containers/sandbox/shm",
                    &["rbind"],
                ));
            },
        )
        .await;
    assert_eq!(output.stdout, "pier\n1777\n2048\n");
    client.sleeper("left").await;
    // Calls that are parked must not keep the guest alive.
    let parked = client.wait("left", "");
    let destroy = async {
        client
            .rpc
            .agent
            .destroy_sandbox(soon(), &DestroySandboxRequest::default())
            .await
            .unwrap();
    };
    let (status, ()) = tokio::join!(parked, destroy);
    assert_eq!(status.unwrap(), 137);
}

pub async fn the_clock_can_be_set(client: &Client<'_>) {
    let set = async |seconds, microseconds| {
        let request = SetGuestDateTimeRequest {
            Sec: seconds,
            Usec: microseconds,
            ..Default::default()
        };
        client.rpc.agent.set_guest_date_time(soon(), &request).await
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    set(2_000_000_000, 500_000).await.unwrap();
    let output = client.script("clock", "date +%s", |_| {}).await;
    let seconds: i64 = output.stdout.trim().parse().unwrap();
    assert!(
        (2_000_000_000..2_000_000_060).contains(&seconds),
        "{seconds}"
    );
    for (seconds, microseconds) in [(-1, 0), (0, -1), (0, 1_000_000)] {
        let (code, text) = refusal(set(seconds, microseconds).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains("not a time since 1970"), "{text}");
    }
    set(now.unwrap().as_secs().try_into().unwrap(), 0)
        .await
        .unwrap();
}

pub async fn the_clock_can_be_asked_and_corrected(client: &Client<'_>) {
    let read = async || {
        let nothing = protobuf::well_known_types::empty::Empty::new();
        let answer = client.rpc.clock.read(soon(), &nothing).await;
        answer.unwrap().nanoseconds
    };
    let correct = async |nanoseconds, slowly| {
        let by = Correction {
            nanoseconds,
            slowly,
            ..Default::default()
        };
        client.rpc.clock.correct(soon(), &by).await.unwrap();
    };
    const SECOND: i64 = 1_000_000_000;
    let before = read().await;
    correct(100 * SECOND + 1, false).await;
    let after = read().await;
    assert!(after - before > 100 * SECOND, "{before} {after}");
    correct(-100 * SECOND - 1, false).await;
    let back = read().await;
    assert!(back >= before && back < after, "{before} {back} {after}");
    // Half a millisecond in a second: nothing that is seen at once.
    correct(-SECOND / 10, true).await;
    let later = read().await;
    assert!(later > back, "{back} {later}");
    correct(0, true).await;
}
