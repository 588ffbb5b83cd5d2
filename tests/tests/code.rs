//! Programs run as their files say, whatever the guest has evicted, read again or been given anew.
//! An emulator keeps translations of code and must notice when other code takes its place; with
//! `scripts/with-qemu` this suite asks that of other releases of QEMU.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use cofferdam_tests::assets::code_program;
use cofferdam_tests::command::{Running, run};
use cofferdam_tests::{Container, Env, PATIENCE, Suite, cases, eventually};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Once: program_larger_than_its_memory_limit, programs_of_two_containers_with_small_limits,
            program_replaced_on_the_host, code_read_past_the_page_cache;
        Ours: programs_after_the_guest_dropped_its_caches, code_made_by_a_program_that_has_ended;
    ])
}

/// A directory of this test's, and the flags that put it at /code.
fn dir(env: &Env) -> (PathBuf, String) {
    let dir = env.dir.join(env.id());
    fs::create_dir(&dir).unwrap();
    let mount = format!("type=bind,src={},dst=/code,options=rbind:rw", dir.display());
    (dir, mount)
}

/// What `times` calls of a program with this number say, if all of its pages are right.
fn right(number: u32, times: usize) -> String {
    vec![format!("0 of {number} wrong"); times].join("\n")
}

fn programs_after_the_guest_dropped_its_caches(env: &Env) {
    let (dir, mount) = dir(env);
    code_program(&dir, 2048, 1_000_000);
    code_program(&dir, 2048, 2_000_000);
    let script = "for turn in 1 2 3; do for code in /code/*; do
        echo 3 >/proc/sys/vm/drop_caches; $code; done; done";
    let flags = ["--privileged", "--mount", &mount];
    let said = env.run(&flags, &["sh", "-c", script]).ok().text();
    let once = [right(1_000_000, 1), right(2_000_000, 1)].join("\n");
    assert_eq!(said, [once.as_str(); 3].join("\n"));
}

fn program_larger_than_its_memory_limit(env: &Env) {
    let (dir, mount) = dir(env);
    code_program(&dir, 12_288, 1_000_000);
    code_program(&dir, 12_288, 2_000_000);
    let limit = (32 << 20).to_string();
    let flags = ["--memory-limit", &limit, "--mount", &mount];
    let script = "for code in /code/*; do $code 2 || exit; done; true";
    let said = env.run(&flags, &["sh", "-c", script]).ok().text();
    assert_eq!(
        said,
        [right(1_000_000, 1), right(2_000_000, 1)].join("\n"),
        "48 MiB of code, 32 MiB of memory"
    );
}

fn programs_of_two_containers_with_small_limits(env: &Env) {
    let (dir, mount) = dir(env);
    let numbers = [1_000_000, 2_000_000];
    let programs = numbers.map(|number| code_program(&dir, 6144, number));
    let limit = (16 << 20).to_string();
    let first = env.id();
    let group = format!("io.containerd.runc.v2.group={first}");
    let flags = [
        "--memory-limit",
        &limit,
        "--mount",
        &mount,
        "--annotation",
        &group,
    ];
    let flags: Vec<&str> = ["-d"].into_iter().chain(flags).collect();
    let containers = [first.clone(), env.id()].map(|id| {
        run(env.run_command(&id, &flags, &["sleep", "3600"]), PATIENCE).ok();
        Container::adopt(env, &id)
    });
    std::thread::scope(|scope| {
        // Each runs both, the other one first.
        for (index, container) in containers.iter().enumerate() {
            let programs = &programs;
            scope.spawn(move || {
                for turn in 0..4 {
                    let which = (index + turn) % 2;
                    let name = programs[which].file_name().unwrap().to_str().unwrap();
                    let said = container.exec(&[&format!("/code/{name}")]).ok().text();
                    assert_eq!(said, right(numbers[which], 1));
                }
            });
        }
    });
    for container in containers.iter().rev() {
        container.kill("SIGKILL", &[]).ok();
        container.finish();
    }
}

fn program_replaced_on_the_host(env: &Env) {
    let (dir, mount) = dir(env);
    let other = env.dir.join(env.id());
    fs::create_dir(&other).unwrap();
    let old = code_program(&other, 2048, 1_000_000);
    let new = code_program(&other, 2048, 2_000_000);
    let place = dir.join("program");
    fs::copy(&old, &place).unwrap();
    let container = env.detached(&["--mount", &mount], &["sleep", "3600"]);
    let call = |rounds: &str| container.exec(&["/code/program", rounds]).ok().text();
    assert_eq!(call("1"), right(1_000_000, 1));
    // As a package manager does it, while the old one runs.
    let until = ["/code/program", "until", "/code/end"];
    let running = Running::start(container.exec_command(&env.id(), &[], &until), None);
    eventually("it runs", PATIENCE, || {
        (container.exec(&["pidof", "program"]).status == 0).then_some(())
    });
    fs::copy(&new, dir.join("program.new")).unwrap();
    fs::rename(dir.join("program.new"), &place).unwrap();
    eventually("the new one is seen", PATIENCE, || {
        (call("1") == right(2_000_000, 1)).then_some(())
    });
    fs::write(dir.join("end"), "").unwrap();
    assert_eq!(running.wait(PATIENCE).ok().text(), right(1_000_000, 1));
    // Written over, the file stays the same one.
    fs::write(&place, fs::read(&old).unwrap()).unwrap();
    eventually("what was written is seen", PATIENCE, || {
        (call("1") == right(1_000_000, 1)).then_some(())
    });
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

fn code_made_by_a_program_that_has_ended(env: &Env) {
    let (dir, mount) = dir(env);
    code_program(&dir, 4096, 1_000_000);
    code_program(&dir, 4096, 2_000_000);
    let script = "for code in /code/*; do $code copy; $code; done;
        echo 3 >/proc/sys/vm/drop_caches; for code in /code/*; do $code; done";
    let flags = ["--privileged", "--mount", &mount];
    let said = env.run(&flags, &["sh", "-c", script]).ok().text();
    let twice = [right(1_000_000, 2), right(2_000_000, 2)];
    let once = [right(1_000_000, 1), right(2_000_000, 1)];
    assert_eq!(said, [twice, once].concat().join("\n"));
}

fn code_read_past_the_page_cache(env: &Env) {
    let (dir, mount) = dir(env);
    code_program(&dir, 512, 1_000_000);
    code_program(&dir, 512, 2_000_000);
    let script = "cd /code; ./code-512-1000000 write /code/a; ./code-512-2000000 write /code/b;
        ./code-512-1000000 read a b a b";
    let said = env
        .run(&["--mount", &mount], &["sh", "-c", script])
        .ok()
        .text();
    assert_eq!(said, right(1_000_000, 1));
}
