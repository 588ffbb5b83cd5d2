//! A pod's volumes as the kubelet gives them: directories, files, sockets and devices of the host,
//! and what changes there while the pod runs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use cofferdam_tests::command::run;
use cofferdam_tests::pod::{Member, Pod, one_line};
use cofferdam_tests::{Env, PATIENCE, Suite, cases, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Core: directory_and_file_of_the_host, unix_socket_between_two_containers,
            config_map_is_updated_live, program_is_told_of_a_new_configuration;
        Once: volume_of_a_reader_and_a_writer, empty_dir_of_two_containers, empty_dir_in_memory, read_only_volumes,
            recursively_read_only,
            sub_path, socket_of_the_host, mount_made_later_appears, size_of_dev_shm,
            block_device, forty_disks,
            directory_that_is_missing_is_made, owners_and_modes_are_the_hosts;
        Ours: mounts_that_would_go_to_the_host_are_refused, root_of_the_host_read_only;
    ])
}

fn volume(host: &Path, inside: &str) -> Value {
    json!({"host_path": host, "container_path": inside})
}

fn read_only(host: &Path, inside: &str) -> Value {
    json!({"host_path": host, "container_path": inside, "readonly": true})
}

fn dir(env: &Env, name: &str) -> PathBuf {
    let dir = env.dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// By its uid the kubelet names the directory of a pod's volumes.
fn pod_with_uid(env: &Env) -> Pod<'_> {
    Pod::with(env, json!({"metadata": {"uid": "uid"}}))
}

fn idle<'p>(pod: &'p Pod, name: &str, mounts: &[Value]) -> Member<'p> {
    pod.run_with(name, &["sleep", "3600"], json!({"mounts": mounts}))
}

/// A file system on a directory of the host, until the value goes.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, options: &str) -> Mounted {
        fs::create_dir_all(at).unwrap();
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .unwrap();
        Mounted(at.to_owned())
    }

    fn shared(self) -> Mounted {
        mount(
            None::<&str>,
            &self.0,
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .unwrap();
        self
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn directory_and_file_of_the_host(env: &Env) {
    let (dir, file) = (dir(env, "dir"), env.dir.join("file"));
    fs::write(&file, "one file").unwrap();
    fs::write(dir.join("old"), "from the host").unwrap();
    let pod = Pod::new(env);
    let container = idle(
        &pod,
        "main",
        &[volume(&dir, "/data"), volume(&file, "/etc/one")],
    );
    assert_eq!(
        container
            .sh("cat /etc/one; echo; cat /data/old; echo new >/data/new; echo changed >/etc/one"),
        "one file\nfrom the host"
    );
    assert_eq!(fs::read_to_string(dir.join("new")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "changed\n");
    fs::write(dir.join("later"), "later").unwrap();
    container.wait_until("grep later /data/later");
    container.sh("rm /data/old && mv /data/new /data/renamed");
    assert!(!dir.join("old").exists() && dir.join("renamed").exists());
}

fn directory_that_is_missing_is_made(env: &Env) {
    let missing = env.dir.join("a/b");
    let pod = Pod::new(env);
    idle(&pod, "main", &[volume(&missing, "/data/in/depth")]).sh("echo x >/data/in/depth/file");
    assert_eq!(fs::read_to_string(missing.join("file")).unwrap(), "x\n");
}

fn owners_and_modes_are_the_hosts(env: &Env) {
    let dir = dir(env, "dir");
    nix::unistd::chown(&dir, Some(1000.into()), Some(2000.into())).unwrap();
    let pod = Pod::new(env);
    let user = json!({"run_as_user": {"value": 1000}, "run_as_group": {"value": 2000}});
    let config = json!({"mounts": [volume(&dir, "/data")], "linux": {"security_context": user}});
    let container = pod.run_with("main", &["sleep", "3600"], config);
    container.sh("umask 027; echo x >/data/file; ln -s file /data/link; mkfifo /data/fifo");
    let meta = fs::metadata(dir.join("file")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (1000, 2000, 0o640)
    );
    assert_eq!(fs::read_link(dir.join("link")).unwrap(), Path::new("file"));
    assert!(
        fs::symlink_metadata(dir.join("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

fn read_only_volumes(env: &Env) {
    let (dir, file) = (dir(env, "dir"), env.dir.join("file"));
    fs::write(&file, "text").unwrap();
    let pod = Pod::new(env);
    let container = idle(
        &pod,
        "main",
        &[
            read_only(&dir, "/data"),
            read_only(&file, "/file"),
            volume(&dir, "/same"),
        ],
    );
    let seen = container.sh("touch /data/x 2>&1; echo x 2>&1 >/file; cat /file; touch /same/y");
    assert!(
        seen.contains("Read-only file system") && seen.ends_with("text"),
        "{seen}"
    );
    assert!(dir.join("y").exists() && !dir.join("x").exists());
}

/// By ctr: containerd 2.1's CRI panics when a pod asks for it with any runtime whose features it
/// has not read, which is every one but runc.
fn recursively_read_only(env: &Env) {
    let dir = dir(env, "dir");
    let _below = Mounted::tmpfs(&dir.join("below"), "size=1m");
    let mount = |inside: &str, options: &str| {
        format!(
            "type=bind,src={},dst={inside},options=rbind:{options}",
            dir.display()
        )
    };
    let (all, top) = (mount("/data", "rro"), mount("/plain", "ro"));
    let script = "touch /data/below/x 2>&1; touch /data/x 2>&1; touch /plain/x 2>&1; touch /plain/below/y && echo plain";
    let seen = env
        .run(&["--mount", &all, "--mount", &top], &["sh", "-c", script])
        .ok()
        .text();
    assert_eq!(seen.matches("Read-only file system").count(), 3, "{seen}");
    assert!(seen.ends_with("plain"), "{seen}");
}

/// As node exporters and log collectors have it: below are /proc and /sys, by which a host can be
/// changed.
fn root_of_the_host_read_only(env: &Env) {
    let script = "test -e /host/etc/passwd; mkdir /host/x /host/run/x 2>&1; \
                  echo x 2>&1 >/host/proc/sys/kernel/core_pattern; echo over";
    let mount = "type=bind,src=/,dst=/host,options=rbind:ro";
    let seen = env
        .run(&["--mount", mount], &["sh", "-c", script])
        .ok()
        .text();
    assert!(
        seen.matches("Read-only file system").count() == 3 && seen.ends_with("over"),
        "{seen}"
    );
}

/// As the kubelet writes a configMap: each version in a directory of its own, which `..data` points
/// to.
/// Writes a volume as the kubelet does: `version` is a directory in it, and its contents.
fn swap_in(volume: &Path, version: &str, keys: &[&str]) {
    let old = fs::read_link(volume.join("..data")).ok();
    fs::create_dir(volume.join(version)).unwrap();
    for key in keys {
        fs::write(volume.join(version).join(key), version).unwrap();
    }
    symlink(version, volume.join("..tmp")).unwrap();
    fs::rename(volume.join("..tmp"), volume.join("..data")).unwrap();
    for key in keys.iter().filter(|key| !volume.join(key).is_symlink()) {
        symlink(Path::new("..data").join(key), volume.join(key)).unwrap();
    }
    for entry in fs::read_dir(volume).unwrap().flatten() {
        if entry.path().is_symlink() && !entry.path().exists() {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old)).unwrap();
    }
}

fn config_map_is_updated_live(env: &Env) {
    let map = dir(env, "map");
    swap_in(&map, "..one", &["key"]);
    let pod = Pod::new(env);
    let container = idle(&pod, "main", &[read_only(&map, "/etc/map")]);
    assert_eq!(container.sh("cat /etc/map/key"), "..one");
    swap_in(&map, "..two", &["key"]);
    container.wait_until("grep -q two /etc/map/key");
}

fn program_is_told_of_a_new_configuration(env: &Env) {
    let pod = pod_with_uid(env);
    for kind in ["configmap", "secret", "projected", "downward-api"] {
        let volume = dir(env, &format!("pods/uid/volumes/kubernetes.io~{kind}/it"));
        swap_in(&volume, "..one", &["key", "old"]);
        nix::unistd::chown(&volume.join("..one/key"), None, Some(2000.into())).unwrap();
        let mounts = [read_only(&volume, "/it")];
        let watcher = pod.run_with(kind, &["inotify", "/it"], json!({ "mounts": mounts }));
        let other = idle(&pod, &format!("{kind}-2"), &mounts);
        watcher.wait_for_log("watching");
        assert_eq!(
            watcher.sh("cat /it/key; stat -Lc ' %g' /it/key"),
            "..one 2000"
        );
        swap_in(&volume, "..two", &["key", "new"]);
        watcher.wait_for_log("moved ..data");
        watcher.wait_until("! test -e /it/..one");
        let look = "cat /it/key; echo; ls -A /it";
        assert_eq!(watcher.sh(look), "..two\n..data\n..two\nkey\nnew");
        assert_eq!(other.sh(look), watcher.sh(look));
        let output = other.exec(&["sh", "-c", "echo x >/it/mine"]);
        assert_ne!(output.status, 0, "{output:?}");
        watcher.remove(&["-f"]);
        swap_in(&volume, "..three", &["key"]);
        other.wait_until("grep -q three /it/key");
    }
}

/// Whichever of the two comes first, they meet in one file system.
fn volume_of_a_reader_and_a_writer(env: &Env) {
    let pod = Pod::new(env);
    for order in ["reader-first", "writer-first"] {
        let data = dir(env, order);
        let reader = || {
            let mounts = json!({"mounts": [read_only(&data, "/r")]});
            pod.run_with(&format!("{order}-r"), &["inotify", "/r"], mounts)
        };
        let writer = || {
            let mounts = json!({"mounts": [volume(&data, "/w")]});
            let server = ["talk", "serve", "unix", "/w/s.sock"];
            pod.run_with(&format!("{order}-w"), &server, mounts)
        };
        let (reader, writer) = if order == "reader-first" {
            let reader = reader();
            reader.wait_for_log("watching");
            (reader, writer())
        } else {
            let writer = writer();
            writer.wait_until("test -S /w/s.sock");
            (reader(), writer)
        };
        reader.wait_for_log("watching");
        writer.sh("echo from the writer >/w/file");
        reader.wait_for_log("made file");
        assert_eq!(reader.sh("cat /r/file"), "from the writer");
        assert_eq!(reader.sh("talk ask unix /r/s.sock hello"), "you said hello");
        let output = reader.exec(&["sh", "-c", "echo x >/r/file"]);
        assert!(output.errors().contains("ead-only"), "{output:?}");
        assert_eq!(
            fs::read_to_string(data.join("file")).unwrap(),
            "from the writer\n"
        );
    }
}

fn empty_dir_of_two_containers(env: &Env) {
    let shared = dir(env, "pods/uid/volumes/kubernetes.io~empty-dir/shared");
    let pod = pod_with_uid(env);
    let (one, two) = (
        idle(&pod, "one", &[volume(&shared, "/a")]),
        idle(&pod, "two", &[volume(&shared, "/b")]),
    );
    one.sh("echo hello >/a/file; mkfifo /a/fifo; ln /a/file /a/hard");
    assert_eq!(two.sh("cat /b/hard"), "hello");
    let reader = pod.run_with(
        "reader",
        &["cat", "/c/fifo"],
        json!({"mounts": [volume(&shared, "/c")]}),
    );
    two.sh("echo through >/b/fifo");
    assert_eq!(reader.exit_code(), 0);
    assert_eq!(reader.logs(), "through");
}

fn unix_socket_between_two_containers(env: &Env) {
    let shared = dir(env, "pods/uid/volumes/kubernetes.io~empty-dir/socket");
    let pod = pod_with_uid(env);
    let server = ["talk", "serve", "unix", "/a/s.sock"];
    let server = pod.run_with(
        "server",
        &server,
        json!({"mounts": [volume(&shared, "/a")]}),
    );
    let client = idle(&pod, "client", &[volume(&shared, "/b")]);
    assert_eq!(client.sh("talk ask unix /b/s.sock hello"), "you said hello");
    server.remove(&["-f"]);
    let output = client.exec(&["sh", "-c", "timeout 1 talk ask unix /b/s.sock hello"]);
    assert_ne!(output.status, 0, "who answers? {output:?}");
}

fn empty_dir_in_memory(env: &Env) {
    let path = env
        .dir
        .join("pods/uid/volumes/kubernetes.io~empty-dir/memory");
    let _mounted = Mounted::tmpfs(&path, "size=8m");
    let pod = pod_with_uid(env);
    let (one, two) = (
        idle(&pod, "one", &[volume(&path, "/a")]),
        idle(&pod, "two", &[volume(&path, "/b")]),
    );
    one.sh("echo hello >/a/file");
    assert_eq!(two.sh("cat /b/file; stat -f -c %T /b"), "hello\ntmpfs");
    let output = one.exec(&["dd", "if=/dev/zero", "of=/a/large", "bs=1M", "count=16"]);
    assert!(
        output.errors().contains("No space left"),
        "the size limit of 8 MiB does not hold: {output:?}"
    );
}

fn sub_path(env: &Env) {
    let dir = dir(env, "dir");
    fs::create_dir_all(dir.join("sub/deep")).unwrap();
    fs::write(dir.join("sub/deep/file"), "deep").unwrap();
    // The kubelet binds a subPath by itself and gives the bind's place.
    let bind = env.dir.join("volume-subpaths/0");
    fs::create_dir_all(&bind).unwrap();
    mount(
        Some(&dir.join("sub")),
        &bind,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let _mounted = Mounted(bind.clone());
    let pod = Pod::new(env);
    let container = idle(
        &pod,
        "main",
        &[
            volume(&bind, "/sub"),
            volume(&dir.join("sub/deep/file"), "/file"),
        ],
    );
    assert_eq!(
        container.sh("cat /sub/deep/file; echo; cat /file; echo; ls /sub"),
        "deep\ndeep\ndeep"
    );
}

fn socket_of_the_host(env: &Env) {
    let dir = dir(env, "host");
    let (alone, within) = (env.dir.join("alone.sock"), dir.join("within.sock"));
    let serve = |path: &Path| {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut text = [0; 100];
                let count = stream.read(&mut text).unwrap();
                stream.write_all(b"the host heard ").unwrap();
                stream.write_all(&text[..count]).unwrap();
            }
        });
    };
    serve(&alone);
    let pod = Pod::new(env);
    let client = idle(
        &pod,
        "client",
        &[volume(&alone, "/run/host.sock"), volume(&dir, "/run/dir")],
    );
    for _ in 0..3 {
        // One read may bring less than all of it.
        let said = client.sh("talk ask unix /run/host.sock hello");
        assert!(said.starts_with("the host heard"), "{said}");
    }
    serve(&within);
    assert!(
        client
            .sh("talk ask unix /run/dir/within.sock hello")
            .starts_with("the host heard")
    );
}

fn mount_made_later_appears(env: &Env) {
    let path = env.dir.join("shared");
    let _shared = Mounted::tmpfs(&path, "size=1m").shared();
    let pod = Pod::new(env);
    let mut slave = volume(&path, "/data");
    slave["propagation"] = json!(1);
    let container = idle(&pod, "main", &[slave]);
    fs::create_dir(path.join("new")).unwrap();
    let _new = Mounted::tmpfs(&path.join("new"), "size=1m");
    fs::write(path.join("new/file"), "later").unwrap();
    container.wait_until("grep -q later /data/new/file");
}

fn mounts_that_would_go_to_the_host_are_refused(env: &Env) {
    let path = env.dir.join("shared");
    let _shared = Mounted::tmpfs(&path, "size=1m").shared();
    let pod = Pod::new(env);
    let mut both = volume(&path, "/data");
    both["propagation"] = json!(2);
    let config = json!({"mounts": [both]});
    let (output, _) = pod.try_create("main", &["sleep", "3600"], config);
    // Which of the two says no is the runtime's business.
    let output = if output.status == 0 {
        env.crictl(&["start", &output.text()])
    } else {
        output
    };
    let errors = one_line(&output);
    assert!(
        errors.contains("/data") && errors.contains("Bidirectional"),
        "{errors}"
    );
    pod.idle("next").exec(&["true"]).ok();
}

fn size_of_dev_shm(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.idle("main");
    assert_eq!(
        container.sh("df -k /dev/shm | awk 'NR == 2 {print $2}'"),
        "65536"
    );
    assert_eq!(
        container.sh("stat -c %a /dev/shm; stat -f -c %T /dev/shm"),
        "1777\ntmpfs"
    );
}

/// A loop device on a file, until the value goes.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Loop {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]).arg(file);
        Loop(run(command, Duration::from_secs(20)).ok().text())
    }
}

impl Loop {
    /// At the size of the file.
    fn look_again(&self) {
        let mut command = Command::new("losetup");
        command.args(["--set-capacity", &self.0]);
        run(command, Duration::from_secs(20)).ok();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let mut command = Command::new("losetup");
        command.args(["--detach", &self.0]);
        run(command, Duration::from_secs(20));
    }
}

/// More than the machine has root ports.
fn forty_disks(env: &Env) {
    let disks: Vec<Loop> = (0..40)
        .map(|number| {
            let file = env.dir.join(format!("disk{number}"));
            fs::write(&file, format!("{number:02},")).unwrap();
            fs::File::options()
                .write(true)
                .open(&file)
                .and_then(|file| file.set_len(1 << 20))
                .unwrap();
            Loop::new(&file)
        })
        .collect();
    let pod = Pod::new(env);
    let devices: Vec<_> = disks
        .iter()
        .enumerate()
        .map(|(number, disk)| {
            json!({"host_path": disk.0, "container_path": format!("/dev/x{number}"),
                "permissions": "r"})
        })
        .collect();
    let devices = json!({ "devices": devices });
    let container = pod.run_with("main", &["sleep", "3600"], devices.clone());
    let all: String = (0..40).map(|number| format!("{number:02},")).collect();
    let read = "for i in $(seq 0 39); do head -c 3 /dev/x$i; done";
    assert_eq!(container.sh(read), all);
    // What it had is free for the next one.
    container.remove(&["-f"]);
    let next = pod.run_with("next", &["sleep", "3600"], devices);
    assert_eq!(next.sh(read), all);
    next.remove(&["-f"]);
    pod.stop();
}

fn block_device(env: &Env) {
    let file = env.dir.join("disk");
    let disk = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&file)
        .unwrap();
    disk.set_len(8 << 20).unwrap();
    disk.write_all_at(b"from the host", 0).unwrap();
    disk.sync_all().unwrap();
    let device = Loop::new(&file);
    let pod = Pod::new(env);
    let devices = json!({"devices": [{"host_path": device.0, "container_path": "/dev/xvda",
        "permissions": "rwm"}]});
    let container = pod.run_with("main", &["sleep", "3600"], devices);
    assert_eq!(
        container
            .sh("test -b /dev/xvda; head -c 13 /dev/xvda; echo; blockdev --getsize64 /dev/xvda"),
        "from the host\n8388608"
    );
    container.sh("printf 'from the guest' | dd of=/dev/xvda bs=512 seek=8 conv=fsync 2>/dev/null");
    let mut text = [0; 14];
    disk.read_exact_at(&mut text, 8 * 512).unwrap();
    assert_eq!(&text, b"from the guest");
    container.sh("mke2fs -F /dev/xvda >/dev/null");
    disk.set_len(16 << 20).unwrap();
    device.look_again();
    eventually("the disk has grown", PATIENCE, || {
        (container.sh("blockdev --getsize64 /dev/xvda") == "16777216").then_some(())
    });
    container.sh("printf end | dd of=/dev/xvda bs=512 seek=32767 conv=fsync 2>/dev/null");
    container.remove(&["-f"]);
    pod.stop();
}
