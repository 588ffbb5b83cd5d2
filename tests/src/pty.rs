//! A command under a terminal of its own, as a user at a keyboard has it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{OpenptyResult, Winsize, openpty};

use crate::{PATIENCE, eventually};

mod ioctls {
    #![allow(missing_docs, reason = "the macros take no comments")]
    nix::ioctl_write_ptr_bad!(set_size, nix::libc::TIOCSWINSZ, nix::pty::Winsize);
    nix::ioctl_write_int_bad!(set_controlling, nix::libc::TIOCSCTTY);
}

/// The user's end of the terminal.
pub struct Terminal {
    child: Child,
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Runs `command` in a new session whose terminal has this size.
    pub fn run(mut command: Command, rows: u16, columns: u16) -> Terminal {
        let OpenptyResult { master, slave } = openpty(&size(rows, columns), None).unwrap();
        let io = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(io()).stdout(io()).stderr(io());
        let become_leader = || {
            nix::unistd::setsid()?;
            // SAFETY: standard input is the terminal's slave, and the new session has no terminal
            // yet.
            unsafe { ioctls::set_controlling(0, 0) }?;
            Ok(())
        };
        // SAFETY: the closure makes two system calls and allocates nothing.
        unsafe { command.pre_exec(become_leader) };
        let child = command.spawn().unwrap();
        let (master, seen) = (File::from(master), Arc::new(Mutex::new(Vec::new())));
        let (mut reader, sink) = (master.try_clone().unwrap(), Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Terminal {
            child,
            master,
            seen,
        }
    }

    /// Everything on the screen so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    /// Types.
    pub fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Drags the window's corner.
    pub fn resize(&self, rows: u16, columns: u16) {
        // SAFETY: the descriptor is a terminal's master and the structure lives across the call.
        unsafe { ioctls::set_size(self.master.as_raw_fd(), &size(rows, columns)) }.unwrap();
    }

    /// Waits for a text on the screen.
    #[track_caller]
    pub fn expect(&self, text: &str) {
        let end = std::time::Instant::now() + PATIENCE;
        while !self.screen().contains(text) {
            assert!(
                std::time::Instant::now() < end,
                "{text:?} does not appear, but {:?}",
                self.screen()
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Waits for the end; gives the exit code.
    #[track_caller]
    pub fn wait(mut self) -> i32 {
        let status = eventually("the end of the command on the terminal", PATIENCE, || {
            self.child.try_wait().unwrap()
        });
        status.code().unwrap_or(-1)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
