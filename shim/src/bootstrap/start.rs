//! `start`: finds the group's server or leaves a new one behind, and prints its address.
//!
//! containerd reads stdout and stderr as one stream until both are closed, so nothing else may be
//! printed and the server must not inherit them.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use sys::point::{Point, reach};
use vmm::process::Identity;

use super::group::group_id;
use super::reply::Request;
use crate::args::Args;
use crate::container::role::is_from_containerd;
use crate::deadlines::{PROCESS_GONE, SERVER_READY, SWEEP};
use crate::error::{Error, IoContext, Result};
use crate::host::identity::{STATE_ROOT, SandboxIdentity};
use crate::host::ledger::{self, Ledger, Resource};
use crate::host::sandbox_lock::SandboxLock;

/// Descriptor on which the server inherits its listening socket.
pub const LISTENER_FD: i32 = 3;

/// Descriptor on which the server says that it is ready (`+`) or why it is not (text).
pub const READY_FD: i32 = 4;

/// Name of the file in a bundle that says where its server is.
pub const ADDRESS: &str = "address";

/// Runs `start`.
///
/// # Errors
/// One line; nothing is left behind.
pub fn run(args: &Args) -> Result<()> {
    let mut stdin = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin()
            .read_to_end(&mut stdin)
            .doing(|| "read the options on stdin".into())?;
    }
    let request = Request::decode(&stdin, &args.namespace, &args.id)?;
    let bundle = std::env::current_dir().doing(|| "find the bundle".into())?;
    let group = group_id(&bundle, &args.id);
    let identity = SandboxIdentity::new(&args.address, &args.namespace, &group);
    let dir = request.socket_dir()?;
    make_dir(&dir)?;
    make_dir(Path::new(STATE_ROOT))?;
    let socket = identity.socket(&dir);
    let address = format!("unix://{}", socket.display());
    // Before there is a server: a start that fails must leave none.
    write_address(&bundle, &address)?;
    let reply = request.reply(&address)?;
    let print = || {
        let mut stdout = std::io::stdout();
        reach(Point::StartServerReady)
            .and_then(|()| stdout.write_all(&reply))
            .and_then(|()| stdout.flush())
            .doing(|| "print the address".into())
    };
    reach(Point::StartBeforeLock).doing(|| format!("lock {}", identity.state_dir().display()))?;
    // Until the server has said that it is there, or is undone: nobody undoes it as a dead one's.
    let _lock = SandboxLock::take(&identity.state_dir())?;
    let Some(listener) = listen(&socket, &identity.state_dir())? else {
        return print();
    };
    let debug = args.debug || request.debug();
    let started = spawn_server(args, &group, debug, &socket, listener)
        .and_then(|server| print().inspect_err(|_| kill(server)));
    if started.is_err() {
        // Nobody would ever hear of the server.
        let _ = ledger::undo_own(&identity.state_dir());
    }
    if !is_from_containerd() {
        // CRI-O never runs `delete`: what servers left that were killed goes now.
        ledger::sweep(Path::new(STATE_ROOT), SWEEP);
    }
    started
}

/// Makes a directory that only root can enter. One that is there already is looked at: in a
/// directory that somebody else can write to, sockets and state are theirs.
fn make_dir(dir: &Path) -> Result<()> {
    let doing = || format!("make directory {}", dir.display());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .doing(doing)?;
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let opened = File::options()
        .read(true)
        .custom_flags(flags)
        .open(dir)
        .doing(doing)?;
    let found = opened.metadata().doing(doing)?;
    if found.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Error::internal(format!(
            "{} belongs to user {}: remove it, it must be root's",
            dir.display(),
            found.uid()
        )));
    }
    if found.mode() & 0o022 != 0 {
        opened
            .set_permissions(Permissions::from_mode(0o700))
            .doing(doing)?;
    }
    Ok(())
}

/// Listens on the socket, or finds that a server already answers there (`None`). Under a lock, so
/// that of many starts of one group exactly one binds and none removes a socket that another is
/// about to listen on.
fn listen(socket: &Path, state_dir: &Path) -> Result<Option<UnixListener>> {
    reach(Point::StartUndoing).doing(|| format!("look into {}", state_dir.display()))?;
    // What a former server of the same id left; what cannot be undone is in nobody's way here.
    let _ = ledger::undo_abandoned(state_dir);
    // A unix connect never waits for the server itself, only for room in its backlog.
    if UnixStream::connect(socket).is_ok() {
        return Ok(None);
    }
    let bound = bind(socket, state_dir);
    if bound.is_err() {
        let _ = ledger::undo_own(state_dir);
    }
    bound.map(Some)
}

/// Binds the socket, which nobody listens on. Until there is a server, this process stands in for
/// it in the ledger, so that a sweep takes what a killed start left.
fn bind(socket: &Path, state_dir: &Path) -> Result<UnixListener> {
    let ledger = Ledger::create(state_dir)?;
    let own = Identity::of(std::process::id().cast_signed())
        .doing(|| "read this process's own start time".into())?;
    ledger.record(&Resource::Server(own))?;
    ledger.record(&Resource::File {
        path: socket.to_owned(),
    })?;
    let doing = || format!("listen on {}", socket.display());
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).doing(doing),
        _ => {}
    }
    let listener = UnixListener::bind(socket).doing(doing)?;
    reach(Point::StartSocketBound).doing(doing)?;
    std::fs::set_permissions(socket, Permissions::from_mode(0o600)).doing(doing)?;
    Ok(listener)
}

/// Starts the server in a session of its own and waits for its first word.
fn spawn_server(
    args: &Args,
    group: &str,
    debug: bool,
    socket: &Path,
    listener: UnixListener,
) -> Result<Pid> {
    let (mut ready, server_end) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map(|(r, w)| (File::from(r), w))
        .doing(|| "make a pipe".into())?;
    let program = std::env::current_exe().doing(|| "find the shim's own path".into())?;
    let mut command = Command::new(program);
    command.args([
        "-namespace",
        &args.namespace,
        "-id",
        group,
        "-address",
        &args.address,
    ]);
    command.arg("-socket").arg(socket);
    if debug {
        command.arg("-debug");
    }
    command
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Above the two numbers that the server expects, so that neither dup2 closes the other's
    // source.
    let high = |fd: BorrowedFd<'_>| {
        rustix::io::fcntl_dupfd_cloexec(fd, 10).doing(|| "duplicate a descriptor".into())
    };
    let (listener_fd, ready_fd) = (high(listener.as_fd())?, high(server_end.as_fd())?);
    let pass = move || {
        nix::unistd::setsid()?;
        // What containerd itself was started with, and passes on to everything it runs, is not the
        // server's. A kernel before 5.11 does not know the flag.
        let _ = sys::process::close_on_exec_from(3);
        for (from, to) in [(&listener_fd, LISTENER_FD), (&ready_fd, READY_FD)] {
            // SAFETY: dup2 is async-signal-safe; both numbers are free in the child, whose other
            // descriptors are close-on-exec.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(pass) };
    let child = command.spawn().doing(|| "start the server".into())?;
    let pid = Pid::from_raw(child.id().cast_signed());
    drop((command, listener, server_end));
    // The kernel should take a container's server before containerd: one more than the parent's
    // score, as runc's shim does. Without CAP_SYS_RESOURCE even that can be refused; then the
    // inherited score stays.
    let _ = containerd_shim::cgroup::adjust_oom_score(child.id());
    let mut answer = Vec::new();
    if readable(&ready) {
        ready
            .read_to_end(&mut answer)
            .doing(|| "read the server's answer".into())?;
    }
    match answer.as_slice() {
        b"+" => Ok(pid),
        answer => {
            kill(pid);
            let text = String::from_utf8_lossy(answer).into_owned();
            let text = if text.is_empty() {
                "the server ended before it was ready".to_owned()
            } else {
                text
            };
            Err(Error::internal(text))
        }
    }
}

/// Ends a server that has made nothing yet.
fn kill(server: Pid) {
    let _ = nix::sys::signal::kill(server, Signal::SIGKILL);
    if let Ok(server) = Identity::of(server.as_raw()) {
        let _ = server.kill_and_wait(PROCESS_GONE);
    }
}

fn readable(file: &File) -> bool {
    let timeout = PollTimeout::try_from(SERVER_READY).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout) == Ok(1)
}

/// containerd 1.6 and 1.7 find the server again after a restart by this file; later ones migrate
/// from it.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let path = bundle.join(ADDRESS);
    let temporary = bundle.join(".address");
    std::fs::write(&temporary, address)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .doing(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    #[test]
    fn directory_of_somebody_else_is_refused_and_an_open_one_is_closed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        make_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        make_dir(&dir).unwrap();
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        chown(&dir, Some(12345), None).unwrap();
        assert!(
            make_dir(&dir)
                .unwrap_err()
                .to_string()
                .contains("belongs to user 12345")
        );
        let link = root.path().join("link");
        symlink(root.path(), &link).unwrap();
        assert!(make_dir(&link).is_err());
    }
}
