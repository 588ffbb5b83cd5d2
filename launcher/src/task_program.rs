//! The program of a process that stands for something elsewhere: it tells on its stdout which
//! signals it gets, and does nothing else. Its file is in no directory, so it runs in any root; it
//! needs no library and takes a few pages of memory.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};

// An ELF file with one segment, which is the whole file (elf(5)). The system calls are those of
// x86-64: number in rax, arguments in rdi, rsi, rdx, r10.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.cofferdam_task_program, "a"
    .balign 8
cofferdam_task_program:
    .byte 0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0
    .short 2, 62                        # ET_EXEC, EM_X86_64
    .long 1
    .quad 0x400000 + 2f - cofferdam_task_program
    .quad 64, 0                         # offset of the program header; no sections
    .long 0
    .short 64, 56, 1, 0, 0, 0
    .long 1, 5                          # PT_LOAD, readable and executable
    .quad 0, 0x400000, 0x400000
    .quad cofferdam_task_program_end - cofferdam_task_program
    .quad cofferdam_task_program_end - cofferdam_task_program
    .quad 0x1000
2:  mov eax, 14                         # rt_sigprocmask(SIG_BLOCK, &all, NULL, 8)
    xor edi, edi
    lea rsi, [rip + 8f]
    xor edx, edx
    mov r10d, 8
    syscall
    mov eax, 157                        # prctl(PR_SET_NAME, name)
    mov edi, 15
    lea rsi, [rip + 9f]
    syscall
    xor eax, eax
    jmp 4f
3:  mov eax, 128                        # rt_sigtimedwait(&all, NULL, NULL, 8)
    lea rdi, [rip + 8f]
    xor esi, esi
    xor edx, edx
    mov r10d, 8
    syscall
    test eax, eax
    jle 3b
4:  mov byte ptr [rsp - 8], al
    mov eax, 1                          # write(1, &signal, 1)
    mov edi, 1
    lea rsi, [rsp - 8]
    mov edx, 1
    syscall
    jmp 3b
8:  .quad -1
9:  .asciz "cofferdam-task"
cofferdam_task_program_end:
    .popsection
    "#
);

unsafe extern "C" {
    static cofferdam_task_program: u8;
    static cofferdam_task_program_end: u8;
}

/// The file of a program that writes a zero to its stdout when it runs, then a byte for each signal
/// that it gets, its number. It dies of SIGKILL only.
///
/// # Errors
/// No memory; a host that lets nobody execute what is in no directory (`vm.memfd_noexec`) refuses
/// the program's start.
pub fn task_program() -> io::Result<OwnedFd> {
    // SAFETY: both symbols are in the same section, which is read-only and lives as long as this
    // program; the second one is the end of what begins at the first.
    let image = unsafe {
        let (start, end) = (
            &raw const cofferdam_task_program,
            &raw const cofferdam_task_program_end,
        );
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    };
    // Kernels before 6.3 know no flag for it and make every such file executable.
    let flags = MemfdFlags::CLOEXEC;
    let made = memfd_create("cofferdam-task", flags | MemfdFlags::EXEC)
        .or_else(|_| memfd_create("cofferdam-task", flags))?;
    let mut file = File::from(made);
    file.write_all(image)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::path::PathBuf;

    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    use sys::process::pidfd_send_signal;

    use super::*;
    use crate::{Launch, spawn};

    #[test]
    fn signals_are_told_by_number_and_only_a_sigkill_ends_it() {
        let (mut told, theirs) = io::pipe().unwrap();
        let program = spawn(Launch {
            program: PathBuf::from("task"),
            image: Some(task_program().unwrap()),
            args: Vec::new(),
            fds: Vec::new(),
            stdout: Some(theirs.into()),
            stderr: File::open("/dev/null").unwrap().into(),
            cgroup_procs: Vec::new(),
            netns: None,
            oom_score_adj: None,
            jail: None,
        })
        .unwrap();
        let mut next = || {
            let mut byte = [99];
            told.read_exact(&mut byte).unwrap();
            i32::from(byte[0])
        };
        assert_eq!(next(), 0);
        let name = std::fs::read_to_string(format!("/proc/{}/comm", program.pid)).unwrap();
        assert_eq!(name, "cofferdam-task\n");
        for signal in [libc::SIGHUP, libc::SIGTERM, libc::SIGUSR2, libc::SIGRTMAX()] {
            pidfd_send_signal(program.pidfd.as_fd(), signal).unwrap();
            assert_eq!(next(), signal);
        }
        pidfd_send_signal(program.pidfd.as_fd(), libc::SIGKILL).unwrap();
        let end = waitid(Id::PIDFd(program.pidfd.as_fd()), WaitPidFlag::WEXITED).unwrap();
        assert!(matches!(
            end,
            WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)
        ));
    }
}
