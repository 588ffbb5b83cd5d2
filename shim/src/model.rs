//! What all parts of the shim speak of: a process, its input and output, its end.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// A process of a container: its init, or an exec.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    pub container: String,
    /// The exec; none for init.
    pub exec: Option<String>,
}

impl ProcessId {
    /// The first process of a container.
    pub fn init(container: &str) -> ProcessId {
        ProcessId {
            container: container.to_owned(),
            exec: None,
        }
    }

    /// A further process of a container.
    pub fn exec(container: &str, exec: &str) -> ProcessId {
        ProcessId {
            container: container.to_owned(),
            exec: Some(exec.to_owned()),
        }
    }

    /// The process of a request's `id` and `exec_id`, where an empty `exec_id` is init.
    pub fn of_request(container: &str, exec_id: &str) -> ProcessId {
        if exec_id.is_empty() {
            ProcessId::init(container)
        } else {
            ProcessId::exec(container, exec_id)
        }
    }

    /// The `exec_id` of a request: empty for init.
    pub fn exec_id(&self) -> &str {
        self.exec.as_deref().unwrap_or_default()
    }

    /// Whether this is the container's init.
    pub fn is_init(&self) -> bool {
        self.exec.is_none()
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.exec {
            None => write!(f, "task {}", self.container),
            Some(exec) => write!(f, "exec {exec} of task {}", self.container),
        }
    }
}

/// Whose processes a signal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalScope {
    /// The one that is named.
    Process,
    /// All of its container.
    Container,
}

/// Whether a container's processes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freezer {
    /// They stand still.
    Frozen,
    /// They run.
    Thawed,
}

/// Where the client wants a process's input and output: echoed in `State`, so that it can attach
/// again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Fifo for input.
    pub stdin: Option<String>,
    /// Fifo or URI for output.
    pub stdout: Option<String>,
    /// Fifo or URI for errors.
    pub stderr: Option<String>,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

impl Stdio {
    /// Those of a request, where an empty name is none.
    pub fn of_request(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Stdio {
        let named = |name: &str| Some(name.to_owned()).filter(|name| !name.is_empty());
        Stdio {
            stdin: named(stdin),
            stdout: named(stdout),
            stderr: named(stderr),
            terminal,
        }
    }
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
