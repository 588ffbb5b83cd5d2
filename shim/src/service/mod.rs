//! The ttrpc services: requests in containerd's terms become calls of the sandbox's owner.

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
