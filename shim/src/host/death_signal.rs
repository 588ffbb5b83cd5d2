//! The death signal of programs that the shim runs on the host for others: hooks and loggers.

use std::io;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// What a child runs between fork and exec so that it is killed when the thread of the shim that
/// started it ends (PR_SET_PDEATHSIG): nobody else knows of it. Makes system calls only.
pub fn with_the_shim() -> impl FnMut() -> io::Result<()> + Send + Sync + 'static {
    let shim = Pid::from_raw(std::process::id().cast_signed());
    move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // It may have ended before the child could ask for the signal.
        if getppid() == shim {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    }
}
