//! What all parts of the shim speak of: a process, its input and output, its end.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// A process of a container: its init (`exec` is empty) or an exec.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// The exec, empty for init.
    pub exec: String,
}

impl ProcessId {
    /// The key of a request's `id` and `exec_id`.
    pub fn new(container: &str, exec: &str) -> ProcessId {
        ProcessId {
            container: container.to_owned(),
            exec: exec.to_owned(),
        }
    }

    /// Whether this is the container's init.
    pub fn is_init(&self) -> bool {
        self.exec.is_empty()
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.is_init() {
            true => write!(f, "task {}", self.container),
            false => write!(f, "exec {} of task {}", self.exec, self.container),
        }
    }
}

/// Where the client wants a process's input and output: echoed in `State`, so that it can attach
/// again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Fifo for input, or empty.
    pub stdin: String,
    /// Fifo or URI for output, or empty.
    pub stdout: String,
    /// Fifo or URI for errors, or empty.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The pid that containerd knows the process by.
    pub pid: u32,
    /// Exit code, or 128 plus the signal's number.
    pub status: u32,
    /// When it ended.
    pub at: SystemTime,
}
