//! What stands between a container and the host: the directories that the shim works in, and the
//! processes that serve the guest, as somebody finds them who has got that far.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cofferdam_tests::assets::busybox_tree;
use cofferdam_tests::procs;
use cofferdam_tests::{Env, PATIENCE, Suite, cases};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Ours: guest_cannot_write_where_the_shim_makes_names, device_nodes_and_setuid_programs_work,
            qemu_and_helpers_have_nothing_of_the_host,
            stranger_on_the_host_gets_nothing_of_the_agent,
            files_go_in_and_out_by_the_pid_of_a_task,
            pid_of_a_task_leads_to_nothing_of_the_hosts,
            sandbox_without_a_user_of_its_own_does_not_start;
    ])
}

/// A privileged container mounts what the host shares, and plants a link for every name that may
/// come next.
fn guest_cannot_write_where_the_shim_makes_names(env: &Env) {
    let victim = env.dir.join("victim");
    fs::write(&victim, "precious").unwrap();
    let group = format!(
        "io.containerd.runc.v2.group={}",
        env.dir.file_name().unwrap().to_string_lossy()
    );
    let container = env.detached(
        &["--privileged", "--annotation", &group],
        &["sleep", "3600"],
    );
    // The second share shows the container's own root, which it may write to, so only the first one
    // is said to be closed.
    let script = format!(
        "mkdir /m /r; mount -t virtiofs kataShared /m && mount -t virtiofs cofferdamRootfs /r || \
         exit 9
         for n in .volumes $(seq 1 30); do
             ln -s {victim} /m/$n && echo made /m/$n; mkdir /m/d$n && echo made /m/d$n; ln -s {victim} /r/$n
         done
         touch /m/file && echo made /m/file; mkdir -p /m/.volumes && echo made /m/.volumes; echo own >/own; echo over",
        victim = victim.display()
    );
    let output = container
        .exec(&["sh", "-c", &format!("({script}) 2>/dev/null")])
        .ok()
        .text();
    assert_eq!(output, "over", "nothing can be made in the shares");
    let volume = env.dir.join("volume");
    fs::create_dir_all(&volume).unwrap();
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        volume.display()
    );
    let host_name = "type=bind,src=/etc/hostname,dst=/h,options=rbind:ro";
    let flags = [
        "--annotation",
        &group,
        "--mount",
        host_name,
        "--mount",
        &mount,
    ];
    let second = env.detached(&flags, &["sleep", "3600"]);
    second
        .exec(&["sh", "-c", "test -s /h && echo mine >/data/mine"])
        .ok();
    assert_eq!(
        fs::read_to_string(volume.join("mine")).unwrap(),
        "mine\n",
        "a volume is as writable as it was"
    );
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    // The directories themselves, below everything that is mounted in the shim's namespace.
    for sandbox in fs::read_dir("/run/cofferdam").unwrap().flatten() {
        for share in ["share", "rootfs"] {
            let names = fs::read_dir(sandbox.path().join(share))
                .into_iter()
                .flatten()
                .flatten();
            let links: Vec<_> = names
                .filter(|name| name.file_type().unwrap().is_symlink())
                .collect();
            assert!(links.is_empty(), "{links:?}");
        }
    }
    for container in [second, container] {
        container.kill("SIGKILL", &[]).ok();
        container.finish();
    }
}

fn device_nodes_and_setuid_programs_work(env: &Env) {
    // Not busybox, which gives a user's rights back by itself.
    let mut flags = vec!["--null-io".to_owned(), "--allow-new-privs".to_owned()];
    for dir in ["/usr", "/lib", "/lib64"] {
        flags.extend([
            "--mount".to_owned(),
            format!("type=bind,src={dir},dst={dir},options=rbind:ro"),
        ]);
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let container = env.detached(&flags, &["sleep", "3600"]);
    let script = "mknod /null c 1 3 && echo gone >/null && mknod /disk b 8 0 && ! cat /disk 2>/dev/null && \
                  cp /usr/bin/cat /su && chmod 4755 /su";
    container.exec(&["sh", "-c", script]).ok();
    let status = container
        .exec_with(&["--user", "1000"], &["/su", "/proc/self/status"])
        .ok()
        .text();
    let line = status
        .lines()
        .find(|line| line.starts_with("Uid:"))
        .unwrap();
    assert_eq!(
        line.split_whitespace().collect::<Vec<_>>()[1..3],
        ["1000", "0"],
        "the file's owner has its rights"
    );
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

fn status(pid: i32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().to_owned()
}

fn children(pid: i32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    list.split_ascii_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

fn qemu_and_helpers_have_nothing_of_the_host(env: &Env) {
    let container = env.idle();
    let shim = i32::try_from(procs::family(&container.id)[0]).unwrap();
    let task = i32::try_from(container.listed().unwrap().0).unwrap();
    let mut names = Vec::new();
    for pid in children(shim) {
        let name = status(pid, "Name:");
        for kind in ["mnt", "pid", "ipc", "uts", "net"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert_ne!(
                of(&pid.to_string()),
                of("self"),
                "{name} is in the host's {kind} namespace"
            );
        }
        assert_eq!(
            (status(pid, "NoNewPrivs:"), status(pid, "Seccomp:")),
            ("1".into(), "2".into()),
            "{name}"
        );
        let capabilities = u64::from_str_radix(&status(pid, "CapEff:"), 16).unwrap();
        if name == "virtiofsd" {
            // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP, and MKNOD for what is a
            // container's own.
            assert_eq!(
                capabilities & !0x8800_00db,
                0,
                "{name} has {capabilities:x}"
            );
        } else {
            assert_eq!(
                (capabilities, status(pid, "CapBnd:").trim_start_matches('0')),
                (0, ""),
                "{name}"
            );
            assert!(
                pid == task || status(pid, "Uid:").parse::<u32>().unwrap() >= 1_900_000_000,
                "{name} is {}",
                status(pid, "Uid:")
            );
        }
        assert!(
            fs::read(format!("/proc/{pid}/environ")).unwrap().is_empty(),
            "{name} has an environment"
        );
        names.push(name.clone());
        if pid == task {
            // Its root is the container's, and the subject of another test.
            continue;
        }
        let root = Path::new("/proc").join(pid.to_string()).join("root");
        for path in [
            "etc/shadow",
            "etc/passwd",
            "run/containerd",
            "dev/sda",
            "bin/sh",
            "proc/1/mem",
            "var/lib",
        ] {
            assert!(!root.join(path).exists(), "{name} sees /{path}");
        }
        let error = fs::write(root.join("new"), "").unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(nix::libc::EROFS),
            "{name} can write to its root"
        );
    }
    names.sort();
    names.dedup();
    assert!(
        names.contains(&"virtiofsd".to_owned()) && names.len() >= 3,
        "{names:?}"
    );
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

/// Whoever reaches the guest's ports, as every local user does on a host with /dev/vhost-vsock,
/// lacks the key.
fn stranger_on_the_host_gets_nothing_of_the_agent(env: &Env) {
    let container = env.idle();
    let shims = fs::read_dir("/run/cofferdam")
        .unwrap()
        .flatten()
        .map(|sandbox| sandbox.path().join("vsock/vm"));
    let sockets: Vec<_> = shims.filter(|socket| socket.exists()).collect();
    assert!(!sockets.is_empty(), "no sandbox has a vsock daemon");
    let wrong = format!("cofferdam-key/1 {}\n", "0".repeat(64));
    // What the agent answers with a plus to whoever is let in.
    let header = format!("cofferdam-stdio/1 stdout {} stranger\n", container.id);
    let mut reached = 0;
    for (socket, key) in sockets
        .iter()
        .flat_map(|socket| [(socket, ""), (socket, wrong.as_str())])
    {
        // Another test's sandbox may have ended.
        let Ok(stream) = UnixStream::connect(socket) else {
            continue;
        };
        let mut stream = BufReader::new(stream);
        stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        stream.get_mut().write_all(b"CONNECT 1028\n").unwrap();
        let mut answer = String::new();
        let _ = stream.read_line(&mut answer);
        if !answer.starts_with("OK ")
            || stream
                .get_mut()
                .write_all(format!("{key}{header}").as_bytes())
                .is_err()
        {
            continue;
        }
        reached += 1;
        let mut rest = Vec::new();
        // The device may also end the connection by a reset.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "the agent answers a stranger: {rest:?}");
    }
    assert!(reached >= 2, "no guest was reached");
    container.exec(&["true"]).ok();
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}

/// What keeps sandboxes apart is never left out in silence.
fn sandbox_without_a_user_of_its_own_does_not_start(env: &Env) {
    let config = env.dir.join("cofferdam.toml");
    fs::write(&config, "uid_range = [1950000001, 1950000001]\n").unwrap();
    let config = config.to_string_lossy();
    let flags = ["--null-io", "--runtime-config-path", &config];
    let container = env.detached(&flags, &["sleep", "3600"]);
    let family = procs::family(&container.id);
    let users = |pid: &u32| status(i32::try_from(*pid).unwrap(), "Uid:");
    assert!(family.iter().any(|pid| users(pid) == "1950000001"));
    env.run(&flags[1..], &["true"])
        .fails_with(&["every user id from 1950000001 to 1950000001", "uid_range"]);
    container.kill("SIGKILL", &[]).ok();
    container.finish();
    env.run(&flags[1..], &["true"]).ok();
}

/// As `nerdctl cp`, a debugger or a security agent has it: by /proc/<pid>/root.
fn files_go_in_and_out_by_the_pid_of_a_task(env: &Env) {
    let volume = env.dir.join("by-pid");
    fs::create_dir_all(&volume).unwrap();
    let mount = |to: &str, how: &str| {
        let from = volume.display();
        format!("--mount=type=bind,src={from},dst={to},options=rbind:{how}")
    };
    // A file as a volume too, as each container of a pod has some.
    let hosts = env.dir.join("hosts");
    fs::write(&hosts, "::1 me\n").unwrap();
    let hosts = format!(
        "--mount=type=bind,src={},dst=/etc/hosts,options=rbind:rw",
        hosts.display()
    );
    let mounts = [mount("/data", "rw"), mount("/seen", "ro"), hosts];
    let container = env.detached(&[&mounts[0], &mounts[1], &mounts[2]], &["sleep", "3600"]);
    let (pid, _) = container.listed().unwrap();
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    fs::write(root.join("tmp/in"), "to the root").unwrap();
    fs::write(root.join("data/in"), "to the volume").unwrap();
    let seen = container.exec(&["cat", "/tmp/in", "/data/in"]).ok().text();
    assert_eq!(seen, "to the rootto the volume");
    assert!(volume.join("in").exists() && !Path::new("/tmp/in").exists());
    container
        .exec(&["sh", "-c", "echo out >/root/out; echo out >/data/out"])
        .ok();
    for path in ["root/out", "data/out", "seen/out"] {
        assert_eq!(fs::read_to_string(root.join(path)).unwrap(), "out\n");
    }
    assert_eq!(
        fs::read_to_string(root.join("etc/hosts")).unwrap(),
        "::1 me\n"
    );
    // Only the guest has these, and a file that nobody would see is refused.
    for path in ["seen/x", "dev/x", "proc/x", "run/x", "sys/x"] {
        let error = fs::write(root.join(path), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EROFS), "{path}");
    }
    assert!(
        procs::pss_kib(pid) < 300,
        "it takes {} KiB",
        procs::pss_kib(pid)
    );
    container.kill("SIGKILL", &[]).ok();
    container.wait_for("STOPPED");
    assert!(
        !root.join("tmp").exists(),
        "it has ended with the container"
    );
    container.finish();
}

/// The image has links in the places of volumes, and programs.
fn pid_of_a_task_leads_to_nothing_of_the_hosts(env: &Env) {
    let tree = env.dir.join("linked");
    busybox_tree(&tree);
    std::os::unix::fs::symlink("/var/../../../../etc", tree.join("data")).unwrap();
    let victim = env.dir.join("below-the-link");
    fs::create_dir_all(&victim).unwrap();
    fs::write(victim.join("file"), "of the volume").unwrap();
    let (tree, from) = (tree.display().to_string(), victim.display());
    let mount = format!("--mount=type=bind,src={from},dst=/data,options=rbind:rw");
    let container = env.detached(
        &[&mount, "--env", "PATH=/bin", "--rootfs", &tree],
        &["sleep", "3600"],
    );
    let (pid, _) = container.listed().unwrap();
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let read = fs::read_to_string(root.join("etc/file"));
    assert_eq!(
        read.unwrap(),
        "of the volume",
        "the link was followed in the root"
    );
    assert!(!Path::new("/etc/file").exists());
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    for line in mounts.lines() {
        let options = line.split(' ').nth(5).unwrap();
        for wanted in ["nosuid", "nodev", "noexec"] {
            assert!(options.split(',').any(|option| option == wanted), "{line}");
        }
    }
    let namespace = |of: &str, kind: &str| fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap();
    for kind in ["mnt", "net", "ipc", "uts", "pid"] {
        assert_ne!(namespace(&pid.to_string(), kind), namespace("self", kind));
    }
    container.kill("SIGKILL", &[]).ok();
    container.finish();
}
