//! What happens in the child between clone and exec. Only system calls: no allocation and no lock,
//! because another thread of the parent may have held the allocator's. rustix makes its calls
//! itself and knows no `errno`; of the C library only functions are used that signal-safety(7)
//! lists, or that are a system call and no more. The only destructors close descriptors.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{Gid, Signal, Uid, chdir, pivot_root, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, capability_is_in_bounding_set,
    move_into_link_name_space, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use sys::mount::{Attributes, Extent, attach, clone_tree_at, set_attributes};
use sys::{check, process};

use crate::root::{Source, Step};
use crate::{FAILED, Plan, PlannedJail, User};

/// A step that was refused: what it was, on what, and the kernel's answer.
struct Refused<'a>(&'static str, &'a CStr, Errno);

type Done<'a> = Result<(), Refused<'a>>;

/// Confines this process and executes the program; never returns.
pub(crate) fn run(plan: &Plan) -> ! {
    let Err(refused) = confine(plan).and_then(|()| exec(plan));
    say(&refused);
    // SAFETY: ends the process at once, without running anything of its parent's.
    unsafe { libc::_exit(FAILED) }
}

/// One line on stderr: "launcher: cannot mount a file of its root /lib/x: Permission denied".
fn say(Refused(what, on, errno): &Refused<'_>) {
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
    // Nobody is there to be told of a failure.
    let _ = rustix::io::writev(rustix::stdio::stderr(), &parts.map(io::IoSlice::new));
}

fn confine(plan: &Plan) -> Done<'_> {
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
            check(unsafe { libc::dup2(*fd, number as i32) }.into()),
        )?;
    }
    for cgroup in &plan.cgroups {
        done("enter its cgroup", rustix::io::write(cgroup, b"0"))?;
    }
    if let Some(score) = &plan.oom_score {
        set_oom_score(score);
    }
    if let Some(netns) = &plan.netns {
        done(
            "enter the network namespace",
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)),
        )?;
    }
    if let Some(jail) = &plan.jail {
        enter_root(jail)?;
    }
    done(
        "close its parent's descriptors",
        process::close_on_exec_from(3),
    )?;
    for fd in &plan.inherited {
        done(
            "inherit a descriptor",
            // SAFETY: integers only; the parent's `Launch` owns the descriptor and keeps it open.
            check(unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) }.into()),
        )?;
    }
    if let Some(jail) = &plan.jail {
        drop_privileges(jail)?;
    }
    // After the change of user, which clears it.
    done(
        "ask for its parent's death",
        set_parent_process_death_signal(Some(Signal::KILL)),
    )?;
    // A parent that died before the line above sends no signal any more. Its descriptor can be read
    // then.
    let mut parent = [PollFd::new(plan.parent.as_fd(), PollFlags::POLLIN)];
    if poll(&mut parent, PollTimeout::ZERO) != Ok(0) {
        return Err(Refused("outlive its parent", c"", Errno::ESRCH));
    }
    match plan.jail.as_ref().and_then(|jail| jail.filter.as_ref()) {
        Some(filter) => done(
            "install its seccomp filter",
            process::set_seccomp_filter(filter, 0),
        ),
        None => Ok(()),
    }
}

fn exec(plan: &Plan) -> Result<std::convert::Infallible, Refused<'_>> {
    let nothing = [std::ptr::null()];
    let (argv, environment) = (plan.argv_pointers.as_ptr(), nothing.as_ptr());
    // SAFETY: path, arguments and environment are C strings and arrays that end in null, and
    // outlive the calls.
    unsafe {
        match &plan.image {
            Some(image) => libc::fexecve(image.as_raw_fd(), argv, environment),
            None => libc::execve(plan.exec.as_ptr(), argv, environment),
        }
    };
    Err(Refused("execute", &plan.exec, Errno::last()))
}

/// Raising always works, lowering needs CAP_SYS_RESOURCE: what cannot be done is left as it is.
fn set_oom_score(score: &CStr) {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty()) {
        let _ = rustix::io::write(file, score.to_bytes());
    }
}

/// Makes the jail's root and moves into it. The mount namespace is this process's own.
fn enter_root(jail: &PlannedJail) -> Done<'_> {
    let base = jail.mount_point.as_c_str();
    // A slave: what the parent mounts below a shared directory later still arrives, and nothing
    // goes back.
    let slave = MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM;
    done("leave its parent's mounts alone", mount_change(c"/", slave))?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let size = c"size=64k,nr_inodes=1024,mode=755";
    on(
        "mount its root at",
        base,
        mount(c"tmpfs", base, c"tmpfs", flags, size),
    )?;
    let what = "make its root read-only at";
    let root = on(
        what,
        base,
        open_tree(CWD, base, OpenTreeFlags::OPEN_TREE_CLOEXEC),
    )?;
    for step in &jail.steps {
        take(step, base)?;
    }
    let read_only = Attributes::set(libc::MOUNT_ATTR_RDONLY);
    on(what, base, set_attributes(&root, &read_only, Extent::Mount))?;
    // The old root comes to lie on top of the new one, from where it is taken off (pivot_root(2)).
    on("enter its root at", base, chdir(base))?;
    on("make its root of", base, pivot_root(c".", c"."))?;
    done("leave the host's root", unmount(c".", UnmountFlags::DETACH))?;
    done("enter its root", chdir(c"/"))
}

fn take<'a>(step: &'a Step, base: &'a CStr) -> Done<'a> {
    match step {
        Step::Root(tree) => {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            on(
                "mount its root at",
                base,
                move_mount(tree, c"", CWD, base, flags),
            )
        }
        Step::Within { tree, to } => {
            let root = on(
                "open its root at",
                base,
                rustix::fs::open(base, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()),
            )?;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let mounted = rustix::fs::openat2(root, to, flags, Mode::empty(), resolve)
                .map_err(io::Error::from)
                .and_then(|place| attach(tree, place));
            match mounted {
                // Nothing is there, or a file in the place of a directory.
                Err(error) if is_missing(&error) => Ok(()),
                mounted => on("mount in its root", to, mounted),
            }
        }
        Step::Directory(path) => on(
            "make",
            path,
            rustix::fs::mkdir(path.as_c_str(), Mode::from_raw_mode(0o755)),
        ),
        Step::File(path) => on(
            "make",
            path,
            rustix::fs::mknodat(
                CWD,
                path.as_c_str(),
                FileType::RegularFile,
                Mode::from_raw_mode(0o644),
                0,
            ),
        ),
        Step::Node {
            path,
            device,
            owner: (uid, gid),
        } => {
            on(
                "make the device node",
                path,
                rustix::fs::mknodat(
                    CWD,
                    path.as_c_str(),
                    FileType::CharacterDevice,
                    Mode::from_raw_mode(0o600),
                    *device,
                ),
            )?;
            let (uid, gid) = (Uid::from_raw_unchecked(*uid), Gid::from_raw_unchecked(*gid));
            on(
                "hand over the device node",
                path,
                rustix::fs::chown(path.as_c_str(), Some(uid), Some(gid)),
            )
        }
        Step::Bind {
            source,
            to,
            attributes,
            extent,
        } => {
            let cloned;
            let (from, tree) = match source {
                Source::Path(from) => {
                    cloned = on("take", from, clone_tree_at(from, *extent))?;
                    (from, cloned.as_fd())
                }
                Source::Tree(tree) => (to, tree.as_fd()),
            };
            on(
                "restrict the mount of",
                from,
                set_attributes(tree, attributes, *extent),
            )?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            on(
                "mount",
                from,
                move_mount(tree, c"", CWD, to.as_c_str(), flags),
            )
        }
        Step::MountProc(path) => {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            on(
                "mount proc at",
                path,
                mount(c"proc", path.as_c_str(), c"proc", flags, None),
            )
        }
        Step::Unmount(path) => {
            on(
                "unmount",
                path,
                unmount(path.as_c_str(), UnmountFlags::DETACH),
            )?;
            on("remove", path, rustix::fs::rmdir(path.as_c_str()))
        }
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

fn drop_privileges(jail: &PlannedJail) -> Done<'_> {
    for (resource, limit) in jail.limits.iter().copied().chain([(libc::RLIMIT_CORE, 0)]) {
        // SAFETY: both calls read or write a local variable.
        unsafe {
            let mut old: libc::rlimit = std::mem::zeroed();
            done(
                "read a limit",
                check(libc::getrlimit(resource, &raw mut old).into()),
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
                check(libc::setrlimit(resource, &raw const new).into()),
            )?;
        }
    }
    let (kept, user) = match &jail.user {
        User::Own { uid, gid } => (CapabilitySet::empty(), Some((*uid, *gid))),
        User::Root {
            capabilities,
            user_namespace,
        } => {
            if let Some(namespace) = user_namespace {
                // It has no power over the namespaces above, which belong to the one it leaves.
                done(
                    "enter its user namespace",
                    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User)),
                )?;
            }
            let bits = capabilities.iter().fold(0, |set, number| set | 1 << number);
            (CapabilitySet::from_bits_retain(bits), None)
        }
    };
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        let dropped = remove_capability_from_bounding_set(capability);
        // What the kernel does not know as a capability it refuses, which is as good.
        if capability_is_in_bounding_set(capability) == Ok(true) {
            done(
                "drop a capability for good",
                dropped.and(Err::<(), _>(rustix::io::Errno::PERM)),
            )?;
        }
    }
    // Of this thread, the only one: the C library's would have to tell others.
    done("drop its groups", set_thread_groups(&[]))?;
    if let Some((uid, gid)) = user {
        let (uid, gid) = (Uid::from_raw_unchecked(uid), Gid::from_raw_unchecked(gid));
        done("become its group", set_thread_res_gid(gid, gid, gid))?;
        done("become its user", set_thread_res_uid(uid, uid, uid))?;
    }
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    done("drop its capabilities", set_capabilities(None, sets))?;
    done("give up new privileges", set_no_new_privs(true))
}

fn done<T>(
    what: &'static str,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, Refused<'static>> {
    on(what, c"", result)
}

fn on<'a, T>(
    what: &'static str,
    on: &'a CStr,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, Refused<'a>> {
    // An io::Error of a number is that number, and allocates nothing.
    result.map_err(|error| {
        let number = error.into().raw_os_error().unwrap_or_default();
        Refused(what, on, Errno::from_raw(number))
    })
}
