//! `make bench`: what a container costs, beside runc and beside a bare QEMU with the same machine
//! and kernel. Prints a table and writes `target/bench.json`, a list of `{name, unit, ours, runc,
//! floor}` with medians; `null` where something does not exist.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed measurement ends the benchmark"
)]

mod files;
mod pods;
mod programs;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cofferdam_tests::command::{Running, run};
use cofferdam_tests::procs::{self, MARK, mark};
use cofferdam_tests::suite::{Release, Runtime, Suite};
use cofferdam_tests::{Container, Env, PATIENCE, assets};
use serde_json::json;

/// MiB through a standard stream in one measurement.
const STREAM_MIB: u32 = 64;

struct Row {
    name: &'static str,
    unit: &'static str,
    ours: Option<f64>,
    runc: Option<f64>,
    floor: Option<f64>,
}

fn main() -> ExitCode {
    let suite = Suite::of_pods();
    let envs = [Runtime::Cofferdam, Runtime::Runc]
        .map(|runtime| suite.env(Release::V1_7, runtime, "bench"));
    let mut rows = measure(&envs);
    rows.extend(files::measure(&envs));
    rows.extend(programs::measure(&envs));
    rows.extend(pods::measure(&envs));
    drop(envs);
    report(&rows);
    suite.finish(false)
}

fn measure(envs: &[Env; 2]) -> Vec<Row> {
    let say = |what: &str| eprintln!("measuring {what}");
    let mut rows = Vec::new();
    let mut row = |name, unit, [ours, runc]: [f64; 2], floor| {
        rows.push(Row {
            name,
            unit,
            ours: Some(ours),
            runc: Some(runc),
            floor,
        });
    };

    say("the bare machine");
    let machine = Machine::of_a_sandbox(&envs[0]);
    say("cold starts");
    // Side by side, so that what else the machine does is shared by all.
    let open = unconfined(&envs[0]);
    let open = ["--runtime-config-path", open.to_str().unwrap()];
    let mut starts = [vec![], vec![], vec![], vec![]];
    for _ in 0..15 {
        starts[0].push(first_output(&envs[0], &[]));
        starts[1].push(first_output(&envs[1], &[]));
        starts[2].push(machine.boot_and_end());
        starts[3].push(first_output(&envs[0], &open));
    }
    let [ours, runc, floor, unconfined] = starts.map(median);
    row("start.cold", "ms", [ours, runc], Some(floor));
    row("start.unconfined", "ms", [unconfined, runc], Some(floor));
    say("execs");
    row(
        "exec.true",
        "ms",
        both(envs, 25, Env::idle, |container, _| {
            millis(container.exec(&["true"]).ok().took)
        }),
        None,
    );
    say("stops");
    let stop = [0, 1].map(|index| median((0..7).map(|_| stop(&envs[index])).collect()));
    row("stop", "ms", stop, None);
    say("streams");
    row(
        "stdio.out",
        "MiB/s",
        both(envs, 5, Env::idle, stream_out),
        None,
    );
    row(
        "stdio.in",
        "MiB/s",
        both(envs, 5, Env::idle, stream_in),
        None,
    );
    say("memory");
    let idle = envs.each_ref().map(|env| idle_memory(env, &[]));
    let floor = machine.idle_memory();
    row("memory.idle_pss", "MiB", idle, Some(floor));
    row(
        "memory.unconfined",
        "MiB",
        [idle_memory(&envs[0], &open), idle[1]],
        Some(floor),
    );
    say("code that is dropped");
    rows.push(Row {
        name: "code.dropped",
        unit: "ms",
        ours: Some(code_dropped(&envs[0])),
        runc: None,
        floor: None,
    });
    rows.insert(
        1,
        Row {
            name: "start.clone",
            unit: "ms",
            ours: None,
            runc: None,
            floor: None,
        },
    );
    rows
}

/// An exec that runs 16 MiB of code, and then drops the guest's page cache.
fn code_dropped(env: &Env) -> f64 {
    let dir = env.dir.join("code");
    fs::create_dir(&dir).unwrap();
    let program = assets::code_program(&dir, 4096, 1_000_000);
    let mount = format!("type=bind,src={},dst=/code,options=rbind:ro", dir.display());
    let name = program.file_name().unwrap().to_string_lossy();
    let script = format!("/code/{name} && echo 3 >/proc/sys/vm/drop_caches");
    let flags = ["--null-io", "--privileged", "--mount", &mount];
    let container = env.detached(&flags, &["sleep", "3600"]);
    let times = (0..7).map(|_| millis(container.exec(&["sh", "-c", &script]).ok().took));
    let took = median(times.collect());
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    took
}

/// Medians of `count` measurements in one container of each runtime, alternating.
fn both<'e, T>(
    envs: &'e [Env; 2],
    count: usize,
    make: impl Fn(&'e Env) -> T,
    measure: impl Fn(&T, usize) -> f64,
) -> [f64; 2] {
    let made = envs.each_ref().map(make);
    let mut values = [vec![], vec![]];
    for number in 0..count {
        for (one, values) in made.iter().zip(&mut values) {
            values.push(measure(one, number));
        }
    }
    values.map(median)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A configuration without the launcher's confinement, to show what that costs.
fn unconfined(env: &Env) -> PathBuf {
    let path = env.dir.join("unconfined.toml");
    fs::write(&path, "confinement = 'none'\n").unwrap();
    path
}

/// From `ctr run` to the first byte of the container's output.
fn first_output(env: &Env, flags: &[&str]) -> f64 {
    let container = Container::adopt(env, &env.id());
    let began = Instant::now();
    let mut command = env.run_command(
        &container.id,
        &[&["--rm"], flags].concat(),
        &["echo", "started"],
    );
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut [0])
        .expect("the container's first byte");
    let took = began.elapsed();
    assert!(child.wait().unwrap().success());
    millis(took)
}

/// From `ctr task kill` until `ctr task rm` has returned.
fn stop(env: &Env) -> f64 {
    let container = env.idle();
    let began = Instant::now();
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    millis(began.elapsed())
}

fn throughput(took: Duration) -> f64 {
    f64::from(STREAM_MIB) / took.as_secs_f64()
}

fn stream_out(container: &Container, number: usize) -> f64 {
    let count = format!("count={}", STREAM_MIB * 16);
    let script = ["dd", "if=/dev/zero", "bs=64k", &count];
    let command = container.exec_command(&format!("out{number}"), &[], &script);
    let null = File::options().write(true).open("/dev/null").unwrap();
    throughput(
        Running::start_into(command, None, null)
            .wait(PATIENCE)
            .ok()
            .took,
    )
}

fn stream_in(container: &Container, number: usize) -> f64 {
    let path = Path::new("/run/stream-in");
    if !path.exists() {
        fs::write(path, vec![7; (STREAM_MIB as usize) << 20]).unwrap();
    }
    // It ends by itself after the last byte: how `ctr` notices the end of input does not count.
    let count = format!("count={}", STREAM_MIB * 16);
    let script = ["dd", "of=/dev/null", "bs=64k", "iflag=fullblock", &count];
    let command = container.exec_command(&format!("in{number}"), &[], &script);
    throughput(
        Running::start(command, Some(File::open(path).unwrap()))
            .wait(PATIENCE)
            .ok()
            .took,
    )
}

/// MiB of all these processes together, once they have come to rest.
fn settled_memory(pids: &[u32]) -> f64 {
    procs::come_to_rest(pids);
    pids.iter().map(|pid| procs::pss_kib(*pid)).sum::<u64>() as f64 / 1024.0
}

fn idle_memory(env: &Env, flags: &[&str]) -> f64 {
    let _container = env.detached(&[&["--null-io"], flags].concat(), &["sleep", "3600"]);
    let others =
        |process: &procs::Proc| process.program != "containerd" && process.program != "ctr";
    let pids: Vec<u32> = procs::ours()
        .into_iter()
        .filter(others)
        .map(|process| process.pid)
        .collect();
    settled_memory(&pids)
}

/// A QEMU without a shim: the command line of a real sandbox, less the monitor, with busybox for an
/// agent.
struct Machine {
    program: PathBuf,
    args: Vec<String>,
    initramfs: PathBuf,
}

impl Machine {
    fn of_a_sandbox(env: &Env) -> Machine {
        let _container = env.idle();
        let qemu = procs::named("qemu-system")
            .into_iter()
            .next()
            .expect("a sandbox has a QEMU");
        let program = fs::read_link(format!("/proc/{}/exe", qemu.pid)).unwrap();
        let cmdline = fs::read(format!("/proc/{}/cmdline", qemu.pid)).unwrap();
        let mut words = cmdline
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .skip(1);
        let mut args = Vec::new();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-S" | "" => (),
                "-chardev" | "-mon" | "-initrd" | "-append" | "-name" => drop(words.next()),
                // A confined QEMU has it under a name of its own.
                "-kernel" => {
                    drop(words.next());
                    let kernel = assets::installed("share/cofferdam/vmlinux");
                    args.extend([word, kernel.to_string_lossy().into_owned()]);
                }
                _ => args.push(word),
            }
        }
        let append = String::from_utf8_lossy(&cmdline)
            .split('\0')
            .skip_while(|word| *word != "-append")
            .nth(1)
            .map(str::to_owned);
        args.extend(["-append".to_owned(), append.unwrap()]);
        let tree = env.dir.join("tree");
        assets::busybox_tree(&tree);
        let mut pack = Command::new("sh");
        pack.args(["-c", "find . | busybox cpio -o -H newc >../floor.cpio"])
            .current_dir(&tree);
        run(pack, PATIENCE).ok();
        Machine {
            program,
            args,
            initramfs: env.dir.join("floor.cpio"),
        }
    }

    /// The machine with `init` as its PID 1.
    fn command(&self, init: &str) -> Command {
        let mut command = Command::new(&self.program);
        let (append, args) = self.args.split_last().unwrap();
        command
            .args(args)
            .arg(format!("{append} {init}"))
            .arg("-initrd")
            .arg(&self.initramfs)
            .env(MARK, mark());
        command
    }

    /// From QEMU's start to its end, the guest doing nothing but to end.
    fn boot_and_end(&self) -> f64 {
        millis(
            run(self.command("rdinit=/bin/reboot -- -f"), PATIENCE)
                .ok()
                .took,
        )
    }

    fn idle_memory(&self) -> f64 {
        let mut running = Running::start(self.command("rdinit=/bin/sleep -- 3600"), None);
        let memory = settled_memory(&[running.child.id()]);
        running.child.kill().unwrap();
        let _ = running.outcome(PATIENCE);
        memory
    }
}

fn report(rows: &[Row]) {
    let show = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    println!(
        "{:<18} {:>6} {:>10} {:>10} {:>10} {:>10}",
        "", "unit", "cofferdam", "runc", "ratio", "bare QEMU"
    );
    for row in rows {
        let ratio = row.ours.zip(row.runc).map(|(ours, runc)| ours / runc);
        let values = [row.ours, row.runc, ratio, row.floor].map(show);
        println!(
            "{:<18} {:>6} {:>10} {:>10} {:>10} {:>10}",
            row.name, row.unit, values[0], values[1], values[2], values[3]
        );
    }
    let round = |value: Option<f64>| value.map(|value| (value * 10.0).round() / 10.0);
    let list: Vec<_> = rows
        .iter()
        .map(|row| {
            let [ours, runc, floor] = [row.ours, row.runc, row.floor].map(round);
            json!({"name": row.name, "unit": row.unit, "ours": ours, "runc": runc, "floor": floor})
        })
        .collect();
    let path = assets::root().join("target/bench.json");
    fs::write(&path, serde_json::to_string_pretty(&list).unwrap() + "\n").unwrap();
    println!("written to {}", path.display());
}
