//! What the owner keeps for each container and each process while they are there, beside what
//! `state` decides by.

use std::collections::HashMap;

use oci_spec::runtime::Process as ProcessSpec;
use tokio::time::Instant;

use crate::container::create::Container;
use crate::container::hooks::HostHooks;
use crate::guest::machine_size::ResourceLimits;
use crate::guest::preconnect::PreconnectedStdio;
use crate::guest::task_process::TaskEnding;
use crate::model::{Exit, ProcessId};
use crate::sandbox::request::Reply;
use crate::stdio::Pumps;

#[derive(Debug, Default)]
pub struct ContainerRuntime {
    /// What it may use of the machine; none for a pod's sandbox, whose limits are the pod's.
    pub limits: Option<ResourceLimits>,
    pub hooks: HostHooks,
    /// The container itself, once the guest has it.
    pub container: Option<Container>,
    /// How many updates of its limits there were.
    pub updates: u64,
    /// When it got its first SIGKILL.
    pub killed: Option<Instant>,
}

impl ContainerRuntime {
    /// What ends the process by whose pid it goes.
    pub fn task_ending(&mut self) -> Option<TaskEnding> {
        let task = self.container.as_mut().and_then(Container::task);
        task.map(|task| task.ending())
    }

    /// The container has ended, and with it the process by whose pid it went.
    pub fn stop_task(&mut self) {
        if let Some(task) = self.container.as_mut().and_then(Container::task) {
            task.stop();
        }
    }
}

/// What is known of an exec that is announced.
#[derive(Debug)]
pub struct PendingExec {
    pub spec: ProcessSpec,
    pub preconnected: Option<PreconnectedStdio>,
}

#[derive(Debug, Default)]
pub struct ProcessRuntime {
    /// Its running input and output.
    pub pumps: Option<Pumps>,
    /// What to run, of an exec that is not started yet.
    pub exec: Option<PendingExec>,
    /// Columns and rows of its terminal, set before there was one.
    pub terminal_size: Option<(u32, u32)>,
    /// Its input was closed before there was one.
    pub stdin_closed: bool,
    /// Who waits for its end.
    pub waiters: Vec<Reply<Exit>>,
}

impl ProcessRuntime {
    /// One more who waits for the end, in the place of those who have given up.
    pub fn wait(&mut self, waiter: Reply<Exit>) {
        self.waiters.retain(Reply::is_awaited);
        self.waiters.push(waiter);
    }
}

/// Of all containers of a sandbox.
#[derive(Debug, Default)]
pub struct Runtimes {
    containers: HashMap<String, ContainerRuntime>,
    processes: HashMap<ProcessId, ProcessRuntime>,
    /// How many processes there were at a time, since memory was given back.
    most: usize,
}

/// So many processes at a time leave memory behind that is worth giving back.
const MANY: usize = 64;

impl Runtimes {
    /// What is kept for a container, from now on.
    pub fn container(&mut self, id: &str) -> &mut ContainerRuntime {
        self.containers.entry(id.to_owned()).or_default()
    }

    /// What is kept for a container, if anything is.
    pub fn known(&self, id: &str) -> Option<&ContainerRuntime> {
        self.containers.get(id)
    }

    /// What is kept for a process, from now on.
    pub fn process(&mut self, process: &ProcessId) -> &mut ProcessRuntime {
        self.most = self.most.max(self.processes.len());
        self.processes.entry(process.clone()).or_default()
    }

    pub fn processes(&mut self) -> impl Iterator<Item = (&ProcessId, &mut ProcessRuntime)> {
        self.processes.iter_mut()
    }

    /// Containers that the guest has.
    pub fn in_guest(&self) -> impl Iterator<Item = &String> {
        let has = |(_, kept): &(&String, &ContainerRuntime)| kept.container.is_some();
        self.containers.iter().filter(has).map(|(id, _)| id)
    }

    /// The limits of all containers.
    pub fn limits(&self) -> impl Iterator<Item = (&String, ResourceLimits)> {
        let containers = self.containers.iter();
        containers.filter_map(|(id, kept)| Some((id, kept.limits?)))
    }

    /// The running streams of a process; with its init those of the whole container.
    pub fn take_pumps(&mut self, process: &ProcessId) -> Vec<Pumps> {
        let of = self
            .processes
            .iter_mut()
            .filter(|(other, _)| is_of(other, process));
        of.filter_map(|(_, kept)| kept.pumps.take()).collect()
    }

    /// Gives up a process; with its init the whole container. Returns who still waits.
    pub fn remove(&mut self, process: &ProcessId) -> Vec<Reply<Exit>> {
        if process.is_init() {
            self.containers.remove(&process.container);
        }
        let gone = self.processes.extract_if(|other, _| is_of(other, process));
        let waiters = gone.flat_map(|(_, kept)| kept.waiters).collect();
        if self.most > MANY && self.processes.len() < MANY / 8 {
            self.most = 0;
            self.processes.shrink_to_fit();
            sys::trim_heap();
        }
        waiters
    }

    /// Whether nothing is kept.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.processes.is_empty()
    }

    /// Gives up everything: what the host holds for containers.
    pub fn clear(&mut self) -> Vec<Container> {
        self.processes.clear();
        let containers = self.containers.drain();
        containers.filter_map(|(_, kept)| kept.container).collect()
    }
}

fn is_of(other: &ProcessId, process: &ProcessId) -> bool {
    other == process || (process.is_init() && other.container == process.container)
}
