//! What a user did wrong, or a machine that is broken: one line that says what and what to do, and
//! nothing left behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use cofferdam_tests::bundle::Bundle;
use cofferdam_tests::command::{Output, run};
use cofferdam_tests::task::refused;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, assets, cases, eventually};
use serde_json::json;
use ttrpc::Code;

fn main() -> ExitCode {
    Suite::new().run(cases![
        Core: file_that_is_not_there;
        Ours: mistakes_in_the_configuration, drop_ins_and_annotations_set_what_they_may,
            program_that_cannot_run, qemu_that_dies_at_once, kernel_that_is_no_kernel,
            helper_that_dies_at_once, guest_that_never_answers, guest_without_an_agent,
            config_json_is_missing,
            config_json_is_corrupt, unknown_namespace, command_that_is_empty,
            full_disk_for_the_ledger, mount_that_cannot_be_made;
    ])
}

/// Runs a container with this configuration.
#[track_caller]
fn run_with(env: &Env, toml: &str) -> Output {
    let path = env.dir.join("cofferdam.toml");
    fs::write(&path, toml).unwrap();
    let id = env.id();
    let _container = Container::adopt(env, &id);
    let flags = ["--rm", "--runtime-config-path", path.to_str().unwrap()];
    let output = run(env.run_command(&id, &flags, &["true"]), PATIENCE);
    if output.status != 0 {
        eventually("its server ends", Duration::from_secs(10), || {
            cofferdam_tests::procs::ours()
                .iter()
                .all(|process| !process.args.contains(&id))
                .then_some(())
        });
    }
    output
}

fn file_that_is_not_there(env: &Env) {
    if !env.is_vm() {
        return; // runc reads no such file
    }
    for key in [
        "kernel",
        "initramfs",
        "qemu",
        "virtiofsd",
        "vhost_device_vsock",
    ] {
        // Whether the host has a vsock of its own must not matter.
        let output = run_with(
            env,
            &format!("{key} = '/no/such/file'\nvsock = 'vhost-user'\n"),
        );
        output.fails_with(&[
            "failed to create shim task: ",
            "/no/such/file",
            &format!("set {key} in"),
        ]);
    }
}

fn mistakes_in_the_configuration(env: &Env) {
    run_with(env, "memory = 5\n").fails_with(&["cofferdam.toml line 1", "unknown field `memory`"]);
    run_with(env, "\nvcpus = 'two'\n")
        .fails_with(&["cofferdam.toml line 2: vcpus: must be a whole number from 1 to 240"]);
    run_with(env, "memory_mib = 1\n").fails_with(&["memory_mib", "from 64 to"]);
    run_with(env, "qemu = [\n").fails_with(&["cofferdam.toml line "]);
    let id = env.id();
    let _container = Container::adopt(env, &id);
    let output = run(
        env.run_command(
            &id,
            &["--rm", "--runtime-config-path", "/no/such.toml"],
            &["true"],
        ),
        PATIENCE,
    );
    output.fails_with(&["/no/such.toml"]);
    run_with(env, "memory_mib = 300\nvcpus = 2\n").ok();
}

fn drop_ins_and_annotations_set_what_they_may(env: &Env) {
    let file = env.dir.join("annotated.toml");
    let drop_in = env.dir.join("annotated.toml.d/10-site.toml");
    fs::create_dir(drop_in.parent().unwrap()).unwrap();
    let memory = |annotation: &str| {
        let id = env.id();
        let _container = Container::adopt(env, &id);
        let flags = [
            "--rm",
            "--runtime-config-path",
            file.to_str().unwrap(),
            "--annotation",
            annotation,
        ];
        run(
            env.run_command(
                &id,
                &flags,
                &[
                    "sed",
                    "-n",
                    "s/^MemTotal: *\\([0-9]*\\) kB/\\1/p",
                    "/proc/meminfo",
                ],
            ),
            PATIENCE,
        )
    };
    fs::write(
        &file,
        "memory_mib = 400\nenable_annotations = ['memory_mib']\n",
    )
    .unwrap();
    fs::write(&drop_in, "memory_mib = 200\n").unwrap();
    for (annotation, most_mib) in [("other=1", 200), ("io.cofferdam.memory_mib=300", 300)] {
        let mib = memory(annotation).ok().text().parse::<u64>().unwrap() >> 10;
        assert!(
            (most_mib - 60..=most_mib).contains(&mib),
            "{annotation}: the machine has {mib} MiB"
        );
    }
    memory("io.cofferdam.vcpus=2").fails_with(&[
        "annotation io.cofferdam.vcpus",
        "\"vcpus\" to enable_annotations",
    ]);
    memory("io.cofferdam.memory_mib=lots").fails_with(&[
        "annotation io.cofferdam.memory_mib has a wrong value",
        "not \"lots\"",
    ]);
    memory("io.cofferdam.qemu=/bin/sh").fails_with(&["annotation io.cofferdam.qemu sets nothing"]);
    fs::write(&drop_in, "\nvcpus = 1000\n").unwrap();
    memory("other=1").fails_with(&["annotated.toml.d/10-site.toml line 2: vcpus"]);
    fs::write(&drop_in, "enable_annotations = ['kernel']\n").unwrap();
    memory("other=1")
        .fails_with(&["10-site.toml line 1: enable_annotations: cannot have \"kernel\""]);
}

/// A program of the test's own.
fn script(env: &Env, name: &str, text: &str) -> PathBuf {
    let path = env.dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn program_that_cannot_run(env: &Env) {
    let text = env.dir.join("not-a-program");
    fs::write(&text, "hello").unwrap();
    for key in ["qemu", "virtiofsd"] {
        run_with(env, &format!("{key} = '{}'\n", text.display()))
            .fails_with(&["not-a-program", "not an executable file"]);
    }
}

fn qemu_that_dies_at_once(env: &Env) {
    let always = script(env, "always", "echo 'out of luck' >&2; exit 3");
    run_with(env, &format!("qemu = '{}'\n", always.display())).fails_with(&["out of luck"]);
    // One that can be asked for its version and dies when it is to be a machine.
    let later = script(
        env,
        "later",
        "case \"$*\" in *kernel*) echo 'no luck left' >&2; exit 3;; esac; exec qemu-system-x86_64 \
         \"$@\"",
    );
    // A script has no place in a root that holds a program and its libraries.
    run_with(env, &format!("qemu = '{}'\n", later.display()))
        .fails_with(&["is not an ELF program", "confined"]);
    let config = format!("qemu = '{}'\nconfinement = 'none'\n", later.display());
    run_with(env, &config).fails_with(&["no luck left", "exited with status 3"]);
}

fn helper_that_dies_at_once(env: &Env) {
    for key in ["virtiofsd", "vhost_device_vsock"] {
        let text = "case $1 in --version) echo virtiofsd 1.14.0;; *) echo 'cannot serve' >&2; exit 4;; esac";
        let program = script(env, key, text);
        let output = run_with(
            env,
            &format!(
                "{key} = '{}'\nvsock = 'vhost-user'\nconfinement = 'none'\n",
                program.display()
            ),
        );
        output.fails_with(&["cannot serve"]);
    }
}

fn kernel_that_is_no_kernel(env: &Env) {
    let kernel = env.dir.join("kernel");
    fs::write(&kernel, "hello").unwrap();
    run_with(env, &format!("kernel = '{}'\n", kernel.display())).fails_with(&["kernel"]);
}

/// An initramfs with busybox and this /init.
fn initramfs(env: &Env, init: &str) -> PathBuf {
    let tree = env.dir.join("initramfs");
    assets::busybox_tree(&tree);
    fs::write(tree.join("init"), format!("#!/bin/sh\n{init}\n")).unwrap();
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", "find . | busybox cpio -o -H newc >../initramfs.cpio"])
        .current_dir(&tree);
    run(command, PATIENCE).ok();
    env.dir.join("initramfs.cpio")
}

fn guest_that_never_answers(env: &Env) {
    let initramfs = initramfs(env, "exec sleep 3600");
    let output = run_with(
        env,
        &format!(
            "initramfs = '{}'\nboot_timeout_seconds = 3\n",
            initramfs.display()
        ),
    );
    output.fails_with(&["the guest agent did not answer within 3 s"]);
}

fn guest_without_an_agent(env: &Env) {
    let initramfs = initramfs(env, "exit 1");
    let output = run_with(env, &format!("initramfs = '{}'\n", initramfs.display()));
    assert!(
        output.took < Duration::from_secs(25),
        "a dead guest is noticed at once, not after {:?}",
        output.took
    );
    output.fails_with(&["guest"]);
}

fn config_json_is_missing(env: &Env) {
    let bundle = Bundle::new(env, &["true"]);
    fs::remove_file(bundle.dir.join("config.json")).unwrap();
    let task = bundle.start();
    assert!(refused(task.create(), Code::INVALID_ARGUMENT).contains("config.json"));
}

fn config_json_is_corrupt(env: &Env) {
    for text in ["", "{", "[]", "{\"ociVersion\": 3}", "\u{0}\u{1}"] {
        let bundle = Bundle::new(env, &["true"]);
        fs::write(bundle.dir.join("config.json"), text).unwrap();
        let task = bundle.start();
        let error = refused(task.create(), Code::INVALID_ARGUMENT);
        assert!(error.contains("config.json"), "{text:?}: {error}");
    }
}

fn unknown_namespace(env: &Env) {
    let bundle = Bundle::new(env, &["true"]);
    bundle.edit(|spec| {
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "dreams"}))
    });
    let task = bundle.start();
    assert!(refused(task.create(), Code::INVALID_ARGUMENT).contains("dreams"));
    // A failed Create must not keep the server.
    task.shutdown(false).unwrap();
    eventually("the server ends", PATIENCE, || {
        bundle.processes().is_empty().then_some(())
    });
}

fn command_that_is_empty(env: &Env) {
    let bundle = Bundle::new(env, &[]);
    let task = bundle.start();
    let error = refused(task.create(), Code::INVALID_ARGUMENT);
    assert!(
        error.contains("args") || error.contains("command"),
        "{error}"
    );
}

fn full_disk_for_the_ledger(env: &Env) {
    let bundle = Bundle::new(env, &["true"]);
    // A mount namespace of its own, in which the state directory is a full file system.
    let script = "mkdir -p /run/cofferdam && mount -t tmpfs -o size=4k none /run/cofferdam && head -c 4096 /dev/zero >/run/cofferdam/full
        exec \"$@\"";
    let inner = bundle.shim(&["start"]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "-"])
        .arg(inner.get_program())
        .args(inner.get_args());
    command.current_dir(&bundle.dir);
    command.envs(
        inner
            .get_envs()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    let output = run(command, PATIENCE);
    if output.status != 0 {
        let errors = output.errors();
        assert!(
            errors.contains("No space left") && errors.lines().count() == 1,
            "{errors}"
        );
        return;
    }
    let mut task = cofferdam_tests::task::Task::connect(&output.text(), &bundle.id);
    task.bundle = bundle.dir.to_string_lossy().into_owned();
    let error = task.create().unwrap_err();
    assert!(
        error.message.contains("No space left") && error.message.contains("/run/cofferdam"),
        "{error:?}"
    );
    task.shutdown(false).unwrap();
    eventually("the server ends", PATIENCE, || {
        bundle.processes().is_empty().then_some(())
    });
}

fn mount_that_cannot_be_made(env: &Env) {
    env.run(
        &[
            "--mount",
            "type=bind,src=/no/such/source,dst=/x,options=rbind",
        ],
        &["true"],
    )
    .fails_with(&["/no/such/source"]);
}
