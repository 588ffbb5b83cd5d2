//! What can go wrong, and which status code each failure has on the wire.

use std::io;

use ttrpc::Code;

use crate::stock::STOCK;

/// A failed request. The text is one line that says what failed and on what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong, or names a container that does not exist.
    #[error("{0}")]
    Invalid(String),
    /// The process is gone, or was never there.
    #[error("{0}")]
    NotFound(String),
    /// The thing exists but cannot do this, such as a resize without a terminal.
    #[error("{0}")]
    Unavailable(String),
    /// A system call failed.
    #[error("{context}: {}", errno_text(.source))]
    Io {
        /// What was tried, on what.
        context: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The kernel's number of a system call that failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    fn code(&self) -> Code {
        match self {
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Unavailable(_) => Code::UNAVAILABLE,
            Error::Io { .. } | Error::Failed(_) => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        let trace = if STOCK {
            "\n\nStack backtrace:\n   0: <unknown>\n   1: <unknown>"
        } else {
            ""
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), format!("{error}{trace}")))
    }
}

/// Says what was tried when a system call fails.
pub trait Context<T> {
    /// Turns a system call's error into [`Error::Io`] with this sentence.
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io {
            context: context(),
            source: error.into(),
        })
    }
}

/// The kernel's words for an error, as users of runc know them: lower case, without the number.
pub fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    match chars.next() {
        // An acronym or a name stays as it is.
        Some(first) if chars.clone().next().is_some_and(char::is_lowercase) => {
            first.to_lowercase().collect::<String>() + chars.as_str()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_like_those_of_runc() {
        let error = Err::<(), _>(io::Error::from_raw_os_error(libc::ENOENT))
            .context(|| "stat /foo".into())
            .unwrap_err();
        assert_eq!(error.to_string(), "stat /foo: no such file or directory");
        assert_eq!(
            errno_text(&io::Error::from_raw_os_error(libc::ENOEXEC)),
            "exec format error"
        );
        assert_eq!(
            errno_text(&io::Error::other("CPU 3 is gone")),
            "CPU 3 is gone"
        );
    }

    #[test]
    fn each_failure_has_the_code_of_the_protocol() {
        for (error, code) in [
            (Error::Invalid(String::new()), Code::INVALID_ARGUMENT),
            (Error::NotFound(String::new()), Code::NOT_FOUND),
            (Error::Unavailable(String::new()), Code::UNAVAILABLE),
            (Error::Failed(String::new()), Code::INTERNAL),
        ] {
            assert_eq!(error.code(), code);
        }
    }
}
