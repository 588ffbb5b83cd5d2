//! containerd's snapshotter for erofs, whose layers the guest mounts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::process::{Command, ExitCode};

use cofferdam_tests::command::{Output, run};
use cofferdam_tests::cri::LAYERS;
use cofferdam_tests::pod::Pod;
use cofferdam_tests::{Container, Env, PATIENCE, Release, Suite, assets, cases};
use serde_json::json;

fn main() -> ExitCode {
    Suite::of_pods().run_on(
        &[Release::V2_4, Release::V2_2, Release::V2_3],
        cases![
            Ours: the_guest_mounts_the_layers, what_was_written_is_committed, pods_of_layers;
        ],
    )
}

/// containerd's own ctr of the release, as the tests' does not know such mounts.
fn ctr(env: &Env, args: &[&str]) -> Output {
    let mut command = Command::new(assets::release_bin(env.daemon.release).join("ctr"));
    command
        .arg("--address")
        .arg(&env.daemon.socket)
        .args(["--namespace", &env.daemon.namespace()])
        .args(args);
    run(command, PATIENCE)
}

/// A container on the image's layers.
fn idle<'e>(env: &'e Env, id: &str) -> Container<'e> {
    let archive = assets::image(&env.dir, true).display().to_string();
    let import = ["images", "import", "--local", "--snapshotter", "erofs"];
    ctr(env, &[&import[..], &[&archive]].concat()).ok();
    let flags = ["--snapshotter", "erofs", "--runtime", env.runtime.name()];
    let create = ["container", "create"];
    let command = [assets::IMAGE, id, "sleep", "3600"];
    ctr(env, &[&create[..], &flags, &command].concat()).ok();
    start(env, id)
}

fn start<'e>(env: &'e Env, id: &str) -> Container<'e> {
    ctr(env, &["task", "start", "--detach", "--null-io", id]).ok();
    Container::adopt(env, id)
}

fn end(env: &Env, container: &Container<'_>, id: &str) {
    container.kill("SIGKILL", &[]).ok();
    container.wait_for("STOPPED");
    ctr(env, &["task", "delete", id]);
}

fn sh(container: &Container<'_>, script: &str) -> String {
    container.exec(&["sh", "-c", script]).ok().text()
}

fn the_guest_mounts_the_layers(env: &Env) {
    let id = env.id();
    let container = idle(env, &id);
    let root = sh(&container, "grep ' / ' /proc/mounts");
    assert!(root.contains("lowerdir=/run/layers/"), "{root}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(" erofs "),
        "the host mounted them: {mounts}"
    );
    sh(&container, "echo kept >/file");
    end(env, &container, &id);
    let container = start(env, &id);
    assert_eq!(sh(&container, "cat /file"), "kept");
    end(env, &container, &id);
    ctr(env, &["container", "delete", &id]).ok();
}

fn what_was_written_is_committed(env: &Env) {
    let id = env.id();
    let container = idle(env, &id);
    sh(&container, "echo kept >/file; rm /bin/vi");
    end(env, &container, &id);
    let layer = format!("{id}-layer");
    let snapshots = |args: &[&str]| {
        let command = ["snapshots", "--snapshotter", "erofs"];
        ctr(env, &[&command[..], args].concat()).ok()
    };
    snapshots(&["commit", &layer, &id]);
    let place = "root/io.containerd.snapshotter.v1.erofs/snapshots";
    let made = fs::read_dir(env.daemon.config.with_file_name(place)).unwrap();
    let made = made.map(|entry| entry.unwrap().path().join("layer.erofs"));
    let newest = made.max_by_key(|file| {
        let changed = fs::metadata(file).and_then(|metadata| metadata.modified());
        changed.ok()
    });
    let newest = newest.unwrap();
    let at = env.dir.join("layer");
    fs::create_dir_all(&at).unwrap();
    let mut mount = Command::new("mount");
    mount
        .args(["-t", "erofs", "-o", "ro,loop"])
        .arg(&newest)
        .arg(&at);
    run(mount, PATIENCE).ok();
    let file = fs::read_to_string(at.join("file"));
    let whiteout = fs::symlink_metadata(at.join("bin/vi")).map(|metadata| metadata.file_type());
    nix::mount::umount(&at).unwrap();
    assert_eq!(file.unwrap(), "kept\n");
    assert!(whiteout.unwrap().is_char_device());
    ctr(env, &["container", "delete", &id]).ok();
    snapshots(&["delete", &layer]);
}

fn pods_of_layers(env: &Env) {
    let (pod, started) = Pod::start_with(env, LAYERS, json!({}));
    started.ok();
    let (first, second) = (pod.idle("first"), pod.idle("second"));
    for container in [&first, &second] {
        let root = container.sh("grep ' / ' /proc/mounts");
        assert!(root.contains("lowerdir=/run/layers/"), "{root}");
        container.sh("test ! -e /file && echo mine >/file");
    }
    // What it had is free for the next one.
    drop(first);
    let third = pod.idle("third");
    third.sh("test ! -e /file");
    pod.stop();
}
