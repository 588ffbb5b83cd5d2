//! The error of this crate: one line that says what failed, on what, and where it is known, what to
//! do.

use std::io;
use std::time::Duration;

/// What went wrong with QEMU or a helper. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("cannot {doing}: {source}")]
    Io {
        /// Reads like "open /dev/kvm".
        doing: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Something took too long. It may have happened all the same.
    #[error("{doing} took longer than {timeout:?}")]
    Deadline {
        /// Reads like "QEMU's answer to device_add".
        doing: String,
        /// What it was given.
        timeout: Duration,
    },
    /// QEMU answered a command with an error.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The QMP command.
        command: &'static str,
        /// QMP's error class: the only part of its errors that is stable.
        class: String,
        /// QEMU's text.
        desc: String,
    },
    /// The monitor connection is gone, or never was one.
    #[error("connection to QEMU's monitor is closed: {reason}")]
    Closed {
        /// End of file, a reset, or what was wrong with what QEMU sent.
        reason: String,
    },
    /// A process ended that should live, or could not be used from the start.
    #[error("{what} {why}")]
    Died {
        /// Which program, by its path.
        what: String,
        /// How it ended and its last words.
        why: String,
    },
    /// A device that the user knows by a name could not be attached.
    #[error("{device}: {source}")]
    Device {
        /// Reads like "NIC eth0".
        device: String,
        /// Why not.
        source: Box<Error>,
    },
    /// The host, the binary or the request cannot do this.
    #[error("{0}")]
    Unsupported(String),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether QEMU answered with this stable error class.
    pub(crate) fn is_class(&self, wanted: &str) -> bool {
        matches!(self, Error::Refused { class, .. } if class == wanted)
    }
}

/// Turns a system error into one of this crate, with what was being done in front.
pub(crate) trait Doing<T> {
    /// `doing` reads like "open /dev/kvm".
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io {
            doing: doing(),
            source: error.into(),
        })
    }
}
