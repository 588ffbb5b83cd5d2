//! A pod that `crictl` made, its containers, and what a user does with them. It is removed with the
//! value.

use std::cell::Cell;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::command::{Output, Running, run};
use crate::cri::TALK;
use crate::daemon::namespace;
use crate::suite::Env;
use crate::{PATIENCE, eventually};

/// Values of CRI's namespace options.
pub mod mode {
    /// Shared by the pod's containers.
    pub const POD: u8 = 0;
    /// Each container's own.
    pub const CONTAINER: u8 = 1;
    /// The host's.
    pub const NODE: u8 = 2;
    /// Another container's.
    pub const TARGET: u8 = 3;
}

/// Puts what is in `patch` into `value`: objects are merged, everything else takes the old one's
/// place.
pub fn merge(value: &mut Value, patch: Value) {
    match (value, patch) {
        (Value::Object(value), Value::Object(patch)) => {
            for (key, patch) in patch {
                merge(value.entry(key).or_insert(Value::Null), patch);
            }
        }
        (value, patch) => *value = patch,
    }
}

/// The line of error that `crictl` ends with; it logs the same before that.
#[track_caller]
pub fn one_line(output: &Output) -> String {
    let errors = output.errors();
    let last = errors.lines().last().unwrap_or_default();
    assert!(
        last.contains("level=fatal") && !last.contains("\\n"),
        "not one line of error: {errors}"
    );
    last.to_owned()
}

/// A pod sandbox.
pub struct Pod<'e> {
    /// Its test.
    pub env: &'e Env,
    /// Its id.
    pub id: String,
    /// Its files on the host: the logs, and what `crictl` was given.
    pub dir: PathBuf,
    config: Value,
    made: Cell<u32>,
}

impl<'e> Pod<'e> {
    /// A pod as the kubelet makes it without further wishes.
    #[track_caller]
    pub fn new(env: &'e Env) -> Pod<'e> {
        Pod::with(env, json!({}))
    }

    /// A pod whose configuration has `patch` in it.
    #[track_caller]
    pub fn with(env: &'e Env, patch: Value) -> Pod<'e> {
        let (pod, output) = Pod::try_with(env, patch);
        output.ok();
        pod
    }

    /// The message of a pod that is refused, which is one line.
    #[track_caller]
    pub fn refused(env: &Env, patch: Value) -> String {
        let (pod, output) = Pod::try_with(env, patch);
        assert!(output.status != 0, "pod {} was made", pod.id);
        one_line(&output)
    }

    /// A pod whose sandbox the shim runs by itself (`sandboxer = "shim"`).
    #[track_caller]
    pub fn without_task(env: &'e Env, patch: Value) -> Pod<'e> {
        let (pod, output) = Pod::try_without_task(env, patch);
        output.ok();
        pod
    }

    /// As [`Pod::without_task`], with what crictl said.
    #[track_caller]
    pub fn try_without_task(env: &'e Env, patch: Value) -> (Pod<'e>, Output) {
        Pod::start_with(env, crate::cri::SANDBOX_API, patch)
    }

    /// `crictl runp` and what it says. A pod that was not made has no id.
    #[track_caller]
    pub fn try_with(env: &'e Env, patch: Value) -> (Pod<'e>, Output) {
        Pod::start_with(env, if env.is_vm() { "cofferdam" } else { "runc" }, patch)
    }

    /// As [`Pod::try_with`], of a handler.
    #[track_caller]
    pub fn start_with(env: &'e Env, handler: &str, patch: Value) -> (Pod<'e>, Output) {
        let name = env.id();
        let dir = env.dir.join(&name);
        std::fs::create_dir_all(&dir).unwrap();
        let mut config = json!({
            "metadata": {"name": name, "uid": name, "namespace": "e2e", "attempt": 0},
            "hostname": "pod",
            "log_directory": dir,
            "linux": {
                "cgroup_parent": format!("/{}", namespace()),
                "security_context": {"namespace_options": {"pid": mode::CONTAINER}},
            },
        });
        merge(&mut config, patch);
        let file = dir.join("pod.json");
        std::fs::write(&file, config.to_string()).unwrap();
        let output = env.crictl(&["runp", "--runtime", handler, &file.to_string_lossy()]);
        (
            Pod {
                env,
                id: output.text(),
                dir,
                config,
                made: Cell::new(0),
            },
            output,
        )
    }

    /// A container that runs `command`.
    #[track_caller]
    pub fn run(&self, name: &str, command: &[&str]) -> Member<'_> {
        self.run_with(name, command, json!({}))
    }

    /// A container whose configuration has `patch` in it.
    #[track_caller]
    pub fn run_with(&self, name: &str, command: &[&str], patch: Value) -> Member<'_> {
        let member = self.create(name, command, patch);
        self.env.crictl(&["start", &member.id]).ok();
        member
    }

    /// A container that does nothing until it is stopped.
    #[track_caller]
    pub fn idle(&self, name: &str) -> Member<'_> {
        self.run(name, &["sleep", "3600"])
    }

    /// A container that is not started.
    #[track_caller]
    pub fn create(&self, name: &str, command: &[&str], patch: Value) -> Member<'_> {
        let (output, log) = self.try_create(name, command, patch);
        Member {
            env: self.env,
            id: output.ok().text(),
            log,
        }
    }

    /// `crictl create` and what it says, and the container's log file.
    #[track_caller]
    pub fn try_create(&self, name: &str, command: &[&str], patch: Value) -> (Output, PathBuf) {
        let number = self.made.replace(self.made.get() + 1);
        let log = format!("{name}-{number}.log");
        let options = &self.config["linux"]["security_context"]["namespace_options"];
        let mut config = json!({
            "metadata": {"name": name, "attempt": number},
            "image": {"image": TALK},
            "command": command,
            "log_path": log,
            "linux": {"security_context": {"namespace_options": options}},
        });
        merge(&mut config, patch);
        let (file, pod) = (
            self.dir.join(format!("{name}-{number}.json")),
            self.dir.join("pod.json"),
        );
        std::fs::write(&file, config.to_string()).unwrap();
        let output = self.env.crictl(&[
            "create",
            "--no-pull",
            &self.id,
            &file.to_string_lossy(),
            &pod.to_string_lossy(),
        ]);
        (output, self.dir.join(log))
    }

    /// What `crictl inspectp` says.
    #[track_caller]
    pub fn inspect(&self) -> Value {
        serde_json::from_slice(&self.env.crictl(&["inspectp", &self.id]).ok().stdout).unwrap()
    }

    /// Its addresses, IPv4 first.
    #[track_caller]
    pub fn addresses(&self) -> Vec<String> {
        let status = &self.inspect()["status"]["network"];
        let more = status["additionalIps"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let first = status["ip"].as_str().into_iter();
        first
            .chain(more.iter().filter_map(|ip| ip["ip"].as_str()))
            .map(str::to_owned)
            .collect()
    }

    /// `crictl stopp`.
    #[track_caller]
    pub fn stop(&self) {
        self.env.crictl(&["stopp", &self.id]).ok();
    }

    /// `crictl rmp` with flags.
    #[track_caller]
    pub fn remove(&self, flags: &[&str]) {
        self.env
            .crictl(&[&["rmp"], flags, &[&self.id]].concat())
            .ok();
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if self.id.is_empty() {
            return;
        }
        if std::thread::panicking() {
            eprintln!(
                "pod {}: containerd's log says:\n{}",
                self.id,
                self.env.daemon.log_about(&self.id)
            );
        }
        let crictl = |args: &[&str]| {
            let running = Running::start(self.env.cri().command(args), None);
            running
                .outcome(PATIENCE)
                .is_ok_and(|output| output.status == 0)
        };
        // A second try, as the daemon may have been away in the first.
        let _ = crictl(&["rmp", "-f", &self.id]) || crictl(&["rmp", "-f", &self.id]);
    }
}

/// A container of a pod.
pub struct Member<'p> {
    env: &'p Env,
    /// Its id.
    pub id: String,
    /// Its log on the host, in CRI's format.
    pub log: PathBuf,
}

impl Member<'_> {
    /// `crictl exec --sync`.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        run(self.exec_command(&["--sync"], command), PATIENCE)
    }

    /// The output of a shell script that succeeds.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.exec(&["sh", "-c", script]).ok().text()
    }

    /// The command line of `crictl exec`.
    pub fn exec_command(&self, flags: &[&str], command: &[&str]) -> Command {
        self.env
            .cri()
            .command([&["exec"], flags, &[&self.id], command].concat())
    }

    /// Waits until a shell condition holds inside.
    #[track_caller]
    pub fn wait_until(&self, condition: &str) {
        eventually(&format!("{condition} in {}", self.id), PATIENCE, || {
            (self.exec(&["sh", "-c", condition]).status == 0).then_some(())
        });
    }

    /// Output and errors so far, as `crictl logs` prints them.
    #[track_caller]
    pub fn logs(&self) -> String {
        let output = self.env.crictl(&["logs", &self.id]).ok();
        format!("{}{}", output.text(), output.errors())
    }

    /// Waits for a text in the log file.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        eventually(
            &format!("{text:?} in {}", self.log.display()),
            PATIENCE,
            || {
                std::fs::read_to_string(&self.log)
                    .is_ok_and(|log| log.contains(text))
                    .then_some(())
            },
        );
    }

    /// What `crictl inspect` says.
    #[track_caller]
    pub fn inspect(&self) -> Value {
        serde_json::from_slice(&self.env.crictl(&["inspect", &self.id]).ok().stdout).unwrap()
    }

    /// Its state, `CONTAINER_RUNNING` for one.
    #[track_caller]
    pub fn state(&self) -> String {
        self.inspect()["status"]["state"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// Waits for its end; gives its status: `exitCode`, `reason` and so on.
    #[track_caller]
    pub fn wait(&self) -> Value {
        eventually(&format!("the end of {}", self.id), PATIENCE, || {
            let status = self.inspect()["status"].clone();
            (status["state"] == "CONTAINER_EXITED").then_some(status)
        })
    }

    /// Waits for its end; gives its exit code.
    #[track_caller]
    pub fn exit_code(&self) -> i64 {
        self.wait()["exitCode"].as_i64().unwrap()
    }

    /// `crictl stop` with a grace period in seconds; gives how long it took.
    #[track_caller]
    pub fn stop(&self, grace: u32) -> Duration {
        self.env
            .crictl(&["stop", "--timeout", &grace.to_string(), &self.id])
            .ok()
            .took
    }

    /// `crictl rm` with flags.
    #[track_caller]
    pub fn remove(&self, flags: &[&str]) {
        self.env
            .crictl(&[&["rm"], flags, &[&self.id]].concat())
            .ok();
    }
}
