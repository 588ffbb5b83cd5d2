//! A guest agent that means harm, as /init of a guest under test: what a guest's kernel may do to
//! the host by its agent.
//!
//! /mode in the initramfs holds two words: how it does harm, and the method from whose call on it
//! does. Until then, and beside that, it answers all calls with empty messages, which say that all
//! is well, and does nothing at all.

mod plant;

use std::fs;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use guest_protocol::protocols::agent::{
    AgentDetails, CreateContainerRequest, GuestDetailsResponse, OOMEvent, WaitProcessResponse,
};
use guest_protocol::{
    AGENT_PORT, FEATURE_POD, FEATURE_RAW_STDIO, FEATURE_SIGNAL_ALL, FEATURE_UDS, KEY_LINE,
    READY_PARAMETER, STDIO_PORT, stdio,
};
use nix::mount::{MsFlags, mount};
use protobuf::Message;
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader, Request,
    Response, Status,
};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

/// Longer than any deadline of the host's for a call that is to be short.
const LATE: Duration = Duration::from_secs(20);

/// A container that is in no sandbox of this guest's.
const FOREIGN: &str = "somebody-elses";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// All is answered, and nothing done.
    Nothing,
    /// No answer.
    Never,
    /// An answer when nobody waits for one.
    Late,
    /// Answers that are no messages.
    Garbage,
    /// Bytes that are no frames.
    Noise,
    /// Errors with 100 KiB of control characters as their text.
    Error,
    /// Processes that end with statuses that there are not.
    Status,
    /// A frame of 64 MiB.
    Much,
    /// Each answer a thousand times.
    Again,
    /// Frames that are no answers.
    Stream,
    /// Containers out of memory without an end, of all names.
    Flood,
    /// Links for all names in what the host shares, for ever.
    Links,
    /// Connections to all ports of the host.
    Dials,
}

impl FromStr for Mode {
    type Err = io::Error;

    fn from_str(name: &str) -> io::Result<Mode> {
        Ok(match name {
            "nothing" => Mode::Nothing,
            "never" => Mode::Never,
            "late" => Mode::Late,
            "garbage" => Mode::Garbage,
            "noise" => Mode::Noise,
            "error" => Mode::Error,
            "status" => Mode::Status,
            "much" => Mode::Much,
            "again" => Mode::Again,
            "stream" => Mode::Stream,
            "flood" => Mode::Flood,
            "links" => Mode::Links,
            "dials" => Mode::Dials,
            _ => return Err(io::Error::other(format!("no mode {name:?}"))),
        })
    }
}

/// What it does, and since when.
struct Plan {
    mode: Mode,
    from: String,
    begun: AtomicBool,
    /// The latest container.
    container: std::sync::Mutex<String>,
}

impl Plan {
    /// What it does to an ordinary call.
    fn mode(&self) -> Mode {
        if self.begun.load(Ordering::Acquire) {
            self.mode
        } else {
            Mode::Nothing
        }
    }
}

fn main() -> ExitCode {
    let Err(error) = run();
    eprintln!("hostile agent: {error}");
    // The end of PID 1 is the end of the guest.
    ExitCode::FAILURE
}

fn run() -> io::Result<std::convert::Infallible> {
    for (kind, target) in [("proc", "/proc"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir(target);
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )?;
    }
    let text = fs::read_to_string("/mode")?;
    let (mode, from) = text
        .trim()
        .split_once(' ')
        .ok_or_else(|| io::Error::other("/mode has not two words"))?;
    let plan: &'static Plan = Box::leak(Box::new(Plan {
        mode: mode.parse()?,
        from: from.to_owned(),
        begun: AtomicBool::new(false),
        container: std::sync::Mutex::default(),
    }));
    let listen = |port| VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port);
    let (agent, stdio) = (listen(AGENT_PORT)?, listen(STDIO_PORT)?);
    let line = fs::read_to_string("/proc/cmdline")?;
    let port = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(READY_PARAMETER)?.strip_prefix('='));
    let port = port
        .and_then(|port| port.parse().ok())
        .ok_or_else(|| io::Error::other("no port for the notice"))?;
    let mut notice = dial(port)?;
    notice.write_all(b"ready\n")?;
    notice.read_exact(&mut [0; KEY_LINE])?;
    match plan.mode {
        Mode::Links => plant::everywhere(),
        Mode::Dials => drop(thread::spawn(move || dial_all(port))),
        _ => {}
    }
    thread::spawn(move || accept(&stdio, move |stream| hold(plan, stream)));
    accept(&agent, move |stream| serve(plan, stream));
    Err(io::Error::other("nobody can connect any more"))
}

/// The vsock device may come after /init.
fn dial(port: u32) -> io::Result<VsockStream> {
    for _ in 0..1000 {
        if let Ok(stream) = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port) {
            return Ok(stream);
        }
        sleep(Duration::from_millis(5));
    }
    Err(io::Error::other("the host does not listen"))
}

fn accept(
    listener: &VsockListener,
    serve: impl Fn(VsockStream) -> io::Result<()> + Copy + Send + 'static,
) {
    while let Ok((stream, _)) = listener.accept() {
        thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("hostile agent: {error}");
            }
        });
    }
}

/// Serves calls on one connection.
fn serve(plan: &'static Plan, mut stream: VsockStream) -> io::Result<()> {
    stream.read_exact(&mut [0; KEY_LINE])?;
    loop {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        stream.read_exact(&mut header)?;
        let header = MessageHeader::from(header);
        let mut payload = vec![0; header.length as usize];
        stream.read_exact(&mut payload)?;
        let request = Request::parse_from_bytes(&payload)?;
        if request.method == plan.from {
            plan.begun.store(true, Ordering::Release);
        }
        if let Some(answer) = answer(plan, header.stream_id, &request)? {
            stream.write_all(&answer)?;
        }
    }
}

/// The bytes that answer a call.
fn answer(plan: &Plan, stream: u32, request: &Request) -> io::Result<Option<Vec<u8>>> {
    let mode = plan.mode();
    let mut response = Response::new();
    match (request.method.as_str(), mode) {
        (_, Mode::Never) => return Ok(None),
        ("GetOOMEvent", Mode::Flood) => {
            let own = plan
                .container
                .lock()
                .map(|id| id.clone())
                .unwrap_or_default();
            let names = [
                own,
                FOREIGN.to_owned(),
                String::new(),
                "x".repeat(100 << 10),
                "../../x".to_owned(),
            ];
            let name = names[usize::try_from(random()).unwrap_or(0) % names.len()].clone();
            response.payload = OOMEvent {
                container_id: name,
                ..Default::default()
            }
            .write_to_bytes()?;
        }
        ("WaitProcess", Mode::Status) => {
            let statuses = [i32::MIN, -1, 256, i32::MAX];
            let status = statuses[usize::try_from(random()).unwrap_or(0) % statuses.len()];
            response.payload = WaitProcessResponse {
                status,
                ..Default::default()
            }
            .write_to_bytes()?;
        }
        (
            "WaitProcess" | "GetOOMEvent",
            Mode::Nothing | Mode::Links | Mode::Dials | Mode::Flood | Mode::Status,
        ) => {
            return Ok(None);
        }
        ("GetGuestDetails", _) => response.payload = details().write_to_bytes()?,
        ("CreateContainer", _) => {
            let asked = CreateContainerRequest::parse_from_bytes(&request.payload)?;
            if let Ok(mut container) = plan.container.lock() {
                *container = asked.container_id;
            }
        }
        _ => {}
    }
    let frame = |kind: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        [
            Vec::from(MessageHeader {
                length,
                stream_id: stream,
                type_: kind,
                flags: 0,
            }),
            payload.to_vec(),
        ]
        .concat()
    };
    Ok(Some(match mode {
        Mode::Late => {
            sleep(LATE);
            frame(MESSAGE_TYPE_RESPONSE, &response.write_to_bytes()?)
        }
        Mode::Garbage => frame(MESSAGE_TYPE_RESPONSE, &noise(1000)),
        Mode::Noise => noise(100_000),
        Mode::Error => {
            let message = "\u{1b}[2J\n\0".repeat(20 << 10);
            let status = Status {
                code: Code::INTERNAL.into(),
                message,
                ..Default::default()
            };
            response.status = Some(status).into();
            frame(MESSAGE_TYPE_RESPONSE, &response.write_to_bytes()?)
        }
        Mode::Much => {
            let header = MessageHeader {
                length: 64 << 20,
                stream_id: stream,
                type_: MESSAGE_TYPE_RESPONSE,
                flags: 0,
            };
            [Vec::from(header), vec![0; 64 << 20]].concat()
        }
        Mode::Again => frame(MESSAGE_TYPE_RESPONSE, &response.write_to_bytes()?).repeat(1000),
        Mode::Stream => frame(MESSAGE_TYPE_DATA, &response.write_to_bytes()?).repeat(1000),
        _ => frame(MESSAGE_TYPE_RESPONSE, &response.write_to_bytes()?),
    }))
}

fn details() -> GuestDetailsResponse {
    let features = [
        FEATURE_RAW_STDIO,
        FEATURE_SIGNAL_ALL,
        FEATURE_UDS,
        FEATURE_POD,
    ];
    let details = AgentDetails {
        version: env!("CARGO_PKG_VERSION").into(),
        extra_features: features.map(str::to_owned).into(),
        ..Default::default()
    };
    GuestDetailsResponse {
        agent_details: Some(details).into(),
        ..Default::default()
    }
}

/// A stdio channel: taken, and then silent, or never silent.
fn hold(plan: &Plan, mut stream: VsockStream) -> io::Result<()> {
    stream.read_exact(&mut [0; KEY_LINE])?;
    stream.write_all(&[stdio::ACCEPTED])?;
    if plan.mode == Mode::Flood {
        let text = noise(64 << 10);
        loop {
            stream.write_all(&text)?;
        }
    }
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

/// The listener of the notice, and whatever else the host has.
fn dial_all(ready: u32) {
    loop {
        for port in (1..2048).chain([ready; 64]) {
            if let Ok(mut stream) = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port) {
                let _ = stream.write_all(&noise(4096));
                // Many stay open.
                std::mem::forget(stream);
            }
        }
        sleep(Duration::from_millis(100));
    }
}

/// Bytes without a meaning; the same in each run.
fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|_| random().to_le_bytes()[0]).collect()
}

fn random() -> u32 {
    static STATE: AtomicU64 = AtomicU64::new(1);
    // Knuth's MMIX generator.
    let next = |state: u64| {
        state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407)
    };
    let state = STATE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
        Some(next(state))
    });
    u32::try_from(next(state.unwrap_or(1)) >> 33).unwrap_or(0)
}
