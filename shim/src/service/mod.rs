//! The ttrpc services: containerd's calls become requests to the sandbox's owner.
//!
//! ```text
//! containerd ─▶ ttrpc ─▶ guard ─▶ task, sandbox ─▶ options, spec of an exec: read and checked
//!                          │            │
//!      a panic is one      │            ▼
//!      answer, INTERNAL ◀──┘      SandboxHandle::ask(Request) ─▶ owner
//! ```
//!
//! Two APIs ask the same owner: the task API (`task`), which every containerd speaks, and the
//! sandbox API (`sandbox`), by which containerd 2 makes a pod's sandbox without a task. Both answer
//! in two generations of types (v2 and v3 of the task API have one wire format under two names).
//!
//! What is here only translates. Whether something may be is decided by the pure state, what is
//! done about it by the owner; so a handler is a few lines, and none of them keeps anything. Two
//! things are done here because they need no state: the configuration is read with the request that
//! may begin a sandbox (`options`: what containerd's own configuration says for this runtime), and
//! an exec's process is parsed, so that what is wrong is refused before the owner hears of it.
//!
//! Codes are part of the contract (`error` decides them): containerd takes `NOT_FOUND` for "gone
//! already" and goes on, `UNIMPLEMENTED` for "try another way", and shows users the text. A method
//! that this runtime does not have says what it is and why in its answer.
//!
//! A client may give up on any call. Its request goes on, as with runc: a create that nobody waits
//! for is made, and deleted by containerd like any other.

mod guard;
mod options;
mod sandbox;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use ttrpc::r#async::Service;

pub use sandbox::SandboxService;
pub use task::TaskService;

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Services that containerd may ask a shim for and that this one does not have: without an entry
/// ttrpc answers `INVALID_ARGUMENT`, where containerd looks for `UNIMPLEMENTED`.
const ABSENT: [&str; 2] = [
    "containerd.services.streaming.v1.Streaming",
    "containerd.services.transfer.v1.Transfer",
];

/// All services: the task service under its v2 and v3 names, whose messages are the same bytes.
pub fn all(task: TaskService, sandbox: SandboxService) -> HashMap<String, Service> {
    let task = Arc::new(task);
    let mut services = create_task(task.clone());
    if let Some(v2) = create_task(task).remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), v2);
    }
    services.extend(create_sandbox(Arc::new(sandbox)));
    for name in ABSENT {
        services.insert(
            name.to_owned(),
            Service {
                methods: HashMap::new(),
                streams: HashMap::new(),
            },
        );
    }
    guard::guarded(services)
}
