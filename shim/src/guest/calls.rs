//! The seam between the sandbox's owner and a running guest: all that the rest of the shim asks of
//! one. [`RunningGuest`](crate::guest::running::RunningGuest) answers with a virtual machine, the
//! double of the owner's tests with what a test wants to happen.

use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use guest_protocol::protocols::agent::CreateContainerRequest;
use oci_spec::runtime::{LinuxResources, Process};
use tokio::time::Instant;
use vmm::Attached;

use crate::error::Result;
use crate::from_guest::{Features, Stats};
use crate::guest::host_sockets::HostSockets;
use crate::guest::machine_size::WantedSize;
use crate::guest::preconnect::PreconnectedStdio;
use crate::guest::task_process::TaskPlace;
use crate::host::ledger::Ledger;
use crate::model::{Freezer, ProcessId, SignalScope, Stdio};
use crate::stdio::GuestIo;

/// How a machine ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// In one line.
    pub reason: String,
    /// Whether the host killed one of its processes because memory ran out.
    pub out_of_memory: bool,
}

/// What a running guest is asked. Every call that returns a future ends within its deadline or with
/// the machine; an error is the agent's or QEMU's own words, unless it says otherwise.
#[async_trait]
pub trait GuestCalls: Debug + Send + Sync {
    /// Pid of QEMU on the host.
    fn pid(&self) -> u32;

    /// Where the processes by whose pids its containers go can run.
    fn task_place(&self) -> Option<TaskPlace>;

    /// What the agent can do.
    fn features(&self) -> &Features;

    /// The host's sockets that its containers may connect to, if the agent can pass connections on.
    fn host_sockets(&self) -> Option<&HostSockets>;

    /// Makes a container, its stdio connected before. Without an answer in time the container may
    /// be there.
    async fn create_container(
        &self,
        request: &CreateContainerRequest,
        io: &Stdio,
    ) -> Result<GuestIo>;

    /// Removes a container, or finds that there is none; gives up at `by`. A machine that ends in
    /// the meantime has no container any more.
    async fn remove_container(&self, id: &str, by: Instant) -> Result<()>;

    /// Plugs a disk in, whose device number on the host has to be `number`.
    async fn attach_disk(&self, path: &Path, number: Option<u64>, ro: bool) -> Result<Attached>;

    /// Pulls a disk out, within `deadline`.
    async fn detach_disk(&self, id: &str, deadline: Duration) -> Result<()>;

    /// Lets the guest write to a shared volume, named by its path below the shared directory, that
    /// it could only read until now.
    async fn allow_writes(&self, volume: &Path) -> Result<()>;

    /// Lets a container's init run.
    async fn start_container(&self, id: &str) -> Result<()>;

    /// Begins to connect the streams of an exec that is announced, if the agent takes streams.
    fn preconnect(&self, process: &ProcessId, io: &Stdio) -> Option<PreconnectedStdio>;

    /// Runs a further process in a container, its stdio connected before: by `preconnected` if the
    /// agent still holds those streams.
    async fn exec(
        &self,
        process: &ProcessId,
        spec: &Process,
        io: &Stdio,
        preconnected: Option<PreconnectedStdio>,
    ) -> Result<GuestIo>;

    /// Waits for the end of a process: its status, or `None` if the agent failed first, and with it
    /// the machine.
    async fn wait(&self, process: &ProcessId) -> Option<u32>;

    /// Sends a signal; SIGKILL to an init is for its whole container anyway. `NOT_FOUND`: the
    /// process is gone already.
    async fn signal(
        &self,
        process: &ProcessId,
        signal: u32,
        scope: SignalScope,
        deadline: Duration,
    ) -> Result<()>;

    /// Sets the size of a process's terminal, in characters. Without a terminal that is nothing.
    async fn resize_terminal(&self, process: &ProcessId, columns: u32, rows: u32) -> Result<()>;

    /// Freezes or thaws a container.
    async fn set_freezer(&self, id: &str, to: Freezer) -> Result<()>;

    async fn stats(&self, id: &str) -> Result<Stats>;

    /// Changes a container's limits; what is not named stays.
    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()>;

    /// Gives the guest what has changed in the network namespace since.
    async fn add_links(&self, ledger: &Ledger) -> Result<()>;

    /// Gives the machine the memory and the CPUs that it should have, and takes none.
    async fn grow(&self, wanted: &WantedSize) -> Result<()>;

    /// Brings the machine to the size that it should have, as far as that goes: a guest keeps what
    /// it cannot give back.
    async fn fit(&self, wanted: &WantedSize) -> Result<()>;

    /// Tells of each container that runs out of memory, until the agent is gone.
    async fn watch_oom(&self, tell: &(dyn Fn(String) + Send + Sync));

    /// Lets the machine grow and shrink with what containers without a memory limit use, its disks
    /// with the host's, and its network with its namespace, until the agent is gone.
    async fn follow_host(&self, wanted: &WantedSize, ledger: &Ledger);

    /// Whether the agent answers.
    async fn ping(&self) -> Result<()>;

    /// Waits until the machine, a helper that it cannot live without, or an agent that makes sense
    /// is gone. The machine may still run.
    async fn died(&self) -> Ended;

    /// Ends QEMU and the helpers.
    async fn stop(&self);
}
