//! What Kata's clients ask of an agent and our shim does not: copied files, other sizes of memory
//! volumes, lookups of a share's mounts, figures.

use guest_protocol::GUEST_SHARE;
use guest_protocol::protocols::agent::{
    CopyFileRequest, CreateContainerRequest, GetMetricsRequest, RemoveContainerRequest,
    RemoveStaleVirtiofsShareMountsRequest, Storage, UpdateEphemeralMountsRequest,
};
use ttrpc::Code;

use super::client::{Client, mount, refusal, soon, strings};

/// A piece of a file of `size` bytes.
fn piece(path: &str, size: usize, offset: usize, data: &[u8]) -> CopyFileRequest {
    CopyFileRequest {
        path: format!("{GUEST_SHARE}/{path}"),
        file_size: i64::try_from(size).unwrap(),
        file_mode: libc::S_IFREG | 0o640,
        dir_mode: 0o750,
        uid: 33,
        gid: 44,
        offset: i64::try_from(offset).unwrap(),
        data: data.to_vec(),
        ..Default::default()
    }
}

/// Something that is no regular file, of the type and mode.
fn special(path: &str, mode: u32, data: &[u8]) -> CopyFileRequest {
    CopyFileRequest {
        file_mode: mode,
        ..piece(path, 0, 0, data)
    }
}

async fn copy(client: &Client<'_>, request: &CopyFileRequest) -> ttrpc::Result<()> {
    let answer = client.rpc.agent.copy_file(soon(), request).await;
    answer.map(drop)
}

/// What a container prints that has a directory of the share at /data.
async fn look(client: &Client<'_>, id: &str, directory: &str, script: &str) -> String {
    let source = format!("{GUEST_SHARE}/{directory}");
    let output = client
        .script(id, script, |spec| {
            spec.Mounts
                .push(mount("/data", "bind", &source, &["rbind"]));
        })
        .await;
    assert_eq!(output.stderr, "");
    output.stdout
}

pub async fn a_file_comes_in_pieces(client: &Client<'_>) {
    // The first one is as large as a frame has room for.
    let contents: Vec<u8> = (0..5 << 20).map(|i: u32| (i / 251) as u8).collect();
    let cut = (4 << 20) - 4096;
    let size = contents.len();
    let first = piece("pieces/deep/file", size, 0, &contents[..cut]);
    let last = piece("pieces/deep/file", size, cut, &contents[cut..]);
    copy(client, &first).await.unwrap();
    copy(client, &first).await.unwrap();
    assert_eq!(
        look(client, "half", "pieces/deep", "ls /data").await,
        "file.cofferdam-partial\n"
    );
    copy(client, &last).await.unwrap();
    let script = "cd /data; ls deep; stat -c '%a %u %g %s' deep/file; stat -c '%a %u' . deep
                  i=0; while [ $i -lt 20 ]; do dd if=deep/file bs=256k count=1 skip=$i 2>/dev/null \
                  | head -c 1 | od -An -tu1; i=$((i+1)); done";
    let seen = look(client, "whole", "pieces", script).await;
    let mut expected = format!("file\n640 33 44 {size}\n750 0\n750 0\n");
    for offset in (0..20).map(|i| i << 18) {
        expected.push_str(&format!("{:>4}\n", contents[offset]));
    }
    assert_eq!(seen, expected);
    // A shorter one takes its place.
    copy(client, &piece("pieces/deep/file", 3, 0, b"new"))
        .await
        .unwrap();
    copy(client, &piece("pieces/empty", 0, 0, b""))
        .await
        .unwrap();
    let script = "cat /data/deep/file; wc -c </data/empty; ls /data/deep";
    assert_eq!(
        look(client, "again", "pieces", script).await,
        "new0\nfile\n"
    );
}

pub async fn directories_and_links_are_copied(client: &Client<'_>) {
    for request in [
        special("config/..1", libc::S_IFDIR | 0o2751, b""),
        piece("config/..1/key", 5, 0, b"first"),
        special("config/..data", libc::S_IFLNK | 0o777, b"..1"),
        special("config/key", libc::S_IFLNK | 0o777, b"..data/key"),
        // As when a config map changes.
        special("config/..2", libc::S_IFDIR | 0o755, b""),
        piece("config/..2/key", 6, 0, b"second"),
        special("config/..data", libc::S_IFLNK | 0o777, b"..2"),
        special("config/..1", libc::S_IFDIR | 0o2751, b""),
    ] {
        copy(client, &request).await.unwrap();
    }
    let script = "cd /data; cat key; echo; readlink ..data; cat ..1/key; echo
                  stat -c '%a %u %g' ..1; stat -c '%u %g' ..data; ls -A";
    assert_eq!(
        look(client, "links", "config", script).await,
        "second\n..2\nfirst\n2751 33 44\n33 44\n..1\n..2\n..data\nkey\n"
    );
}

pub async fn a_copy_cannot_be_led_elsewhere_by_a_container(client: &Client<'_>) {
    let directory = special("trap", libc::S_IFDIR | 0o777, b"");
    copy(client, &directory).await.unwrap();
    let script =
        "cd /data; ln -s / out; ln -s .. up; ln -s /run/stolen dir; mkdir full; echo kept >plain
                  begun=.cofferdam-partial; ln -s /run/stolen link$begun; mkfifo fifo$begun
                  mknod null$begun c 1 3; mkdir full$begun";
    look(client, "planter", "trap", script).await;
    for (request, word) in [
        (piece("trap/out/run/stolen", 1, 0, b"x"), "symbolic links"),
        (piece("trap/up/stolen", 1, 0, b"x"), "symbolic links"),
        (
            special("trap/dir", libc::S_IFDIR | 0o700, b""),
            "symbolic links",
        ),
        (piece("trap/link", 2, 1, b"x"), "symbolic links"),
        (piece("trap/fifo", 2, 1, b"x"), "not a regular file"),
        (piece("trap/null", 2, 1, b"x"), "not a regular file"),
        (piece("trap/full", 1, 0, b"x"), "directory"),
        (piece("trap/plain/file", 1, 0, b"x"), "not a directory"),
    ] {
        let (code, text) = refusal(copy(client, &request).await);
        assert_eq!(code, Code::INTERNAL, "{text}");
        assert!(
            text.contains(word) && text.contains(&request.path),
            "{text}"
        );
    }
    // What lies in the place of a file or of its beginning is put aside.
    for name in ["link", "fifo", "null", "out"] {
        copy(client, &piece(&format!("trap/{name}"), 1, 0, b"x"))
            .await
            .unwrap();
    }
    let script = "cd /data; stat -c '%n %F %s' link fifo null out; cat plain; ls";
    assert_eq!(
        look(client, "found", "trap", script).await,
        "link regular file 1\nfifo regular file 1\nnull regular file 1\nout regular file 1\n\
         kept\ndir\nfifo\nfull\nfull.cofferdam-partial\nlink\nnull\nout\nplain\nup\n"
    );
    let nothing = look(
        client,
        "nothing",
        ".",
        "ls -d /data/stolen 2>/dev/null || echo none",
    )
    .await;
    assert_eq!(nothing, "none\n");
}

pub async fn a_copy_that_makes_no_sense_is_refused(client: &Client<'_>) {
    let elsewhere = |path: &str| CopyFileRequest {
        path: path.into(),
        ..piece("", 1, 0, b"x")
    };
    let device = special("odd/device", libc::S_IFBLK | 0o600, b"");
    for request in [
        elsewhere(""),
        elsewhere("odd"),
        elsewhere("/etc/passwd"),
        elsewhere(GUEST_SHARE),
        elsewhere(&format!("{GUEST_SHARE}/../odd")),
        elsewhere("/run/kata-containers/sandbox/odd"),
        device,
        piece("odd/long", 1, 0, b"xy"),
        piece("odd/long", 3, 2, b"xy"),
        CopyFileRequest {
            offset: -1,
            ..piece("odd/before", 1, 0, b"x")
        },
        CopyFileRequest {
            file_size: -1,
            ..piece("odd/less", 1, 0, b"")
        },
    ] {
        let (code, text) = refusal(copy(client, &request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    }
    copy(client, &piece("odd/hole", 9, 0, b"abc"))
        .await
        .unwrap();
    let (code, text) = refusal(copy(client, &piece("odd/hole", 9, 4, b"efghi")).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("only 3 bytes came before"), "{text}");
}

/// A memory volume, as a request names it.
fn memory_volume(name: &str, options: &[&str]) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options: strings(options),
        mount_point: format!("/run/kata-containers/sandbox/ephemeral/{name}"),
        ..Default::default()
    }
}

async fn update(client: &Client<'_>, storage: Storage) -> ttrpc::Result<()> {
    let request = UpdateEphemeralMountsRequest {
        storages: vec![storage],
        ..Default::default()
    };
    let answer = client
        .rpc
        .agent
        .update_ephemeral_mounts(soon(), &request)
        .await;
    answer.map(drop)
}

/// A container that sleeps and has the storage at /cache.
async fn sleeper_with(client: &Client<'_>, id: &str, storage: &Storage) {
    let mut spec = client.spec(&["sleep", "1000"]);
    spec.Mounts
        .push(mount("/cache", "bind", &storage.mount_point, &["rbind"]));
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: Some(spec).into(),
        storages: vec![storage.clone()],
        ..Default::default()
    };
    client
        .rpc
        .agent
        .create_container(soon(), &request)
        .await
        .unwrap();
    client.start(id).await.unwrap();
}

pub async fn a_memory_volume_gets_another_size(client: &Client<'_>) {
    let made = memory_volume("grows", &["size=64k", "mode=0711"]);
    sleeper_with(client, "grows", &made).await;
    let size = "df -k /cache | tail -n 1 | awk '{print $2}'; stat -c '%a %g' /cache";
    let seen = client.exec_script("grows", "small", size).await;
    assert_eq!(seen.stdout, "64\n711 0\n");
    update(
        client,
        memory_volume("grows", &["remount", "size=2M", "fsgid=33"]),
    )
    .await
    .unwrap();
    let fill = format!("{size}; head -c 1000000 /dev/zero >/cache/big");
    let seen = client.exec_script("grows", "large", &fill).await;
    assert_eq!((seen.status, seen.stdout.as_str()), (0, "2048\n2771 33\n"));
    // Less than what is in it.
    let (code, text) =
        refusal(update(client, memory_volume("grows", &["remount", "size=64k"])).await);
    assert_eq!(code, Code::INTERNAL);
    assert!(
        text.contains("grows") && text.contains("invalid argument"),
        "{text}"
    );
    let seen = client.exec_script("grows", "still", size).await;
    assert_eq!(seen.stdout, "2048\n2771 33\n");
    client.remove("grows").await.unwrap();
}

pub async fn only_memory_volumes_get_another_size(client: &Client<'_>) {
    let local = Storage {
        driver: "local".into(),
        ..memory_volume("local", &["mode=0755"])
    };
    sleeper_with(client, "local", &local).await;
    let size = ["remount", "size=2M"];
    for storage in [
        Storage {
            driver: "local".into(),
            ..memory_volume("local", &size)
        },
        memory_volume("local", &size),
        memory_volume("nowhere", &size),
        Storage {
            mount_point: "/run".into(),
            ..memory_volume("", &size)
        },
    ] {
        let (code, text) = refusal(update(client, storage).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    }
    client.remove("local").await.unwrap();
}

pub async fn a_watched_volume_is_copied_when_it_changes(client: &Client<'_>) {
    let version = async |version: &str, keys: &[&str]| {
        let path = |name: &str| format!("watched/{name}");
        let mut requests = vec![special(&path(version), libc::S_IFDIR | 0o750, b"")];
        for key in keys {
            let key = format!("{version}/{key}");
            requests.push(piece(&path(&key), version.len(), 0, version.as_bytes()));
        }
        let leads_to = version.as_bytes();
        requests.push(special(&path("..data"), libc::S_IFLNK | 0o777, leads_to));
        for request in requests {
            copy(client, &request).await.unwrap();
        }
    };
    version("..1", &["key", "deep/old"]).await;
    let storage = Storage {
        driver: "watchable-bind".into(),
        source: format!("{GUEST_SHARE}/watched"),
        mount_point: "/run/kata-containers/sandbox/watched/1".into(),
        ..Default::default()
    };
    sleeper_with(client, "watcher", &storage).await;
    let look = "cd /cache; cat key; echo; ls -A; readlink key; stat -c '%a %u %g' key/ ..1 ..2 \
                2>/dev/null";
    let seen = client.exec_script("watcher", "first", look).await;
    let expected = "..1\n..1\n..data\ndeep\nkey\n..data/key\n750 33 44\n";
    assert_eq!(seen.stdout, expected);
    // Whoever may write there leads no copy elsewhere.
    let plant = "cd /cache; ln -s /run/stolen ..2; ln -s /run/stolen new
                 ln -s /run/stolen ..data.cofferdam-partial; mkdir other; echo x >other/file";
    let planted = client.exec_script("watcher", "plant", plant).await;
    assert_eq!(planted.stderr, "");
    version("..2", &["key", "new"]).await;
    let wait = "while ! grep -q '^..2' /cache/new; do sleep 0.1; done 2>/dev/null";
    client.exec_script("watcher", "wait", wait).await;
    let gone = "while ls -d /cache/..1 /cache/other; do sleep 0.1; done >/dev/null 2>&1";
    client.exec_script("watcher", "gone", gone).await;
    let seen = client.exec_script("watcher", "second", look).await;
    let expected = "..2\n..2\n..data\nkey\nnew\n..data/key\n750 33 44\n";
    assert_eq!(seen.stdout, expected);
    client.remove("watcher").await.unwrap();
}

pub async fn what_has_no_versions_is_not_copied(client: &Client<'_>) {
    copy(client, &piece("plain/file", 1, 0, b"1"))
        .await
        .unwrap();
    let storage = Storage {
        driver: "watchable-bind".into(),
        source: format!("{GUEST_SHARE}/plain"),
        mount_point: "/run/kata-containers/sandbox/watched/2".into(),
        ..Default::default()
    };
    sleeper_with(client, "plain", &storage).await;
    copy(client, &piece("plain/file", 1, 0, b"2"))
        .await
        .unwrap();
    let seen = client.exec_script("plain", "now", "cat /cache/file").await;
    assert_eq!(seen.stdout, "2");
    client.remove("plain").await.unwrap();
    let gone = Storage {
        source: format!("{GUEST_SHARE}/nowhere"),
        ..storage
    };
    let request = CreateContainerRequest {
        container_id: "nowhere".into(),
        OCI: Some(client.spec(&["true"])).into(),
        storages: vec![gone],
        ..Default::default()
    };
    let made = client.rpc.agent.create_container(soon(), &request).await;
    let (code, text) = refusal(made.map(drop));
    assert_eq!(code, Code::INTERNAL, "{text}");
    assert!(text.contains("nowhere"), "{text}");
}

pub async fn mounts_of_a_share_are_looked_up_again(client: &Client<'_>) {
    let below = Storage {
        mount_point: format!("{GUEST_SHARE}/mounted here"),
        ..memory_volume("", &["size=64k"])
    };
    sleeper_with(client, "stale", &below).await;
    let request = RemoveStaleVirtiofsShareMountsRequest::default();
    let agent = &client.rpc.agent;
    for _ in 0..3 {
        agent
            .remove_stale_virtiofs_share_mounts(soon(), &request)
            .await
            .unwrap();
    }
    let request = RemoveContainerRequest {
        container_id: "stale".into(),
        ..Default::default()
    };
    agent.remove_container(soon(), &request).await.unwrap();
}

pub async fn figures_are_text_for_prometheus(client: &Client<'_>) {
    let request = GetMetricsRequest::default();
    let ask = async || {
        let answer = client.rpc.agent.get_metrics(soon(), &request).await;
        answer.unwrap().metrics
    };
    let scrapes = |text: &str| -> u64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("kata_agent_scrape_count "));
        line.unwrap().parse().unwrap()
    };
    let (first, second) = (ask().await, ask().await);
    assert_eq!(scrapes(&first) + 1, scrapes(&second));
    for name in [
        "kata_agent_total_rss ",
        "kata_guest_load{item=\"load1\"} ",
        "kata_guest_cpu_time{cpu=\"total\",item=\"user\"} ",
        "kata_guest_meminfo{item=\"mem_available\"} ",
        "kata_guest_netdev_stat{interface=\"lo\",item=\"recv_bytes\"} ",
    ] {
        let value = second.lines().find_map(|line| line.strip_prefix(name));
        let value: f64 = value.unwrap_or_else(|| panic!("{second}")).parse().unwrap();
        assert!(value >= 0.0);
    }
}
