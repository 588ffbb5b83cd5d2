//! What programs that work on many files cost in a container's root file system, and in one whose
//! changes stay in the guest's memory (`root_in_memory`).

use std::fs;
use std::time::Duration;

use cofferdam_tests::command::run;
use cofferdam_tests::{Container, Env, assets};

use crate::{Row, median};

/// Runs of each, alternating.
const RUNS: usize = 3;

/// The import of the image, and a start from it.
const LONG: Duration = Duration::from_secs(300);

/// Name of the row, of the one in memory, and a script in an empty directory, which times itself.
const SCRIPTS: [(&str, &str, &str); 8] = [
    (
        "files.make",
        "memory.make",
        "time for i in {1..500}; do echo $i >$i; done",
    ),
    (
        "files.git_add",
        "memory.git_add",
        "for i in {1..300}; do echo $i >$i; done; git init -q; time git add .",
    ),
    (
        "files.tar",
        "memory.tar",
        "time tar -C /usr/include -cf - . | tar -xf -",
    ),
    (
        "files.rm",
        "memory.rm",
        "cp -r /usr/include .; time rm -r include",
    ),
    (
        "files.find",
        "memory.find",
        "time find /usr -xdev -type f -size +1k >/dev/null",
    ),
    (
        "files.grep",
        "memory.grep",
        "time grep -r no-such-word /usr/include || true",
    ),
    (
        "files.sqlite",
        "memory.sqlite",
        "sqlite3 db 'create table t (n)'; time for i in {1..50}; do sqlite3 db \"insert into t values ($i)\"; done",
    ),
    (
        "files.initdb",
        "memory.initdb",
        "chown postgres .; time su postgres -c '/usr/lib/postgresql/*/bin/initdb -D data >/dev/null'",
    ),
];

/// The same for rates, by fio's count.
const FIO: [(&str, &str, &str); 3] = [
    (
        "fio.randrw",
        "memory.randrw",
        "--rw=randrw --bs=4k --size=64m --runtime=3 --time_based",
    ),
    (
        "fio.write",
        "memory.write",
        "--rw=write --bs=1m --size=128m",
    ),
    (
        "fio.fsync",
        "memory.fsync",
        "--rw=randwrite --bs=4k --size=16m --fsync=1 --runtime=3 --time_based",
    ),
];

/// All rows.
pub fn measure(envs: &[Env; 2]) -> Vec<Row> {
    eprintln!("measuring programs that work on files");
    let archive = assets::programs();
    envs.iter().for_each(|env| env.import(&archive));
    let config = envs[0].dir.join("in-memory.toml");
    fs::write(&config, "root_in_memory = true\n").unwrap();
    let memory = ["--runtime-config-path", config.to_str().unwrap()];
    let containers = [
        start(&envs[0], &[]),
        start(&envs[1], &[]),
        start(&envs[0], &memory),
    ];
    let mut rows = Vec::new();
    let mut add =
        |[root, memory]: [&'static str; 2], unit, measure: &dyn Fn(&Container<'_>) -> f64| {
            let mut values = [vec![], vec![], vec![]];
            for _ in 0..RUNS {
                for (container, values) in containers.iter().zip(&mut values) {
                    values.push(measure(container));
                }
            }
            let [ours, runc, in_memory] = values.map(median);
            rows.extend([(root, ours), (memory, in_memory)].map(|(name, ours)| Row {
                name,
                unit,
                ours: Some(ours),
                runc: Some(runc),
                floor: None,
            }));
        };
    for (root, memory, script) in SCRIPTS {
        let script = format!("TIMEFORMAT=%R; {script}");
        add([root, memory], "ms", &|container| {
            let said = sh(container, &script);
            let seconds = said
                .lines()
                .last()
                .and_then(|line| line.parse::<f64>().ok());
            1000.0 * seconds.unwrap_or_else(|| panic!("no time in {said:?}"))
        });
    }
    for (root, memory, job) in FIO {
        let script = format!("fio --name=x --directory=. --ioengine=psync --minimal {job}");
        add([root, memory], "IOPS", &|container| {
            let said = sh(container, &script);
            let fields: Vec<&str> = said.split(';').collect();
            // Of the terse format, version 3: the rate of writes.
            fields[48].parse().unwrap()
        });
    }
    for container in &containers {
        container.kill("SIGKILL", &[]).ok();
        container.finish();
    }
    rows
}

fn start<'e>(env: &'e Env, flags: &[&str]) -> Container<'e> {
    let id = env.id();
    let (snapshotter, runtime) = (env.daemon.snapshotter, env.runtime.name());
    let base = [
        "run",
        "-d",
        "--null-io",
        "--snapshotter",
        snapshotter,
        "--runtime",
        runtime,
    ];
    let command = [assets::PROGRAMS, &id, "tini", "--", "sleep", "infinity"];
    let command = [&base[..], flags, &command].concat();
    run(env.daemon.ctr_command(command), LONG).ok();
    Container::adopt(env, &id)
}

/// Runs a script in an empty directory; gives what it said, its times too.
fn sh(container: &Container<'_>, script: &str) -> String {
    let script = format!(
        "cd \"$(mktemp -d /srv/XXXXXX)\" && chmod 755 . && {{ {script}; }} 2>&1 && rm -rf \"$PWD\""
    );
    container.exec(&["bash", "-ec", &script]).ok().text()
}
