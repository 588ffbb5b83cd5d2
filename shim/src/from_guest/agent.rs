//! The agent, as the rest of the shim knows it: each call gives what the host may believe, or an
//! error.

use std::sync::Arc;
use std::time::Duration;

use guest_protocol::protocols::agent::{
    AddARPNeighborsRequest, CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest,
    GetOOMEventRequest, GuestDetailsRequest, OnlineCPUMemRequest, PauseContainerRequest,
    ReadStreamRequest, RemoveContainerRequest, ResumeContainerRequest, SetGuestDateTimeRequest,
    SignalProcessRequest, StartContainerRequest, StatsContainerRequest, TtyWinResizeRequest,
    UpdateContainerRequest, UpdateEphemeralMountsRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, WaitProcessRequest, WriteStreamRequest,
};
use guest_protocol::protocols::clock::Correction;
use guest_protocol::protocols::health::CheckRequest;
use guest_protocol::protocols::memory::MemoryState;
use guest_protocol::protocols::network::NetworkState;
use guest_protocol::stdio::Channel;
use guest_protocol::{AgentClient, context};
use protobuf::well_known_types::empty::Empty;
use tokio::sync::watch;

use super::{Features, Stats, UNKNOWN_STATUS, exit_status, judge};
use crate::error::{Error, Result};

/// The end of an agent, with the reason that a user is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ended, or the agent broke its rules. An end of the machine may be behind it.
    Lost(String),
    /// It answered something that is no answer.
    Garbled(String),
}

/// A connection to a guest agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    fault: Arc<watch::Sender<Option<Fault>>>,
}

/// Calls whose answer says nothing but that it is done; if it has more in it (the routes, the
/// interface), nobody looks.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ty) $method:literal;)*) => {
        impl Agent {
            $($(#[$doc])*
            ///
            /// # Errors
            /// The agent's own words; `DEADLINE_EXCEEDED`; `UNAVAILABLE` if the agent is gone.
            pub async fn $name(&self, request: &$request, deadline: Duration) -> Result<()> {
                let answer = self.client.agent.$name(context(Some(deadline)), request).await;
                self.judged($method, answer).map(drop)
            })*
        }
    };
}

calls! {
    /// Sets up the sandbox.
    create_sandbox(CreateSandboxRequest) "CreateSandbox";
    /// Gives file systems in the guest's memory another size.
    update_ephemeral_mounts(UpdateEphemeralMountsRequest) "UpdateEphemeralMounts";
    /// Brings CPUs to life that were plugged in.
    online_cpu_mem(OnlineCPUMemRequest) "OnlineCPUMem";
    /// Sets up a network card.
    update_interface(UpdateInterfaceRequest) "UpdateInterface";
    /// Sets the routes.
    update_routes(UpdateRoutesRequest) "UpdateRoutes";
    /// Adds neighbours.
    add_arp_neighbors(AddARPNeighborsRequest) "AddARPNeighbors";
    /// Makes a container.
    create_container(CreateContainerRequest) "CreateContainer";
    /// Lets a container's init run.
    start_container(StartContainerRequest) "StartContainer";
    /// Removes a container.
    remove_container(RemoveContainerRequest) "RemoveContainer";
    /// Changes a container's limits.
    update_container(UpdateContainerRequest) "UpdateContainer";
    /// Freezes a container.
    pause_container(PauseContainerRequest) "PauseContainer";
    /// Thaws a container.
    resume_container(ResumeContainerRequest) "ResumeContainer";
    /// Runs a further process in a container.
    exec_process(ExecProcessRequest) "ExecProcess";
    /// Sends a signal.
    signal_process(SignalProcessRequest) "SignalProcess";
    /// Sets the size of a terminal.
    tty_win_resize(TtyWinResizeRequest) "TtyWinResize";
    /// Sets the time of day.
    set_guest_date_time(SetGuestDateTimeRequest) "SetGuestDateTime";
}

impl Agent {
    /// Takes the client; nobody else has it.
    pub fn new(client: AgentClient) -> Agent {
        Agent {
            client,
            fault: Arc::new(watch::Sender::new(None)),
        }
    }

    /// Waits until the agent is of no use any more; any number of callers may.
    pub async fn failed(&self) -> Fault {
        let mut fault = self.fault.subscribe();
        let seen = fault
            .wait_for(Option::is_some)
            .await
            .map(|fault| fault.clone());
        // `self` holds the sender.
        seen.ok()
            .flatten()
            .unwrap_or_else(|| Fault::Lost("the connection to the guest agent was lost".into()))
    }

    /// The first fault stays: what follows it follows from it.
    fn fail(&self, fault: Fault) {
        self.fault.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(fault);
            first
        });
    }

    fn judged<T>(&self, method: &str, answer: ttrpc::Result<T>) -> Result<T> {
        answer.map_err(|error| {
            let error = match self.client.broken() {
                Some(rule) if !matches!(error, ttrpc::Error::RpcStatus(_)) => {
                    ttrpc::Error::Socket(rule.to_owned())
                }
                _ => error,
            };
            let (error, fault) = judge(method, &error);
            fault.into_iter().for_each(|fault| self.fail(fault));
            error
        })
    }

    /// What the agent can do.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn features(&self, deadline: Duration) -> Result<Features> {
        let answer = self
            .client
            .agent
            .get_guest_details(context(Some(deadline)), &GuestDetailsRequest::default())
            .await;
        let details = self.judged("GetGuestDetails", answer)?;
        Ok(Features::of(&details.agent_details))
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn ping(&self, deadline: Duration) -> Result<()> {
        let request = CheckRequest::default();
        let answer = self
            .client
            .health
            .check(context(Some(deadline)), &request)
            .await;
        self.judged("Check", answer).map(drop)
    }

    /// Its time of day, in nanoseconds since 1970, which may be any.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn read_clock(&self, deadline: Duration) -> Result<i64> {
        let (context, nothing) = (context(Some(deadline)), Empty::new());
        let answer = self.client.clock.read(context, &nothing).await;
        Ok(self.judged("Clock.Read", answer)?.nanoseconds)
    }

    /// Changes its time of day by some nanoseconds.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn correct_clock(&self, by: &Correction, deadline: Duration) -> Result<()> {
        let answer = self.client.clock.correct(context(Some(deadline)), by).await;
        self.judged("Clock.Correct", answer).map(drop)
    }

    /// Waits until the agent wants more memory for its machine, or less: by how many MiB, which may
    /// be any number, and none after a while.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn memory_need(&self, state: &MemoryState, deadline: Duration) -> Result<i64> {
        let answer = self
            .client
            .memory
            .wait(context(Some(deadline)), state)
            .await;
        Ok(self.judged("Memory.Wait", answer)?.mib)
    }

    /// Makes the guest's network what the message says.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn set_network(&self, state: &NetworkState, deadline: Duration) -> Result<()> {
        let answer = self
            .client
            .network
            .set(context(Some(deadline)), state)
            .await;
        self.judged("Network.Set", answer).map(drop)
    }

    /// The ports of TCP at which somebody in the guest can be reached from outside.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn listening(&self, deadline: Duration) -> Result<Vec<u32>> {
        let nothing = Empty::new();
        let answer = self
            .client
            .network
            .listening(context(Some(deadline)), &nothing)
            .await;
        Ok(self.judged("Network.Listening", answer)?.tcp)
    }

    /// A container's statistics.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn stats(
        &self,
        request: &StatsContainerRequest,
        deadline: Duration,
    ) -> Result<Stats> {
        let answer = self
            .client
            .agent
            .stats_container(context(Some(deadline)), request)
            .await;
        Ok(Stats::of(
            &self.judged("StatsContainer", answer)?.cgroup_stats,
        ))
    }

    /// Waits for the end of a process, as long as that takes: its status, or none if there will not
    /// be one, because the agent has failed.
    pub async fn wait_process(&self, request: &WaitProcessRequest) -> Option<u32> {
        match self.client.agent.wait_process(context(None), request).await {
            Ok(answer) => Some(exit_status(answer.status)),
            Err(error) => {
                let is_answer = matches!(error, ttrpc::Error::RpcStatus(_));
                let error = self.judged("WaitProcess", Err::<(), _>(error)).err()?;
                if is_answer {
                    tracing::warn!(%error, id = request.container_id,
                        "the guest does not know how a process ended");
                    return Some(UNKNOWN_STATUS);
                }
                // Nobody would ever hear of the process again.
                self.fail(Fault::Lost(error.to_string()));
                None
            }
        }
    }

    /// Waits for the next container that is out of memory: a name that may be anything. None: the
    /// agent cannot tell.
    ///
    /// # Errors
    /// The agent has failed.
    pub(super) async fn oom_event(&self) -> Result<Option<String>> {
        match self
            .client
            .agent
            .get_oom_event(context(None), &GetOOMEventRequest::default())
            .await
        {
            Ok(event) => Ok(Some(event.container_id)),
            Err(error) => {
                let is_answer = matches!(error, ttrpc::Error::RpcStatus(_));
                let result = self.judged("GetOOMEvent", Err(error));
                if is_answer { Ok(None) } else { result }
            }
        }
    }

    /// The next output of a process, once there is some; none at its end.
    ///
    /// # Errors
    /// As those of every call; more than was asked for.
    pub async fn read(
        &self,
        channel: Channel,
        request: &ReadStreamRequest,
    ) -> Result<Option<Vec<u8>>> {
        let answer = match channel {
            Channel::Stderr => self.client.agent.read_stderr(context(None), request).await,
            Channel::Stdin | Channel::Stdout => {
                self.client.agent.read_stdout(context(None), request).await
            }
        };
        let data = self.judged("ReadStdout", answer)?.data;
        if data.len() > request.len as usize {
            let (got, asked) = (data.len(), request.len);
            return Err(Error::internal(format!(
                "the guest agent gave {got} bytes of output where {asked} were asked"
            )));
        }
        Ok(Some(data).filter(|data| !data.is_empty()))
    }

    /// Writes to a process's input. How much of it the agent says that it took says nothing: it
    /// takes all or fails.
    ///
    /// # Errors
    /// As those of every call.
    pub async fn write(&self, request: &WriteStreamRequest) -> Result<()> {
        let answer = self.client.agent.write_stdin(context(None), request).await;
        self.judged("WriteStdin", answer).map(drop)
    }
}
