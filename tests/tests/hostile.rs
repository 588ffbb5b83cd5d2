//! A guest that somebody has taken over, and that breaks its word by its agent (tests/hostile): the
//! host keeps its files, its memory, and its hold on the sandbox; containerd hears of nothing that
//! is not so.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use cofferdam_tests::command::{Output, Running, run};
use cofferdam_tests::events::Events;
use cofferdam_tests::leftovers::Snapshot;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, assets, cases, eventually, procs};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Ours: agent_that_does_nothing, agent_that_does_not_answer, agent_whose_answers_are_none,
            agent_that_says_too_much, agent_that_lies_about_ends,
            links_for_every_name_in_the_shares,
            connections_to_every_port_of_the_host;
    ])
}

/// How long a user may have to wait for the end of a container.
const END: Duration = Duration::from_secs(15);

/// What a shim may have at any time.
const PEAK_KIB: u64 = 32 << 10;

/// One guest that does harm.
struct Hostile<'e> {
    env: &'e Env,
    events: Events,
    dir: PathBuf,
    victim: PathBuf,
    flags: Vec<String>,
    first: Container<'e>,
    peak: Peak,
    before: Snapshot,
}

/// The most memory that a shim had.
struct Peak {
    kib: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl Peak {
    fn watch() -> Peak {
        let (kib, over) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (seen, end) = (kib.clone(), over.clone());
        let watcher = spawn(move || {
            while !end.load(Ordering::Acquire) {
                for shim in procs::named("containerd-shim-cofferdam") {
                    let status = fs::read_to_string(format!("/proc/{}/status", shim.pid))
                        .unwrap_or_default();
                    let peak = status
                        .lines()
                        .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
                    seen.fetch_max(peak.map_or(0, |kib| kib.parse().unwrap()), Ordering::AcqRel);
                }
                sleep(Duration::from_millis(20));
            }
        });
        Peak {
            kib,
            over,
            watcher: Some(watcher),
        }
    }

    fn end(&mut self) -> u64 {
        self.over.store(true, Ordering::Release);
        self.watcher.take().unwrap().join().unwrap();
        self.kib.load(Ordering::Acquire)
    }
}

/// A file as an archive of its own (cpio, "newc"): the kernel unpacks one after the other.
fn archive(name: &str, text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, mode, text) in [(name, 0o100_644, text), ("TRAILER!!!", 0, "")] {
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            text.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        bytes.extend(b"070701");
        fields
            .iter()
            .for_each(|field| bytes.extend(format!("{field:08x}").bytes()));
        for part in [format!("{name}\0").as_str(), text] {
            bytes.extend(part.bytes());
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

impl<'e> Hostile<'e> {
    /// Starts the first container of a guest whose agent does harm in this `mode` from the first
    /// call of the method `from` on.
    fn start(env: &'e Env, mode: &str, from: &str, config: &str) -> (Hostile<'e>, Output) {
        let before = Snapshot::take();
        let dir = env.dir.join(format!("{mode}-{from}"));
        fs::create_dir_all(dir.join("volume")).unwrap();
        let victim = dir.join("victim");
        fs::write(&victim, "precious").unwrap();
        let mut guest = fs::read(assets::installed("share/cofferdam/hostile.cpio")).unwrap();
        guest.resize(guest.len().next_multiple_of(4), 0);
        guest.extend(archive("mode", &format!("{mode} {from}")));
        guest.extend(archive("victim", &victim.to_string_lossy()));
        fs::write(dir.join("initramfs"), guest).unwrap();
        let initramfs = dir.join("initramfs");
        let text = format!(
            "initramfs = {:?}\nboot_timeout_seconds = 180\n{config}",
            initramfs.display().to_string()
        );
        fs::write(dir.join("cofferdam.toml"), text).unwrap();
        let id = env.id();
        // The shim's log has the sandbox's name.
        let group = format!("io.containerd.runc.v2.group={id}");
        let volume = format!(
            "type=bind,src={},dst=/data,options=rbind:rw",
            dir.join("volume").display()
        );
        let config = dir.join("cofferdam.toml").to_string_lossy().into_owned();
        let flags = [
            &["--runtime-config-path", &config, "--annotation", &group][..],
            &[
                "--mount",
                &volume,
                "--mount",
                "type=bind,src=/etc/hostname,dst=/h,options=rbind:ro",
            ],
        ];
        let hostile = Hostile {
            events: Events::subscribe(&env.daemon),
            flags: flags.concat().into_iter().map(str::to_owned).collect(),
            peak: Peak::watch(),
            first: Container::adopt(env, &id),
            env,
            dir,
            victim,
            before,
        };
        let output = hostile.run(&id);
        (hostile, output)
    }

    /// One more container of the same guest's.
    fn run(&self, id: &str) -> Output {
        let flags: Vec<&str> = ["-d"]
            .into_iter()
            .chain(self.flags.iter().map(String::as_str))
            .collect();
        run(
            self.env.run_command(id, &flags, &["sleep", "3600"]),
            PATIENCE,
        )
    }

    /// Ends a container as a user does who has had enough.
    #[track_caller]
    fn kill(&self, container: &Container<'_>) {
        let began = Instant::now();
        container.kill("SIGKILL", &[]);
        while container
            .listed()
            .is_some_and(|(_, status)| status != "STOPPED")
        {
            assert!(
                began.elapsed() < END,
                "{} has not ended: {:?}",
                container.id,
                container.listed()
            );
            sleep(Duration::from_millis(50));
        }
        self.env.ctr(&["tasks", "rm", "-f", &container.id]);
        assert!(
            container.listed().is_none(),
            "{} is still there: {:?}",
            container.id,
            container.listed()
        );
        assert!(
            began.elapsed() < END,
            "{} took {:?} to be removed",
            container.id,
            began.elapsed()
        );
    }

    /// Ends what is left, and looks at what the host has of it. Gives what containerd's log says.
    #[track_caller]
    fn end(mut self) -> String {
        self.kill(&self.first);
        let started = |topic: &str| {
            self.events
                .of(&self.first.id)
                .iter()
                .filter(|event| event.brief() == topic)
                .count()
        };
        let (starts, exits) = (started("start"), started("exit"));
        assert!(
            exits <= 1 && starts <= exits,
            "{:?}",
            self.events.of(&self.first.id)
        );
        assert!(
            started("oom") <= 1,
            "an OOM is told once: {:?}",
            self.events.of(&self.first.id)
        );
        let told = self.events.text();
        assert!(
            !told.contains("somebody-elses") && !told.contains("xxxxxxxx"),
            "{told}"
        );
        assert_eq!(fs::read_to_string(&self.victim).unwrap(), "precious");
        let peak = self.peak.end();
        assert!((1..PEAK_KIB).contains(&peak), "the shim had {peak} KiB");
        let log = self.env.daemon.log_about(&self.first.id);
        eprintln!(
            "{}: the shim had {peak} KiB",
            self.dir.file_name().unwrap().display()
        );
        drop(self.first);
        drop(self.events);
        self.before.wait_gone(Duration::from_secs(10)).unwrap();
        log
    }
}

/// These compare the whole machine before and after: one at a time.
fn alone() -> impl Sized {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Each call is answered as if it were done. Nothing is.
fn agent_that_does_nothing(env: &Env) {
    let _alone = alone();
    let (hostile, output) = Hostile::start(env, "nothing", "CreateSandbox", "");
    output.ok();
    let second = Container::adopt(env, &env.id());
    hostile.run(&second.id).ok();
    let exec = Running::start(second.exec_command("hung", &[], &["true"]), None);
    eventually("the exec is killed", END, || {
        (second.kill("SIGKILL", &["--exec-id", "hung"]).status == 0).then_some(())
    });
    // Its deadline, and that of what it may still say.
    assert_eq!(exec.wait(PATIENCE).status, 137);
    hostile.kill(&second);
    let log = hostile.end();
    assert!(log.contains("SIGKILL"), "{log}");
}

fn agent_that_does_not_answer(env: &Env) {
    let _alone = alone();
    for (mode, from) in [
        ("never", "SignalProcess"),
        ("late", "SignalProcess"),
        ("never", "GetGuestDetails"),
    ] {
        let (hostile, output) = Hostile::start(env, mode, from, "kill_timeout_seconds = 3\n");
        assert_eq!(
            output.status == 0,
            from == "SignalProcess",
            "{}",
            output.errors()
        );
        hostile.end();
    }
}

fn agent_whose_answers_are_none(env: &Env) {
    let _alone = alone();
    for mode in ["garbage", "noise", "error"] {
        for from in ["GetGuestDetails", "CreateContainer", "SignalProcess"] {
            let (hostile, output) = Hostile::start(env, mode, from, "kill_timeout_seconds = 3\n");
            let errors = output.errors();
            assert_eq!(output.status == 0, from == "SignalProcess", "{errors}");
            assert!(
                errors.trim().lines().count() <= 1 && errors.len() < 2000,
                "{errors}"
            );
            assert!(!errors.contains('\u{1b}'), "{errors:?}");
            let log = hostile.end();
            eprintln!(
                "{mode} {from}: {errors} {}",
                log.lines().last().unwrap_or_default()
            );
        }
    }
}

fn agent_that_says_too_much(env: &Env) {
    let _alone = alone();
    for mode in ["much", "again", "stream"] {
        for from in ["CreateSandbox", "CreateContainer", "SignalProcess"] {
            let (hostile, output) = Hostile::start(env, mode, from, "kill_timeout_seconds = 3\n");
            let errors = output.errors();
            let log = hostile.end();
            let reason = match mode {
                "much" => "131072 are allowed",
                "again" => "what it was not asked",
                _ => "which is no response",
            };
            assert!(
                format!("{errors}{log}").contains(reason),
                "{mode} {from}: {errors} {log}"
            );
        }
    }
    let (hostile, output) =
        Hostile::start(env, "flood", "CreateSandbox", "kill_timeout_seconds = 3\n");
    output.ok();
    // As long as a user needs to look, several times over.
    for _ in 0..20 {
        env.ctr(&["tasks", "metrics", &hostile.first.id]);
    }
    hostile.end();
}

fn agent_that_lies_about_ends(env: &Env) {
    let _alone = alone();
    let (hostile, _) = Hostile::start(env, "status", "CreateSandbox", "kill_timeout_seconds = 3\n");
    hostile.first.wait_for("STOPPED");
    let exit = eventually("the exit is told", PATIENCE, || {
        hostile
            .events
            .of(&hostile.first.id)
            .into_iter()
            .find(|event| event.brief() == "exit")
    });
    // A status of 0 does not stand in the event.
    let status = exit.body["exit_status"].as_u64().unwrap_or(0);
    assert!(status < 256, "{status}");
    hostile.end();
}

/// The guest goes on while the host makes containers, volumes and their names in the shares, and
/// removes them.
fn links_for_every_name_in_the_shares(env: &Env) {
    let _alone = alone();
    let (hostile, output) =
        Hostile::start(env, "links", "CreateSandbox", "kill_timeout_seconds = 3\n");
    output.ok();
    let more: Vec<Container<'_>> = (0..5).map(|_| Container::adopt(env, &env.id())).collect();
    for container in &more {
        hostile.run(&container.id).ok();
    }
    for sandbox in fs::read_dir("/run/cofferdam").unwrap().flatten() {
        insist_on_no_links(&sandbox.path(), 2);
    }
    assert!(
        fs::read_dir(hostile.dir.join("volume")).unwrap().count() > 0,
        "the guest has planted nothing at all"
    );
    for container in &more {
        hostile.kill(container);
    }
    drop(more);
    hostile.end();
}

/// The names that the host makes are directories and files, and stay so.
fn insist_on_no_links(dir: &Path, depth: usize) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let kind = entry.file_type().unwrap();
        assert!(!kind.is_symlink(), "{} is a link", entry.path().display());
        if kind.is_dir() && depth > 0 {
            insist_on_no_links(&entry.path(), depth - 1);
        }
    }
}

fn connections_to_every_port_of_the_host(env: &Env) {
    let _alone = alone();
    let (hostile, output) =
        Hostile::start(env, "dials", "CreateSandbox", "kill_timeout_seconds = 3\n");
    output.ok();
    let second = Container::adopt(env, &env.id());
    hostile.run(&second.id).ok();
    hostile.kill(&second);
    drop(second);
    hostile.end();
}
