//! What happens in the child between clone and exec. Only system calls: no allocation, no lock, no
//! destructor.

use std::ffi::CStr;
use std::os::fd::AsRawFd;

use libc::c_long;
use nix::errno::Errno;

use crate::root::{Source, Step};
use crate::{FAILED, Plan, PlannedJail, User};

/// A step that was refused: what it was, on what, and the kernel's answer.
struct Refused(&'static str, *const libc::c_char, Errno);

type Done = Result<(), Refused>;

/// Confines this process and executes the program; never returns.
pub(crate) fn run(plan: &Plan) -> ! {
    let Err(refused) = confine(plan).and_then(|()| exec(plan));
    say(&refused);
    // SAFETY: ends the process at once, without running anything of its parent's.
    unsafe { libc::_exit(FAILED) }
}

/// One line on stderr: "launcher: cannot mount a file of its root /lib/x: Permission denied".
fn say(Refused(what, on, errno): &Refused) {
    let on = match on.is_null() {
        true => c"",
        // SAFETY: all these pointers are of C strings in the plan, which outlives this process's
        // use of it.
        false => unsafe { CStr::from_ptr(*on) },
    };
    let space: &[u8] = if on.is_empty() { b"" } else { b" " };
    let parts: [&[u8]; 7] = [
        b"launcher: cannot ",
        what.as_bytes(),
        space,
        on.to_bytes(),
        b": ",
        errno.desc().as_bytes(),
        b"\n",
    ];
    // SAFETY: writev(2) reads the parts, which outlive it. Nobody is there to be told of a failure.
    unsafe {
        let parts = parts.map(|part| libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        });
        libc::writev(2, parts.as_ptr(), 7);
    }
}

fn confine(plan: &Plan) -> Done {
    // A new process has its parent's blocked signals, and exec keeps what is ignored.
    // SAFETY: an empty set, initialised before it is used; both calls read local variables.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    for (number, fd) in plan.stdio.iter().enumerate() {
        done(
            "set up stdio",
            // SAFETY: integers only; the numbers 0 to 2 are nobody's but stdio's.
            unsafe { libc::dup2(*fd, number as i32) }.into(),
        )?;
    }
    for cgroup in &plan.cgroups {
        done(
            "enter its cgroup",
            // SAFETY: writes one byte of a static string.
            unsafe { libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) } as c_long,
        )?;
    }
    if let Some(score) = &plan.oom_score {
        set_oom_score(score);
    }
    if let Some(netns) = &plan.netns {
        done(
            "enter the network namespace",
            // SAFETY: integers only.
            unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) }.into(),
        )?;
    }
    if let Some(jail) = &plan.jail {
        enter_root(jail)?;
    }
    let marked = sys::process::close_on_exec_from(3);
    done(
        "close its parent's descriptors",
        if marked.is_ok() { 0 } else { -1 },
    )?;
    for fd in &plan.inherited {
        done(
            "inherit a descriptor",
            // SAFETY: integers only; the descriptor stays open because the parent's `Launch` owns it.
            unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) }.into(),
        )?;
    }
    if let Some(jail) = &plan.jail {
        drop_privileges(jail)?;
    }
    // After the change of user, which clears it.
    done(
        "ask for its parent's death",
        // SAFETY: integers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }.into(),
    )?;
    let mut parent = libc::pollfd {
        fd: plan.parent.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // A parent that died before the line above sends no signal any more. Its descriptor can be read
    // then. SAFETY: poll(2) reads and writes one local pollfd.
    match unsafe { libc::poll(&raw mut parent, 1, 0) } {
        0 => {}
        _ => {
            return Err(Refused(
                "outlive its parent",
                std::ptr::null(),
                Errno::ESRCH,
            ));
        }
    }
    match plan.jail.as_ref().and_then(|jail| jail.filter.as_ref()) {
        Some(filter) => install(filter),
        None => Ok(()),
    }
}

fn exec(plan: &Plan) -> Result<std::convert::Infallible, Refused> {
    let nothing = [std::ptr::null()];
    // SAFETY: path, arguments and environment are C strings and arrays that end in null, and
    // outlive the call.
    unsafe {
        libc::execve(
            plan.exec.as_ptr(),
            plan.argv_pointers.as_ptr(),
            nothing.as_ptr(),
        )
    };
    Err(Refused("execute", plan.exec.as_ptr(), Errno::last()))
}

/// Raising always works, lowering needs CAP_SYS_RESOURCE: what cannot be done is left as it is.
fn set_oom_score(score: &CStr) {
    // SAFETY: opens and writes by C strings that outlive the calls; the descriptor is closed again.
    unsafe {
        let file = libc::open(
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if file >= 0 {
            libc::write(file, score.as_ptr().cast(), score.count_bytes());
            libc::close(file);
        }
    }
}

/// Makes the jail's root and moves into it. The mount namespace is this process's own.
fn enter_root(jail: &PlannedJail) -> Done {
    let none = std::ptr::null();
    let base = jail.mount_point.as_ptr();
    // A slave: what the parent mounts below a shared directory later still arrives, and nothing
    // goes back.
    let flags = libc::MS_REC | libc::MS_SLAVE;
    // SAFETY: mount(2) reads C strings that outlive the call.
    let left = unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) };
    done("leave its parent's mounts alone", left.into())?;
    let flags = libc::MS_NOSUID | libc::MS_NOEXEC;
    let (kind, size) = (
        c"tmpfs".as_ptr(),
        c"size=64k,nr_inodes=1024,mode=755".as_ptr().cast(),
    );
    // SAFETY: as above.
    let mounted = unsafe { libc::mount(kind, base, kind, flags, size) };
    on("mount its root at", base, mounted.into())?;
    for step in &jail.steps {
        take(step)?;
    }
    let read_only = attributes(libc::MOUNT_ATTR_RDONLY);
    // SAFETY: mount_setattr(2) reads a C string and attributes of the given size, which outlive the
    // call.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            base,
            0,
            &raw const read_only,
            size_of_val(&read_only),
        )
    };
    on("make its root read-only at", base, set)?;
    let dot = c".".as_ptr();
    // The old root comes to lie on top of the new one, from where it is taken off (pivot_root(2)).
    // SAFETY: C strings that outlive the calls.
    unsafe {
        on("enter its root at", base, libc::chdir(base).into())?;
        on(
            "make its root of",
            base,
            libc::syscall(libc::SYS_pivot_root, dot, dot),
        )?;
        done(
            "leave the host's root",
            libc::umount2(dot, libc::MNT_DETACH).into(),
        )?;
        done("enter its root", libc::chdir(c"/".as_ptr()).into())
    }
}

fn take(step: &Step) -> Done {
    let here = libc::AT_FDCWD;
    match step {
        // SAFETY: a C string that outlives the call.
        Step::Directory(path) => on(
            "make",
            path.as_ptr(),
            unsafe { libc::mkdir(path.as_ptr(), 0o755) }.into(),
        ),
        Step::File(path) => {
            let path = path.as_ptr();
            // SAFETY: a C string that outlives the call.
            on(
                "make",
                path,
                unsafe { libc::mknod(path, libc::S_IFREG | 0o644, 0) }.into(),
            )
        }
        Step::Node {
            path,
            device,
            owner: (uid, gid),
        } => {
            let path = path.as_ptr();
            // SAFETY: a C string that outlives the calls.
            unsafe {
                on(
                    "make the device node",
                    path,
                    libc::mknod(path, libc::S_IFCHR | 0o600, *device).into(),
                )?;
                on(
                    "hand over the device node",
                    path,
                    libc::chown(path, *uid, *gid).into(),
                )
            }
        }
        Step::Bind {
            source,
            to,
            attributes: set,
            recursive,
        } => {
            let recursive = if *recursive { libc::AT_RECURSIVE } else { 0 };
            let clone = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive.cast_unsigned();
            let set = attributes(*set);
            let size = size_of_val(&set);
            let empty = c"".as_ptr();
            // SAFETY: C strings and attributes of the given size, which outlive the calls; the
            // descriptor is closed.
            unsafe {
                let (from, tree) = match source {
                    Source::Path(from) => (
                        from.as_ptr(),
                        libc::syscall(libc::SYS_open_tree, here, from.as_ptr(), clone),
                    ),
                    Source::Tree(tree) => (to.as_ptr(), tree.as_raw_fd().into()),
                };
                on("take", from, tree)?;
                let tree = tree as i32;
                let flags = libc::AT_EMPTY_PATH | recursive;
                let done = libc::syscall(
                    libc::SYS_mount_setattr,
                    tree,
                    empty,
                    flags,
                    &raw const set,
                    size,
                );
                on("restrict the mount of", from, done)?;
                let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
                on(
                    "mount",
                    from,
                    libc::syscall(libc::SYS_move_mount, tree, empty, here, to.as_ptr(), flags),
                )?;
            }
            Ok(())
        }
        Step::MountProc(path) => {
            let (path, kind) = (path.as_ptr(), c"proc".as_ptr());
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            // SAFETY: C strings that outlive the call.
            on(
                "mount proc at",
                path,
                unsafe { libc::mount(kind, path, kind, flags, std::ptr::null()) }.into(),
            )
        }
        Step::Unmount(path) => {
            let path = path.as_ptr();
            // SAFETY: a C string that outlives the calls.
            unsafe {
                on(
                    "unmount",
                    path,
                    libc::umount2(path, libc::MNT_DETACH).into(),
                )?;
                on("remove", path, libc::rmdir(path).into())
            }
        }
    }
}

fn attributes(set: u64) -> libc::mount_attr {
    libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    }
}

fn drop_privileges(jail: &PlannedJail) -> Done {
    for (resource, limit) in jail.limits.iter().copied().chain([(libc::RLIMIT_CORE, 0)]) {
        // SAFETY: both calls read or write a local variable.
        unsafe {
            let mut old: libc::rlimit = std::mem::zeroed();
            done(
                "read a limit",
                libc::getrlimit(resource, &raw mut old).into(),
            )?;
            let mut limit = limit.min(old.rlim_max);
            // At 0 the kernel still hands a dump to a program of the host's (core_pattern with a
            // pipe), at 1 it does not. Who may not raise a limit of 0 stays there.
            let one = libc::rlimit {
                rlim_cur: 1,
                rlim_max: 1,
            };
            if resource == libc::RLIMIT_CORE && libc::setrlimit(resource, &raw const one) == 0 {
                limit = 1;
            }
            let new = libc::rlimit {
                rlim_cur: limit,
                rlim_max: limit,
            };
            done(
                "set a limit",
                libc::setrlimit(resource, &raw const new).into(),
            )?;
        }
    }
    let (kept, user) = match &jail.user {
        User::Own { uid, gid } => (0, Some((*uid, *gid))),
        User::Root {
            capabilities,
            user_namespace,
        } => {
            if let Some(namespace) = user_namespace {
                // It has no power over the namespaces above, which belong to the one it leaves.
                // SAFETY: integers only.
                let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUSER) };
                done("enter its user namespace", entered.into())?;
            }
            (
                capabilities
                    .iter()
                    .fold(0_u64, |set, number| set | 1 << number),
                None,
            )
        }
    };
    for number in 0..64 {
        // What the kernel does not know as a capability it refuses, which is as good.
        if kept & (1 << number) == 0 {
            // SAFETY: integers only.
            let left = unsafe {
                libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0);
                libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0)
            };
            done("drop a capability for good", if left == 1 { -1 } else { 0 })?;
        }
    }
    // Raw system calls, because the C library's would have to tell other threads.
    // SAFETY: integers and a null pointer for an empty list.
    unsafe {
        done(
            "drop its groups",
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
        )?;
        if let Some((uid, gid)) = user {
            done(
                "become its group",
                libc::syscall(libc::SYS_setresgid, gid, gid, gid),
            )?;
            done(
                "become its user",
                libc::syscall(libc::SYS_setresuid, uid, uid, uid),
            )?;
        }
    }
    set_capabilities(kept)?;
    done(
        "give up new privileges",
        // SAFETY: integers only.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into(),
    )
}

fn set_capabilities(kept: u64) -> Done {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // linux/capability.h: _LINUX_CAPABILITY_VERSION_3.
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let half = |bits: u64| Data {
        effective: bits as u32,
        permitted: bits as u32,
        inheritable: 0,
    };
    let data = [half(kept & 0xffff_ffff), half(kept >> 32)];
    // SAFETY: a header and two halves of the layout that version 3 has; both outlive the call.
    done("drop its capabilities", unsafe {
        libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr())
    })
}

fn install(filter: &[libc::sock_filter]) -> Done {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: seccomp(2) reads a program whose instructions outlive the call.
    let installed = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    done("install its seccomp filter", installed)
}

fn done(what: &'static str, result: c_long) -> Done {
    on(what, std::ptr::null(), result)
}

fn on(what: &'static str, path: *const libc::c_char, result: c_long) -> Done {
    if result < 0 {
        Err(Refused(what, path, Errno::last()))
    } else {
        Ok(())
    }
}
