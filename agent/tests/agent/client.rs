//! What a test says to the agent: specs, containers, streams.

use std::time::Duration;

use guest_protocol::protocols::agent::{
    CreateContainerRequest, ExecProcessRequest, RemoveContainerRequest, SignalProcessRequest,
    StartContainerRequest, WaitProcessRequest,
};
use guest_protocol::protocols::oci::{
    self, Linux, LinuxCapabilities, LinuxNamespace, Mount, Process, Root, Spec,
};
use guest_protocol::stdio::{ACCEPTED, Channel, Header};
use guest_protocol::{AGENT_PORT, AgentClient, STDIO_PORT, Stream, context};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::context::Context;

use super::guest::Guest;

/// Longer than anything here takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A connection to the agent of a guest.
pub struct Client<'a> {
    pub rpc: AgentClient,
    pub guest: &'a Guest,
}

/// How a process ended and what it wrote.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// The raw streams of a process.
pub struct Streams {
    pub stdin: Option<Stream>,
    pub stdout: Option<Stream>,
    pub stderr: Option<Stream>,
}

/// The context of a call that must be answered soon.
pub fn soon() -> Context {
    context(Some(DEADLINE))
}

/// The code and the text of a refusal.
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("expected a status, got {other:?}"),
    }
}

impl<'a> Client<'a> {
    pub async fn connect(guest: &'a Guest) -> Client<'a> {
        let stream = guest.transport.dial(AGENT_PORT, DEADLINE).await.unwrap();
        Client {
            rpc: AgentClient::new(stream),
            guest,
        }
    }

    /// A container spec as containerd makes them, for a command of the busybox tree.
    pub fn spec(&self, args: &[&str]) -> Spec {
        let capabilities = strings(&[
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_KILL",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
        ]);
        let process = Process {
            Args: strings(args),
            Env: strings(&["PATH=/usr/bin:/bin"]),
            Cwd: "/".into(),
            Capabilities: Some(LinuxCapabilities {
                Bounding: capabilities.clone(),
                Effective: capabilities.clone(),
                Permitted: capabilities,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let namespaces = ["pid", "mount", "ipc", "uts", "cgroup"].map(|kind| LinuxNamespace {
            Type: kind.into(),
            ..Default::default()
        });
        let linux = Linux {
            Namespaces: namespaces.into(),
            MaskedPaths: strings(&[
                "/proc/acpi",
                "/proc/kcore",
                "/proc/keys",
                "/proc/scsi",
                "/sys/firmware",
                "/no/such",
            ]),
            ReadonlyPaths: strings(&[
                "/proc/bus",
                "/proc/fs",
                "/proc/irq",
                "/proc/sys",
                "/proc/sysrq-trigger",
            ]),
            ..Default::default()
        };
        Spec {
            Process: Some(process).into(),
            Root: Some(Root {
                Path: self.guest.rootfs.display().to_string(),
                ..Default::default()
            })
            .into(),
            Mounts: vec![
                mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount(
                    "/dev",
                    "tmpfs",
                    "tmpfs",
                    &["nosuid", "strictatime", "mode=755", "size=65536k"],
                ),
                mount(
                    "/dev/pts",
                    "devpts",
                    "devpts",
                    &[
                        "nosuid",
                        "noexec",
                        "newinstance",
                        "ptmxmode=0666",
                        "mode=0620",
                    ],
                ),
                mount(
                    "/dev/shm",
                    "tmpfs",
                    "shm",
                    &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
                ),
                mount(
                    "/dev/mqueue",
                    "mqueue",
                    "mqueue",
                    &["nosuid", "noexec", "nodev"],
                ),
                mount(
                    "/sys",
                    "sysfs",
                    "sysfs",
                    &["nosuid", "noexec", "nodev", "ro"],
                ),
                mount(
                    "/sys/fs/cgroup",
                    "cgroup",
                    "cgroup",
                    &["nosuid", "noexec", "nodev", "relatime", "ro"],
                ),
                mount(
                    "/run",
                    "tmpfs",
                    "tmpfs",
                    &["nosuid", "strictatime", "mode=755", "size=65536k"],
                ),
            ],
            Linux: Some(linux).into(),
            ..Default::default()
        }
    }

    pub async fn create(&self, id: &str, spec: Spec) -> ttrpc::Result<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: Some(spec).into(),
            ..Default::default()
        };
        self.rpc
            .agent
            .create_container(soon(), &request)
            .await
            .map(|_| ())
    }

    pub async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.rpc
            .agent
            .start_container(soon(), &request)
            .await
            .map(|_| ())
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<i32> {
        let request = WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.rpc
            .agent
            .wait_process(soon(), &request)
            .await
            .map(|response| response.status)
    }

    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal.cast_unsigned(),
            ..Default::default()
        };
        self.rpc
            .agent
            .signal_process(soon(), &request)
            .await
            .map(|_| ())
    }

    pub async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.rpc
            .agent
            .remove_container(soon(), &request)
            .await
            .map(|_| ())
    }

    /// Dials one raw stream and waits until the agent holds it.
    pub async fn stream(&self, channel: Channel, id: &str, exec_id: &str) -> Stream {
        let mut stream = self
            .guest
            .transport
            .dial(STDIO_PORT, DEADLINE)
            .await
            .unwrap();
        let header = Header {
            channel,
            container_id: id.into(),
            exec_id: exec_id.into(),
        };
        stream
            .write_all(header.to_string().as_bytes())
            .await
            .unwrap();
        assert_eq!(
            timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap(),
            ACCEPTED
        );
        stream
    }

    pub async fn streams(&self, id: &str, exec_id: &str) -> Streams {
        Streams {
            stdin: Some(self.stream(Channel::Stdin, id, exec_id).await),
            stdout: Some(self.stream(Channel::Stdout, id, exec_id).await),
            stderr: Some(self.stream(Channel::Stderr, id, exec_id).await),
        }
    }

    /// Creates, starts, waits and removes a container, with nothing on its stdin.
    pub async fn run(&self, id: &str, spec: Spec) -> Output {
        let streams = self.streams(id, "").await;
        self.create(id, spec).await.unwrap();
        self.start(id).await.unwrap();
        let output = streams.finish(b"").await;
        let status = self.wait(id, "").await.unwrap();
        self.remove(id).await.unwrap();
        Output { status, ..output }
    }

    /// Runs a shell script in a container of its own.
    pub async fn script(&self, id: &str, script: &str, change: impl FnOnce(&mut Spec)) -> Output {
        let mut spec = self.spec(&["sh", "-c", script]);
        change(&mut spec);
        self.run(id, spec).await
    }

    /// Starts a container that sleeps.
    pub async fn sleeper(&self, id: &str) {
        self.create(id, self.spec(&["sleep", "1000"]))
            .await
            .unwrap();
        self.start(id).await.unwrap();
    }

    pub fn process(&self, args: &[&str]) -> Process {
        self.spec(args).Process.unwrap()
    }

    pub async fn exec(&self, id: &str, exec_id: &str, process: Process) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process).into(),
            ..Default::default()
        };
        self.rpc
            .agent
            .exec_process(soon(), &request)
            .await
            .map(|_| ())
    }

    /// Runs a shell script in a running container.
    pub async fn exec_script(&self, id: &str, exec_id: &str, script: &str) -> Output {
        let streams = self.streams(id, exec_id).await;
        self.exec(id, exec_id, self.process(&["sh", "-c", script]))
            .await
            .unwrap();
        let output = streams.finish(b"").await;
        Output {
            status: self.wait(id, exec_id).await.unwrap(),
            ..output
        }
    }
}

impl Streams {
    /// Writes `input`, closes stdin, and reads both outputs to their end.
    pub async fn finish(self, input: &[u8]) -> Output {
        let Streams {
            stdin,
            stdout,
            stderr,
        } = self;
        let write = async move {
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(input).await;
                let _ = stdin.shutdown().await;
            }
        };
        let ((), stdout, stderr) = tokio::join!(write, read_all(stdout), read_all(stderr));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Output {
            status: -1,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }
}

/// Reads a stream to its end.
pub async fn read_all(stream: Option<Stream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        timeout(DEADLINE, stream.read_to_end(&mut bytes))
            .await
            .expect("the stream has no end")
            .unwrap();
    }
    bytes
}

pub fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|item| (*item).to_owned()).collect()
}

pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        type_: kind.into(),
        source: source.into(),
        options: strings(options),
        ..Default::default()
    }
}

pub fn linux(spec: &mut Spec) -> &mut Linux {
    spec.Linux.mut_or_insert_default()
}

pub fn process(spec: &mut Spec) -> &mut Process {
    spec.Process.mut_or_insert_default()
}

pub fn resources(spec: &mut Spec) -> &mut oci::LinuxResources {
    linux(spec).Resources.mut_or_insert_default()
}
