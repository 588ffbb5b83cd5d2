//! What a container's world looks like: namespaces, file system, devices; and what happens when it
//! cannot be made.

use guest_protocol::POD_PID_PATH;
use guest_protocol::protocols::agent::CreateContainerRequest;
use guest_protocol::protocols::oci::{LinuxDevice, LinuxIDMapping, LinuxNamespace};
use ttrpc::Code;

use super::client::{Client, linux, mount, process, refusal, soon};

pub async fn a_container_runs_in_namespaces_of_its_own(client: &Client<'_>) {
    let script =
        "echo $$; cat /proc/1/comm; grep ^0: /proc/self/cgroup; ls /proc/self/ns; pwd; umask";
    let output = client.script("own-ns", script, |_| {}).await;
    assert_eq!(output.status, 0, "{output:?}");
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[..3], ["1", "sh", "0::/"]);
    assert_eq!(lines[lines.len() - 2..], ["/", "0022"]);
}

pub async fn a_missing_command_fails_create_with_the_words_of_runc(client: &Client<'_>) {
    for (command, words) in [
        (
            "levitate",
            "exec: \"levitate\": executable file not found in $PATH",
        ),
        (
            "/bin/levitate",
            "exec: \"/bin/levitate\": stat /bin/levitate: no such file or directory",
        ),
        ("/etc/plain", "exec: \"/etc/plain\": permission denied"),
        ("/bin", "exec: \"/bin\": permission denied"),
    ] {
        let (code, text) = refusal(client.create("missing", client.spec(&[command])).await);
        assert_eq!((code, text.as_str()), (Code::INTERNAL, words));
    }
}

pub async fn a_command_that_cannot_be_executed_fails_start(client: &Client<'_>) {
    client
        .create("orphan", client.spec(&["/bin/orphan"]))
        .await
        .unwrap();
    let (code, text) = refusal(client.start("orphan").await);
    assert_eq!(
        (code, text.as_str()),
        (
            Code::INTERNAL,
            "exec /bin/orphan: no such file or directory"
        )
    );
    client.wait("orphan", "").await.unwrap();
    client.remove("orphan").await.unwrap();

    // Killed before it could start.
    client
        .create("early", client.spec(&["true"]))
        .await
        .unwrap();
    client.kill("early", "", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("early", "").await.unwrap(), 137);
    let (_, text) = refusal(client.start("early").await);
    assert_eq!(text, "container early has ended before it was started");
    client.remove("early").await.unwrap();
}

pub async fn a_failed_create_leaves_nothing_behind(client: &Client<'_>) {
    let mut spec = client.spec(&["true"]);
    spec.Mounts
        .push(mount("/x", "bind", "/no/such/source", &["bind"]));
    let (_, text) = refusal(client.create("again", spec).await);
    assert_eq!(
        text,
        "mount /no/such/source on /x: no such file or directory"
    );
    let mut spec = client.spec(&["true"]);
    spec.Root.mut_or_insert_default().Path = "/no/such/root".into();
    let (_, text) = refusal(client.create("again", spec).await);
    assert_eq!(
        text,
        "root file system /no/such/root: no such file or directory"
    );
    // The id and its cgroup are free.
    assert_eq!(client.run("again", client.spec(&["true"])).await.status, 0);
    let (code, _) = refusal(client.remove("again").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
}

pub async fn what_the_kernel_shows_too_much_of_is_hidden(client: &Client<'_>) {
    let script =
        "ls /sys/firmware; cat /proc/kcore 2>/dev/null; cat /proc/keys; ls -A /proc/acpi \
         /proc/scsi 2>/dev/null
        (echo 1 >/proc/sys/kernel/panic) 2>&1 | grep -o 'Read-only.*'; (mkdir /sys/x) 2>&1 | grep -o Read-only.*";
    let output = client.script("masked", script, |_| {}).await;
    let text = output
        .stdout
        .replace("/proc/acpi:\n", "")
        .replace("/proc/scsi:\n", "");
    assert_eq!(
        text.trim_start(),
        "Read-only file system\nRead-only file system\n",
        "{output:?}"
    );
}

pub async fn a_read_only_root_cannot_be_written(client: &Client<'_>) {
    let output = client
        .script(
            "ro-root",
            "touch /x 2>&1; touch /run/y && echo fine; exit 3",
            |spec| {
                spec.Root.mut_or_insert_default().Readonly = true;
            },
        )
        .await;
    assert_eq!(output.stdout, "touch: /x: Read-only file system\nfine\n");
    assert_eq!(output.status, 3);
}

pub async fn mounts_are_made_as_told(client: &Client<'_>) {
    let seed = client.guest.rootfs.join("seed").display().to_string();
    let file = format!("{seed}/file");
    let script = "cat /mnt/dir/file /etc/bound; (echo x >/mnt/dir/new) 2>&1 | grep -o Read-only.*; (echo x >/etc/bound) \
        2>&1 | grep -o Read-only.*; grep -c '/mnt/dir.*ro,nosuid,nodev' /proc/self/mountinfo; \
        echo rw >/mnt/rw/rw && rm \
        /mnt/rw/rw; ls /nowhere/yet/there/dir && echo dangling";
    let output = client
        .script("mounts", script, |spec| {
            spec.Mounts.extend([
                mount(
                    "/mnt/dir",
                    "bind",
                    &seed,
                    &["rbind", "ro", "nosuid", "nodev"],
                ),
                mount("/etc/bound", "bind", &file, &["bind", "ro", "rprivate"]),
                mount("/mnt/rw", "bind", &seed, &["rbind", "rw"]),
                // The image has a symlink to where nothing is.
                mount("/dangling/there", "bind", &seed, &["rbind", "rro"]),
            ]);
        })
        .await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(
        lines[..5],
        [
            "seeded",
            "seeded",
            "Read-only file system",
            "Read-only file system",
            "1"
        ],
        "{output:?}"
    );
}

pub async fn a_symlink_of_the_image_cannot_lead_a_mount_outside(client: &Client<'_>) {
    let seed = client.guest.rootfs.join("seed").display().to_string();
    let output = client
        .script("outside", "ls /tmp/escape && readlink /outside", |spec| {
            spec.Mounts
                .push(mount("/outside/escape", "bind", &seed, &["rbind"]));
        })
        .await;
    assert_eq!(
        output.stdout, "file\nlink\n/../../../../../../tmp\n",
        "{output:?}"
    );
    if !client.guest.is_vm {
        assert!(!std::fs::exists("/tmp/escape").unwrap());
    }
    let mut spec = client.spec(&["true"]);
    spec.Mounts[0] = mount("/outside", "proc", "proc", &[]);
    let (_, text) = refusal(client.create("outside", spec).await);
    assert_eq!(text, "mount proc on /outside: the place is a symlink");
}

pub async fn a_tmpfs_can_begin_with_the_images_files(client: &Client<'_>) {
    let output = client
        .script(
            "copy-up",
            "cat /seed/link; stat -c %a /seed/file; (touch /seed/x) 2>&1",
            |spec| {
                spec.Mounts.push(mount(
                    "/seed",
                    "tmpfs",
                    "tmpfs",
                    &["tmpcopyup", "ro", "size=1m"],
                ));
            },
        )
        .await;
    assert_eq!(
        output.stdout,
        "seeded\n644\ntouch: /seed/x: Read-only file system\n"
    );
}

pub async fn the_usual_devices_are_there(client: &Client<'_>) {
    let own = LinuxDevice {
        Path: "/dev/own/zero".into(),
        Type: "c".into(),
        Major: 1,
        Minor: 5,
        FileMode: 0o600,
        UID: 33,
        GID: 33,
        ..Default::default()
    };
    let script = "cd /dev; for d in null zero full random urandom tty; do [ -c $d ] || echo no $d; done
        for l in fd stdin stdout stderr ptmx; do readlink $l; done; stat -c '%t:%T %a %u' own/zero; head -c 3 zero | wc -c; echo x >null";
    let output = client
        .script("devices", script, |spec| linux(spec).Devices.push(own))
        .await;
    let links = "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n";
    assert_eq!(
        output.stdout,
        format!("{links}1:5 600 33\n3\n"),
        "{output:?}"
    );
}

pub async fn sysctls_and_hostname_are_set(client: &Client<'_>) {
    let output = client
        .script("sysctl", "hostname; cat /proc/sys/kernel/msgmax", |spec| {
            spec.Hostname = "harbour".into();
            linux(spec)
                .Sysctl
                .insert("kernel.msgmax".into(), "8100".into());
        })
        .await;
    assert_eq!(output.stdout, "harbour\n8100\n", "{output:?}");
}

pub async fn containers_can_share_a_pid_namespace(client: &Client<'_>) {
    let join = async |id: &str, args: &[&str]| {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: Some(client.spec(args)).into(),
            sandbox_pidns: true,
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
        let status = client.wait(id, "").await.unwrap();
        client.remove(id).await.unwrap();
        (output.stdout, status)
    };
    let (seen, _) = join("sharer", &["sh", "-c", "cat /proc/1/comm; echo $$"]).await;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[0], "pause", "{seen}");
    assert_ne!(lines[1], "1");
    // A background process does not outlive its container's first one.
    assert_eq!(
        join("leaver", &["sh", "-c", "sleep 1001 & exit 4"]).await,
        (String::new(), 4)
    );
    let (seen, _) = join("looker", &["ps"]).await;
    assert!(seen.contains("pause") && !seen.contains("1001"), "{seen}");
}

pub async fn a_container_can_join_the_pid_namespace_of_another(client: &Client<'_>) {
    client.sleeper("target").await;
    let mut spec = client.spec(&["cat", "/proc/1/comm"]);
    for namespace in &mut spec.Linux.mut_or_insert_default().Namespaces {
        if namespace.Type == "pid" {
            namespace.Path = format!("{POD_PID_PATH}target");
        }
    }
    let streams = client.streams("debugger", "").await;
    client.create("debugger", spec.clone()).await.unwrap();
    client.start("debugger").await.unwrap();
    assert_eq!(streams.finish(b"").await.stdout, "sleep\n");
    client.wait("debugger", "").await.unwrap();
    client.remove("debugger").await.unwrap();
    client.remove("target").await.unwrap();
    let (_, text) = refusal(client.create("debugger", spec).await);
    assert!(text.contains("target"), "{text}");
}

pub async fn a_user_namespace_maps_root_to_somebody(client: &Client<'_>) {
    let map = LinuxIDMapping {
        ContainerID: 0,
        HostID: 100_000,
        Size: 65536,
        ..Default::default()
    };
    let change = |spec: &mut guest_protocol::protocols::oci::Spec| {
        let user = LinuxNamespace {
            Type: "user".into(),
            ..Default::default()
        };
        let linux = linux(spec);
        linux.Namespaces.push(user);
        linux.UIDMappings = vec![map.clone()];
        linux.GIDMappings = vec![map.clone()];
    };
    // The test's own directory is not open to everybody.
    if client.guest.is_vm {
        let output = client
            .script(
                "user-ns",
                "id -u; cat /proc/self/uid_map; echo hello >/dev/null && touch /run/mine && echo \
                 fine",
                change,
            )
            .await;
        let words: Vec<&str> = output.stdout.split_whitespace().collect();
        assert_eq!(words, ["0", "0", "100000", "65536", "fine"], "{output:?}");
    }
}

pub async fn a_missing_working_directory_is_made(client: &Client<'_>) {
    let output = client
        .script("cwd", "pwd", |spec| {
            process(spec).Cwd = "/run/made/for/you".into();
            spec.Root.mut_or_insert_default().Readonly = true;
        })
        .await;
    assert_eq!(output.stdout, "/run/made/for/you\n", "{output:?}");
}
