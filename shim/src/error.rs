//! The shim's error: typed up to the edge, where it is a gRPC code that containerd acts on and one
//! line that a user reads.

use std::io;
use std::sync::Arc;

use ttrpc::Code;

use crate::refusal::Refusal;

/// One failed request. Only [`Error::code`] and the line that it displays as survive the way to
/// the user, so the line says what failed, on what, and what to do. Each level of a chain keeps its
/// own part, and they are joined in one place, by `Display`.
#[derive(Clone, Debug)]
pub enum Error {
    /// As things are, the request cannot be.
    Refused(Refusal),
    /// What the shim itself found.
    Found {
        /// What containerd's clients act on.
        code: Code,
        /// In a line.
        message: String,
    },
    /// What the guest agent answered, in its words.
    Agent { code: Code, message: String },
    /// The host's kernel refused something.
    Io {
        /// Reads like "make directory /run/cofferdam".
        doing: String,
        source: Arc<io::Error>,
    },
    /// QEMU or one of its helpers failed.
    Vmm(Arc<vmm::Error>),
    /// What was being done, and why it failed.
    While {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: Box<Error>,
    },
}

impl Error {
    /// What containerd and its clients act on (`NOT_FOUND`: already gone; `UNIMPLEMENTED`: try
    /// another way; ...). The one place that says which error has which.
    pub fn code(&self) -> Code {
        match self {
            Error::Refused(refusal) => refusal.code(),
            Error::Found { code, .. } | Error::Agent { code, .. } => *code,
            Error::Io { .. } => Code::INTERNAL,
            Error::Vmm(error) => vmm_code(error),
            Error::While { source, .. } => source.code(),
        }
    }

    /// Whether it is this refusal of the host's kernel.
    pub fn is_errno(&self, errno: i32) -> bool {
        match self {
            Error::Io { source, .. } => source.raw_os_error() == Some(errno),
            Error::While { source, .. } => source.is_errno(errno),
            _ => false,
        }
    }

    /// Puts what was being done in front.
    pub fn context(self, doing: impl Into<String>) -> Error {
        Error::While {
            doing: doing.into(),
            source: Box::new(self),
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Refused(refusal) => refusal.fmt(f),
            Error::Found { message, .. } | Error::Agent { message, .. } => f.write_str(message),
            Error::Io { doing, source } => write!(f, "cannot {doing}: {source}"),
            Error::Vmm(error) => error.fmt(f),
            Error::While { doing, source } => write!(f, "{doing}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Refused(_) | Error::Found { .. } | Error::Agent { .. } => None,
            Error::Io { source, .. } => Some(source),
            Error::Vmm(error) => Some(error),
            Error::While { source, .. } => Some(source),
        }
    }
}

/// Result with the shim's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $code:ident;)*) => {
        impl Error {
            $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Error {
                Error::Found { code: Code::$code, message: message.into() }
            })*
        }
    };
}

constructors! {
    /// The request or a file it names is wrong.
    invalid => INVALID_ARGUMENT;
    /// No such task, exec or process (any more).
    not_found => NOT_FOUND;
    /// The id is taken.
    exists => ALREADY_EXISTS;
    /// Not in this state.
    precondition => FAILED_PRECONDITION;
    /// Gone for now or for good, through no fault of the request.
    unavailable => UNAVAILABLE;
    /// This runtime does not do it.
    unimplemented => UNIMPLEMENTED;
    /// Something took too long.
    deadline => DEADLINE_EXCEEDED;
    /// Everything else.
    internal => INTERNAL;
}

#[cfg(test)]
impl PartialEq for Error {
    fn eq(&self, other: &Error) -> bool {
        (self.code(), self.to_string()) == (other.code(), other.to_string())
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::Refused(refusal)
    }
}

impl From<vmm::Error> for Error {
    fn from(error: vmm::Error) -> Error {
        Error::Vmm(Arc::new(error))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        // Names in it may come from anywhere, and it ends on somebody's terminal.
        let (code, line) = (error.code(), error.to_string());
        let mut message = line.replace(char::is_control, " ");
        if let Some(class) = class(code).filter(|class| !message.ends_with(class)) {
            message = format!("{message}: {class}");
        }
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
    }
}

/// The code of an error of QEMU's.
fn vmm_code(error: &vmm::Error) -> Code {
    match error {
        vmm::Error::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        vmm::Error::Closed { .. } | vmm::Error::Died { .. } => Code::UNAVAILABLE,
        vmm::Error::Unsupported(_) => Code::FAILED_PRECONDITION,
        vmm::Error::Io { .. } | vmm::Error::Refused { .. } => Code::INTERNAL,
        vmm::Error::Device { source, .. } => vmm_code(source),
    }
}

/// What stands at the end of such an error's message (containerd's errdefs). Clients up to 1.7 put
/// it there, and take it off before that; those from 2.0 on show what they get, and users and
/// scripts look for it.
fn class(code: Code) -> Option<&'static str> {
    match code {
        Code::INVALID_ARGUMENT => Some("invalid argument"),
        Code::NOT_FOUND => Some("not found"),
        Code::ALREADY_EXISTS => Some("already exists"),
        Code::FAILED_PRECONDITION => Some("failed precondition"),
        Code::UNAVAILABLE => Some("unavailable"),
        Code::UNIMPLEMENTED => Some("not implemented"),
        _ => None,
    }
}

/// Why a ttrpc call of ours failed. The client has one variant for most reasons and tells them
/// apart in words only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server answered with an error.
    Answered,
    /// No answer came in time; the connection is as good as before.
    Late,
    /// The request cannot be sent: it is too long, say. The connection is as good as before.
    Unsendable,
    /// The answer does not decode.
    Garbled,
    /// There is no connection, or none any more.
    Lost,
}

impl Failure {
    /// By the client's error.
    pub fn of(error: &ttrpc::Error) -> Failure {
        match error {
            ttrpc::Error::RpcStatus(_) => Failure::Answered,
            ttrpc::Error::Others(words) if words == "Request deadline elapsed" => Failure::Late,
            ttrpc::Error::Others(words)
                if words.starts_with("message length ") || words.starts_with("Encoding ") =>
            {
                Failure::Unsendable
            }
            ttrpc::Error::Others(words)
                if words.starts_with("Unpack ") || words.starts_with("Receiver got ") =>
            {
                Failure::Garbled
            }
            _ => Failure::Lost,
        }
    }
}

/// Keeps with a system error what was being done.
pub trait IoContext<T> {
    /// `doing` reads like "make directory /run/cofferdam".
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io {
            doing: doing(),
            source: Arc::new(error.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_sees_the_message_and_nothing_of_rust() {
        let error: ttrpc::Error =
            Error::not_found("task \"web\" is not there\nany\u{1b}more").into();
        let ttrpc::Error::RpcStatus(status) = error else {
            panic!("not a status")
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(
            status.message(),
            "task \"web\" is not there any more: not found"
        );
    }

    #[test]
    fn a_chain_keeps_its_cause_and_its_code_and_is_one_line() {
        let refused: std::io::Result<()> = Err(nix::errno::Errno::ENOSPC.into());
        let error = refused.doing(|| "make directory /run/x".into());
        let error = error.unwrap_err().context("cannot make room");
        assert_eq!(
            error.to_string(),
            "cannot make room: cannot make directory /run/x: No space left on device (os error 28)"
        );
        assert!(error.is_errno(libc::ENOSPC) && !error.is_errno(libc::EIO));
        let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| {
            error.source()
        });
        assert!(
            causes.last().is_some_and(
                |cause| cause.is::<Arc<std::io::Error>>() || cause.is::<std::io::Error>()
            )
        );
        let refusal = Error::from(Refusal::Exists(crate::model::ProcessId::init("web")));
        assert_eq!(refusal.context("no").code(), Code::ALREADY_EXISTS);
    }

    #[test]
    fn the_class_of_an_error_is_said_once() {
        let message = |error: Error| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
            other => panic!("{other}"),
        };
        assert_eq!(
            message(Error::exists("task web already exists")),
            "task web already exists"
        );
        assert_eq!(
            message(Error::internal("cannot mount /x")),
            "cannot mount /x"
        );
    }
}
