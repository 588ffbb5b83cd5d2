//! The shim's command line: what containerd runs before and after it talks to the server.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::time::Duration;

use cofferdam_tests::bundle::{Bundle, Reply, run_with};
use cofferdam_tests::command::{Output, Running, run};
use cofferdam_tests::procs::{self, MARK, mark};
use cofferdam_tests::task::Task;
use cofferdam_tests::{Env, PATIENCE, Suite, assets, cases, eventually};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::Value;

const SLEEP: [&str; 2] = ["sleep", "3600"];

fn main() -> ExitCode {
    Suite::new().run(cases![
        Once: delete_after_the_normal_end;
        Ours: version, info, spellings_of_flags, wrong_command_lines,
            start_prints_the_address_alone, start_fails_in_one_line,
            plain_address_for_older_daemons, protobuf_for_newer_daemons, start_is_quick,
            server_inherits_nothing, longest_names,
            twenty_starts_of_one_pod, stale_socket_is_replaced, missing_config_is_tolerated,
            oom_score, shim_is_in_its_cgroup,
            delete_after_a_crash_tells_the_exit_status, delete_without_anything,
            delete_with_garbage_in_the_state,
            delete_of_one_container_spares_the_pod;
    ])
}

fn shim(args: &[&str]) -> Command {
    let mut command = Command::new(assets::shim());
    command
        .args(args)
        .current_dir("/")
        .env(MARK, mark())
        .env("RUST_LOG", "trace");
    command
}

fn any(type_url: &str, value: &[u8]) -> Vec<u8> {
    Any {
        type_url: type_url.into(),
        value: value.into(),
        ..Default::default()
    }
    .write_to_bytes()
    .unwrap()
}

fn params(id: &str, namespace: &str) -> BootstrapParams {
    BootstrapParams {
        instance_id: id.into(),
        namespace: namespace.into(),
        containerd_version: "2.3.0".into(),
        containerd_grpc_address: "/run/containerd/containerd.sock".into(),
        ..Default::default()
    }
}

/// One clear line on stderr, and exit status 1.
#[track_caller]
fn one_line(output: Output, parts: &[&str]) {
    let (output, errors) = (output.exits(1), String::new());
    let errors = errors + &output.errors();
    assert_eq!(
        (output.text().as_str(), errors.lines().count()),
        ("", 1),
        "{errors}"
    );
    parts
        .iter()
        .for_each(|part| assert!(errors.contains(part), "no {part:?} in {errors:?}"));
}

fn version(_: &Env) {
    for flag in ["-v", "-version", "--version"] {
        let output = run(shim(&[flag]), PATIENCE).ok();
        assert!(
            output.text().contains(env!("CARGO_PKG_VERSION")),
            "{:?}",
            output.text()
        );
        assert_eq!(output.errors(), "");
    }
}

fn info(_: &Env) {
    let mut times = Vec::new();
    for stdin in [
        vec![],
        any("runtimeoptions.v1.Options", b"\x12\x04/etc"),
        any("containerd.runc.v1.Options", b""),
    ] {
        let output = run_with(shim(&["-info"]), &stdin).ok();
        assert_eq!(output.errors(), "");
        times.push(output.took);
        let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(info.name, "io.containerd.cofferdam.v2");
        assert_eq!(
            info.features.type_url,
            "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
        );
        let features: Value = serde_json::from_slice(&info.features.value).unwrap();
        assert!(
            features["linux"]["namespaces"]
                .as_array()
                .unwrap()
                .contains(&"pid".into())
        );
    }
    times.sort();
    assert!(times[0] < Duration::from_millis(100), "{times:?}");
}

fn spellings_of_flags(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let address = Reply::parse(&bundle.run(&["start"], &[]).ok().stdout).address;
    let socket = env.daemon.socket.to_string_lossy().into_owned();
    let (id, namespace) = (&bundle.id, &bundle.namespace);
    for flags in [
        vec![
            format!("-namespace={namespace}"),
            format!("-id={id}"),
            format!("-address={socket}"),
            "-debug=false".into(),
        ],
        vec![
            "--namespace".into(),
            namespace.clone(),
            format!("--id={id}"),
            "--address".into(),
            socket.clone(),
            "--debug".into(),
        ],
    ] {
        let mut command = shim(&[]);
        command.args(flags).arg("start").current_dir(&bundle.dir);
        assert_eq!(
            Reply::parse(&run(command, PATIENCE).ok().stdout).address,
            address
        );
    }
}

fn wrong_command_lines(_: &Env) {
    one_line(run(shim(&["-teleport", "start"]), PATIENCE), &["teleport"]);
    one_line(
        run(shim(&["-namespace", "n", "-id", "i", "teleport"]), PATIENCE),
        &["teleport"],
    );
    one_line(run(shim(&["-namespace", "n", "start"]), PATIENCE), &["-id"]);
    one_line(run(shim(&[]), PATIENCE), &["start"]);
}

fn start_prints_the_address_alone(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let mut command = bundle.shim(&["-debug", "start"]);
    command.env("RUST_LOG", "trace").env("RUST_BACKTRACE", "1");
    let output = run(command, PATIENCE).ok();
    assert_eq!(output.errors(), "");
    let address = output.text();
    let socket = address.strip_prefix("unix://").unwrap();
    assert_eq!(
        fs::metadata(socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    UnixStream::connect(socket).expect("the socket accepts at once");
    assert_eq!(
        fs::read_to_string(bundle.dir.join("address")).unwrap(),
        address
    );
    assert_eq!(output.stdout, address.as_bytes(), "not a byte more");
}

fn start_fails_in_one_line(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let mut params = params(&bundle.id, &bundle.namespace);
    params.socket_dir = Some(format!("/run/{}", "x".repeat(60)));
    one_line(
        bundle.run(&["start"], &params.write_to_bytes().unwrap()),
        &["socket_dir"],
    );
    assert!(bundle.processes().is_empty() && !bundle.dir.join("address").exists());
    fs::create_dir(bundle.dir.join("address")).unwrap();
    one_line(bundle.run(&["start"], &[]), &["address"]);
    assert!(bundle.processes().is_empty(), "a server without an address");
    fs::remove_dir(bundle.dir.join("address")).unwrap();
}

fn plain_address_for_older_daemons(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let address = bundle.run(&["start"], &[]).ok().text();
    assert!(
        address.starts_with("unix:///run/containerd/s/"),
        "{address}"
    );
    for stdin in [
        any("runtimeoptions.v1.Options", b"\x12\x04/etc\x1a\x02hi"),
        any("containerd.runc.v1.Options", b"\x1a\x03abc"),
    ] {
        assert_eq!(bundle.run(&["start"], &stdin).ok().text(), address);
    }
}

fn protobuf_for_newer_daemons(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let mut good = params(&bundle.id, &bundle.namespace);
    good.socket_dir = Some("/run/own".into());
    good.log_level = protobuf::EnumOrUnknown::from_i32(-4);
    let output = bundle.run(&["start"], &good.write_to_bytes().unwrap()).ok();
    let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert!(
        result.address.starts_with("unix:///run/own/"),
        "{}",
        result.address
    );
    assert_eq!(
        fs::metadata("/run/own").unwrap().permissions().mode() & 0o777,
        0o700
    );
    Task::connect(&result.address, &bundle.id)
        .connected()
        .unwrap();
    let other = params("other", &bundle.namespace).write_to_bytes().unwrap();
    one_line(bundle.run(&["start"], &other), &["other", &bundle.id]);
}

fn start_is_quick(env: &Env) {
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let bundle = Bundle::new(env, &SLEEP);
            bundle.run(&["start"], &[]).ok().took
        })
        .collect();
    times.sort();
    assert!(times[2] < Duration::from_millis(300), "{times:?}");
}

fn server_inherits_nothing(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    // The runner itself insists on the end of stdout and stderr, that is, that nobody else holds
    // them.
    let pid = bundle.start().connected().unwrap().shim_pid;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path())
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let known = [
            "/dev/null",
            "socket:",
            "anon_inode:",
            "pipe:",
            "/proc/",
            "/sys/",
            // Its client's, where CRI-O's root file systems are.
            "mnt:[",
            "/run/cofferdam",
        ];
        assert!(
            known.iter().any(|known| target.starts_with(known)) || target.ends_with("/log"),
            "{target}"
        );
    }
    for fd in 0..3 {
        assert_eq!(
            fs::read_link(format!("/proc/{pid}/fd/{fd}"))
                .unwrap()
                .to_string_lossy(),
            "/dev/null"
        );
    }
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    assert_eq!(
        (
            nix::unistd::getsid(Some(pid)),
            nix::unistd::getpgid(Some(pid))
        ),
        (Ok(pid), Ok(pid))
    );
}

fn longest_names(env: &Env) {
    let mut bundle = Bundle::named(env, &"i".repeat(64), &SLEEP);
    bundle.namespace = "n".repeat(76);
    let task = bundle.start();
    task.create().unwrap();
    task.start("").unwrap();
    task.kill("", 9, true).unwrap();
    assert_eq!(task.wait("").unwrap().exit_status, 137);
    task.delete("").unwrap();
}

fn twenty_starts_of_one_pod(env: &Env) {
    let sandbox = Bundle::new(env, &SLEEP);
    sandbox.join_pod(&sandbox.id, "sandbox");
    let members: Vec<Bundle> = (0..19)
        .map(|_| {
            let member = Bundle::new(env, &SLEEP);
            member.join_pod(&sandbox.id, "container");
            member
        })
        .collect();
    let all: Vec<&Bundle> = members.iter().chain([&sandbox]).collect();
    let starts: Vec<Running> = all
        .iter()
        .map(|bundle| Running::start(bundle.shim(&["start"]), None))
        .collect();
    let mut addresses: Vec<String> = starts
        .into_iter()
        .map(|start| start.wait(PATIENCE).ok().text())
        .collect();
    for (bundle, address) in all.iter().zip(&addresses) {
        assert_eq!(
            &fs::read_to_string(bundle.dir.join("address")).unwrap(),
            address
        );
    }
    addresses.dedup();
    assert_eq!(addresses.len(), 1, "{addresses:?}");
    assert_eq!(sandbox.processes().len(), 1, "{:?}", sandbox.processes());
}

fn stale_socket_is_replaced(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let first = bundle.run(&["start"], &[]).ok().text();
    let server = bundle.processes().remove(0);
    server.kill9();
    eventually("the server is dead", PATIENCE, || {
        (!server.is_alive()).then_some(())
    });
    assert_eq!(bundle.run(&["start"], &[]).ok().text(), first);
    Task::connect(&first, &bundle.id).connected().unwrap();
}

fn missing_config_is_tolerated(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    fs::remove_file(bundle.dir.join("config.json")).unwrap();
    bundle.start().connected().unwrap();
}

fn oom_score(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let server = bundle.start().connected().unwrap().shim_pid;
    let score = |pid: u32| -> i32 {
        fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    assert_eq!(score(server), (score(std::process::id()) + 1).min(1000));
}

fn shim_is_in_its_cgroup(env: &Env) {
    let container = env.idle();
    let qemu = procs::named("qemu-system");
    let cgroup = format!("/{}/{}", cofferdam_tests::daemon::namespace(), container.id);
    let inside = |process: &procs::Proc| {
        fs::read_to_string(format!("/proc/{}/cgroup", process.pid))
            .unwrap_or_default()
            .lines()
            .any(|line| line.ends_with(&cgroup))
    };
    assert!(qemu.iter().any(inside), "no QEMU in {cgroup}, of {qemu:?}");
}

fn delete_after_the_normal_end(env: &Env) {
    let bundle = Bundle::new(env, &["sh", "-c", "exit 7"]);
    let task = bundle.start();
    task.create().unwrap();
    task.start("").unwrap();
    assert_eq!(task.wait("").unwrap().exit_status, 7);
    task.delete("").unwrap();
    task.shutdown(false).unwrap();
    let output = bundle
        .run(&["-bundle", &bundle.dir.to_string_lossy(), "delete"], &[])
        .ok();
    DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
}

fn delete_after_a_crash_tells_the_exit_status(env: &Env) {
    for (script, status) in [("exit 7", 7), ("sleep 3600", 137)] {
        let bundle = Bundle::new(env, &["sh", "-c", script]);
        let task = bundle.start();
        task.create().unwrap();
        task.start("").unwrap();
        if status == 7 {
            task.wait("").unwrap();
        }
        bundle.processes().iter().for_each(procs::Proc::kill9);
        assert_eq!(bundle.delete().exit_status, status);
        assert_eq!(bundle.delete().exit_status, status, "a second time");
        assert_eq!((bundle.processes(), bundle.state_dir()), (vec![], None));
    }
}

fn delete_without_anything(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    assert_eq!(bundle.delete().exit_status, 137);
    fs::remove_dir_all(&bundle.dir).unwrap();
    let mut command = bundle.shim(&["-bundle", &bundle.dir.to_string_lossy(), "delete"]);
    command.current_dir("/");
    DeleteResponse::parse_from_bytes(&run(command, PATIENCE).ok().stdout).unwrap();
}

fn delete_with_garbage_in_the_state(env: &Env) {
    let bundle = Bundle::new(env, &SLEEP);
    let task = bundle.start();
    task.create().unwrap();
    let state = bundle.state_dir().unwrap();
    let ledger = fs::read_dir(&state)
        .unwrap()
        .find(|entry| entry.as_ref().unwrap().file_name() == "ledger")
        .unwrap()
        .unwrap();
    let mut text = fs::read(ledger.path()).unwrap();
    text.extend_from_slice(b"\xff\xfe{garbage\n[]\n");
    fs::write(ledger.path(), text).unwrap();
    bundle.processes().iter().for_each(procs::Proc::kill9);
    bundle.delete();
    assert_eq!((bundle.processes(), bundle.state_dir()), (vec![], None));
}

fn delete_of_one_container_spares_the_pod(env: &Env) {
    let (pod, member) = (Bundle::new(env, &SLEEP), Bundle::new(env, &SLEEP));
    pod.join_pod(&pod.id, "sandbox");
    member.join_pod(&pod.id, "container");
    let pause = pod.start();
    pause.create().unwrap();
    pause.start("").unwrap();
    for _ in 0..2 {
        let task = member.start();
        task.create().unwrap();
        task.start("").unwrap();
        assert_ne!(task.state("").unwrap().pid, pause.state("").unwrap().pid);
        task.kill("", 9, true).unwrap();
        task.wait("").unwrap();
        task.delete("").unwrap();
        task.shutdown(false).unwrap();
        member.delete();
        assert_eq!(pause.status(""), "RUNNING", "the pod lives on");
    }
}
