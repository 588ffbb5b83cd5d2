//! Everything that the guest says, and what of it may be said.
//!
//! The guest is whoever broke into it. Each value that the agent answers comes through here before
//! anything else of the shim sees it: [`Agent`] is the only holder of the client, and gives known
//! features, statuses of 0 to 255, short texts without control characters, lists of a known length,
//! containers of this sandbox. What cannot be understood is no answer: it ends the machine, with a
//! reason.
//!
//! ```text
//! agent ─▶ frames (size, number of answers) ─▶ ttrpc ─▶ Agent::judged ─▶ Ok: a value with a range
//!                                                           │           └▶ Error::Agent: its words
//!                                                           ▼
//!                                       Fault: garbled or lost ─▶ the machine ends
//! ```
//!
//! A value that is out of its range is not repaired by whoever uses it: it is made harmless here,
//! once. An answer that is an error is the agent's opinion, with its code, and ends nothing; who
//! asked decides. Events come at a rate (`oom`), because a guest can make them for nothing.
//!
//! Sizes are bounded below that already: no answer is larger than [`guest_protocol::MAX_FRAME`], and
//! there is one for each question.

mod agent;
mod oom;
mod stats;

use guest_protocol::protocols::agent::AgentDetails;
use guest_protocol::{
    FEATURE_CLOCK, FEATURE_IMAGES, FEATURE_MEMORY, FEATURE_NETWORK, FEATURE_OWN_FIELDS,
    FEATURE_POD, FEATURE_PORT_FORWARD, FEATURE_RAW_STDIO, FEATURE_SIGNAL_ALL, FEATURE_UDS,
    FEATURE_UDS_BELOW,
};
use ttrpc::Code;

use crate::error::{Error, Failure};

pub use agent::{Agent, Fault};
pub use oom::{Bucket, watch_oom};
pub use stats::{IoEntry, Limited, Op, Stats};

/// The longest text of an agent's that goes on to a user or into a log, in bytes.
pub const MAX_TEXT: usize = 1024;

/// The longest version that an agent can have, in bytes.
const MAX_VERSION: usize = 64;

/// Exit status of a process whose end is not known, as containerd's "unknown".
pub const UNKNOWN_STATUS: u32 = 255;

/// What an agent can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Its version, for the log.
    pub version: String,
    /// It applies seccomp profiles.
    pub seccomp: bool,
    /// See [`FEATURE_RAW_STDIO`].
    pub raw_stdio: bool,
    /// See [`FEATURE_SIGNAL_ALL`].
    pub signal_all: bool,
    /// See [`FEATURE_PORT_FORWARD`].
    pub port_forward: bool,
    /// See [`FEATURE_UDS`].
    pub uds: bool,
    /// See [`FEATURE_UDS_BELOW`].
    pub uds_below: bool,
    /// See [`FEATURE_POD`].
    pub pod: bool,
    /// See [`FEATURE_OWN_FIELDS`].
    pub own_fields: bool,
    /// See [`FEATURE_CLOCK`].
    pub clock: bool,
    /// See [`FEATURE_MEMORY`].
    pub memory: bool,
    /// See [`FEATURE_NETWORK`].
    pub network: bool,
    /// See [`FEATURE_IMAGES`].
    pub images: bool,
}

/// The refusal of what only our own agent can do.
pub fn needs_own_agent(what: &str) -> Error {
    Error::unimplemented(format!(
        "{what} needs Cofferdam's own guest agent: use the initramfs of this installation"
    ))
}

impl Features {
    pub(crate) fn of(details: &AgentDetails) -> Features {
        let has = |feature| {
            details
                .extra_features
                .iter()
                .any(|announced| announced == feature)
        };
        Features {
            version: text(&details.version, MAX_VERSION),
            seccomp: details.supports_seccomp,
            raw_stdio: has(FEATURE_RAW_STDIO),
            signal_all: has(FEATURE_SIGNAL_ALL),
            port_forward: has(FEATURE_PORT_FORWARD),
            uds: has(FEATURE_UDS),
            uds_below: has(FEATURE_UDS_BELOW),
            pod: has(FEATURE_POD),
            own_fields: has(FEATURE_OWN_FIELDS),
            clock: has(FEATURE_CLOCK),
            memory: has(FEATURE_MEMORY),
            network: has(FEATURE_NETWORK),
            images: has(FEATURE_IMAGES),
        }
    }
}

/// A text of the guest's as one line of at most `max` bytes: each run of control characters (those
/// that change the direction of a text are among them) and white space is a blank.
pub fn text(raw: &str, max: usize) -> String {
    let mut line = String::new();
    for word in raw
        .split(|c: char| c.is_control() || c.is_whitespace() || is_format(c))
        .filter(|word| !word.is_empty())
    {
        let blank = usize::from(!line.is_empty());
        let room = max.saturating_sub(line.len() + blank);
        let end = word.floor_char_boundary(room);
        if end == 0 {
            break;
        }
        line.extend([" "].iter().take(blank).copied().chain([&word[..end]]));
        if end < word.len() {
            break;
        }
    }
    line
}

/// Characters that are not seen and change how others are.
fn is_format(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

/// An exit status as a process has one.
fn exit_status(raw: i32) -> u32 {
    u8::try_from(raw).map_or(UNKNOWN_STATUS, u32::from)
}

/// Without the back trace that Kata's agent adds to its errors.
fn without_trace(message: &str) -> &str {
    message
        .split_once("Stack backtrace:")
        .map_or(message, |(message, _)| message)
}

/// What a failed call to the agent means: what its caller is told, and, if it is the end of the
/// agent, how.
pub(crate) fn judge(method: &str, error: &ttrpc::Error) -> (Error, Option<Fault>) {
    let words = || text(&error.to_string(), MAX_TEXT);
    match (Failure::of(error), error) {
        (_, ttrpc::Error::RpcStatus(status)) => {
            // An error that says that there is none is none that a client could act on.
            let code = Some(status.code())
                .filter(|code| *code != Code::OK)
                .unwrap_or(Code::UNKNOWN);
            (
                Error::Agent {
                    code,
                    message: text(without_trace(status.message()), MAX_TEXT),
                },
                None,
            )
        }
        (Failure::Late, _) => (
            Error::deadline(format!("the guest agent did not answer {method} in time")),
            None,
        ),
        (Failure::Unsendable, _) => (
            Error::internal(format!(
                "cannot ask the guest agent for {method}: {}",
                words()
            )),
            None,
        ),
        (Failure::Garbled, _) => {
            let reason = format!(
                "the guest agent's answer to {method} is not understood: {}",
                words()
            );
            (Error::unavailable(&reason), Some(Fault::Garbled(reason)))
        }
        (Failure::Lost | Failure::Answered, _) => {
            let reason = format!("the connection to the guest agent was lost: {}", words());
            (Error::unavailable(&reason), Some(Fault::Lost(reason)))
        }
    }
}

#[cfg(test)]
mod tests;
