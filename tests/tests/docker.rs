//! docker with its own networks, volumes and builds, as its users call it. Each test has a dockerd
//! of its own, in a network namespace of its own. By `make test-docker`, under runc too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use cofferdam_tests::command::{Output, Running, run};
use cofferdam_tests::network::{Netns, inside};
use cofferdam_tests::{Env, PATIENCE, Release, Suite, assets, cases, daemon, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn main() -> ExitCode {
    Suite::of_pods().run_on(
        &[Release::V1_7],
        cases![
            Heavy: run_and_exit_codes, options_of_run, exec_logs_top_stats, copy_in_and_out,
                volumes_are_kept, published_port, names_of_a_network_resolve, names_of_the_world_resolve,
                networks_are_connected_and_disconnected, restart_policy, health_check,
                commit_and_build, network_of_another_container;
        ],
    )
}

const IMAGE: &str = "busybox:local";

/// What a container does until it is killed.
const IDLE: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 3' TERM; echo ready; while :; do sleep 1; done",
];

/// A dockerd whose default runtime is the one under test.
struct Docker<'e> {
    env: &'e Env,
    process: Child,
    socket: String,
    netns: Netns,
}

impl<'e> Docker<'e> {
    fn new(env: &'e Env) -> Docker<'e> {
        let netns = Netns::new(&env.id());
        // A socket's path is short.
        let dir = PathBuf::from(format!("/run/{}", env.id()));
        fs::create_dir_all(&dir).unwrap();
        let (file, socket) = (dir.join("daemon.json"), dir.join("d"));
        let runtime = env.runtime.name();
        let config = serde_json::json!({
            "runtimes": {"tested": {"runtimeType": runtime}},
            "default-runtime": "tested",
            "containerd": env.daemon.socket,
            "containerd-namespace": "k8s.io",
            "containerd-plugins-namespace": "k8s.io",
            "hosts": [format!("unix://{}", socket.display())],
            "data-root": env.dir.join("docker"),
            "exec-root": dir.join("exec"),
            "pidfile": dir.join("pid"),
            "cgroup-parent": format!("/{}", daemon::namespace()),
        });
        fs::write(&file, config.to_string()).unwrap();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns.path()));
        command.arg(assets::docker().join("dockerd"));
        command.args(["--config-file", &file.to_string_lossy()]);
        command.env("PATH", path());
        let log = fs::File::create(env.dir.join("dockerd.log")).unwrap();
        command.stderr(log).stdout(Stdio::null());
        let docker = Docker {
            env,
            process: command.spawn().unwrap(),
            socket: format!("unix://{}", socket.display()),
            netns,
        };
        eventually("dockerd answers", PATIENCE, || {
            (docker.try_do(&["version"]).status == 0).then_some(())
        });
        let tree = env.dir.join("tree");
        assets::busybox_tree(&tree);
        let archive = env.dir.join("tree.tar");
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&archive).arg("-C").arg(&tree).arg(".");
        run(tar, PATIENCE).ok();
        docker.done(&["import", &archive.to_string_lossy(), IMAGE]);
        docker
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(assets::docker().join("docker"));
        command.args(["-H", &self.socket]).args(args);
        command
    }

    fn try_do(&self, args: &[&str]) -> Output {
        run(self.command(args), 3 * PATIENCE)
    }

    /// Gives what it says.
    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        self.try_do(args).ok().text()
    }

    /// `docker run --rm FLAGS IMAGE sh -c SCRIPT`.
    #[track_caller]
    fn sh(&self, flags: &[&str], script: &str) -> String {
        self.done(&[&["run", "--rm"], flags, &[IMAGE, "sh", "-c", script]].concat())
    }

    /// A container in the background.
    #[track_caller]
    fn start(&self, name: &str, flags: &[&str], command: &[&str]) {
        self.done(&[&["run", "-d", "--name", name], flags, &[IMAGE], command].concat());
    }

    #[track_caller]
    fn exec(&self, name: &str, script: &str) -> String {
        self.done(&["exec", name, "sh", "-c", script])
    }

    fn inspect(&self, name: &str, format: &str) -> String {
        self.done(&["inspect", "-f", format, name])
    }

    /// Asks a server by its name until it is there.
    fn answer_of(&self, client: &str, server: &str) -> String {
        let ask = format!("nc -w 5 {server} 80 </dev/null");
        eventually(&format!("{client} reaches {server}"), PATIENCE, || {
            let said = self.try_do(&["exec", client, "sh", "-c", &ask]).text();
            (!said.is_empty()).then_some(said)
        })
    }

    fn serve(&self, name: &str, flags: &[&str]) {
        let says = format!("I am {name}");
        let script = format!("while :; do echo '{says}' | nc -l -p 80; done");
        self.start(name, flags, &["sh", "-c", &script]);
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        let list = self.try_do(&["ps", "-aq"]).text();
        let ids: Vec<&str> = list.split_whitespace().collect();
        if !ids.is_empty() {
            self.try_do(&[&["rm", "-f"], &ids[..]].concat());
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.env.dir.join("dockerd.log")).unwrap_or_default();
            eprintln!("dockerd's log says:\n{log}");
        }
        let pid = Pid::from_raw(self.process.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.process.wait();
    }
}

fn path() -> String {
    let own = std::env::var("PATH").unwrap_or_default();
    format!("{}:{own}", assets::docker().display())
}

fn run_and_exit_codes(env: &Env) {
    let docker = Docker::new(env);
    assert_eq!(docker.sh(&[], "echo out; echo error >&2"), "out");
    docker
        .try_do(&["run", "--rm", IMAGE, "sh", "-c", "exit 7"])
        .exits(7);
    docker
        .try_do(&[
            "run",
            "--rm",
            IMAGE,
            "sh",
            "-c",
            "sh -c 'kill -9 $$'; exit $?",
        ])
        .exits(137);
    docker
        .try_do(&["run", "--rm", IMAGE, "/nothing"])
        .exits(127);
    docker.try_do(&["run", "--rm", IMAGE, "/etc"]).exits(126);
    let input = env.dir.join("input");
    fs::write(&input, "from a pipe").unwrap();
    let command = docker.command(&["run", "--rm", "-i", IMAGE, "cat"]);
    let output = Running::start(command, Some(fs::File::open(&input).unwrap())).wait(PATIENCE);
    assert_eq!(output.ok().text(), "from a pipe");
    docker.start("stops", &[], &IDLE);
    // A first process without a handler is told nothing.
    eventually("it has a handler", PATIENCE, || {
        (docker.done(&["logs", "stops"]) == "ready").then_some(())
    });
    docker.done(&["stop", "stops"]);
    assert_eq!(docker.inspect("stops", "{{.State.ExitCode}}"), "3");
}

fn options_of_run(env: &Env) {
    let docker = Docker::new(env);
    for (flags, script, wanted) in [
        (&["-e", "A=b"][..], "echo $A", "b"),
        (&["-w", "/tmp"], "pwd", "/tmp"),
        (&["-u", "1000:7"], "id -u; id -g", "1000\n7"),
        (&["--hostname", "other"], "hostname", "other"),
        (
            &["--add-host", "x:10.1.2.3"],
            "grep 10.1.2.3 /etc/hosts",
            "10.1.2.3\tx",
        ),
        (
            &["--ulimit", "nofile=77:88"],
            "ulimit -n; ulimit -Hn",
            "77\n88",
        ),
        (
            &["--sysctl", "net.core.somaxconn=99"],
            "cat /proc/sys/net/core/somaxconn",
            "99",
        ),
        (
            &["--tmpfs", "/t:size=4m"],
            "df -k /t | tail -n 1 | tr -s ' ' | cut -d' ' -f2",
            "4096",
        ),
        (
            &["--read-only"],
            "touch /x 2>/dev/null || echo refused",
            "refused",
        ),
        (
            &["--memory", "64m"],
            "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2>/dev/null || true",
            "67108864",
        ),
        (&["--network", "none"], "ls /sys/class/net", "lo"),
        (&["--entrypoint", "/bin/echo"], "x", "sh -c x"),
    ] {
        assert_eq!(docker.sh(flags, script), wanted, "{flags:?}");
    }
}

fn exec_logs_top_stats(env: &Env) {
    let docker = Docker::new(env);
    docker.start("main", &[], &["sh", "-c", "echo one; echo two; sleep 3600"]);
    assert_eq!(docker.exec("main", "echo inside"), "inside");
    docker
        .try_do(&["exec", "main", "sh", "-c", "exit 9"])
        .exits(9);
    assert_eq!(
        docker.done(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/tmp",
            "main",
            "sh",
            "-c",
            "echo $A $PWD"
        ]),
        "b /tmp"
    );
    eventually("both lines are in the log", PATIENCE, || {
        (docker.done(&["logs", "main"]) == "one\ntwo").then_some(())
    });
    assert_eq!(docker.done(&["logs", "--tail", "1", "main"]), "two");
    assert!(docker.done(&["top", "main"]).contains("PID"));
    let stats = docker.done(&["stats", "--no-stream", "--format", "{{.PIDs}}", "main"]);
    assert!(stats.parse::<u32>().unwrap() >= 1, "{stats}");
    docker.done(&["pause", "main"]);
    assert_eq!(docker.inspect("main", "{{.State.Status}}"), "paused");
    docker.done(&["unpause", "main"]);
    docker.done(&[
        "update",
        "--memory",
        "128m",
        "--memory-swap",
        "128m",
        "main",
    ]);
}

fn copy_in_and_out(env: &Env) {
    let docker = Docker::new(env);
    docker.start("main", &[], &IDLE);
    let file = env.dir.join("file");
    fs::write(&file, "from the host").unwrap();
    docker.done(&["cp", &file.to_string_lossy(), "main:/tmp/in"]);
    assert_eq!(docker.exec("main", "cat /tmp/in"), "from the host");
    docker.exec("main", "echo from inside >/tmp/out");
    let out = env.dir.join("out");
    docker.done(&["cp", "main:/tmp/out", &out.to_string_lossy()]);
    assert_eq!(fs::read_to_string(out).unwrap(), "from inside\n");
    let changed = docker.done(&["diff", "main"]);
    assert!(
        changed.contains("A /tmp/in") && changed.contains("A /tmp/out"),
        "{changed}"
    );
}

fn volumes_are_kept(env: &Env) {
    let docker = Docker::new(env);
    docker.done(&["volume", "create", "kept"]);
    docker.sh(&["-v", "kept:/v"], "echo once >/v/file");
    assert_eq!(
        docker.sh(
            &["-v", "kept:/v:ro"],
            "cat /v/file; touch /v/x 2>/dev/null || echo ro"
        ),
        "once\nro"
    );
    let bind = env.dir.join("bind");
    fs::create_dir(&bind).unwrap();
    docker.sh(
        &["-v", &format!("{}:/b", bind.display())],
        "echo bound >/b/file",
    );
    assert_eq!(fs::read_to_string(bind.join("file")).unwrap(), "bound\n");
    docker.done(&["volume", "rm", "kept"]);
}

fn published_port(env: &Env) {
    let docker = Docker::new(env);
    docker.serve("web", &["-p", "8088:80"]);
    let gateway = "127.0.0.1";
    eventually("the published port", PATIENCE, || {
        let ask = format!("busybox nc -w 5 {gateway} 8088 </dev/null");
        let inside = [
            "nsenter",
            &format!("--net={}", docker.netns.path()),
            "sh",
            "-c",
            &ask,
        ]
        .map(String::from);
        let mut command = Command::new(&inside[0]);
        command.args(&inside[1..]);
        (run(command, PATIENCE).text() == "I am web").then_some(())
    });
}

fn names_of_a_network_resolve(env: &Env) {
    let docker = Docker::new(env);
    docker.done(&["network", "create", "net"]);
    let on = ["--network", "net"];
    docker.serve("web", &on);
    docker.serve("db", &[&on[..], &["--network-alias", "database"]].concat());
    for (client, server) in [
        ("web", "db"),
        ("db", "web"),
        ("web", "database"),
        ("web", "web"),
    ] {
        let says = if server == "web" {
            "I am web"
        } else {
            "I am db"
        };
        assert_eq!(
            docker.answer_of(client, server),
            says,
            "{client} asks {server}"
        );
    }
    // By TCP, as answers that are too long for a datagram come.
    let asked = docker.exec("web", "nslookup -type=a db 127.0.0.11");
    assert!(asked.contains("db"), "{asked}");
    // One that nobody has does not hang.
    docker.try_do(&["exec", "web", "nslookup", "nobody.invalid"]);
}

/// Answers each question for a name's IPv4 address with 192.0.2.7, for as long as the test runs.
fn name_server(netns: &Netns, address: &'static str) {
    let socket = inside(netns, move || UdpSocket::bind((address, 53)).unwrap());
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut question) {
            // RFC 1035: the header, and the question up to its class.
            let end = 12 + question[12..length].iter().position(|b| *b == 0).unwrap() + 5;
            let is_address = question[end - 4..end - 2] == [0, 1];
            let mut answer = question[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
            if is_address {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            }
            socket.send_to(&answer, from).unwrap();
        }
    });
}

/// Docker's server asks this one from the container's namespace.
fn names_of_the_world_resolve(env: &Env) {
    let docker = Docker::new(env);
    docker
        .netns
        .ip(&["addr", "add", "10.99.0.53/32", "dev", "lo"]);
    name_server(&docker.netns, "10.99.0.53");
    docker.done(&["network", "create", "net"]);
    let flags = ["--network", "net", "--dns", "10.99.0.53"];
    let asked = docker.sh(&flags, "nslookup -type=a outside.example 127.0.0.11");
    assert!(asked.contains("192.0.2.7"), "{asked}");
}

fn networks_are_connected_and_disconnected(env: &Env) {
    let docker = Docker::new(env);
    for network in ["one", "two"] {
        docker.done(&["network", "create", network]);
    }
    docker.serve("first", &["--network", "one"]);
    docker.serve("second", &["--network", "two"]);
    docker.done(&["network", "connect", "two", "first"]);
    assert_eq!(docker.answer_of("first", "second"), "I am second");
    assert_eq!(docker.answer_of("second", "first"), "I am first");
    docker.done(&["network", "disconnect", "one", "first"]);
    eventually("one link is left", PATIENCE, || {
        (docker.exec("first", "ls /sys/class/net | grep -c eth") == "1").then_some(())
    });
    assert_eq!(docker.answer_of("first", "second"), "I am second");
}

fn restart_policy(env: &Env) {
    let docker = Docker::new(env);
    docker.start(
        "fails",
        &["--restart", "on-failure:2"],
        &["sh", "-c", "exit 4"],
    );
    eventually("it was started twice more", 3 * PATIENCE, || {
        let state = docker.inspect("fails", "{{.RestartCount}} {{.State.Status}}");
        (state == "2 exited").then_some(())
    });
    docker.start(
        "again",
        &[],
        &["sh", "-c", "date +%s%N >>/dates; sleep 3600"],
    );
    docker.done(&["restart", "-t", "1", "again"]);
    eventually("it has begun twice", PATIENCE, || {
        (docker.exec("again", "wc -l </dates") == "2").then_some(())
    });
}

fn health_check(env: &Env) {
    let docker = Docker::new(env);
    let flags = [
        "--health-cmd",
        "test -e /tmp/ok",
        "--health-interval",
        "1s",
        "--health-retries",
        "2",
    ];
    docker.start("main", &flags, &IDLE);
    let becomes = |what: &str| {
        eventually(what, PATIENCE, || {
            (docker.inspect("main", "{{.State.Health.Status}}") == what).then_some(())
        });
    };
    becomes("unhealthy");
    docker.exec("main", "touch /tmp/ok");
    becomes("healthy");
}

fn commit_and_build(env: &Env) {
    let docker = Docker::new(env);
    docker.start("main", &[], &IDLE);
    docker.exec("main", "echo kept >/kept");
    docker.done(&["commit", "main", "made:1"]);
    assert_eq!(
        docker.done(&["run", "--rm", "made:1", "cat", "/kept"]),
        "kept"
    );
    let context = env.dir.join("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("file"), "copied\n").unwrap();
    let steps = format!(
        "FROM {IMAGE}\nCOPY file /file\nRUN cat /file >/again && mkdir /d\n\
         CMD [\"cat\", \"/again\"]\n"
    );
    fs::write(context.join("Dockerfile"), steps).unwrap();
    let mut build = docker.command(&["build", "-t", "built:1", &context.to_string_lossy()]);
    build.env("DOCKER_BUILDKIT", "0");
    run(build, Duration::from_secs(180)).ok();
    assert_eq!(docker.done(&["run", "--rm", "built:1"]), "copied");
}

fn network_of_another_container(env: &Env) {
    let docker = Docker::new(env);
    docker.serve("first", &[]);
    let second = docker.try_do(&[
        "run",
        "--rm",
        "--network",
        "container:first",
        IMAGE,
        "ls",
        "/sys/class/net",
    ]);
    if env.is_vm() {
        second.fails_with(&["another container's virtual machine", "pod"]);
    } else {
        assert!(second.ok().text().contains("eth0"));
    }
    let address = docker.inspect("first", "{{.NetworkSettings.IPAddress}}");
    let ask = format!("nc -w 5 {address} 80 </dev/null");
    eventually("the first is still reached", PATIENCE, || {
        (docker.sh(&[], &ask) == "I am first").then_some(())
    });
}
