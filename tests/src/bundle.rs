//! The shim as containerd drives it, without containerd: a bundle made by hand, `start`, `delete`,
//! and the replies.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use nix::sys::stat::Mode;
use protobuf::Message;
use serde_json::{Value, json};

use crate::command::{Output, Running};
use crate::daemon::namespace;
use crate::procs::{self, MARK, mark};
use crate::suite::{Env, Runtime};
use crate::task::Task;
use crate::{PATIENCE, assets};

/// The answer to `start`, in any of its forms.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Where the server is.
    pub address: String,
    /// Version of the task API; 2 for a plain address.
    pub version: i32,
}

impl Reply {
    /// Decodes a plain address, JSON, or protobuf.
    ///
    /// # Panics
    /// It is none of them.
    pub fn parse(bytes: &[u8]) -> Reply {
        if let Ok(json) = serde_json::from_slice::<Value>(bytes) {
            let version = i32::try_from(json["version"].as_i64().unwrap()).unwrap();
            return Reply {
                address: json["address"].as_str().unwrap().to_owned(),
                version,
            };
        }
        if bytes.starts_with(b"unix://") {
            return Reply {
                address: String::from_utf8(bytes.to_vec()).unwrap(),
                version: 2,
            };
        }
        let result = BootstrapResult::parse_from_bytes(bytes);
        let result = result
            .unwrap_or_else(|_| panic!("not a start reply: {:?}", String::from_utf8_lossy(bytes)));
        Reply {
            address: result.address,
            version: result.version,
        }
    }
}

/// A bundle of the test's own; its server is ended with it.
pub struct Bundle<'e> {
    env: &'e Env,
    /// The directory.
    pub dir: PathBuf,
    /// The container's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's address; its ttrpc socket has `.ttrpc` appended.
    pub address: PathBuf,
    server: RefCell<Option<String>>,
    /// containerd's end of the log; nobody reads it, and a server must not mind.
    _log: File,
}

impl<'e> Bundle<'e> {
    /// A container that runs `args` on a busybox tree, null stdio, no limits.
    pub fn new(env: &'e Env, args: &[&str]) -> Bundle<'e> {
        Bundle::named(env, &env.id(), args)
    }

    /// As [`Bundle::new`], with an id of the caller's.
    pub fn named(env: &'e Env, id: &str, args: &[&str]) -> Bundle<'e> {
        let dir = env.dir.join(id);
        fs::create_dir_all(dir.join("rootfs")).unwrap();
        nix::unistd::mkfifo(&dir.join("log"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let log = File::options()
            .read(true)
            .write(true)
            .open(dir.join("log"))
            .unwrap();
        let (address, server) = (env.daemon.socket.clone(), RefCell::default());
        let bundle = Bundle {
            env,
            dir,
            id: id.to_owned(),
            namespace: namespace(),
            address,
            server,
            _log: log,
        };
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid",
                "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid",
                "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid",
                "noexec", "nodev", "ro"]},
        ]);
        let capabilities = json!(["CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"]);
        let spec = json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/",
                    "noNewPrivileges": true,
                "capabilities": {"bounding": capabilities, "effective": capabilities,
                    "permitted": capabilities},
            },
            "root": {"path": tree()},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("/{}/{id}", namespace()),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"}, {"type": "network"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        });
        fs::write(bundle.dir.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    /// Changes config.json.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let path = self.dir.join("config.json");
        let mut spec = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut spec);
        fs::write(path, spec.to_string()).unwrap();
    }

    /// The shim's binary, for a command line of the test's own.
    pub fn shim_path(env: &Env) -> PathBuf {
        match env.runtime {
            Runtime::Cofferdam => assets::shim(),
            Runtime::Runc => {
                assets::release_bin(env.daemon.release).join("containerd-shim-runc-v2")
            }
        }
    }

    /// The command that containerd would run in this bundle, up to the action.
    pub fn shim(&self, action: &[&str]) -> Command {
        let socket = &self.address;
        let mut command = Command::new(Bundle::shim_path(self.env));
        command
            .args(["-namespace", &self.namespace, "-address"])
            .arg(socket);
        command
            .args(["-publish-binary", "/usr/bin/containerd", "-id", &self.id])
            .args(action)
            .current_dir(&self.dir);
        command
            .env("TTRPC_ADDRESS", format!("{}.ttrpc", socket.display()))
            .env("GRPC_ADDRESS", socket);
        command
            .env("NAMESPACE", &self.namespace)
            .env("MAX_SHIM_VERSION", "2")
            .env("GOMAXPROCS", "2")
            .env(MARK, mark());
        command
    }

    /// Runs the shim with `stdin`.
    #[track_caller]
    pub fn run(&self, action: &[&str], stdin: &[u8]) -> Output {
        run_with(self.shim(action), stdin)
    }

    /// Runs `start` and connects.
    #[track_caller]
    pub fn start(&self) -> Task {
        let output = self.run(&["start"], &[]).ok();
        let reply = Reply::parse(&output.stdout);
        let mut task = Task::connect(&reply.address, &self.id);
        *self.server.borrow_mut() = Some(reply.address);
        task.bundle = self.dir.to_string_lossy().into_owned();
        task.version = reply.version;
        task
    }

    /// Runs `delete` as containerd does after everything else.
    #[track_caller]
    pub fn delete(&self) -> DeleteResponse {
        let bundle = self.dir.to_string_lossy().into_owned();
        let output = self.run(&["-bundle", &bundle, "delete"], &[]).ok();
        assert_eq!(output.errors(), "", "delete prints errors");
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// Puts it into the pod of another bundle, as CRI's annotations do.
    pub fn join_pod(&self, sandbox: &str, kind: &str) {
        let annotations = json!({"io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": sandbox});
        self.edit(|spec| spec["annotations"] = annotations);
    }

    /// The sandbox's directory with its state, while there is one.
    pub fn state_dir(&self) -> Option<PathBuf> {
        let mut dirs = fs::read_dir("/run/cofferdam")
            .into_iter()
            .flatten()
            .flatten();
        dirs.find(|dir| dir.path().join("share").join(&self.id).exists())
            .map(|dir| dir.path())
    }

    /// The processes that belong to it: the server and whatever names its id.
    pub fn processes(&self) -> Vec<procs::Proc> {
        let mine = |process: &procs::Proc| process.args.split(' ').any(|arg| arg == self.id);
        procs::ours().into_iter().filter(mine).collect()
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        let delete = || {
            let mut command = self.shim(&["-bundle", &self.dir.to_string_lossy(), "delete"]);
            // A test may have taken the bundle away.
            if !self.dir.exists() {
                command.current_dir("/");
            }
            let _ = Running::start(command, None).outcome(PATIENCE);
        };
        delete();
        // A server that still has other bundles, which containerd would have removed, is spared.
        let left = self.processes();
        if !left.is_empty() {
            left.iter().for_each(procs::Proc::kill9);
            delete();
        }
        if self.env.runtime == Runtime::Runc {
            // The control's server leaves its socket when it is killed, and its `delete` does not
            // know it.
            let address = self.server.borrow().clone().unwrap_or_default();
            let _ = fs::remove_file(address.trim_start_matches("unix://"));
        }
    }
}

/// Runs a command that gets `stdin` and then end of file.
#[track_caller]
pub fn run_with(command: Command, stdin: &[u8]) -> Output {
    let mut running = Running::start_piped(command);
    // A program that does not want it is no failure of the write's.
    let _ = running
        .child
        .stdin
        .take()
        .map(|mut pipe| pipe.write_all(stdin));
    running.wait(PATIENCE)
}

/// The root file system that all bundles share, read and written in place.
pub fn tree() -> &'static Path {
    static TREE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        // On the suite's own /run, which goes away with it: a static is never dropped.
        let dir = tempfile::Builder::new()
            .prefix("tree-")
            .tempdir_in("/run")
            .unwrap();
        assets::busybox_tree(dir.path());
        dir
    };
    TREE.get_or_init(make).path()
}
