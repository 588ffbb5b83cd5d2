//! What pods cost: their network and volumes, one that starts, and many that start at once.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
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

/// Of requests in one measurement.
const SECONDS: u32 = 2;

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
    let gateway = envs[0].cri().gateways()[0].clone();
    let host = TcpListener::bind((gateway.as_str(), 0)).unwrap();
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
    row(
        "net.udp_out",
        "MiB/s",
        both(5, &|member| udp_out(member, &gateway)),
    );
    row(
        "net.requests",
        "1/s",
        both(5, &|member| requests(member, &gateway)),
    );
    eprintln!("measuring the network between pods");
    let peers = envs.each_ref().map(Pod::new);
    let others = peers.each_ref().map(|pod| pod.idle("other"));
    let between = |measure: &dyn Fn(&Member<'_>, &Member<'_>, &str) -> f64| {
        let mut values = [vec![], vec![]];
        for _ in 0..5 {
            for (index, values) in values.iter_mut().enumerate() {
                let address = peers[index].addresses().remove(0);
                values.push(measure(&members[index], &others[index], &address));
            }
        }
        values.map(median)
    };
    row(
        "pods.tcp",
        "MiB/s",
        between(&|from, to, at| sent("tcp", from, to, at)),
    );
    row(
        "pods.udp",
        "MiB/s",
        between(&|from, to, at| sent("udp", from, to, at)),
    );
    row("pods.requests", "1/s", between(&asked));
    drop(others);
    drop(peers);
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

/// What arrives: a sender that is quicker than the way loses packets.
fn udp_out(member: &Member<'_>, gateway: &str) -> f64 {
    let host = UdpSocket::bind((gateway, 0)).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    let command = format!(
        "talk send udp {gateway} {} {MIB}",
        host.local_addr().unwrap().port()
    );
    thread::scope(|scope| {
        let client = scope.spawn(|| member.sh(&command));
        let mut packet = [0; 2048];
        let (mut bytes, mut first, mut last) = (0, None, Instant::now());
        while let Ok(length @ 1..) = host.recv(&mut packet) {
            last = Instant::now();
            first.get_or_insert(last);
            bytes += length;
        }
        client.join().unwrap();
        mib_a_second(bytes as f64, last - first.unwrap())
    })
}

/// Answers by the host, each to a connection of its own.
fn requests(member: &Member<'_>, gateway: &str) -> f64 {
    let host = TcpListener::bind((gateway, 0)).unwrap();
    let port = host.local_addr().unwrap().port();
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let rate = member.sh(&format!("talk rate tcp {gateway} {port} {SECONDS}"));
            // The last one ends the server.
            let _ = TcpStream::connect((gateway, port));
            rate
        });
        loop {
            let (mut stream, peer) = host.accept().unwrap();
            if peer.ip() == host.local_addr().unwrap().ip() {
                break;
            }
            let mut text = [0; 64];
            if stream.read(&mut text).is_ok_and(|length| length > 0) {
                let _ = stream.write_all(b"you said hello");
            }
        }
        client.join().unwrap().parse().unwrap()
    })
}

/// From one pod to another.
fn sent(kind: &str, from: &Member<'_>, to: &Member<'_>, address: &str) -> f64 {
    thread::scope(|scope| {
        let server = scope.spawn(|| to.sh(&format!("talk time {kind} :: 7001")));
        // A client of talk does not wait for its server.
        let listens = format!("grep -q ':1B59 ' /proc/net/{kind}6");
        eventually("the other pod listens", PATIENCE, || {
            (to.exec(&["sh", "-c", &listens]).status == 0).then_some(())
        });
        from.sh(&format!("talk send {kind} {address} 7001 {MIB}"));
        let said = server.join().unwrap();
        let numbers: Vec<f64> = said
            .lines()
            .last()
            .unwrap()
            .split(' ')
            .map(|number| number.parse().unwrap())
            .collect();
        mib_a_second(numbers[0], Duration::from_secs_f64(numbers[1] / 1e6))
    })
}

/// Answers of one pod to another, each by a connection of its own.
fn asked(from: &Member<'_>, to: &Member<'_>, address: &str) -> f64 {
    // The client tries until its server is there.
    let server = "talk serve tcp :: 7002 >/dev/null 2>&1 & echo $!";
    let pid = to.sh(server);
    from.sh(&format!("talk ask tcp {address} 7002 hello"));
    let rate = from.sh(&format!("talk rate tcp {address} 7002 {SECONDS}"));
    to.sh(&format!("kill {pid}"));
    rate.parse().unwrap()
}

fn mib_a_second(bytes: f64, took: Duration) -> f64 {
    bytes / f64::from(1 << 20) / took.as_secs_f64()
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
