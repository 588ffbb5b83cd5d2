//! What pods cost: their network and volumes, one that starts, and many that start at once.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_tests::pod::{Member, Pod};
use cofferdam_tests::{Env, PATIENCE, eventually};
use serde_json::json;

use crate::{Row, median, millis};

/// MiB over the network or through a volume in one measurement.
const MIB: u32 = 64;

/// Messages there and back in one measurement.
const PINGS: u32 = 200;

/// Pods that start at once.
const PARALLEL: usize = 8;

/// All rows.
pub fn measure(envs: &[Env; 2]) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name, unit, [ours, runc]: [f64; 2]| {
        rows.push(Row {
            name,
            unit,
            ours: Some(ours),
            runc: Some(runc),
            floor: None,
        });
    };
    eprintln!("measuring the network and volumes of pods");
    let volume = envs[0].dir.join("volume");
    fs::create_dir(&volume).unwrap();
    let pods = envs.each_ref().map(Pod::new);
    let mounts = json!({"mounts": [{"host_path": volume, "container_path": "/volume"}]});
    let members = pods
        .each_ref()
        .map(|pod| pod.run_with("idle", &["sleep", "3600"], mounts.clone()));
    let host = TcpListener::bind((envs[0].cri().gateways()[0].as_str(), 0)).unwrap();
    let both = |count: usize, measure: &dyn Fn(&Member<'_>) -> f64| {
        let mut values = [vec![], vec![]];
        for _ in 0..count {
            for (member, values) in members.iter().zip(&mut values) {
                values.push(measure(member));
            }
        }
        values.map(median)
    };
    row(
        "net.tcp_out",
        "MiB/s",
        both(5, &|member| tcp_out(member, &host)),
    );
    row(
        "net.tcp_in",
        "MiB/s",
        both(5, &|member| tcp_in(member, &host)),
    );
    row(
        "net.rtt",
        "µs",
        both(3, &|member| round_trip(member, &host)),
    );
    let file = volume.join("file");
    row(
        "fs.write",
        "MiB/s",
        both(5, &|member| {
            dd(member, "if=/dev/zero of=/volume/file conv=fsync")
        }),
    );
    let read = |member: &Member<'_>| {
        // One that no guest has seen: a guest keeps what it has read in its own memory.
        fs::remove_file(&file).unwrap();
        fs::write(&file, vec![7; (MIB as usize) << 20]).unwrap();
        dd(member, "if=/volume/file of=/dev/null")
    };
    row("fs.read", "MiB/s", both(5, &read));
    drop(members);
    drop(pods);

    eprintln!("measuring starts of pods");
    let mut starts = [vec![], vec![]];
    for _ in 0..5 {
        for (env, starts) in envs.iter().zip(&mut starts) {
            starts.push(start(env));
        }
    }
    row("pod.start", "ms", starts.map(median));
    row("pod.parallel", "ms", envs.each_ref().map(parallel));
    rows
}

/// From the order for a pod to the first line that its container logs.
fn start(env: &Env) -> f64 {
    let began = Instant::now();
    let pod = Pod::new(env);
    let member = pod.run("first", &["echo", "started"]);
    while fs::metadata(&member.log).map_or(0, |log| log.len()) == 0 {
        assert!(
            began.elapsed() < PATIENCE,
            "no line in {}",
            member.log.display()
        );
        thread::sleep(Duration::from_millis(1));
    }
    millis(began.elapsed())
}

/// Until every one of several pods that are ordered at once runs its container.
fn parallel(env: &Env) -> f64 {
    let began = Instant::now();
    let start = || {
        let pod = Pod::new(env);
        pod.idle("one");
        pod
    };
    let pods: Vec<Pod<'_>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(start)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let took = millis(began.elapsed());
    drop(pods);
    took
}

/// Has `talk` of a container connect to the host, in one of its modes, while the host measures.
fn talk<T>(
    member: &Member<'_>,
    host: &TcpListener,
    mode: &str,
    measure: impl FnOnce(TcpStream) -> T,
) -> T {
    let address = host.local_addr().unwrap();
    let amount = if mode == "send" {
        MIB.to_string()
    } else {
        String::new()
    };
    let command = format!(
        "exec talk {mode} tcp {} {} {amount}",
        address.ip(),
        address.port()
    );
    thread::scope(|scope| {
        let client = scope.spawn(|| member.sh(&command));
        host.set_nonblocking(true).unwrap();
        let (stream, _) = eventually("a connection of the container", PATIENCE, || {
            host.accept().ok()
        });
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let measured = measure(stream);
        client.join().unwrap();
        measured
    })
}

fn throughput(took: Duration) -> f64 {
    f64::from(MIB) / took.as_secs_f64()
}

fn tcp_out(member: &Member<'_>, host: &TcpListener) -> f64 {
    talk(member, host, "send", |mut stream| {
        let began = Instant::now();
        let count = io::copy(&mut stream, &mut io::sink()).unwrap();
        assert_eq!(count, u64::from(MIB) << 20);
        throughput(began.elapsed())
    })
}

fn tcp_in(member: &Member<'_>, host: &TcpListener) -> f64 {
    talk(member, host, "drain", |mut stream| {
        let chunk = vec![7; 1 << 20];
        let began = Instant::now();
        (0..MIB).for_each(|_| stream.write_all(&chunk).unwrap());
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // The other end closes when it has read everything.
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        throughput(began.elapsed())
    })
}

/// In microseconds.
fn round_trip(member: &Member<'_>, host: &TcpListener) -> f64 {
    talk(member, host, "echo", |mut stream| {
        let mut message = [7; 64];
        let mut ping = || {
            let began = Instant::now();
            stream.write_all(&message).unwrap();
            stream.read_exact(&mut message).unwrap();
            millis(began.elapsed()) * 1000.0
        };
        median((0..PINGS).map(|_| ping()).collect())
    })
}

/// `dd` of the whole amount, by the container's clock, which counts hundredths of a second.
fn dd(member: &Member<'_>, how: &str) -> f64 {
    let clock = "read now idle </proc/uptime; echo $now";
    let output = member.sh(&format!(
        "{clock}; dd bs=1M count={MIB} {how} 2>/dev/null; {clock}"
    ));
    let times: Vec<f64> = output.lines().map(|line| line.parse().unwrap()).collect();
    f64::from(MIB) / (times[1] - times[0]).max(0.01)
}
