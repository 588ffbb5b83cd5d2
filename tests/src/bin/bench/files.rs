//! What small operations on files cost, in a container's root and in a directory of the host.

use std::fs;

use cofferdam_tests::{Container, Env, assets};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{Row, median};

/// Files in one measurement; the program takes the median of five rounds.
const COUNT: &str = "40";

/// Runs of the program in each container, alternating.
const RUNS: usize = 3;

/// What tests/images/files.c calls it, and the rows' names in the root and in the volume.
const ROWS: [(&str, &str, &str); 10] = [
    ("create", "root.create", "volume.create"),
    ("exclusive", "root.exclusive", "volume.exclusive"),
    ("rewrite", "root.rewrite", "volume.rewrite"),
    ("read", "root.read", "volume.read"),
    ("pwrite", "root.pwrite", "volume.pwrite"),
    ("stat", "root.stat", "volume.stat"),
    ("absent", "root.absent", "volume.absent"),
    ("mkdir", "root.mkdir", "volume.mkdir"),
    ("rename", "root.rename", "volume.rename"),
    ("unlink", "root.unlink", "volume.unlink"),
];

/// All rows.
pub fn measure(envs: &[Env; 2]) -> Vec<Row> {
    eprintln!("measuring small operations on files");
    let (tools, volume) = (envs[0].dir.join("tools"), envs[0].dir.join("on-tmpfs"));
    for dir in [&tools, &volume] {
        fs::create_dir(dir).unwrap();
    }
    assets::program(&tools, "files");
    // ext4 would not take inodes again that were deleted a moment ago, and look for others longer
    // than all the rest takes.
    let none = None::<&str>;
    mount(none, &volume, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let mounts = [(&tools, "/t", "ro"), (&volume, "/v", "rw")].map(|(from, to, mode)| {
        format!(
            "type=bind,src={},dst={to},options=rbind:{mode}",
            from.display()
        )
    });
    let flags = ["--null-io", "--mount", &mounts[0], "--mount", &mounts[1]];
    let containers = envs
        .each_ref()
        .map(|env| env.detached(&flags, &["sleep", "3600"]));
    let mut values = vec![[vec![], vec![]]; 2 * ROWS.len()];
    for run in 0..RUNS {
        for (runtime, container) in containers.iter().enumerate() {
            for (place, dir) in ["/root", "/v"].into_iter().enumerate() {
                let said = times(container, &format!("{dir}/{runtime}-{run}"));
                for (index, (kind, ..)) in ROWS.iter().enumerate() {
                    values[2 * index + place][runtime].push(time_of(&said, kind));
                }
            }
        }
    }
    for container in &containers {
        container.kill("SIGKILL", &[]).ok();
        container.finish();
    }
    umount2(&volume, MntFlags::MNT_DETACH).unwrap();
    let names = ROWS.iter().flat_map(|(_, root, volume)| [*root, *volume]);
    names
        .zip(values)
        .map(|(name, values)| {
            let [ours, runc] = values.map(median);
            Row {
                name,
                unit: "us",
                ours: Some(ours),
                runc: Some(runc),
                floor: None,
            }
        })
        .collect()
}

fn times(container: &Container, dir: &str) -> String {
    let script = format!("mkdir {dir} && /t/files times {dir} {COUNT}");
    container.exec(&["sh", "-c", &script]).ok().text()
}

fn time_of(said: &str, kind: &str) -> f64 {
    let mut lines = said.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(name, _)| *name == kind);
    found.and_then(|(_, time)| time.parse().ok()).unwrap()
}
