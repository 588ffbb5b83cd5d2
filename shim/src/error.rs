//! The shim's error: a gRPC code that containerd acts on and one line that a user reads.

use ttrpc::Code;

/// One failed request. Only code and message survive the way to the user, so the message says what
/// failed, on what, and what to do.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{message}")]
pub struct Error {
    /// What containerd's clients act on (`NOT_FOUND`: already gone; `UNIMPLEMENTED`: try another
    /// way; …).
    pub code: Code,
    /// One line for the user.
    pub message: String,
}

/// Result with the shim's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $code:ident;)*) => {
        impl Error {
            $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Error {
                Error { code: Code::$code, message: message.into() }
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

impl Error {
    /// Puts what was being done in front of the message.
    pub fn context(self, doing: impl std::fmt::Display) -> Error {
        Error {
            message: format!("{doing}: {}", self.message),
            ..self
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        // Names in it may come from anywhere, and it ends on somebody's terminal.
        let mut message = error.message.replace(char::is_control, " ");
        if let Some(class) = class(error.code).filter(|class| !message.ends_with(class)) {
            message = format!("{message}: {class}");
        }
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code, message))
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

impl From<vmm::Error> for Error {
    fn from(error: vmm::Error) -> Error {
        let (code, message) = (code_of(&error), error.to_string());
        Error { code, message }
    }
}

fn code_of(error: &vmm::Error) -> Code {
    match error {
        vmm::Error::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        vmm::Error::Closed { .. } | vmm::Error::Died { .. } => Code::UNAVAILABLE,
        vmm::Error::Unsupported(_) => Code::FAILED_PRECONDITION,
        vmm::Error::Io { .. } | vmm::Error::Refused { .. } => Code::INTERNAL,
        vmm::Error::Device { source, .. } => code_of(source),
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

/// Turns a system error into an internal one, with what was being done in front.
pub trait IoContext<T> {
    /// `doing` reads like "make directory /run/cofferdam".
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let error: std::io::Error = error.into();
            Error::internal(format!("cannot {}: {error}", doing()))
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
