//! Which system calls a confined program may make (seccomp(2)).
//!
//! Two kinds. QEMU and virtiofsd bring a list of their own of what they may do, which changes with
//! their versions; ours takes away what none of them needs and a taken-over one would try.
//! vhost-device-vsock brings none, so for it we say what is allowed. A call that is refused fails
//! with EPERM: the program's own error says more than its death would.

use std::collections::BTreeMap;
use std::io;

use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{MaskedEq, Ne};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// A choice of system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// All but what serves a break-out: no process, socket, mount, namespace, trace, module, clock
    /// or device node.
    Qemu,
    /// As for QEMU, but device nodes can be made: containers make them, with mknod(2), in
    /// directories that are served.
    FileServer,
    /// Nothing but what vhost-device-vsock does: threads, files, memory, unix sockets.
    VsockDaemon,
    /// Nothing but what [`crate::task_program()`] does.
    TaskProgram,
}

/// Calls that none of the programs makes.
const DENIED: &[i64] = &[
    // Processes but itself.
    libc::SYS_fork,
    libc::SYS_vfork,
    // Nor another program: the launcher itself comes by execve(2).
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_fanotify_init,
    libc::SYS_personality,
    libc::SYS_vhangup,
    libc::SYS_mbind,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_set_mempolicy,
];

/// Calls of vhost-device-vsock: a Rust program with threads, epoll, unix sockets and the guest's
/// memory.
const VSOCK_DAEMON: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_ioctl,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socketpair,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_unlink,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Calls of the task program, and the launcher's last one.
const TASK_PROGRAM: &[i64] = &[
    libc::SYS_execveat,
    libc::SYS_exit_group,
    libc::SYS_prctl,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_write,
    // The launcher's last words.
    libc::SYS_writev,
];

impl Filter {
    /// As a program for the kernel.
    ///
    /// # Errors
    /// None in practice; the compiler's own.
    pub(crate) fn compile(&self) -> io::Result<Vec<libc::sock_filter>> {
        let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let always = Vec::new();
        let rules = match self {
            Filter::TaskProgram => {
                let rules = listed(TASK_PROGRAM);
                SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)
            }
            Filter::VsockDaemon => {
                let mut rules = listed(VSOCK_DAEMON);
                rules.insert(
                    libc::SYS_clone,
                    vec![rule(0, Qword, MaskedEq(THREAD), THREAD)?],
                );
                rules.insert(
                    libc::SYS_socket,
                    vec![rule(0, Dword, seccompiler::SeccompCmpOp::Eq, UNIX)?],
                );
                rules.insert(
                    libc::SYS_socketpair,
                    vec![rule(1, Dword, MaskedEq(SOCKET_TYPE), STREAM)?],
                );
                SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)
            }
            Filter::Qemu | Filter::FileServer => {
                let mut rules = listed(DENIED);
                rules.insert(libc::SYS_clone, vec![rule(0, Qword, MaskedEq(THREAD), 0)?]);
                // A thread of virtiofsd has a umask of its own.
                rules.insert(
                    libc::SYS_unshare,
                    vec![rule(0, Qword, Ne, libc::CLONE_FS.cast_unsigned().into())?],
                );
                rules.insert(libc::SYS_socket, always.clone());
                // Two ends that know nobody else: a datagram socket could send to any name of its
                // network namespace.
                rules.insert(
                    libc::SYS_socketpair,
                    vec![
                        rule(0, Dword, Ne, UNIX)?,
                        rule(1, Dword, MaskedEq(SOCKET_TYPE), DATAGRAM)?,
                    ],
                );
                if *self == Filter::Qemu {
                    rules.extend([
                        (libc::SYS_mknod, always.clone()),
                        (libc::SYS_mknodat, always),
                    ]);
                }
                SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)
            }
        };
        let program: BpfProgram = rules
            .and_then(TryInto::try_into)
            .map_err(io::Error::other)?;
        let program = program.into_iter().map(|one| libc::sock_filter {
            code: one.code,
            jt: one.jt,
            jf: one.jf,
            k: one.k,
        });
        Ok(unknown_calls().into_iter().chain(program).collect())
    }
}

/// These calls, whatever their arguments are.
fn listed(calls: &[i64]) -> BTreeMap<i64, Vec<SeccompRule>> {
    calls.iter().map(|number| (*number, Vec::new())).collect()
}

const THREAD: u64 = libc::CLONE_THREAD as u64;
const UNIX: u64 = libc::AF_UNIX as u64;
const STREAM: u64 = libc::SOCK_STREAM as u64;
const DATAGRAM: u64 = libc::SOCK_DGRAM as u64;
/// Without SOCK_NONBLOCK and SOCK_CLOEXEC.
const SOCKET_TYPE: u64 = 0xf;

fn rule(
    argument: u8,
    length: seccompiler::SeccompCmpArgLen,
    operator: seccompiler::SeccompCmpOp,
    value: u64,
) -> io::Result<SeccompRule> {
    let condition =
        SeccompCondition::new(argument, length, operator, value).map_err(io::Error::other)?;
    SeccompRule::new(vec![condition]).map_err(io::Error::other)
}

/// Stands before every program: the calls of the x32 ABI, which have numbers of their own and the
/// same architecture, and clone3, whose flags lie in memory where a filter cannot see them, are
/// unknown; for the latter the C library then uses clone.
fn unknown_calls() -> [libc::sock_filter; 4] {
    const X32_BIT: u32 = 0x4000_0000;
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    [
        // offsetof(struct seccomp_data, nr) is 0.
        statement(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        statement(BPF_JMP | BPF_JEQ | BPF_K, libc::SYS_clone3 as u32, 1, 0),
        statement(BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1),
        statement(
            BPF_RET | BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(),
            0,
            0,
        ),
    ]
}
