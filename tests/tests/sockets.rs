//! Sockets, FIFOs and devices of the host as a pod's volumes: who reaches them, how what is sent
//! arrives, and what is refused.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::Duration;

use cofferdam_tests::pod::{Member, Pod, one_line};
use cofferdam_tests::{Env, PATIENCE, Suite, cases};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recv,
    socket,
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::of_pods().run(cases![
        Core: socket_below_a_mounted_directory;
        Once: syslog_of_the_host, datagrams_stay_apart, sequenced_packets_stay_apart,
            stranger_may_not_connect_and_the_mode_is_the_hosts,
            owner_of_a_socket_below_a_directory_is_the_hosts,
            socket_in_a_directory_that_came_later, server_in_a_container_keeps_its_socket,
            directory_of_the_hosts_dev_shm, devices_of_the_guest;
        Ours: what_only_the_hosts_kernel_has_is_refused, links_in_a_volume_lead_to_no_socket;
    ])
}

fn volume(host: &Path, inside: &str) -> Value {
    json!({"host_path": host, "container_path": inside})
}

fn idle<'p>(pod: &'p Pod, name: &str, mounts: &[Value]) -> Member<'p> {
    pod.run_with(name, &["sleep", "3600"], json!({"mounts": mounts}))
}

fn dir(env: &Env, name: &str) -> PathBuf {
    let dir = env.dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A server at a path that says its name to each client. Its file goes with it, as it does not by
/// itself.
struct Server(PathBuf);

impl Server {
    fn at(path: &Path, name: &'static str) -> Server {
        let listener = UnixListener::bind(path).unwrap();
        set_mode(path, 0o666);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 100]);
                if stream.write_all(name.as_bytes()).is_err() || name == "last" {
                    break;
                }
            }
        });
        Server(path.to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn ask(client: &Member, path: &str) -> String {
    client.exec(&["talk", "ask", "unix", path, "hello"]).text()
}

fn datagrams(path: &Path, count: usize) -> JoinHandle<Vec<String>> {
    let server = UnixDatagram::bind(path).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    set_mode(path, 0o666);
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        let mut next = || server.recv(&mut buffer).map(|size| buffer[..size].to_vec());
        let got = (0..count).map_while(|_| next().ok());
        got.map(|text| String::from_utf8(text).unwrap()).collect()
    })
}

fn packets(path: &Path) -> JoinHandle<Vec<String>> {
    let server = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(server.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&server, Backlog::new(1).unwrap()).unwrap();
    set_mode(path, 0o666);
    std::thread::spawn(move || {
        let client = accept(server.as_raw_fd()).unwrap();
        // SAFETY: it was just accepted, and nobody else has it.
        let client: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(client) };
        let mut buffer = [0; 100];
        let mut next = || recv(client.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        let sizes = std::iter::from_fn(|| Some(next()).filter(|size| *size > 0));
        sizes.map(|size| size.to_string()).collect()
    })
}

/// The socket is in /dev, whose devices are the guest's own.
fn syslog_of_the_host(env: &Env) {
    let path = PathBuf::from(format!("/dev/{}.log", env.id()));
    let heard = datagrams(&path, 1);
    let pod = Pod::new(env);
    let client = idle(&pod, "client", &[volume(&path, "/dev/log")]);
    let line = "<13>app: hello";
    client
        .exec(&["talk", "tell", "unixgram", "/dev/log", line])
        .ok();
    let heard = heard.join().unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(heard, [line]);
}

fn datagrams_stay_apart(env: &Env) {
    let path = dir(env, "run").join("statsd");
    let heard = datagrams(&path, 4);
    let pod = Pod::new(env);
    let alone = volume(&path, "/run/statsd");
    let client = idle(
        &pod,
        "client",
        &[alone, volume(path.parent().unwrap(), "/dir")],
    );
    let tell = ["talk", "tell", "unixgram"];
    let send = |path, texts: &[&str]| client.exec(&[&tell, &[path][..], texts].concat()).ok();
    send("/run/statsd", &["one", "two", "three"]);
    send("/dir/statsd", &["four"]);
    // Of two sockets either may be quicker.
    let mut heard = heard.join().unwrap();
    heard.retain(|text| text != "four");
    assert_eq!(heard, ["one", "two", "three"]);
}

fn sequenced_packets_stay_apart(env: &Env) {
    let path = env.dir.join("control");
    let heard = packets(&path);
    let pod = Pod::new(env);
    let client = idle(&pod, "client", &[volume(&path, "/run/control")]);
    let tell = [
        "talk",
        "tell",
        "unixpacket",
        "/run/control",
        "a",
        "bc",
        "def",
    ];
    client.exec(&tell).ok();
    assert_eq!(heard.join().unwrap(), ["1", "2", "3"]);
}

fn socket_below_a_mounted_directory(env: &Env) {
    let dir = dir(env, "run");
    fs::create_dir(dir.join("app")).unwrap();
    let path = dir.join("app/api.sock");
    let first = Server::at(&path, "first");
    let pod = Pod::new(env);
    let client = idle(&pod, "client", &[volume(&dir, "/run/host")]);
    assert_eq!(ask(&client, "/run/host/app/api.sock"), "first");
    // As a server that begins anew.
    drop(first);
    let second = Server::at(&path, "second");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(ask(&client, "/run/host/app/api.sock"), "second");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(ask(&client, "/run/host/app/api.sock"), "second", "it stays");
    drop(second);
    client.wait_until("! test -e /run/host/app/api.sock");
    let _late = Server::at(&dir.join("late.sock"), "late");
    client.wait_until("test -S /run/host/late.sock");
    assert_eq!(ask(&client, "/run/host/late.sock"), "late");
}

/// systemd removes a service's directory with the service, and makes it anew.
fn socket_in_a_directory_that_came_later(env: &Env) {
    let dir = dir(env, "run");
    let pod = Pod::new(env);
    let client = idle(&pod, "client", &[volume(&dir, "/run/host")]);
    for name in ["first", "second"] {
        fs::create_dir(dir.join("service")).unwrap();
        let _server = Server::at(&dir.join("service/api.sock"), name);
        client.wait_until(&format!(
            "test \"$(talk ask unix /run/host/service/api.sock x)\" = {name}"
        ));
        fs::remove_dir_all(dir.join("service")).unwrap();
    }
}

fn server_in_a_container_keeps_its_socket(env: &Env) {
    let dir = dir(env, "run");
    let pod = Pod::new(env);
    let serve = ["talk", "serve", "unix", "/a/s.sock"];
    let mounts = |inside| json!({"mounts": [volume(&dir, inside)]});
    let _server = pod.run_with("server", &serve, mounts("/a"));
    let client = idle(&pod, "client", &[volume(&dir, "/b")]);
    assert_eq!(ask(&client, "/b/s.sock"), "you said hello");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(ask(&client, "/b/s.sock"), "you said hello");
    client.exec(&["rm", "/b/s.sock"]).ok();
}

fn run_as(user: u32, mounts: &[Value]) -> Value {
    let context = json!({"run_as_user": {"value": user}, "run_as_group": {"value": user}});
    json!({"mounts": mounts, "linux": {"security_context": context}})
}

fn stranger_may_not_connect_and_the_mode_is_the_hosts(env: &Env) {
    let dir = dir(env, "run");
    let path = dir.join("root.sock");
    let _server = Server::at(&path, "served");
    set_mode(&path, 0o660);
    let mounts = [volume(&path, "/run/root.sock"), volume(&dir, "/dir")];
    let pod = Pod::new(env);
    let stranger = pod.run_with("stranger", &["sleep", "3600"], run_as(1000, &mounts));
    let root = idle(&pod, "root", &mounts);
    for inside in ["/run/root.sock", "/dir/root.sock"] {
        let tell = ["talk", "tell", "unix", inside, "x"];
        let refused = stranger.exec(&tell);
        assert!(
            refused.errors().contains("Permission denied"),
            "{refused:?}"
        );
        assert_eq!(ask(&root, inside), "served");
        assert_eq!(root.sh(&format!("stat -c %a {inside}")), "660");
    }
    set_mode(&path, 0o666);
    stranger.wait_until("test $(stat -c %a /dir/root.sock) = 666");
    assert_eq!(ask(&stranger, "/dir/root.sock"), "served");
}

fn owner_of_a_socket_below_a_directory_is_the_hosts(env: &Env) {
    let dir = dir(env, "run");
    let path = dir.join("user.sock");
    let _server = Server::at(&path, "served");
    set_mode(&path, 0o600);
    nix::unistd::chown(&path, Some(1000.into()), Some(1000.into())).unwrap();
    let mounts = [volume(&dir, "/dir")];
    let pod = Pod::new(env);
    let owner = pod.run_with("owner", &["sleep", "3600"], run_as(1000, &mounts));
    let other = pod.run_with("other", &["sleep", "3600"], run_as(2000, &mounts));
    assert_eq!(ask(&owner, "/dir/user.sock"), "served");
    let refused = other.exec(&["talk", "tell", "unix", "/dir/user.sock", "x"]);
    assert!(
        refused.errors().contains("Permission denied"),
        "{refused:?}"
    );
    // Nobody but root enters the directory.
    set_mode(&dir, 0o700);
    owner.wait_until("! test -e /dir/user.sock");
}

fn directory_of_the_hosts_dev_shm(env: &Env) {
    let path = PathBuf::from(format!("/dev/shm/{}", env.id()));
    fs::create_dir(&path).unwrap();
    fs::write(path.join("file"), "host").unwrap();
    let pod = Pod::new(env);
    let container = idle(&pod, "main", &[volume(&path, "/shm")]);
    let seen = container.sh("cat /shm/file; echo -n guest >/shm/back");
    let back = fs::read_to_string(path.join("back"));
    fs::remove_dir_all(&path).unwrap();
    assert_eq!((seen.as_str(), back.unwrap().as_str()), ("host", "guest"));
}

fn devices_of_the_guest(env: &Env) {
    let mounts = ["/dev/null", "/dev/zero", "/sys", "/proc", "/sys/fs/cgroup"]
        .map(|path| volume(Path::new(path), &format!("/host{path}")));
    let pod = Pod::new(env);
    let container = idle(&pod, "main", &mounts);
    let script = "echo x >/host/dev/null; head -c 3 /host/dev/zero | wc -c; test -d /host/sys/kernel; \
                  test -f /host/proc/version; ls /host/sys/fs/cgroup | head -1 | grep -c .";
    assert_eq!(container.sh(script), "3\n1");
}

fn what_only_the_hosts_kernel_has_is_refused(env: &Env) {
    let fifo = env.dir.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let pod = Pod::new(env);
    for (source, why) in [
        (fifo.to_str().unwrap(), "FIFO"),
        (
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "host kernel's",
        ),
        ("/proc/sys/kernel", "host kernel's"),
    ] {
        let config = json!({"mounts": [volume(Path::new(source), "/data")]});
        let (output, _) = pod.try_create("main", &["sleep", "3600"], config);
        let output = if output.status == 0 {
            env.crictl(&["start", &output.text()])
        } else {
            output
        };
        let errors = one_line(&output);
        assert!(errors.contains(source) && errors.contains(why), "{errors}");
    }
    pod.idle("next").exec(&["true"]).ok();
}

/// A container with a writable volume makes links to sockets of the host beside the volume.
fn links_in_a_volume_lead_to_no_socket(env: &Env) {
    let (dir, outside) = (dir(env, "run"), dir(env, "outside"));
    let _secret = Server::at(&outside.join("secret.sock"), "secret");
    let path = dir.join("api.sock");
    let _server = Server::at(&path, "served");
    symlink(&outside, dir.join("planted")).unwrap();
    let pod = Pod::new(env);
    let client = idle(&pod, "client", &[volume(&dir, "/dir")]);
    assert_eq!(ask(&client, "/dir/api.sock"), "served");
    // What the shim knows as a socket, and the directory of one, become links.
    client.sh(&format!(
        "mkdir /dir/way; ln -s {out} /dir/link; ln -s {out}/secret.sock /dir/direct.sock; \
         ln -s ../../outside/secret.sock /dir/way/up.sock; \
         mv /dir/way /dir/gone; ln -s {out} /dir/way",
        out = outside.display()
    ));
    std::thread::sleep(Duration::from_secs(3));
    for name in [
        "planted/secret.sock",
        "link/secret.sock",
        "direct.sock",
        "way/secret.sock",
    ] {
        let inside = format!("/dir/{name}");
        let output = client.exec(&["talk", "tell", "unix", &inside, "x"]);
        assert_ne!(output.status, 0, "{name}: {output:?}");
    }
    assert_eq!(ask(&client, "/dir/api.sock"), "served");
}
