//! The agent's log: silent unless `agent.log=debug`, so that it can never fill anything up.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

static LOG: OnceLock<File> = OnceLock::new();

/// Sends the log to `file` from now on.
pub fn to(file: File) {
    let _ = LOG.set(file);
}

/// Writes one line, if there is a log. One write per line, because /dev/kmsg takes each write as a
/// record.
pub fn line(text: Arguments<'_>) {
    if let Some(mut log) = LOG.get() {
        let _ = log.write_all(format!("cofferdam-agent: {text}\n").as_bytes());
    }
}

/// Logs one line in the manner of `format!`.
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}
pub(crate) use log;
