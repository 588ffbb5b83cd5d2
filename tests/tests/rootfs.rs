//! Root file systems as snapshotters give them: overlays, disks in files, directories.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cofferdam_tests::bundle::{Bundle, tree};
use cofferdam_tests::command::run;
use cofferdam_tests::task::{drain, end, fifo};
use cofferdam_tests::{Env, PATIENCE, Suite, assets, cases};
use containerd_shim_protos::api::Mount;
use nix::sys::stat::{Mode, SFlag, mknod};
use serde_json::json;

fn main() -> ExitCode {
    Suite::new().run(cases![
        Once: overlay_with_very_long_options, bind_mount_as_root, image_file_as_root;
        Ours: root_in_memory_leaves_nothing_on_the_host, a_hundred_layers,
            layers_merged_in_one_file_system, layers_below_a_directory_of_the_host,
            layers_that_cannot_be_mounted_are_refused, full_disk_of_the_host_is_the_writers_error;
    ])
}

/// Runs `script` with these mounts as the root file system; gives its output.
fn output_on(env: &Env, rootfs: Vec<Mount>, script: &str) -> String {
    let bundle = Bundle::new(env, &["/bin/sh", "-c", script]);
    bundle.edit(|spec| spec["root"] = json!({"path": "rootfs"}));
    let named = |what: &str| fifo(env, &format!("{}-{what}", bundle.id));
    let ((stdout, mut output), (stderr, _errors)) = (named("out"), named("err"));
    let task = bundle.start();
    let io = (rootfs, stdout, stderr);
    task.create_with(|request| (request.rootfs, request.stdout, request.stderr) = io)
        .unwrap();
    task.start("").unwrap();
    let status = task.wait("").unwrap().exit_status;
    let text = String::from_utf8_lossy(&drain(&mut output)).into_owned();
    assert_eq!(status, 0, "{text}");
    end(&task);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(&*bundle.dir.to_string_lossy()),
        "still mounted after Delete"
    );
    fs::remove_dir(bundle.dir.join("rootfs")).expect("containerd can remove the bundle");
    text
}

fn mount(kind: &str, source: &str, options: &[String]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.to_vec(),
        ..Default::default()
    }
}

fn overlay_with_very_long_options(env: &Env) {
    let dir = |name: &str| {
        let path = env.dir.join(name);
        fs::create_dir_all(&path).unwrap();
        path.to_string_lossy().into_owned()
    };
    let mut layers: Vec<String> = (0..100)
        .map(|number| {
            let layer = dir(&format!("snapshots/with-a-name-of-some-length/{number}/fs"));
            fs::write(PathBuf::from(&layer).join(format!("file{number}")), "").unwrap();
            layer
        })
        .collect();
    layers.push(dir("snapshots/with-a-name-of-some-length/base/fs"));
    assets::busybox_tree(Path::new(layers.last().unwrap()));
    let lower = format!("lowerdir={}", layers.join(":"));
    assert!(lower.len() > 4096);
    let options = [
        format!("workdir={}", dir("work")),
        format!("upperdir={}", dir("upper")),
        lower,
    ];
    let text = output_on(
        env,
        vec![mount("overlay", "overlay", &options)],
        "ls -d /file* | wc -l; echo new >/file1",
    );
    assert_eq!(text.trim(), "100");
    assert_eq!(
        fs::read_to_string(env.dir.join("upper/file1")).unwrap(),
        "new\n"
    );
}

/// By the annotation of one container, on a host that allows it.
fn root_in_memory_leaves_nothing_on_the_host(env: &Env) {
    let (tree, config) = (env.dir.join("tree"), env.dir.join("allowed.toml"));
    assets::busybox_tree(&tree);
    fs::write(tree.join("etc/old"), "old\n").unwrap();
    fs::write(&config, "enable_annotations = [\"root_in_memory\"]\n").unwrap();
    let (tree_path, config) = (tree.display().to_string(), config.display().to_string());
    let flags = |annotation| {
        [
            "--runtime-config-path",
            &config,
            "--annotation",
            annotation,
            "--env=PATH=/bin",
            "--rootfs",
            &tree_path,
        ]
        .map(str::to_owned)
    };
    let flags = flags("io.cofferdam.root_in_memory=true");
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let container = env.detached(&flags, &["sleep", "3600"]);
    let script = "cat /etc/old && rm /etc/old && echo new >/etc/new && mkdir -p /a/b && mv /a /c && \
                  echo more >>/etc/passwd && chown 7:8 /etc/passwd && dd if=/dev/zero of=/large bs=1M count=64";
    container.exec(&["sh", "-c", script]).ok();
    let seen = "ls -d /etc/old /etc/new /c/b; tail -n1 /etc/passwd; stat -c %u:%g /etc/passwd";
    let seen = container.exec(&["sh", "-c", seen]).text();
    assert_eq!(seen, "/c/b\n/etc/new\nmore\n7:8");
    let passwd = fs::read_to_string(tree.join("etc/passwd")).unwrap();
    assert!(!passwd.contains("more") && tree.join("etc/old").exists());
    for made in ["etc/new", "a", "c", "large"] {
        assert!(!tree.join(made).exists(), "{made} is on the host");
    }
    // A copy that the container would not see is refused.
    let (pid, _) = container.listed().unwrap();
    assert!(fs::write(format!("/proc/{pid}/root/copied"), "").is_err());
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    let refused = env.run(
        &["--annotation", "io.cofferdam.root_in_memory=true"],
        &["true"],
    );
    refused.fails_with(&["io.cofferdam.root_in_memory is not allowed"]);
}

/// As the blockfile snapshotter gives it; devmapper gives a device in the same way.
fn image_file_as_root(env: &Env) {
    let image = env.dir.join("image");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let mut mkfs = Command::new("mke2fs");
    mkfs.args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(tree())
        .arg(&image);
    run(mkfs, PATIENCE).ok();
    let rootfs = || {
        vec![mount(
            "ext4",
            &image.to_string_lossy(),
            &["loop".to_owned()],
        )]
    };
    output_on(env, rootfs(), "echo kept >/file");
    let text = output_on(
        env,
        rootfs(),
        "cat /file; grep ' / ' /proc/mounts | cut -d' ' -f3",
    );
    assert_eq!(text.trim(), "kept\next4");
}

/// Layers as the snapshotter for erofs gives them, the lowest first: busybox, and files that tell
/// them apart. The second takes one of the first's away.
struct Layers {
    files: Vec<String>,
    writable: String,
}

impl Layers {
    fn new(env: &Env, count: usize) -> Layers {
        let layer = |number: usize| {
            let dir = env.dir.join(format!("layer{number}"));
            fs::create_dir_all(dir.join("layers")).unwrap();
            fs::write(dir.join(format!("layers/{number}")), number.to_string()).unwrap();
            match number {
                0 => {
                    assets::busybox_tree(&dir);
                    fs::write(dir.join("gone"), "").unwrap();
                }
                1 => mknod(&dir.join("gone"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap(),
                _ => {}
            }
            let file = env.dir.join(format!("layer{number}.erofs"));
            mkfs_erofs(&[file.as_path(), &dir], &[]);
            file.display().to_string()
        };
        Layers {
            files: (0..count).map(layer).collect(),
            writable: env.dir.join("rwlayer.img").display().to_string(),
        }
    }

    /// With a writable layer in a file, which is made by the one who mounts it.
    fn list(&self, lower: Vec<Mount>) -> Vec<Mount> {
        let size = format!("X-containerd.mkfs.size={}", 64 << 20);
        let options = ["X-containerd.mkfs.fs=ext4", &size, "rw", "loop"];
        let mut list = vec![mount(
            "mkfs/ext4",
            &self.writable,
            &options.map(str::to_owned),
        )];
        let name = match lower.len() {
            1 => "{{ mount 1 }}".to_owned(),
            count => format!("{{{{ overlay 1 {count} }}}}"),
        };
        list.extend(lower);
        let directory = |name| format!("X-containerd.mkdir.path={{{{ mount 0 }}}}/{name}:0755");
        let options = [
            directory("upper"),
            directory("work"),
            "workdir={{ mount 0 }}/work".to_owned(),
            "upperdir={{ mount 0 }}/upper".to_owned(),
            format!("lowerdir={name}"),
        ];
        list.push(mount("format/mkdir/overlay", "overlay", &options));
        list
    }

    /// The topmost first.
    fn lower(&self) -> Vec<Mount> {
        let options = ["ro", "loop"].map(str::to_owned);
        let layer = |file: &String| mount("erofs", file, &options);
        self.files.iter().rev().map(layer).collect()
    }
}

fn mkfs_erofs(paths: &[&Path], options: &[&str]) {
    let mut mkfs = Command::new(assets::erofs().join("mkfs.erofs"));
    // As containerd does; other layers cannot be merged.
    mkfs.args(["--quiet", "-Enoinline_data"]);
    mkfs.args(options).args(paths);
    run(mkfs, PATIENCE).ok();
}

const LOOK: &str = "ls /layers | wc -l; test ! -e /gone; stat -c %a /; \
                    grep ' / ' /proc/mounts | cut -d' ' -f3";

fn a_hundred_layers(env: &Env) {
    let layers = Layers::new(env, 100);
    let list = || layers.list(layers.lower());
    let script = format!("{LOOK}; echo kept >/file; rm /layers/*");
    let text = output_on(env, list(), &script);
    assert_eq!(text, "100\n755\noverlay\n");
    // containerd mounts this without its journal when it commits.
    let mut check = Command::new("e2fsck");
    check.args(["-fn", &layers.writable]);
    run(check, PATIENCE).ok();
    let text = output_on(env, list(), "cat /file; ls /layers");
    assert_eq!(text, "kept\n");
}

/// containerd 2.3 and later: one file has the names of all layers, whose files have the data.
fn layers_merged_in_one_file_system(env: &Env) {
    let layers = Layers::new(env, 3);
    let merged = env.dir.join("fsmeta.erofs");
    let files = layers.files.iter().map(Path::new);
    let files: Vec<&Path> = std::iter::once(&*merged).chain(files).collect();
    mkfs_erofs(&files, &["--aufs", "--ovlfs-strip=1"]);
    let mut options = ["ro", "loop"].map(str::to_owned).to_vec();
    options.extend(layers.files.iter().map(|file| format!("device={file}")));
    let lower = vec![mount("erofs", &merged.to_string_lossy(), &options)];
    let script = format!("{LOOK}; cat /layers/*");
    let text = output_on(env, layers.list(lower), &script);
    assert_eq!(text, "3\n755\noverlay\n012");
}

/// Without a size for writable layers the snapshotter gives directories of the host.
fn layers_below_a_directory_of_the_host(env: &Env) {
    let layers = Layers::new(env, 3);
    let [upper, work] = ["fs", "work"].map(|name| {
        let dir = env.dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        dir.display().to_string()
    });
    let mut list = layers.lower();
    let options = [
        format!("workdir={work}"),
        format!("upperdir={upper}"),
        "lowerdir={{ overlay 0 2 }}".to_owned(),
    ];
    list.push(mount("format/mkdir/overlay", "overlay", &options));
    let script = format!("{LOOK}; echo kept >/file");
    let text = output_on(env, list, &script);
    assert_eq!(text, "3\n755\nvirtiofs\n");
    assert_eq!(
        fs::read_to_string(format!("{upper}/file")).unwrap(),
        "kept\n"
    );
    let loops = run(Command::new("losetup"), PATIENCE).ok().text();
    assert!(!loops.contains(&*env.dir.to_string_lossy()), "{loops}");
}

fn layers_that_cannot_be_mounted_are_refused(env: &Env) {
    let layers = Layers::new(env, 1);
    let refused = |list: Vec<Mount>| {
        let bundle = Bundle::new(env, &["/bin/true"]);
        bundle.edit(|spec| spec["root"] = json!({"path": "rootfs"}));
        let task = bundle.start();
        let error = task
            .create_with(|request| request.rootfs = list)
            .unwrap_err();
        let error = error.message;
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let mut verified = layers.lower();
    verified[0]
        .options
        .push("X-containerd.dmverity=/metadata".to_owned());
    let error = refused(layers.list(verified));
    assert!(error.contains("dmverity_mode"), "{error}");
    let mut list = layers.list(layers.lower());
    list.remove(1);
    let error = refused(list);
    assert!(error.contains("names no mount before it"), "{error}");
    let broken = env.dir.join("layer0.erofs");
    fs::write(&broken, vec![0; 4096]).unwrap();
    let error = refused(layers.list(layers.lower()));
    assert!(error.contains("/run/layers/"), "{error}");
}

/// As under runc, the writer is told, and nobody else waits.
fn full_disk_of_the_host_is_the_writers_error(env: &Env) {
    let small = env.dir.join("small");
    fs::create_dir(&small).unwrap();
    let none = None::<&str>;
    let size = Some("size=40m");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(none, &small, Some("tmpfs"), flags, size).unwrap();
    let image = small.join("image");
    let mut mkfs = Command::new("mke2fs");
    mkfs.args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(tree())
        .arg(&image)
        .arg("200M");
    run(mkfs, PATIENCE).ok();
    let rootfs = vec![mount(
        "ext4",
        &image.to_string_lossy(),
        &["loop".to_owned()],
    )];
    let script = "dd if=/dev/zero of=/large bs=1M count=120 conv=fsync 2>/dev/null || echo told";
    let text = output_on(env, rootfs, script);
    assert_eq!(text.trim(), "told");
    nix::mount::umount(&small).unwrap();
}

fn bind_mount_as_root(env: &Env) {
    let options = ["rbind".to_owned(), "ro".to_owned()];
    let source = tree().to_string_lossy().into_owned();
    let text = output_on(
        env,
        vec![mount("bind", &source, &options)],
        "touch /x || echo read-only",
    );
    assert_eq!(text.trim(), "read-only");
}
