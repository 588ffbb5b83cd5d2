//! How a step of a child fails: one line of text, because that is all that goes back to the agent.

use std::fmt::Display;
use std::io;

use crate::error::errno_text;

/// What a child could not do, in one line.
#[derive(Debug)]
pub struct Failure(pub String);

/// The result of a child's step.
pub type Step<T> = Result<T, Failure>;

/// Says what a child tried when a system call fails.
pub trait StepContext<T> {
    /// Turns a system call's error into a [`Failure`] with these words.
    fn context(self, context: impl Display) -> Step<T>;
}

impl<T, E: Into<io::Error>> StepContext<T> for Result<T, E> {
    fn context(self, context: impl Display) -> Step<T> {
        self.map_err(|error| Failure(format!("{context}: {}", errno_text(&error.into()))))
    }
}
