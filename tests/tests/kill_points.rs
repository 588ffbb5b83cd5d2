//! The 64 kill points: whoever is killed, stopped or refused by the system exactly there, every
//! call ends, events keep their order, the container can be removed, the next one starts, and
//! nothing is left. docs/kill-points.md says what comes of each.
//!
//! The shim of this suite is built with the feature `points`, in a prefix of its own.
//! `COFFERDAM_KILLS` is the number of rounds of `by_chance`, `COFFERDAM_SEED` where they begin, and
//! `COFFERDAM_TABLE` the document that gets the results.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::any::Any;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use cofferdam_tests::bundle::tree;
use cofferdam_tests::command::{Output, Running, run};
use cofferdam_tests::events::{Events, Lifetime};
use cofferdam_tests::leftovers::Snapshot;
use cofferdam_tests::network::{Netns, ip};
use cofferdam_tests::points::{self, Cell, Deed, Life, ONCE, Table, Victim};
use cofferdam_tests::pty::Terminal;
use cofferdam_tests::random::{Random, number};
use cofferdam_tests::{Env, PATIENCE, Suite, assets, cases, procs};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use serde_json::json;
use sys::point::{DIRECTORY, Point};

/// How long cleaning up may take: containerd gives `delete` 5 s and notices the death first, and a
/// machine that is stopped has 10 s to be killed.
const CLEAN: Duration = Duration::from_secs(20);

/// How long a client waits for what hangs, before it gives up and removes the container: longer than
/// two boots may take here, one that hangs and its second try.
const CLIENT: Duration = Duration::from_secs(25);

/// How long a process is stopped that nobody but who stopped it can get going again.
const HELD: Duration = Duration::from_secs(2);

/// Exit status of the container's own program, told apart from all others.
const STATUS: i32 = 7;

fn main() -> ExitCode {
    // SAFETY: there is no second thread yet.
    unsafe {
        std::env::set_var(DIRECTORY, "/run/points");
        if std::env::var_os("COFFERDAM_PREFIX").is_none() {
            std::env::set_var(
                "COFFERDAM_PREFIX",
                assets::root().join("target/prefix-points"),
            );
        }
    }
    // The list of sockets, in which nothing may be left, is a network namespace's.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip(&["link", "set", "lo", "up"]).ok();
    Suite::new().run(cases![
        Ours: each_point_once, an_installed_shim_has_no_points;
        Long: by_chance;
    ])
}

/// These tests compare the whole machine before and after: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn each_point_once(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let points: Vec<Point> = ONCE.iter().map(|(point, ..)| *point).collect();
    assert_eq!(points, Point::ALL, "each point, once");
    let cells = ONCE.map(|(point, victim, deed)| Cell::new(point, victim, deed));
    let cells = cells.into_iter().filter(|cell| is_wanted(cell.point));
    Trials::new(env).run(cells);
}

/// Whether `COFFERDAM_POINT` names it, or nothing.
fn is_wanted(point: Point) -> bool {
    let only = std::env::var("COFFERDAM_POINT").ok();
    only.is_none_or(|names| names.split(' ').any(|name| name == point.name()))
}

fn by_chance(env: &Env) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (seed, kills) = (number("COFFERDAM_SEED", 1), number("COFFERDAM_KILLS", 2000));
    eprintln!("COFFERDAM_SEED={seed} COFFERDAM_KILLS={kills}");
    let mut all = Cell::all();
    all.retain(|cell| is_wanted(cell.point));
    let count = all.len() as u64;
    // All of them in an order of chance, then all of them in another one.
    let pick = |number: u64| {
        let (mut order, mut random) = (all.clone(), Random::new(number / count));
        for end in (1..count).rev() {
            let other = usize::try_from(random.below(end + 1)).unwrap();
            order.swap(usize::try_from(end).unwrap(), other);
        }
        order[usize::try_from(number % count).unwrap()]
    };
    Trials::new(env).run((seed..seed + kills).map(pick));
}

/// Only the shim of this suite has them.
fn an_installed_shim_has_no_points(_: &Env) {
    let installed = assets::root().join("target/prefix/bin/containerd-shim-cofferdam-v2");
    let holds = |shim: &Path, text: &str| {
        let bytes = fs::read(shim).unwrap();
        bytes
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    for name in [
        DIRECTORY,
        Point::StartSocketBound.name(),
        Point::VirtiofsdServes.name(),
    ] {
        assert!(
            holds(&assets::shim(), name),
            "this suite's shim has no {name}"
        );
        assert!(
            !holds(&installed, name),
            "{} has {name}",
            installed.display()
        );
    }
}

/// Points just before a request goes to the guest. The host cannot stop when the guest has it, so
/// QEMU is stopped before it is sent: then it is on its way when its victim is harmed.
const BEFORE_A_REQUEST: [Point; 7] = [
    Point::InterfaceSetting,
    Point::SandboxCreating,
    Point::ContainerCreating,
    Point::ContainerStarting,
    Point::ExecStarting,
    Point::SignalSending,
    Point::ContainerRemoving,
];

/// What all trials share.
struct Trials<'e> {
    env: &'e Env,
    events: Events,
    netns: Netns,
    disk: Disk,
    config: PathBuf,
    table: Option<Table>,
}

/// A loop device on a file, until the value goes.
struct Disk(String);

impl Disk {
    fn new(file: &Path) -> Disk {
        File::create(file).unwrap().set_len(8 << 20).unwrap();
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]).arg(file);
        Disk(run(command, PATIENCE).ok().text())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mut command = Command::new("losetup");
        command.args(["--detach", &self.0]);
        run(command, PATIENCE);
    }
}

impl<'e> Trials<'e> {
    fn new(env: &'e Env) -> Trials<'e> {
        let netns = Netns::new(&env.id());
        netns.ip(&[
            "link", "add", "eth0", "type", "veth", "peer", "name", "host0",
        ]);
        netns.ip(&["address", "add", "10.86.0.2/24", "dev", "eth0"]);
        netns.ip(&["link", "set", "eth0", "up"]);
        let config = env.dir.join("cofferdam.toml");
        fs::write(
            &config,
            "boot_timeout_seconds = 10\nkill_timeout_seconds = 3\n",
        )
        .unwrap();
        Trials {
            env,
            events: Events::subscribe(&env.daemon),
            netns,
            disk: Disk::new(&env.dir.join("disk")),
            config,
            table: std::env::var_os("COFFERDAM_TABLE").map(|path| Table::read(path.into())),
        }
    }

    fn run(mut self, cells: impl Iterator<Item = Cell>) {
        assert_eq!(self.env.run(&[], &["echo", "first"]).ok().text(), "first");
        let mut failed = Vec::new();
        for (index, cell) in cells.enumerate() {
            let began = Instant::now();
            let tried = catch_unwind(AssertUnwindSafe(|| self.try_one(cell)));
            let tried = tried.unwrap_or_else(|panic| Err(words(panic.as_ref())));
            let took = began.elapsed().as_secs_f32();
            match &tried {
                Ok(result) => eprintln!("{cell}: {result} ({took:.1} s)"),
                Err(error) => {
                    eprintln!("{cell}: WRONG ({took:.1} s): {error}");
                    failed.push(format!("{cell}: {error}"));
                    self.end_all();
                }
            }
            if let Some(table) = &mut self.table {
                table.note(cell, tried.as_deref().unwrap_or("WRONG"));
                table.write();
            }
            if index % 8 == 7 {
                assert_eq!(
                    self.env.run(&[], &["echo", "next"]).ok().text(),
                    "next",
                    "{cell}"
                );
            }
        }
        assert_eq!(self.env.run(&[], &["echo", "last"]).ok().text(), "last");
        assert!(
            failed.is_empty(),
            "{} of the trials went wrong:\n{}",
            failed.len(),
            failed.join("\n")
        );
    }

    /// After a trial that went wrong, so that the next one can go right.
    fn end_all(&mut self) {
        points::clear();
        let of_the_test = ["containerd", "ctr"];
        let mut left = procs::ours();
        left.retain(|process| !of_the_test.contains(&process.program.as_str()));
        left.iter().for_each(procs::Proc::kill9);
        self.events = Events::subscribe(&self.env.daemon);
    }

    /// What came of it: a word of the table's, or what is wrong.
    fn try_one(&mut self, cell: Cell) -> Result<String, String> {
        let id = self.env.id();
        let before = Snapshot::take();
        points::clear();
        forget_programs(cell.point);
        let errno = cell.deed.error().map(|(number, _)| number);
        let planted = errno.map_or("stop".to_owned(), |number| format!("error {number}"));
        points::plant(cell.point, &planted);
        let confined = cell.victim != Victim::VirtiofsdChild;
        let steps = self.steps(Life::past(cell.point), &id, confined);
        let patience = match cell.deed {
            Deed::Stop => CLIENT,
            _ => PATIENCE,
        };
        let (outputs, harmed) = std::thread::scope(|scope| {
            let life = scope.spawn(|| live(steps, patience));
            let reached = wait_for(Duration::from_secs(40), || {
                points::reached(cell.point)
                    .map(Some)
                    .or(life.is_finished().then_some(None))
            });
            let harmed = match (reached, errno) {
                (Some(Some(pid)), None) => {
                    let harmed = self.harm(cell, pid);
                    if harmed.is_err() {
                        points::send(pid, Signal::SIGCONT);
                    }
                    harmed
                }
                _ => Ok(()),
            };
            (life.join().unwrap(), harmed)
        });
        harmed?;
        if points::reached(cell.point).is_none() {
            return Err(format!("the point was not reached: {outputs:?}"));
        }
        if cell.victim == Victim::Containerd && cell.deed == Deed::Kill {
            self.env.daemon.start_again();
            self.events = Events::subscribe(&self.env.daemon);
        }
        self.remove(&id)?;
        self.remove(&format!("{id}-2"))?;
        if cell.point <= Point::StartServerReady || cell.victim == Victim::Delete {
            // What is left of a start or a delete that was killed, the next one's `delete` takes.
            self.env.run(&[], &["true"]).ok();
        }
        before.wait_gone(CLEAN)?;
        self.check_events(cell, &id)?;
        result(cell, outputs.last().unwrap())
    }

    /// Does to the victim what is to be done, while `pid` is stopped at the point.
    fn harm(&self, cell: Cell, pid: u32) -> Result<(), String> {
        procs::wait_for_state(pid, 'T');
        let victims = match cell.victim.find() {
            // The machine may have ended before the server came there.
            Err(_) if cell.point >= Point::ShutdownTaken => Vec::new(),
            found => found?,
        };
        if BEFORE_A_REQUEST.contains(&cell.point) && cell.victim != Victim::Server {
            Victim::Qemu.find()?.iter().for_each(procs::Proc::stop);
            points::send(pid, Signal::SIGCONT);
            // It has nothing to do but to wait for the answer.
            procs::wait_for_state(pid, 'S');
        }
        let signal = |signal| {
            victims
                .iter()
                .for_each(|victim| points::send(victim.pid, signal))
        };
        match cell.deed {
            Deed::Kill if cell.victim == Victim::Containerd => {
                self.env.daemon.stop(Signal::SIGKILL);
            }
            Deed::Kill => signal(Signal::SIGKILL),
            _ => signal(Signal::SIGSTOP),
        }
        if (cell.victim, cell.deed) != (Victim::Qemu, Deed::Stop) {
            let machines = procs::named("qemu-system");
            machines
                .iter()
                .for_each(|one| points::send(one.pid, Signal::SIGCONT));
        }
        if !victims.iter().any(|victim| victim.pid == pid) {
            points::send(pid, Signal::SIGCONT);
        }
        // Nobody but who stopped them can get these going again: to a client that is a pause.
        if cell.deed == Deed::Stop && matches!(cell.victim, Victim::Server | Victim::Containerd) {
            sleep(HELD);
            signal(Signal::SIGCONT);
        }
        Ok(())
    }

    fn steps(&self, life: Life, id: &str, confined: bool) -> Vec<Step> {
        let config = if confined {
            self.config.clone()
        } else {
            let text = fs::read_to_string(&self.config).unwrap() + "confinement = \"none\"\n";
            let path = self.config.with_extension("none.toml");
            fs::write(&path, text).unwrap();
            path
        };
        let config = config.to_string_lossy().into_owned();
        let ctr = |args: &[&str]| Step::Command(self.env.daemon.ctr_command(args), None);
        let run = |id: &str, flags: &[&str], command: &[&str]| {
            let flags = [&["--runtime-config-path", &config], flags].concat();
            Step::Command(self.env.run_command(id, &flags, command), None)
        };
        let says = format!("echo up; exit {STATUS}");
        let says = ["sh", "-c", &says];
        let group = format!("io.containerd.runc.v2.group={id}");
        let idle = || {
            let waits = format!("trap 'exit {STATUS}' TERM; while :; do sleep 0.1; done");
            run(
                id,
                &["-d", "--null-io", "--annotation", &group],
                &["sh", "-c", &waits],
            )
        };
        let exec = |flags: &[&str], command: &[&str]| {
            let base = ["tasks", "exec", "--exec-id", "one"];
            self.env
                .daemon
                .ctr_command([&base, flags, &[id], command].concat())
        };
        match life {
            Life::Run => vec![run(id, &["--rm"], &says)],
            Life::Network => {
                let with = format!("network:{}", self.netns.path());
                vec![run(id, &["--rm", "--with-ns", &with], &says)]
            }
            Life::Disk => vec![run(id, &["--rm", "--device", &self.disk.0], &says)],
            Life::LogFile => {
                let log = format!("file://{}", self.env.dir.join("log").display());
                vec![run(id, &["--rm", "--log-uri", &log], &says)]
            }
            Life::Hook => {
                let spec = self.env.dir.join("hook.json");
                fs::write(&spec, spec_with_hook(id, &says)).unwrap();
                let spec = spec.to_string_lossy();
                let base = ["run", "--rm", "--runtime", self.env.runtime.name()];
                let more = ["--runtime-config-path", &config, "--config", &spec, id];
                vec![ctr(&[&base[..], &more].concat())]
            }
            Life::Growth => {
                let flags = [
                    "--rm",
                    "--annotation",
                    &group,
                    "--memory-limit",
                    "536870912",
                ];
                vec![idle(), run(&format!("{id}-2"), &flags, &says)]
            }
            Life::Exec => vec![idle(), Step::Command(exec(&[], &["echo", "up"]), None)],
            Life::Terminal => vec![idle(), Step::Terminal(exec(&["-t"], &["echo", "up"]))],
            Life::Input => {
                let path = self.env.dir.join("input");
                fs::write(&path, "a line\n").unwrap();
                let input = File::open(path).unwrap();
                vec![idle(), Step::Command(exec(&[], &["cat"]), Some(input))]
            }
            Life::Pause => vec![idle(), ctr(&["tasks", "pause", id])],
            Life::Sigterm => vec![idle(), ctr(&["tasks", "kill", "-s", "SIGTERM", id])],
            Life::Sigkill => vec![idle(), ctr(&["tasks", "kill", "-s", "SIGKILL", id])],
        }
    }

    /// The container can be removed, whatever became of it.
    fn remove(&self, id: &str) -> Result<(), String> {
        let ctr = |args: &[&str]| {
            Running::start(self.env.daemon.ctr_command(args), None).outcome(PATIENCE)
        };
        let gone = wait_for(CLEAN, || {
            let tried = ctr(&["tasks", "rm", "-f", id])
                .and_then(|task| Ok((task, ctr(&["containers", "rm", id])?)));
            let (task, container) = match tried {
                Ok(tried) => tried,
                Err(error) => return Some(Err(error)),
            };
            let is_there = |kind: &str| {
                let listed = self.env.ctr(&[kind, "ls", "-q"]).ok().text();
                listed.lines().any(|line| line == id)
            };
            if is_there("tasks") || is_there("containers") {
                eprintln!("not yet: {} {}", task.errors(), container.errors());
                return None;
            }
            Some(Ok(()))
        });
        gone.unwrap_or_else(|| Err(format!("{id} cannot be removed")))
    }

    fn check_events(&self, cell: Cell, id: &str) -> Result<(), String> {
        if cell.victim == Victim::Containerd && cell.deed == Deed::Kill {
            return Ok(());
        }
        let server_died = cell.victim == Victim::Server && cell.deed == Deed::Kill;
        let lifetime = if server_died {
            Lifetime::ToldByContainerd
        } else {
            Lifetime::Told
        };
        let mut last = Ok(());
        for id in [id.to_owned(), format!("{id}-2")] {
            wait_for(Duration::from_secs(5), || {
                last = lifetime.check(&self.events.of(&id));
                last.is_ok().then_some(())
            });
            last.clone()?;
        }
        let known = matches!(cell.point, Point::InitEnded | Point::ExitTold);
        if known && cell.victim == Victim::Server {
            let events = self.events.of(id);
            let mut exits = events.iter().filter(|event| event.brief() == "exit");
            if !exits.all(|exit| exit.body["exit_status"] == STATUS) {
                return Err(format!("the exit status was known: {events:?}"));
            }
        }
        Ok(())
    }
}

/// What is known of QEMU is asked again.
fn forget_programs(point: Point) {
    if point == Point::CapabilitiesAsked {
        for entry in fs::read_dir("/run/cofferdam/cache")
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with("qemu") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

fn spec_with_hook(id: &str, command: &[&str]) -> String {
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", "sleep 1"]});
    json!({
        "ociVersion": "1.1.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": command, "env": ["PATH=/bin"],
            "cwd": "/"},
        "root": {"path": tree()},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "hooks": {"createRuntime": [hook]},
        "linux": {
            "cgroupsPath": format!("/{}/{id}", cofferdam_tests::daemon::namespace()),
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}],
        },
    })
    .to_string()
}

/// What a client does.
enum Step {
    /// A program, and its input.
    Command(Command, Option<File>),
    /// A program on a terminal.
    Terminal(Command),
}

/// How a step ended.
#[derive(Debug)]
enum Ended {
    /// With what it said.
    With(Output),
    /// On a terminal, with this status.
    Status(i32),
    /// Not in the time that its client had.
    Late(String),
}

/// Takes the steps until one fails.
fn live(steps: Vec<Step>, patience: Duration) -> Vec<Ended> {
    let mut ended = Vec::new();
    for step in steps {
        let step = match step {
            Step::Command(command, input) => Running::start(command, input)
                .outcome(patience)
                .map_or_else(Ended::Late, Ended::With),
            Step::Terminal(command) => {
                let waited =
                    catch_unwind(AssertUnwindSafe(|| Terminal::run(command, 24, 80).wait()));
                waited.map_or_else(|panic| Ended::Late(words(panic.as_ref())), Ended::Status)
            }
        };
        let goes_on = matches!(&step, Ended::With(output) if output.status == 0);
        ended.push(step);
        if !goes_on {
            break;
        }
    }
    ended
}

/// The word of the table for the last step that a client took.
fn result(cell: Cell, ended: &Ended) -> Result<String, String> {
    let (status, errors) = match ended {
        Ended::Late(_) if cell.deed == Deed::Stop => return Ok("CUT".to_owned()),
        Ended::Late(what) => return Err(format!("a call did not end: {what}")),
        Ended::With(output) => (output.status, output.errors()),
        Ended::Status(status) => (*status, String::new()),
    };
    let is_dead = |victim| cell.victim == victim && cell.deed == Deed::Kill;
    let word = match status {
        _ if cell.victim == Victim::Containerd => "Q",
        0 | STATUS => "OK",
        137 => "137",
        _ if is_dead(Victim::Server) && cell.point > Point::StartServerReady => "DEL",
        _ => "ERR",
    };
    if let (Some((_, text)), "ERR") = (cell.deed.error(), word) {
        let line = errors.lines().find(|line| line.starts_with("ctr: "));
        let line = line.ok_or_else(|| format!("no line of error: {errors}"))?;
        if !line.contains(text) || errors.lines().count() > 2 {
            return Err(format!("not a clear line of error: {errors}"));
        }
    }
    Ok(word.to_owned())
}

fn wait_for<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        let found = probe();
        if found.is_some() || Instant::now() > end {
            return found;
        }
        sleep(Duration::from_millis(2));
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_else(|| "a panic without words".to_owned())
}
