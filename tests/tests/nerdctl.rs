//! nerdctl with its networks, volumes and compose, as its users call it. By `make test-docker`,
//! under runc too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU8, Ordering};

use cofferdam_tests::command::{Output, run};
use cofferdam_tests::network::ip;
use cofferdam_tests::{Env, PATIENCE, Release, Suite, assets, cases, eventually};
use serde_json::json;

fn main() -> ExitCode {
    Suite::of_pods().run_on(
        &[Release::V1_7],
        cases![
            Heavy: run_and_its_options, exec_logs_cp_commit, stop_and_start_again,
                names_of_a_network, published_port_and_volume, compose_of_two_services;
        ],
    )
}

const IMAGE: &str = assets::IMAGE;

/// What a container does until it is killed.
const IDLE: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 3' TERM; echo ready; while :; do sleep 1; done",
];

/// nerdctl with networks and data of its own.
struct Nerdctl<'e> {
    env: &'e Env,
    config: PathBuf,
    /// Of its default network, which nothing else takes away.
    bridge: String,
}

impl Drop for Nerdctl<'_> {
    fn drop(&mut self) {
        ip(&["link", "delete", &self.bridge]);
    }
}

/// Of default networks.
static NEXT: AtomicU8 = AtomicU8::new(1);

impl<'e> Nerdctl<'e> {
    fn new(env: &'e Env) -> Nerdctl<'e> {
        let dir = env.dir.join("nerdctl");
        fs::create_dir_all(dir.join("net.d")).unwrap();
        // All tests are on one host.
        let net = NEXT.fetch_add(1, Ordering::Relaxed);
        let bridge = format!("nerd{net}");
        let network = json!({
            "cniVersion": "1.0.0", "name": "bridge", "nerdctlID": "17f29b073143d8cd97b5bbe492bdeffe\
            c1c5fee55cc1fe2112c8b9335f8b6121", "nerdctlLabels": {"nerdctl/default-network": "true"},
            "plugins": [
                {"type": "bridge", "bridge": bridge, "isGateway": true,
                    "ipMasq": true, "ipam": {"type": "host-local",
                    "ranges": [[{"subnet": format!("10.211.{net}.0/24")}]],
                    "routes": [{"dst": "0.0.0.0/0"}]}},
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        });
        fs::write(
            dir.join("net.d/nerdctl-bridge.conflist"),
            network.to_string(),
        )
        .unwrap();
        let config = dir.join("nerdctl.toml");
        let text = format!(
            "address = {:?}\ndata_root = {:?}\ncni_path = \"/usr/lib/cni\"\ncni_netconfpath = \
             {:?}\ncgroup_manager = \"cgroupfs\"\nnamespace = {:?}\n",
            env.daemon.socket,
            dir.join("data"),
            dir.join("net.d"),
            env.daemon.namespace(),
        );
        fs::write(&config, text).unwrap();
        Nerdctl {
            env,
            config,
            bridge,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(assets::nerdctl());
        command.env("NERDCTL_TOML", &self.config);
        command.args(["--snapshotter", self.env.daemon.snapshotter]);
        command.args(args);
        command
    }

    fn try_do(&self, args: &[&str]) -> Output {
        run(self.command(args), 3 * PATIENCE)
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        self.try_do(args).ok().text()
    }

    fn run_flags(&self) -> [&str; 4] {
        let runtime = self.env.runtime.name();
        ["run", "--pull=never", "--runtime", runtime]
    }

    /// `nerdctl run --rm FLAGS IMAGE sh -c SCRIPT`.
    #[track_caller]
    fn sh(&self, flags: &[&str], script: &str) -> String {
        let last = [IMAGE, "sh", "-c", script];
        self.done(&[&self.run_flags()[..], &["--rm"], flags, &last].concat())
    }

    /// A container in the background; its name is its own.
    #[track_caller]
    fn start(&self, name: &str, flags: &[&str], command: &[&str]) -> String {
        let name = format!("{}-{name}", self.env.id());
        let named = ["-d", "--name", &name];
        self.done(&[&self.run_flags()[..], &named, flags, &[IMAGE], command].concat());
        name
    }

    #[track_caller]
    fn exec(&self, name: &str, script: &str) -> String {
        self.done(&["exec", name, "sh", "-c", script])
    }

    fn remove(&self, names: &[&str]) {
        self.done(&[&["rm", "-f"], names].concat());
    }
}

/// Says who it is to everybody who asks at port 80.
fn server(says: &str) -> String {
    format!("while :; do echo '{says}' | nc -l -p 80; done")
}

fn run_and_its_options(env: &Env) {
    let nerdctl = Nerdctl::new(env);
    let code = [
        &nerdctl.run_flags()[..],
        &["--rm", IMAGE, "sh", "-c", "exit 7"],
    ]
    .concat();
    assert_eq!(nerdctl.try_do(&code).status, 7);
    let flags = [
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "-u",
        "1:2",
        "--hostname",
        "named",
        "--tmpfs",
        "/x:size=1m",
        "--ulimit",
        "nofile=77:88",
        "--sysctl",
        "net.core.somaxconn=99",
        "--read-only",
    ];
    let script = "echo $A; pwd; id -u; id -g; hostname; df -k /x | tail -1 | awk '{print $2}'; \
                  ulimit -n; cat /proc/sys/net/core/somaxconn; touch /y 2>/dev/null || echo ro";
    let said = nerdctl.sh(&flags, script);
    assert_eq!(said, "b\n/tmp\n1\n2\nnamed\n1024\n77\n99\nro");
}

fn exec_logs_cp_commit(env: &Env) {
    let nerdctl = Nerdctl::new(env);
    let name = nerdctl.start(
        "one",
        &[],
        &["sh", "-c", "echo out; echo err >&2; sleep 3600"],
    );
    eventually("its output is in the logs", PATIENCE, || {
        let logs = nerdctl.try_do(&["logs", &name]);
        (logs.text() == "out" && String::from_utf8_lossy(&logs.stderr).contains("err"))
            .then_some(())
    });
    let said = nerdctl.done(&[
        "exec",
        "-u",
        "5",
        "-w",
        "/tmp",
        "-e",
        "X=y",
        &name,
        "sh",
        "-c",
        "id -u; pwd; echo $X",
    ]);
    assert_eq!(said, "5\n/tmp\ny");
    let (there, back) = (env.dir.join("there"), env.dir.join("back"));
    fs::write(&there, "content").unwrap();
    let inside = format!("{name}:/tmp/there");
    nerdctl.done(&["cp", &there.to_string_lossy(), &inside]);
    assert_eq!(nerdctl.exec(&name, "cat /tmp/there"), "content");
    nerdctl.done(&["cp", &inside, &back.to_string_lossy()]);
    assert_eq!(fs::read_to_string(&back).unwrap(), "content");
    assert!(nerdctl.done(&["top", &name]).contains("PID"));
    let stats = nerdctl.done(&["stats", "--no-stream", "--format", "{{.MemUsage}}", &name]);
    assert!(stats.contains('/') && !stats.starts_with("0B"), "{stats}");
    let image = format!("{}:made", env.id().replace('_', "-"));
    nerdctl.done(&["commit", &name, &image]);
    nerdctl.remove(&[&name]);
    let from = [
        &nerdctl.run_flags()[..],
        &["--rm", &image, "cat", "/tmp/there"],
    ]
    .concat();
    assert_eq!(nerdctl.done(&from), "content");
    nerdctl.done(&["rmi", "-f", &image]);
}

fn stop_and_start_again(env: &Env) {
    let nerdctl = Nerdctl::new(env);
    let name = nerdctl.start("one", &["-m", "64m"], &IDLE);
    let state = |what: &str| nerdctl.done(&["inspect", "-f", what, &name]);
    nerdctl.exec(&name, "touch /kept");
    nerdctl.done(&["pause", &name]);
    assert_eq!(state("{{.State.Status}}"), "paused");
    nerdctl.done(&["unpause", &name]);
    nerdctl.done(&["update", "--memory", "100m", &name]);
    nerdctl.done(&["stop", "-t", "10", &name]);
    assert_eq!(state("{{.State.ExitCode}}"), "3");
    nerdctl.done(&["start", &name]);
    assert_eq!(nerdctl.exec(&name, "ls /kept"), "/kept");
    nerdctl.remove(&[&name]);
}

fn names_of_a_network(env: &Env) {
    let nerdctl = Nerdctl::new(env);
    let network = format!("{}-net", env.id());
    let subnet = if env.is_vm() {
        "10.213.0.0/24"
    } else {
        "10.214.0.0/24"
    };
    nerdctl.done(&["network", "create", "--subnet", subnet, &network]);
    let on = ["--network", &network];
    let name = nerdctl.start("server", &on, &["sh", "-c", &server("it is me")]);
    let ask = format!("until nc -w 3 {name} 80 </dev/null; do sleep 1; done");
    assert_eq!(nerdctl.sh(&on, &ask), "it is me");
    nerdctl.remove(&[&name]);
    nerdctl.done(&["network", "rm", &network]);
}

fn published_port_and_volume(env: &Env) {
    let nerdctl = Nerdctl::new(env);
    let volume = format!("{}-volume", env.id());
    nerdctl.done(&["volume", "create", &volume]);
    nerdctl.sh(&["-v", &format!("{volume}:/v")], "echo kept >/v/f");
    let said = nerdctl.sh(
        &["-v", &format!("{volume}:/v:ro")],
        "cat /v/f; touch /v/g || echo ro",
    );
    assert!(said.starts_with("kept\n") && said.ends_with("ro"), "{said}");
    nerdctl.done(&["volume", "rm", &volume]);
    let port = if env.is_vm() { "8077" } else { "8078" };
    let publish = format!("{port}:80");
    let name = nerdctl.start("web", &["-p", &publish], &["sh", "-c", &server("web")]);
    eventually("the published port", PATIENCE, || {
        let mut ask = Command::new("sh");
        ask.args([
            "-c",
            &format!("busybox nc -w 3 127.0.0.1 {port} </dev/null"),
        ]);
        (run(ask, PATIENCE).text() == "web").then_some(())
    });
    nerdctl.remove(&[&name]);
}

fn compose_of_two_services(env: &Env) {
    let nerdctl = Nerdctl::new(env);
    let dir = env.dir.join("project");
    fs::create_dir_all(&dir).unwrap();
    let subnet = if env.is_vm() {
        "10.215.0.0/24"
    } else {
        "10.216.0.0/24"
    };
    let service = |command: &str| {
        let command = ["sh", "-c", command];
        json!({"image": IMAGE, "runtime": env.runtime.name(), "command": command})
    };
    let compose = json!({
        "name": format!("p{subnet}").replace(['.', '/'], ""),
        "services": {"web": service(&server("it is web")), "client": service("sleep 3600")},
        "networks": {"default": {"ipam": {"config": [{"subnet": subnet}]}}},
    });
    let file = dir.join("compose.yaml");
    fs::write(&file, compose.to_string()).unwrap();
    let file = file.to_string_lossy().into_owned();
    let compose = |args: &[&str]| nerdctl.try_do(&[&["compose", "-f", &file], args].concat());
    compose(&["up", "-d", "--pull", "never"]).ok();
    let asked = eventually("one service finds the other", PATIENCE, || {
        let ask = "nc -w 3 web 80 </dev/null";
        let said = compose(&["exec", "-T", "client", "sh", "-c", ask]).text();
        (!said.is_empty()).then_some(said)
    });
    assert_eq!(asked, "it is web");
    compose(&["down"]).ok();
}
