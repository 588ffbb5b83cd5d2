//! A suite's main: which test runs against which runtime and release, what they share, and the
//! check at the end.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::command::Output;
use crate::container::Container;
use crate::daemon::{Daemon, namespace};
use crate::leftovers::Snapshot;
use crate::procs;

/// A release of containerd that is tested with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Release {
    /// Debian 12's own.
    V1_6,
    /// Debian 13's.
    V1_7,
    /// Debian forky's.
    V2_1,
    /// That of tests/containerd-2.2; on request.
    V2_2,
    /// That of tests/containerd-2.3; on request.
    V2_3,
    /// That of tests/containerd-2.4.
    V2_4,
}

impl Release {
    /// Those that no test runs on unless it is told to.
    const ON_REQUEST: [Release; 2] = [Release::V2_2, Release::V2_3];

    /// Major and minor version.
    pub fn name(self) -> &'static str {
        match self {
            Release::V1_6 => "1.6",
            Release::V1_7 => "1.7",
            Release::V2_1 => "2.1",
            Release::V2_2 => "2.2",
            Release::V2_3 => "2.3",
            Release::V2_4 => "2.4",
        }
    }
}

/// What runs the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The runtime under test.
    Cofferdam,
    /// The control: a test that fails here is wrong.
    Runc,
}

impl Runtime {
    /// containerd's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Cofferdam => "io.containerd.cofferdam.v2",
            Runtime::Runc => "io.containerd.runc.v2",
        }
    }

    fn short(self) -> &'static str {
        match self {
            Runtime::Cofferdam => "cofferdam",
            Runtime::Runc => "runc",
        }
    }
}

/// How much of the matrix a test runs in without being asked. `--include-ignored` runs all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every release, and runc as the control with one of them.
    Core,
    /// One release; the others and the control on request.
    Once,
    /// As `Once`, but it makes no sense under runc.
    Ours,
    /// Only on request, and not under runc.
    Long,
    /// Only on request, and under runc as well.
    Heavy,
}

/// A test and where it runs.
pub type Case = (&'static str, fn(&Env), Scope);

/// Names functions as tests of one [`Scope`]: `cases![Core: a, b]`.
#[macro_export]
macro_rules! cases {
    ($($scope:ident: $($name:ident),+ $(,)?);+ $(;)?) => {
        &[$($((stringify!($name), $name as fn(&$crate::Env), $crate::suite::Scope::$scope)),+),+]
    };
}

/// What no agent but ours can do: docs/interoperability.md.
const NEED_OWN_AGENT: [&str; 18] = [
    "datagrams_stay_apart",
    "empty_dir_of_two_containers",
    "links_in_a_volume_lead_to_no_socket",
    "out_of_memory_kills_the_whole_container",
    "owner_of_a_socket_below_a_directory_is_the_hosts",
    "pid_namespace_of_another_container",
    "port_forward_reaches_a_server_on_loopback",
    "program_is_told_of_a_new_configuration",
    "sequenced_packets_stay_apart",
    "signal_to_all_reaches_children",
    "socket_below_a_mounted_directory",
    "socket_in_a_directory_that_came_later",
    "socket_of_the_host",
    "stop_in_a_shared_pid_namespace_is_a_sigterm",
    "stranger_may_not_connect_and_the_mode_is_the_hosts",
    "syslog_of_the_host",
    "unix_socket_between_two_containers",
    "volume_of_a_reader_and_a_writer",
];

/// One test binary.
pub struct Suite {
    shared: Arc<Shared>,
    before: Snapshot,
}

struct Shared {
    dir: tempfile::TempDir,
    pods: bool,
    daemons: Mutex<HashMap<Release, Arc<Daemon>>>,
}

impl Suite {
    /// Must come before any thread: gives the process mounts and a /run of its own.
    pub fn new() -> Suite {
        Suite::with(false)
    }

    /// As [`Suite::new`], for pods: a network of its own as well, and daemons with CRI.
    pub fn of_pods() -> Suite {
        Suite::with(true)
    }

    fn with(pods: bool) -> Suite {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make mounts and namespaces: run them as root"
        );
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        tmpfs("/run");
        if pods {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            crate::network::ip(&["link", "set", "lo", "up"]).ok();
        }
        // Shared, as on a host: what is unmounted here goes away in the shims' own mount
        // namespaces too.
        std::fs::create_dir("/run/netns").unwrap();
        tmpfs("/run/netns");
        mount(
            None::<&str>,
            "/run/netns",
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .unwrap();
        let dir = tempfile::Builder::new()
            .prefix(&format!("cofferdam-{}-", procs::mark()))
            .tempdir()
            .unwrap();
        Suite {
            shared: Arc::new(Shared {
                dir,
                pods,
                daemons: Mutex::default(),
            }),
            before: Snapshot::take(),
        }
    }

    /// Runs `cases` and then insists that nothing is left on the host.
    pub fn run(self, cases: &[Case]) -> ExitCode {
        let releases = [
            Release::V1_7,
            Release::V1_6,
            Release::V2_1,
            Release::V2_4,
            Release::V2_2,
            Release::V2_3,
        ];
        self.run_on(&releases, cases)
    }

    /// As [`Suite::run`], with these releases only; the first one is that of the tests with the
    /// scope of one.
    ///
    /// With `COFFERDAM_TESTS`, whole names between blanks, those run and no others, whatever their
    /// scope. With `COFFERDAM_SCOPE=core` the tests of [`Scope::Core`] run, each once. With
    /// `COFFERDAM_AGENT=stock`, for a shim whose agent is Kata's or its stand-in, those do not run
    /// that need ours. With `COFFERDAM_RELEASES`, names between blanks, the tests of every release
    /// run on those, and so do all of ours in suites for releases from 2.1 on.
    ///
    /// # Panics
    /// One of the names is not a test's.
    pub fn run_on(self, releases: &[Release], cases: &[Case]) -> ExitCode {
        let arguments = Arguments::from_args();
        let only = std::env::var("COFFERDAM_TESTS").ok();
        let mut only = only
            .as_ref()
            .map(|names| names.split_whitespace().collect::<HashSet<_>>());
        let core_only = std::env::var("COFFERDAM_SCOPE").is_ok_and(|scope| scope == "core");
        let stock = std::env::var("COFFERDAM_AGENT").is_ok_and(|agent| agent == "stock");
        let mut trials = Vec::new();
        let asked = std::env::var("COFFERDAM_RELEASES").ok();
        // What older releases do not have at all.
        let is_of_new = !releases.contains(&Release::V1_7);
        let wanted = |release: &Release| match &asked {
            Some(asked) => asked.split_whitespace().any(|name| name == release.name()),
            None => !Release::ON_REQUEST.contains(release),
        };
        let releases: Vec<Release> = releases.iter().copied().filter(wanted).collect();
        for release in releases.iter().copied() {
            for runtime in [Runtime::Cofferdam, Runtime::Runc] {
                for &(name, test, scope) in cases {
                    if runtime == Runtime::Runc && matches!(scope, Scope::Ours | Scope::Long) {
                        continue;
                    }
                    let ours = release == releases[0] && runtime == Runtime::Cofferdam;
                    let unasked = match scope {
                        _ if asked.is_some() => {
                            runtime == Runtime::Cofferdam
                                && (scope == Scope::Core || is_of_new && scope == Scope::Ours)
                        }
                        _ if core_only => ours && scope == Scope::Core,
                        Scope::Core => release == releases[0] || runtime == Runtime::Cofferdam,
                        Scope::Once | Scope::Ours => ours,
                        Scope::Long | Scope::Heavy => false,
                    };
                    if stock && NEED_OWN_AGENT.contains(&name) {
                        continue;
                    }
                    let full = format!("{name}::{}::{}", runtime.short(), release.name());
                    if only
                        .as_mut()
                        .is_some_and(|only| !only.remove(full.as_str()))
                    {
                        continue;
                    }
                    let shared = Arc::clone(&self.shared);
                    let run = move || {
                        test(&Env::new(shared, release, runtime, name));
                        Ok(())
                    };
                    trials
                        .push(Trial::test(full, run).with_ignored_flag(!unasked && only.is_none()));
                }
            }
        }
        assert!(
            only.iter().all(HashSet::is_empty),
            "COFFERDAM_TESTS names what is no test: {only:?}"
        );
        let conclusion = libtest_mimic::run(&arguments, trials);
        self.finish(conclusion.has_failed())
    }

    /// An environment outside of any test.
    pub fn env(&self, release: Release, runtime: Runtime, name: &str) -> Env {
        Env::new(Arc::clone(&self.shared), release, runtime, name)
    }

    /// Ends the daemons and insists that nothing is left on the host.
    pub fn finish(self, failed: bool) -> ExitCode {
        self.shared
            .daemons
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clear();
        let left = self.before.wait_gone(Duration::from_secs(15));
        remove_empty_cgroups(Path::new("/sys/fs/cgroup"));
        if let Err(left) = &left {
            eprintln!("error: {left}");
            // A failed test may leave a virtual machine; it must not outlive the suite.
            procs::ours().iter().for_each(procs::Proc::kill9);
        }
        if failed || left.is_err() {
            ExitCode::from(101)
        } else {
            ExitCode::SUCCESS
        }
    }
}

fn tmpfs(path: &str) {
    mount(
        Some("tmpfs"),
        path,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )
    .unwrap();
}

impl Default for Suite {
    fn default() -> Suite {
        Suite::new()
    }
}

/// runc makes the cgroup above a container's and leaves it.
fn remove_empty_cgroups(root: &Path) {
    for hierarchy in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let _ = std::fs::remove_dir(hierarchy.path().join(namespace()));
    }
    let _ = std::fs::remove_dir(root.join(namespace()));
}

/// What a test works with.
pub struct Env {
    /// The containerd that the tests of one release share.
    pub daemon: Arc<Daemon>,
    /// What runs the containers.
    pub runtime: Runtime,
    /// A directory for this test's files.
    pub dir: PathBuf,
    shared: Arc<Shared>,
    name: String,
}

impl Env {
    fn new(shared: Arc<Shared>, release: Release, runtime: Runtime, name: &str) -> Env {
        if runtime == Runtime::Cofferdam {
            crate::assets::shim();
        }
        let daemon = {
            let mut daemons = shared
                .daemons
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let start = || Arc::new(Daemon::start(release, shared.dir.path(), None, shared.pods));
            Arc::clone(daemons.entry(release).or_insert_with(start))
        };
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = shared.dir.path().join(number.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        let short: String = name.chars().take(28).collect();
        Env {
            daemon,
            runtime,
            dir,
            shared,
            name: format!("{}-{number}", short.trim_end_matches('_')),
        }
    }

    /// The same test with a containerd of its own, for tests that stop it. `path`: programs to be
    /// found first.
    pub fn with_own_daemon(&self, path: Option<&Path>) -> Env {
        let (dir, pods) = (self.shared.dir.path(), self.shared.pods);
        Env {
            daemon: Arc::new(Daemon::start(self.daemon.release, dir, path, pods)),
            runtime: self.runtime,
            dir: self.dir.clone(),
            shared: Arc::clone(&self.shared),
            name: self.name.clone(),
        }
    }

    /// Whether the runtime under test is Cofferdam, for what a virtual machine does otherwise by
    /// its nature.
    pub fn is_vm(&self) -> bool {
        self.runtime == Runtime::Cofferdam
    }

    /// A new container id that names the test.
    pub fn id(&self) -> String {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        format!("{}-{}", self.name, NUMBER.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs `ctr ARGS` to its end.
    #[track_caller]
    pub fn ctr(&self, args: &[&str]) -> Output {
        self.daemon.ctr(args)
    }

    /// Brings the images of an archive to the daemon.
    #[track_caller]
    pub fn import(&self, archive: &Path) {
        let snapshotter = self.daemon.snapshotter;
        let import = ["images", "import", "--snapshotter", snapshotter];
        let archive = archive.to_string_lossy();
        let command = self.daemon.ctr_command([&import[..], &[&archive]].concat());
        crate::command::run(command, Duration::from_secs(300)).ok();
    }

    /// `ctr run --rm` of the image with `flags`.
    #[track_caller]
    pub fn run(&self, flags: &[&str], command: &[&str]) -> Output {
        let id = self.id();
        crate::command::run(
            self.run_command(&id, &[&["--rm"], flags].concat(), command),
            crate::PATIENCE,
        )
    }

    /// The `ctr run` command line for container `id`.
    pub fn run_command(&self, id: &str, flags: &[&str], command: &[&str]) -> std::process::Command {
        let base = [
            "run",
            "--snapshotter",
            self.daemon.snapshotter,
            "--runtime",
            self.runtime.name(),
        ];
        let image: &[&str] = if flags.contains(&"--rootfs") {
            &[]
        } else {
            &[crate::assets::IMAGE]
        };
        // Not /k8s.io, which may be the host's too.
        let cgroup = format!("/{}/{id}", namespace());
        let (mut base, own) = (base.to_vec(), ["--cgroup", cgroup.as_str()]);
        base.extend(own.iter().filter(|_| self.daemon.cri.is_some()));
        // With --rootfs, the tree's path is the last of the flags and stands where the image would.
        let (flags, tree) = if image.is_empty() {
            flags.split_at(flags.len() - 1)
        } else {
            (flags, &[][..])
        };
        self.daemon
            .ctr_command([&base[..], flags, image, tree, &[id], command].concat())
    }

    /// Runs `crictl ARGS` to its end.
    #[track_caller]
    pub fn crictl(&self, args: &[&str]) -> Output {
        crate::command::run(self.cri().command(args), crate::PATIENCE)
    }

    /// The daemon's CRI plug-in.
    ///
    /// # Panics
    /// The suite is not one of pods.
    pub fn cri(&self) -> &crate::cri::Cri {
        self.daemon.cri.as_ref().expect("a suite of pods")
    }

    /// A container that runs in the background, without a reader of its output.
    #[track_caller]
    pub fn detached(&self, flags: &[&str], command: &[&str]) -> Container<'_> {
        let id = self.id();
        crate::command::run(
            self.run_command(&id, &[&["-d"], flags].concat(), command),
            crate::PATIENCE,
        )
        .ok();
        Container { env: self, id }
    }

    /// A container that runs in the background and does nothing until it is killed.
    #[track_caller]
    pub fn idle(&self) -> Container<'_> {
        self.detached(&["--null-io"], &["sleep", "3600"])
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{}: containerd's log says:\n{}",
                self.name,
                self.daemon.log_about(&self.name)
            );
        }
    }
}
