//! What a QEMU or helper that was taken over can do to the host: this program is run in the place
//! of each, confined as it would be, and tries. Whatever succeeds is named.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "no guest boots here")]
mod common;

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use common::{Lab, SOON, cache_dir};
use libtest_mimic::{Arguments, Failed, Trial};
use vmm::parts::{Virtiofsd, VirtiofsdConfig, Vm, VsockDaemon, VsockDaemonConfig};
use vmm::process::{Child, Spawn};
use vmm::{FsCache, MachineConfig};

/// Arguments by which QEMU, virtiofsd and vhost-device-vsock are started, and one for the control.
const PLACES: [&str; 4] = [
    "-nodefaults",
    "--shared-dir",
    "--guest-cid",
    "--in-the-open",
];

/// Where a jail has the directory that virtiofsd serves.
const SHARED: &str = "/shared";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("virtiofsd 1.14.0");
        return ExitCode::SUCCESS;
    }
    if arguments
        .iter()
        .any(|argument| PLACES.contains(&argument.as_str()))
    {
        return probe();
    }
    let trial = |name: &str, test: fn() -> Result<(), Failed>| Trial::test(name, test);
    libtest_mimic::run(
        &Arguments::from_args(),
        vec![
            trial("the_probe_succeeds_in_the_open", in_the_open),
            trial("qemu_can_do_nothing_to_the_host", in_qemus_place),
            trial("file_server_of_roots_can_do_nothing_to_the_host", || {
                in_virtiofsds_place(FsCache::Always)
            }),
            trial("file_server_of_volumes_can_do_nothing_to_the_host", || {
                in_virtiofsds_place(FsCache::Auto)
            }),
            trial(
                "vsock_daemon_can_do_nothing_to_the_host",
                in_vsock_daemons_place,
            ),
        ],
    )
    .exit_code()
}

/// Tries everything and says what succeeded in one last line on stderr.
fn probe() -> ExitCode {
    let succeeded: Vec<&str> = attempts()
        .into_iter()
        .filter(|(_, attempt)| attempt().is_ok())
        .map(|(n, _)| n)
        .collect();
    eprintln!(
        "tried {}, succeeded: [{}]",
        attempts().len(),
        succeeded.join(", ")
    );
    ExitCode::from(7)
}

type Attempt = fn() -> io::Result<()>;

fn call(number: libc::c_long, arguments: [libc::c_long; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: every call below passes numbers, or pointers to what lives in the caller.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn path(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn socket(family: libc::c_int, kind: libc::c_int) -> io::Result<()> {
    call(libc::SYS_socket, [family.into(), kind.into(), 0, 0, 0])
}

fn open(file: &str) -> io::Result<()> {
    std::fs::File::open(file).map(drop)
}

/// As far as they can be tried in the open without harm.
fn attempts() -> Vec<(&'static str, Attempt)> {
    vec![
        ("read /etc/shadow", || open("/etc/shadow")),
        ("read /etc/passwd", || open("/etc/passwd")),
        ("read /proc/1/environ", || open("/proc/1/environ")),
        ("read /proc/1/mem", || open("/proc/1/mem")),
        ("read core_pattern", || {
            open("/proc/sys/kernel/core_pattern")
        }),
        ("read /sys/kernel", || open("/sys/kernel/uevent_seqnum")),
        ("list /dev/pts", || std::fs::read_dir("/dev/pts").map(drop)),
        ("list /run", || std::fs::read_dir("/run").map(drop)),
        ("list /root", || std::fs::read_dir("/root").map(drop)),
        ("write to its root", || {
            std::fs::write("/tmp/cofferdam-probe", "")
                .and_then(|()| std::fs::remove_file("/tmp/cofferdam-probe"))
        }),
        ("write to its top", || {
            std::fs::write("/cofferdam-probe", "")
                .and_then(|()| std::fs::remove_file("/cofferdam-probe"))
        }),
        ("run a shell", || {
            std::process::Command::new("/bin/sh")
                .args(["-c", "true"])
                .status()
                .map(drop)
        }),
        ("fork", || {
            // SAFETY: the child ends at once.
            match unsafe { libc::fork() } {
                -1 => Err(io::Error::last_os_error()),
                // SAFETY: ends the child without running anything of its parent's.
                0 => unsafe { libc::_exit(0) },
                // Its SIGCHLD would stop a traced process, later.
                // SAFETY: without a place for the status nothing is written.
                child => match unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } {
                    -1 => Err(io::Error::last_os_error()),
                    _ => Ok(()),
                },
            }
        }),
        ("clone into a user namespace", || {
            call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0])
        }),
        ("make a mount namespace", || {
            call(libc::SYS_unshare, [libc::CLONE_NEWNS.into(), 0, 0, 0, 0])
        }),
        ("open a mount tree", || {
            call(
                libc::SYS_open_tree,
                [
                    libc::AT_FDCWD.into(),
                    path("/").as_ptr().addr() as i64,
                    1,
                    0,
                    0,
                ],
            )
        }),
        ("make a file system", || {
            call(
                libc::SYS_fsopen,
                [path("tmpfs").as_ptr().addr() as i64, 0, 0, 0, 0],
            )
        }),
        ("change its root", || {
            call(
                libc::SYS_chroot,
                [path("/").as_ptr().addr() as i64, 0, 0, 0, 0],
            )
        }),
        ("read another's memory", || {
            // Nothing of its own: whether it may at all.
            call(
                libc::SYS_process_vm_readv,
                [std::process::id().into(), 0, 0, 0, 0],
            )
        }),
        ("make a disk's node", || {
            for directory in [SHARED, "/", "/tmp"] {
                let node = format!("{directory}/cofferdam-node");
                // SAFETY: a C string that outlives the call.
                let made = unsafe {
                    libc::mknod(
                        path(&node).as_ptr(),
                        libc::S_IFBLK | 0o666,
                        libc::makedev(254, 0),
                    )
                };
                let opened = open(&node);
                let _ = std::fs::remove_file(&node);
                if made == 0 && opened.is_ok() {
                    return opened;
                }
            }
            Err(io::Error::other("no node, or one that cannot be opened"))
        }),
        ("raise a limit", || {
            let limit = libc::rlimit {
                rlim_cur: 1 << 19,
                rlim_max: 1 << 19,
            };
            // SAFETY: reads a local variable.
            match unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const limit) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }),
        ("become root again", || {
            call(libc::SYS_setresuid, [0, 0, 0, 0, 0]).and_then(|()| open("/proc/1/environ"))
        }),
        ("datagrams", || {
            let mut pair = [0; 2];
            let (family, kind) = (libc::AF_UNIX.into(), libc::SOCK_DGRAM.into());
            call(
                libc::SYS_socketpair,
                [family, kind, 0, pair.as_mut_ptr().addr() as i64, 0],
            )
        }),
        ("execveat", || {
            // There is none here: whether it may at all.
            let empty = path("");
            call(
                libc::SYS_execveat,
                [-1, empty.as_ptr().addr() as i64, 0, 0, 0],
            )
            .or_else(allowed)
        }),
        ("dial vsock", || socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
        ("use the network", || {
            socket(libc::AF_INET, libc::SOCK_STREAM)
        }),
        ("use netlink", || socket(libc::AF_NETLINK, libc::SOCK_RAW)),
        ("use packets", || socket(libc::AF_PACKET, libc::SOCK_RAW)),
        ("load a BPF program", || {
            call(libc::SYS_bpf, [0, 0, 0, 0, 0]).or_else(allowed)
        }),
        ("use io_uring", || {
            call(libc::SYS_io_uring_setup, [0, 0, 0, 0, 0]).or_else(allowed)
        }),
        ("watch faults", || {
            call(libc::SYS_userfaultfd, [0, 0, 0, 0, 0])
        }),
        ("use keys", || call(libc::SYS_keyctl, [0, -3, 0, 0, 0])),
        ("take any file by its handle", || {
            call(libc::SYS_open_by_handle_at, [-1, 0, 0, 0, 0]).or_else(allowed)
        }),
        // The last one: whoever is traced stops at its next signal.
        ("trace", || {
            call(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0, 0, 0])
        }),
    ]
}

/// The call itself was let through, and only its arguments were wrong.
fn allowed(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS) => Err(error),
        _ => Ok(()),
    }
}

fn here() -> std::path::PathBuf {
    std::env::current_exe().unwrap()
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test)
}

fn nothing_succeeded(said: &str, allowed: &[&str]) -> Result<(), Failed> {
    let list = said
        .rsplit_once("succeeded: [")
        .and_then(|(_, list)| list.strip_suffix(']'));
    let Some(list) = list else {
        return Err(format!("the probe did not run: {said}").into());
    };
    let succeeded: Vec<&str> = list
        .split(", ")
        .filter(|name| !name.is_empty() && !allowed.contains(name))
        .collect();
    if succeeded.is_empty() {
        Ok(())
    } else {
        Err(format!("succeeded: {succeeded:?}").into())
    }
}

/// The control: what is tried works where nothing forbids it.
fn in_the_open() -> Result<(), Failed> {
    block_on(async {
        let child = Child::spawn(Spawn::new(here(), vec!["--in-the-open".into()])).unwrap();
        tokio::time::timeout(SOON, child.exited()).await.unwrap();
        let said = child.stderr_tail().last().cloned().unwrap_or_default();
        for wanted in [
            "read /etc/shadow",
            "fork",
            "make a mount namespace",
            "use the network",
            "trace",
            "run a shell",
        ] {
            if !said.contains(wanted) {
                return Err(format!("{wanted} should have succeeded: {said}").into());
            }
        }
        Ok(())
    })
}

fn in_qemus_place() -> Result<(), Failed> {
    block_on(async {
        let lab = Lab::new("").await;
        let config = MachineConfig {
            qemu: here(),
            ..lab.config.clone()
        };
        let said = Vm::spawn(&config)
            .await
            .unwrap()
            .connect(SOON)
            .await
            .map(drop)
            .unwrap_err()
            .to_string();
        nothing_succeeded(&said.to_string(), &[])
    })
}

fn in_virtiofsds_place(cache: FsCache) -> Result<(), Failed> {
    block_on(async {
        let lab = Lab::new("").await;
        let shared = tempfile::tempdir().unwrap();
        let config = VirtiofsdConfig {
            binary: here(),
            cache_dir: cache_dir(),
            socket: lab.dir.path().join("fs.sock"),
            shared_dir: shared.path().into(),
            cache,
            cgroup_procs: Vec::new(),
            oom_score_adj: None,
            confinement: lab.config.confinement.clone(),
        };
        let (virtiofsd, _connection) = Virtiofsd::spawn(&config).await.unwrap();
        let said = tokio::time::timeout(SOON, virtiofsd.process.ended())
            .await
            .unwrap();
        assert!(!Path::new("/shared").exists(), "the jail's, not the host's");
        nothing_succeeded(&said.to_string(), &[])
    })
}

fn in_vsock_daemons_place() -> Result<(), Failed> {
    block_on(async {
        let lab = Lab::new("").await;
        let config = VsockDaemonConfig {
            binary: here(),
            cache_dir: cache_dir(),
            dir: lab.sockets(),
            name: "vm".into(),
            guest_cid: 3,
            cgroup_procs: Vec::new(),
            oom_score_adj: None,
            confinement: lab.config.confinement.clone(),
        };
        let daemon = VsockDaemon::spawn(&config).await.unwrap();
        let said = tokio::time::timeout(SOON, daemon.process.ended())
            .await
            .unwrap();
        nothing_succeeded(&said.to_string(), &[])
    })
}
