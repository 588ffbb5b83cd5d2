//! kill -9 of the shim, of QEMU and of its helpers, at any step of a pod's life: every call ends,
//! the pod can be removed, nothing stays, and the next pod works. `COFFERDAM_KILLS` is the number
//! of rounds, `COFFERDAM_SEED` where the sequence begins.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cofferdam_tests::command::Running;
use cofferdam_tests::leftovers::Snapshot;
use cofferdam_tests::pod::Pod;
use cofferdam_tests::procs::{self, Proc};
use cofferdam_tests::random::{Random, number};
use cofferdam_tests::{Env, PATIENCE, Suite, cases, eventually};
use serde_json::{Value, json};

const PARTS: [&str; 4] = [
    "containerd-shim-cofferdam",
    "qemu-system",
    "virtiofsd",
    "vhost-device-vsock",
];

/// How long cleaning up may take: containerd gives `delete` 5 s, and notices the death first.
const CLEAN: Duration = Duration::from_secs(10);

/// Steps of a pod with one container; each further one has two more.
const STEPS: u64 = 10;

fn main() -> ExitCode {
    Suite::of_pods().run(cases![Ours: at_any_step, what_hangs_in_a_file_server])
}

/// What a round does, all of it by its seed.
#[derive(Debug)]
struct Round {
    containers: usize,
    step: usize,
    delay: Duration,
    victims: Vec<&'static str>,
}

impl Round {
    fn new(seed: u64) -> Round {
        let mut random = Random::new(seed);
        let containers = 1 + random.below(3);
        let step = random.below(STEPS + 2 * (containers - 1));
        // The machine boots in the first step.
        let delay = Duration::from_millis(random.below(if step == 0 { 2000 } else { 300 }));
        let count = 1 + random.below(4) / 3;
        let victims = (0..count)
            .map(|_| PARTS[usize::try_from(random.below(4)).unwrap()])
            .collect();
        Round {
            containers: usize::try_from(containers).unwrap(),
            step: usize::try_from(step).unwrap(),
            delay,
            victims,
        }
    }
}

fn at_any_step(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let socket = env.dir.join("host.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mounts: Vec<Value> = ["hostpath", "volumes/kubernetes.io~empty-dir/shared"]
        .iter()
        .map(|name| {
            let dir = env.dir.join(name);
            std::fs::create_dir_all(&dir).unwrap();
            json!({"host_path": dir, "container_path": format!("/mnt/{name}")})
        })
        .chain([json!({"host_path": socket, "container_path": "/run/host.sock"})])
        .collect();
    // CNI makes the bridge for the first pod, and keeps it.
    works(env);
    let seed = number("COFFERDAM_SEED", 1);
    for seed in seed..seed + number("COFFERDAM_KILLS", 5) {
        let round = Round::new(seed);
        let what = format!("seed {seed}: {round:?}");
        let before = Snapshot::take();
        let reached = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let life = scope.spawn(|| live(env, round.containers, &mounts, &reached));
            while reached.load(Ordering::Acquire) <= round.step && !life.is_finished() {
                std::thread::sleep(Duration::from_millis(2));
            }
            std::thread::sleep(round.delay);
            // At once: what dies of another's death is not a victim.
            let victims: Vec<Proc> = round
                .victims
                .iter()
                .flat_map(|victim| procs::named(victim))
                .collect();
            victims
                .iter()
                .filter(|victim| !victim.args.ends_with(" delete"))
                .for_each(Proc::kill9);
            assert!(life.join().is_ok(), "{what}: a call did not end");
        });
        // More than once, as the kubelet does: containerd may not have noticed yet what has died.
        eventually(&format!("{what}: no pod is left"), CLEAN, || {
            let left = env.crictl(&["pods", "-q"]).ok().text();
            left.lines()
                .for_each(|pod| drop(env.crictl(&["rmp", "-f", pod])));
            left.is_empty().then_some(())
        });
        before
            .wait_gone(CLEAN)
            .unwrap_or_else(|left| panic!("{what}: {left}"));
        if seed % 4 == 0 {
            works(env);
        }
    }
}

/// These tests compare the whole machine before and after: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A pod of which one container hangs in a request to a file server is stopped and removed all the
/// same.
fn what_hangs_in_a_file_server(env: &Env) {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // CNI makes the bridge for the first pod, and keeps it.
    works(env);
    let before = Snapshot::take();
    {
        let pod = Pod::new(env);
        pod.idle("good");
        let busy = pod.run(
            "busy",
            &[
                "sh",
                "-c",
                "touch /up; while :; do ls /$RANDOM$RANDOM; done",
            ],
        );
        busy.wait_until("test -e /up");
        procs::named("virtiofsd").iter().for_each(Proc::stop);
        std::thread::sleep(Duration::from_secs(1));
        let began = Instant::now();
        pod.stop();
        // containerd may not have noted yet that the sandbox is stopped.
        eventually("the pod is removed", PATIENCE, || {
            (env.crictl(&["rmp", &pod.id]).status == 0).then_some(())
        });
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "stopped and removed after {:?}",
            began.elapsed()
        );
        std::mem::forget(pod);
    }
    before.wait_gone(CLEAN).unwrap();
}

/// A pod's life, step by step; any step may fail. `reached` counts those that have begun.
fn live(env: &Env, containers: usize, mounts: &[Value], reached: &AtomicUsize) {
    let begin = || reached.fetch_add(1, Ordering::AcqRel);
    begin();
    let (pod, made) = Pod::try_with(env, json!({}));
    if made.status != 0 {
        return;
    }
    let mut ids = Vec::new();
    for number in 0..containers {
        begin();
        let server = [
            "talk",
            "serve",
            "tcp",
            "127.0.0.1",
            &(7000 + number).to_string(),
        ];
        let (created, _) =
            pod.try_create(&format!("c{number}"), &server, json!({"mounts": mounts}));
        let id = created.text();
        begin();
        if created.status == 0 {
            env.crictl(&["start", &id]);
            ids.push(id);
        }
    }
    let first = ids.first().map_or("none", String::as_str);
    let write = "for d in /mnt/hostpath /mnt/volumes/*/shared; do dd if=/dev/zero of=$d/f bs=1M count=8; done; cat /etc/hosts";
    let steps: [&[&str]; 6] = [
        &["exec", "--sync", first, "sh", "-c", write],
        &["update", "--memory", "268435456", first],
        &["stop", "--timeout", "1", first],
        &["rm", first],
        &["stopp", &pod.id],
        &["rmp", &pod.id],
    ];
    for (number, step) in steps.iter().enumerate() {
        begin();
        env.crictl(step);
        if number == 0 {
            begin();
            let forward = Running::start(
                env.cri().command(["port-forward", &pod.id, "7999:7000"]),
                None,
            );
            ask_through(7999);
            env.crictl(&[
                "exec",
                "--sync",
                first,
                "talk",
                "ask",
                "tcp",
                "127.0.0.1",
                "7000",
                "hello",
            ]);
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(forward.child.id().cast_signed()),
                nix::sys::signal::Signal::SIGTERM,
            );
            forward.outcome(PATIENCE).unwrap();
        }
    }
    std::mem::forget(pod); // its removal is what is tested
}

/// A question through a forwarded port; the pod may die at any moment of it.
fn ask_through(port: u16) {
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
        let _ = stream
            .write_all(b"hello")
            .and_then(|()| stream.read_to_end(&mut Vec::new()));
        return;
    }
}

/// The next pod.
fn works(env: &Env) {
    let pod = Pod::new(env);
    let container = pod.run("next", &["sh", "-c", "ip -o addr; exit 3"]);
    assert_eq!(container.exit_code(), 3);
    let logs = container.logs();
    assert!(
        pod.addresses().iter().all(|address| logs.contains(address)),
        "{logs}"
    );
    pod.stop();
    pod.remove(&[]);
    eventually("the pod is gone", PATIENCE, || {
        (!env.crictl(&["pods", "-q"]).ok().text().contains(&pod.id)).then_some(())
    });
}
