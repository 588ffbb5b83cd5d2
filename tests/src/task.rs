//! A client of the task API, for what `ctr` cannot ask. Every call has a deadline.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;
use std::time::Duration;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use nix::libc;
use nix::sys::stat::Mode;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::Client;

use crate::{Env, PATIENCE, eventually};

/// A refused call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The gRPC code.
    pub code: Code,
    /// The user's line.
    pub message: String,
}

/// What a call gives.
pub type Answer<T> = Result<T, Refused>;

/// A task on a shim's socket.
pub struct Task {
    client: Client,
    /// The task's id.
    pub id: String,
    /// Its bundle, where the test made it.
    pub bundle: String,
    /// Version of the task API that calls use.
    pub version: i32,
}

/// The runtime of all clients.
pub fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    let build = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    RUNTIME.get_or_init(build)
}

async fn request<A: Message>(
    client: Client,
    service: String,
    method: String,
    payload: Vec<u8>,
) -> Answer<A> {
    let request = ttrpc::Request {
        service,
        method,
        payload,
        ..Default::default()
    };
    match client.request(request).await {
        Ok(response) => Ok(A::parse_from_bytes(&response.payload).unwrap()),
        Err(ttrpc::Error::RpcStatus(status)) => {
            let message = status.message().to_owned();
            assert!(
                !message.contains("Others("),
                "Rust debug text in an answer: {message}"
            );
            Err(Refused {
                code: status.code(),
                message,
            })
        }
        Err(error) => Err(Refused {
            code: Code::UNAVAILABLE,
            message: format!("connection: {error}"),
        }),
    }
}

impl Task {
    /// Connects to a shim.
    #[track_caller]
    pub fn connect(address: &str, id: &str) -> Task {
        let client = runtime().block_on(Client::connect(address));
        let client = client.unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        Task {
            client,
            id: id.to_owned(),
            bundle: String::new(),
            version: 2,
        }
    }

    /// The same connection, for another id.
    pub fn other(&self, id: &str) -> Task {
        Task {
            client: self.client.clone(),
            id: id.to_owned(),
            bundle: self.bundle.clone(),
            version: self.version,
        }
    }

    /// Calls any method of any service.
    #[track_caller]
    pub fn call<A: Message>(
        &self,
        service: &str,
        method: &str,
        message: &impl Message,
    ) -> Answer<A> {
        let call = request(
            self.client.clone(),
            service.to_owned(),
            method.to_owned(),
            message.write_to_bytes().unwrap(),
        );
        // Sent by the runtime's one worker, like parked calls: the stream ids of a connection have
        // to increase.
        let answer = runtime()
            .block_on(runtime().spawn(async move { timeout(PATIENCE, call).await }))
            .unwrap();
        answer.unwrap_or_else(|_| panic!("{method} never answers"))
    }

    fn service(&self) -> String {
        format!("containerd.task.v{}.Task", self.version)
    }

    #[track_caller]
    fn task<A: Message>(&self, method: &str, message: &impl Message) -> Answer<A> {
        self.call(&self.service(), method, message)
    }

    /// Create with the bundle's own root file system and null stdio.
    #[track_caller]
    pub fn create(&self) -> Answer<CreateTaskResponse> {
        self.create_with(|_| ())
    }

    /// Create with a changed request.
    #[track_caller]
    pub fn create_with(
        &self,
        change: impl FnOnce(&mut CreateTaskRequest),
    ) -> Answer<CreateTaskResponse> {
        let mut request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            ..Default::default()
        };
        change(&mut request);
        self.task("Create", &request)
    }

    /// Start of init, or of an exec.
    #[track_caller]
    pub fn start(&self, exec_id: &str) -> Answer<StartResponse> {
        self.task(
            "Start",
            &StartRequest {
                id: self.id.clone(),
                exec_id: exec_id.into(),
                ..Default::default()
            },
        )
    }

    /// State of init, or of an exec.
    #[track_caller]
    pub fn state(&self, exec_id: &str) -> Answer<StateResponse> {
        self.task(
            "State",
            &StateRequest {
                id: self.id.clone(),
                exec_id: exec_id.into(),
                ..Default::default()
            },
        )
    }

    /// The state's name, `RUNNING` and the like.
    #[track_caller]
    pub fn status(&self, exec_id: &str) -> String {
        let state = self.state(exec_id).unwrap();
        format!("{:?}", state.status.enum_value().unwrap())
    }

    /// Wait for init, or for an exec.
    #[track_caller]
    pub fn wait(&self, exec_id: &str) -> Answer<WaitResponse> {
        self.task(
            "Wait",
            &WaitRequest {
                id: self.id.clone(),
                exec_id: exec_id.into(),
                ..Default::default()
            },
        )
    }

    /// A Wait that is parked while the test goes on.
    pub fn wait_beside(&self, exec_id: &str) -> JoinHandle<Answer<WaitResponse>> {
        let message = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let (client, service) = (self.client.clone(), self.service());
        runtime().spawn(async move {
            request(
                client,
                service,
                "Wait".to_owned(),
                message.write_to_bytes().unwrap(),
            )
            .await
        })
    }

    /// Kill.
    #[track_caller]
    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Answer<Empty> {
        let id = self.id.clone();
        self.task(
            "Kill",
            &KillRequest {
                id,
                exec_id: exec_id.into(),
                signal,
                all,
                ..Default::default()
            },
        )
    }

    /// Delete of the task, or of an exec.
    #[track_caller]
    pub fn delete(&self, exec_id: &str) -> Answer<DeleteResponse> {
        self.task(
            "Delete",
            &DeleteRequest {
                id: self.id.clone(),
                exec_id: exec_id.into(),
                ..Default::default()
            },
        )
    }

    /// Exec with an OCI process document.
    #[track_caller]
    pub fn exec(&self, exec_id: &str, process: &Value) -> Answer<Empty> {
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
        let spec = Any {
            type_url,
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            terminal: process["terminal"] == true,
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.task("Exec", &request)
    }

    /// Pids.
    #[track_caller]
    pub fn pids(&self) -> Answer<PidsResponse> {
        self.task(
            "Pids",
            &PidsRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    /// Pause.
    #[track_caller]
    pub fn pause(&self) -> Answer<Empty> {
        self.task(
            "Pause",
            &PauseRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    /// Resume.
    #[track_caller]
    pub fn resume(&self) -> Answer<Empty> {
        self.task(
            "Resume",
            &ResumeRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    /// Checkpoint.
    #[track_caller]
    pub fn checkpoint(&self) -> Answer<Empty> {
        self.task(
            "Checkpoint",
            &CheckpointTaskRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    /// `ResizePty`.
    #[track_caller]
    pub fn resize(&self, exec_id: &str, width: u32, height: u32) -> Answer<Empty> {
        let id = self.id.clone();
        self.task(
            "ResizePty",
            &ResizePtyRequest {
                id,
                exec_id: exec_id.into(),
                width,
                height,
                ..Default::default()
            },
        )
    }

    /// `CloseIO` of standard input.
    #[track_caller]
    pub fn close_io(&self, exec_id: &str) -> Answer<Empty> {
        let id = self.id.clone();
        self.task(
            "CloseIO",
            &CloseIORequest {
                id,
                exec_id: exec_id.into(),
                stdin: true,
                ..Default::default()
            },
        )
    }

    /// Update with an OCI resources document.
    #[track_caller]
    pub fn update(&self, resources: &Value) -> Answer<Empty> {
        let type_url =
            "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
        let resources = Any {
            type_url,
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let id = self.id.clone();
        self.task(
            "Update",
            &UpdateTaskRequest {
                id,
                resources: Some(resources).into(),
                ..Default::default()
            },
        )
    }

    /// Stats.
    #[track_caller]
    pub fn stats(&self) -> Answer<Any> {
        let response: StatsResponse = self.task(
            "Stats",
            &StatsRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )?;
        Ok(response.stats.unwrap_or_default())
    }

    /// Connect.
    #[track_caller]
    pub fn connected(&self) -> Answer<ConnectResponse> {
        self.task(
            "Connect",
            &ConnectRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    /// Shutdown.
    #[track_caller]
    pub fn shutdown(&self, now: bool) -> Answer<Empty> {
        self.task(
            "Shutdown",
            &ShutdownRequest {
                id: self.id.clone(),
                now,
                ..Default::default()
            },
        )
    }
}

/// The result of something parked, within a deadline.
#[track_caller]
pub fn join<T>(handle: JoinHandle<T>, deadline: Duration) -> T {
    let joined = runtime().block_on(async { timeout(deadline, handle).await });
    joined
        .unwrap_or_else(|_| panic!("a parked call is not answered within {deadline:?}"))
        .unwrap()
}

/// Insists on a refusal with this code and one line of text.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: Code) -> String {
    let refused = answer.expect_err("this call has to be refused");
    assert_eq!(refused.code, code, "{}", refused.message);
    assert!(
        !refused.message.contains('\n'),
        "more than one line: {:?}",
        refused.message
    );
    refused.message
}

/// Ends a task as containerd does.
pub fn end(task: &Task) {
    let _ = task.kill("", 9, true);
    task.wait("").unwrap();
    task.delete("").unwrap();
    let _ = task.shutdown(false);
}

/// A named pipe that the test holds open as containerd does.
pub fn fifo(env: &Env, name: &str) -> (String, File) {
    let path = env.dir.join(name);
    nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    // Opened for reading only, and without waiting for a writer: end of file is seen once the shim
    // has closed its end.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    (path.to_string_lossy().into_owned(), file)
}

/// Reads a fifo to its end.
pub fn drain(file: &mut File) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 65536]);
    eventually("the end of the output", PATIENCE, || {
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Some(()),
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(_) => return None,
            }
        }
    });
    all
}
