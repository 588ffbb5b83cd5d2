//! A private containerd: its own root, state and socket, and the shim of the tested prefix in its
//! PATH. One for tasks has no CRI; one for pods has it, and a network for pods of its own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::assets::{self, IMAGE};
use crate::command::{Output, run};
use crate::cri::Cri;
use crate::eventually;
use crate::procs::{MARK, mark};
use crate::suite::Release;

/// containerd's namespace in this run; also the name of the cgroup above those of its containers.
pub fn namespace() -> String {
    format!("e2e{}", std::process::id())
}

/// A containerd that ends with this value.
pub struct Daemon {
    /// Which release it is.
    pub release: Release,
    /// Its state directory: bundles are below.
    pub state: PathBuf,
    /// Its gRPC socket.
    pub socket: PathBuf,
    /// The snapshotter that works here.
    pub snapshotter: &'static str,
    /// Its log, kept after the run.
    pub log: PathBuf,
    /// Its CRI plug-in, of one for pods.
    pub cri: Option<Cri>,
    bin: PathBuf,
    /// Its configuration; its own files are beside.
    pub config: PathBuf,
    process: Mutex<Option<Child>>,
}

impl Daemon {
    /// Starts one with its files in `dir` and the images imported, with CRI if it is for `pods`.
    /// Extra programs are found in `path` first.
    pub fn start(release: Release, dir: &Path, path: Option<&Path>, pods: bool) -> Daemon {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "{}-{}",
            release.name(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        // Everything that ends with the daemon is on the suite's own /run, with a short path.
        let (run_dir, root) = (Path::new("/run").join(&name), dir.join(&name));
        std::fs::create_dir_all(&run_dir).unwrap();
        std::fs::create_dir_all(&root).unwrap();
        let logs = assets::root().join("target/e2e");
        std::fs::create_dir_all(&logs).unwrap();
        let suite = std::env::current_exe()
            .unwrap()
            .file_stem()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let suite = suite.split('-').next().unwrap_or("suite").to_owned();
        let (state, socket, config) = (
            run_dir.join("s"),
            run_dir.join("c.sock"),
            root.join("config.toml"),
        );
        let snapshotter = snapshotter(&root);
        let cri = pods.then(|| Cri::new(release, &socket, &run_dir));
        let (version, rest) = match &cri {
            Some(cri) => cri.config(release, snapshotter),
            None => (
                "version = 2",
                "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n".to_owned(),
            ),
        };
        let own = root.join("root");
        let text = format!(
            "{version}\nroot = {own:?}\nstate = {state:?}\n{rest}\n[grpc]\naddress = {socket:?}\n"
        );
        let opt = format!(
            "[plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            root.join("opt")
        );
        let text = text + &opt + layers(release);
        std::fs::write(&config, text).unwrap();
        let log = logs.join(format!("{suite}-{name}.log"));
        let _ = std::fs::remove_file(&log);
        let bin = assets::release_bin(release);
        let daemon = Daemon {
            release,
            state,
            socket,
            snapshotter,
            log,
            cri,
            bin,
            config,
            process: Mutex::new(None),
        };
        daemon.launch(path);
        let version = daemon.ctr(&["version"]).ok().text();
        assert!(
            version.contains(release.name()),
            "wanted containerd {}, found {version}",
            release.name()
        );
        let image = assets::image(dir, pods).to_string_lossy().into_owned();
        // 2 imports through its transfer service, which unpacks for the default snapshotter only,
        // unless told otherwise.
        let local: &[&str] = match release {
            Release::V1_6 | Release::V1_7 => &[],
            _ => &["--local"],
        };
        daemon
            .ctr(
                &[
                    &["images", "import", "--snapshotter", daemon.snapshotter],
                    local,
                    &[&image],
                ]
                .concat(),
            )
            .ok();
        assert!(
            daemon
                .ctr(&["images", "ls", "-q"])
                .ok()
                .text()
                .contains(IMAGE)
        );
        if let Some(cri) = &daemon.cri {
            cri.wait_for_images();
        }
        daemon
    }

    fn launch(&self, path: Option<&Path>) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let mut dirs = path.map(Path::to_owned).into_iter().collect::<Vec<_>>();
        dirs.extend([self.bin.clone(), assets::prefix().join("bin")]);
        if self.release >= Release::V2_2 {
            dirs.push(assets::erofs());
        }
        dirs.extend(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ));
        let mut command = Command::new(self.bin.join("containerd"));
        command
            .arg("--config")
            .arg(&self.config)
            .env(MARK, mark())
            .env("PATH", std::env::join_paths(dirs).unwrap());
        command
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        *self.process.lock().unwrap() = Some(command.spawn().unwrap());
        eventually("containerd answers", Duration::from_secs(30), || {
            (self.ctr(&["version"]).status == 0).then_some(())
        });
        // CRI begins to answer once it has looked at all the pods that were there.
        if let Some(cri) = &self.cri {
            eventually("CRI answers", Duration::from_secs(30), || {
                (run(cri.command(["version"]), crate::PATIENCE).status == 0).then_some(())
            });
        }
    }

    /// A `ctr` command for this daemon.
    pub fn ctr_command<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        // ctr 2.4 takes each comma of a --mount for the end of one.
        let bin = match self.release {
            Release::V2_2 | Release::V2_3 | Release::V2_4 => assets::release_bin(Release::V2_1),
            _ => self.bin.clone(),
        };
        let mut command = Command::new(bin.join("ctr"));
        command
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", &self.namespace()])
            .args(args)
            .env(MARK, mark());
        command
    }

    /// Runs `ctr` to its end.
    #[track_caller]
    pub fn ctr(&self, args: &[&str]) -> Output {
        run(self.ctr_command(args), crate::PATIENCE)
    }

    /// The namespace of its containers: CRI's is fixed.
    pub fn namespace(&self) -> String {
        if self.cri.is_some() {
            "k8s.io".to_owned()
        } else {
            namespace()
        }
    }

    /// The directory of a task's bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.state
            .join("io.containerd.runtime.v2.task")
            .join(self.namespace())
            .join(id)
    }

    /// Ends the process: in order, or as a crash would.
    pub fn stop(&self, signal: Signal) {
        if let Some(mut child) = self.process.lock().unwrap().take() {
            let _ = kill(Pid::from_raw(child.id().cast_signed()), signal);
            let gone = (0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                child.try_wait().is_ok_and(|status| status.is_some())
            });
            if !gone {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    /// Starts it again with the same directories.
    pub fn start_again(&self) {
        self.launch(None);
    }

    /// Pid of the process.
    pub fn pid(&self) -> u32 {
        self.process.lock().unwrap().as_ref().unwrap().id()
    }

    /// The lines of its log that name `id`, for a failed test.
    pub fn log_about(&self, id: &str) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(id)).collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}

/// The settings of a second snapshotter, whose layers are file systems in files.
fn layers(release: Release) -> &'static str {
    match release {
        Release::V2_2 | Release::V2_3 | Release::V2_4 => {
            "[plugins.\"io.containerd.snapshotter.v1.erofs\"]\ndefault_size = \"64MiB\"\n\
             [plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \
             \"walking\"]\n"
        }
        _ => "",
    }
}

/// A file system on which overlayfs cannot be stacked (a container's own root) has to copy.
fn snapshotter(root: &Path) -> &'static str {
    let dir = |name: &str| {
        let dir = root.join("try").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    };
    let (lower, upper, work, merged) = (dir("lower"), dir("upper"), dir("work"), dir("merged"));
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let tried = mount(
        Some("overlay"),
        &merged,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    );
    let works = tried.is_ok() && umount(&merged).is_ok();
    std::fs::remove_dir_all(root.join("try")).unwrap();
    if works { "overlayfs" } else { "native" }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop(Signal::SIGTERM);
        if let Some(cri) = &self.cri {
            cri.remove_bridge();
        }
    }
}
