//! Standard input and output through containerd: every byte, in order, to its end, and never in the
//! way of the rest.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{ChildStdin, ExitCode};
use std::time::Duration;

use cofferdam_tests::command::{Running, run};
use cofferdam_tests::pty::Terminal;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, eventually, procs};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Core: a_hundred_mib_through_cat, terminal_that_is_resized;
        Once: every_byte_value, output_of_a_process_that_exits_at_once, standard_input_ends,
            input_written_before_it_is_read,
            input_that_nobody_reads, output_after_input_ended, null_io, log_file, log_program,
            nobody_reads_the_output,
            a_stopped_reader_blocks_nobody_else, attach_to_a_running_container, terminal_of_an_exec,
            child_that_keeps_the_output_open;
        Long: a_gib_of_output;
    ])
}

/// Random enough that a lost, doubled or moved block shows.
fn noise(path: &Path, mib: usize) {
    let (mut file, mut state) = (File::create(path).unwrap(), 0x9e37_79b9_7f4a_7c15_u64);
    let mut block = vec![0; 1 << 20];
    for _ in 0..mib {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
}

#[track_caller]
fn assert_same(one: &Path, two: &Path) {
    let (size, wanted) = (
        fs::metadata(two).unwrap().len(),
        fs::metadata(one).unwrap().len(),
    );
    assert_eq!(size, wanted, "bytes that came back");
    let (mut one, mut two) = (File::open(one).unwrap(), File::open(two).unwrap());
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for block in 0..wanted >> 20 {
        one.read_exact(&mut left).unwrap();
        two.read_exact(&mut right).unwrap();
        assert!(left == right, "MiB {block} differs");
    }
}

fn a_hundred_mib_through_cat(env: &Env) {
    let (input, output) = (env.dir.join("in"), env.dir.join("out"));
    noise(&input, 100);
    let container = Container::adopt(env, &env.id());
    // ctr 1.6.20 closes its fifos when the process has ended, read or not: it ends later.
    let script = "cat; while [ ! -e /read ]; do sleep 0.1; done";
    let command = env.run_command(&container.id, &["--rm"], &["sh", "-c", script]);
    let cat = Running::start_into(
        command,
        Some(File::open(&input).unwrap()),
        File::create(&output).unwrap(),
    );
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    eventually("all of it comes back", 3 * PATIENCE, || {
        (size(&output) >= size(&input)).then_some(())
    });
    // The end of the container may be that of the exec too.
    container.exec(&["touch", "/read"]);
    cat.wait(PATIENCE).ok();
    assert_same(&input, &output);
    fs::remove_file(input).unwrap();
    fs::remove_file(output).unwrap();
}

fn a_gib_of_output(env: &Env) {
    let output = env.dir.join("out");
    let script = "dd if=/dev/zero bs=1M count=1024 2>/dev/null | tr '\\0' x";
    let command = env.run_command(&env.id(), &["--rm"], &["sh", "-c", script]);
    Running::start_into(command, None, File::create(&output).unwrap())
        .wait(Duration::from_secs(900))
        .ok();
    assert_eq!(fs::metadata(&output).unwrap().len(), 1 << 30);
    fs::remove_file(output).unwrap();
}

fn every_byte_value(env: &Env) {
    let container = env.idle();
    let bytes: Vec<u8> = (0..=255).cycle().take(64 << 10).collect();
    fs::write(env.dir.join("bytes"), &bytes).unwrap();
    let input = File::open(env.dir.join("bytes")).unwrap();
    let output = Running::start(container.exec_command("cat", &[], &["cat"]), Some(input))
        .wait(PATIENCE)
        .ok();
    assert!(
        output.stdout == bytes,
        "{} bytes came back, or other ones",
        output.stdout.len()
    );
}

fn output_of_a_process_that_exits_at_once(env: &Env) {
    assert_eq!(env.run(&[], &["echo", "gone"]).ok().text(), "gone");
    let container = env.idle();
    for number in 0..20 {
        let output = container
            .exec(&["sh", "-c", &format!("echo {number}; echo e{number} >&2")])
            .ok();
        assert_eq!(
            (output.text(), output.errors()),
            (number.to_string(), format!("e{number}"))
        );
    }
}

/// Starts an exec whose standard input is a pipe, and waits until it runs: `ctr` loses an end of
/// input that comes before.
fn piped_exec(container: &Container, script: &str) -> (Running, ChildStdin) {
    let script = format!("touch /ready; {script}");
    let mut running =
        Running::start_piped(container.exec_command("piped", &[], &["sh", "-c", &script]));
    let input = running.child.stdin.take().unwrap();
    container.wait_for_file("/ready");
    (running, input)
}

fn standard_input_ends(env: &Env) {
    let container = env.idle();
    let (cat, mut input) = piped_exec(&container, "cat; echo end");
    input.write_all(b"one\n").unwrap();
    input.write_all(b"two\n").unwrap();
    drop(input);
    assert_eq!(cat.wait(PATIENCE).ok().text(), "one\ntwo\nend");
}

fn input_written_before_it_is_read(env: &Env) {
    let container = env.idle();
    let (cat, mut input) = piped_exec(&container, "sleep 2; cat");
    input.write_all(b"early").unwrap();
    drop(input);
    assert_eq!(cat.wait(PATIENCE).ok().text(), "early");
}

fn input_that_nobody_reads(env: &Env) {
    const AMOUNT: u64 = 2 << 20;
    let path = env.dir.join("unread");
    File::create(&path).unwrap().set_len(AMOUNT).unwrap();
    let container = env.idle();
    container.exec(&["mkfifo", "/go"]).ok();
    let script = "dd bs=1 count=1 of=/first 2>/dev/null; read line </go; wc -c";
    let command = container.exec_command("unread", &[], &["sh", "-c", script]);
    let reader = Running::start(command, Some(File::open(path).unwrap()));
    container.wait_for_file("/first");
    // More is offered than the guest can hold; nobody may keep a CPU busy with that.
    procs::come_to_rest(&procs::family(&container.id));
    container.exec(&["sh", "-c", "echo >/go"]).ok();
    assert_eq!(reader.wait(PATIENCE).ok().text(), (AMOUNT - 1).to_string());
}

fn output_after_input_ended(env: &Env) {
    let container = env.idle();
    let (cat, input) = piped_exec(&container, "cat; sleep 1; echo after");
    drop(input);
    assert_eq!(cat.wait(PATIENCE).ok().text(), "after");
}

fn null_io(env: &Env) {
    let output = env
        .run(
            &["--null-io"],
            &["sh", "-c", "cat; dd if=/dev/zero bs=1M count=4; exit 6"],
        )
        .exits(6);
    assert_eq!(
        (output.text(), output.errors()),
        (String::new(), String::new())
    );
}

fn log_file(env: &Env) {
    let file = env.dir.join("sub/log");
    let uri = format!("file://{}", file.display());
    env.run(
        &["--log-uri", &uri],
        &["sh", "-c", "echo out; echo err >&2"],
    )
    .ok();
    let logged = fs::read_to_string(&file).unwrap();
    assert!(
        logged.contains("out\n") && logged.contains("err\n"),
        "{logged:?}"
    );
    env.run(&["--log-uri", &uri], &["echo", "more"]).ok();
    assert!(
        fs::read_to_string(&file).unwrap().ends_with("more\n"),
        "the file is appended to"
    );
}

fn log_program(env: &Env) {
    let logger = env.dir.join("logger");
    // Descriptor 5 closed: the logger is ready.
    let script = "#!/bin/sh\nexec 5>&-\ncat <&3 >\"$2/$CONTAINER_NAMESPACE.$CONTAINER_ID.out\" &\ncat <&4 >\"$2/$1\" &\nwait\n";
    fs::write(&logger, script).unwrap();
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?errors={}", logger.display(), env.dir.display());
    let container = env.detached(
        &["--log-uri", &uri],
        &["sh", "-c", "echo out; echo err >&2; exit 2"],
    );
    assert_eq!(container.finish(), 2);
    let name = format!(
        "{}.{}.out",
        cofferdam_tests::daemon::namespace(),
        container.id
    );
    for (name, text) in [(name.as_str(), "out\n"), ("errors", "err\n")] {
        let read = || {
            fs::read_to_string(env.dir.join(name))
                .ok()
                .filter(|logged| logged == text)
        };
        eventually(
            &format!("the logger's file {name} has {text:?}"),
            PATIENCE,
            read,
        );
    }
}

fn nobody_reads_the_output(env: &Env) {
    let container = env.detached(
        &[],
        &[
            "sh",
            "-c",
            "dd if=/dev/zero bs=64k count=64 2>/dev/null; sleep 3600",
        ],
    );
    container.exec(&["echo", "alive"]).ok();
    container.kill("SIGKILL", &[]).ok();
    assert_eq!(container.finish(), 137);
}

fn a_stopped_reader_blocks_nobody_else(env: &Env) {
    let container = env.idle();
    let flood = ["dd", "if=/dev/zero", "bs=64k", "count=4096"];
    let mut stopped = container.exec_command("flood", &[], &flood);
    let mut stopped = stopped
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    stopped
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    let took = container.exec(&["echo", "quick"]).ok().took;
    assert!(
        took < Duration::from_secs(10),
        "an exec beside the blocked one took {took:?}"
    );
    container.kill("SIGKILL", &["--exec-id", "flood"]).ok();
    drop(stopped.stdout.take());
    let _ = stopped.kill();
    stopped.wait().unwrap();
    container.exec(&["true"]).ok();
}

fn attach_to_a_running_container(env: &Env) {
    let container = env.detached(
        &[],
        &[
            "sh",
            "-c",
            "while [ ! -e /go ]; do sleep 0.1; done; echo attached; exit 4",
        ],
    );
    let attach = Running::start(
        env.daemon.ctr_command(["tasks", "attach", &container.id]),
        None,
    );
    // The end of the container may be that of the exec too.
    container.exec(&["touch", "/go"]);
    assert_eq!(attach.wait(PATIENCE).exits(4).text(), "attached");
}

fn terminal_that_is_resized(env: &Env) {
    let container = Container::adopt(env, &env.id());
    let mut terminal = Terminal::run(
        env.run_command(&container.id, &["--rm", "-t"], &["sh"]),
        33,
        99,
    );
    terminal.send("tty\n");
    terminal.expect("/dev/pts/0");
    // ctr sets the size after the start: it may be there a moment later.
    terminal
        .send("size() { while [ \"$(stty size)\" != \"$1\" ]; do sleep 0.1; done; echo size is $1; }; size '33 99'\n");
    terminal.expect("size is 33 99");
    terminal.resize(44, 111);
    terminal.send("size '44 111'\n");
    terminal.expect("size is 44 111");
    // One process, which the shell has put before the terminal by then: before that the signal would
    // be the shell's own, which does not mind.
    terminal.send("sh -c \"echo slee''ping; exec sleep 3600\"\n");
    terminal.expect("sleeping");
    terminal.send("\u{3}");
    terminal.send("echo inter''rupted; exit 5\n");
    terminal.expect("interrupted");
    assert_eq!(terminal.wait(), 5);
}

fn terminal_of_an_exec(env: &Env) {
    let container = env.idle();
    let mut terminal = Terminal::run(container.exec_command("sh", &["-t"], &["sh"]), 25, 81);
    terminal.send("while [ \"$(stty size)\" != '25 81' ]; do sleep 0.1; done; echo err''or >&2\n");
    terminal.expect("error");
    terminal.send("exit 6\n");
    assert_eq!(terminal.wait(), 6);
}

fn child_that_keeps_the_output_open(env: &Env) {
    // The exit of a process must not wait for a child that still holds its output.
    let container = env.idle();
    let output = run(
        container.exec_command("parent", &[], &["sh", "-c", "sleep 25 & echo parent"]),
        PATIENCE,
    );
    assert_eq!(output.ok().text(), "parent");
}
