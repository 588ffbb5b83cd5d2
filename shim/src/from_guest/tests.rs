//! A guest that says what it likes, as raw frames, and what the shim makes of it.

use std::future::Future;
use std::time::Duration;

use guest_protocol::protocols::agent::{
    AgentDetails, BlkioStats, BlkioStatsEntry, CgroupStats, GuestDetailsResponse, MemoryStats,
    OOMEvent, ReadStreamRequest, ReadStreamResponse, SignalProcessRequest, StatsContainerRequest,
    StatsContainerResponse, WaitProcessRequest, WaitProcessResponse,
};
use guest_protocol::stdio::Channel;
use guest_protocol::{AgentClient, MAX_FRAME};
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::{Instant, timeout};
use ttrpc::proto::{MESSAGE_TYPE_RESPONSE, MessageHeader, Request, Response};

use super::*;
use crate::error::Result;

const DEADLINE: Duration = Duration::from_secs(5);

/// A guest agent's end of the connection, and the shim's agent.
fn connected() -> (DuplexStream, Agent) {
    let (ours, theirs) = duplex(64 * 1024);
    (theirs, Agent::new(AgentClient::over(ours)))
}

async fn request(stream: &mut DuplexStream) -> Option<(u32, Request)> {
    let mut header = [0; 10];
    stream.read_exact(&mut header).await.ok()?;
    let header = MessageHeader::from(header);
    let mut payload = vec![0; header.length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some((
        header.stream_id,
        Request::parse_from_bytes(&payload).unwrap(),
    ))
}

fn frame(stream_id: u32, type_: u8, payload: &[u8]) -> Vec<u8> {
    let header = MessageHeader {
        length: u32::try_from(payload.len()).unwrap(),
        stream_id,
        type_,
        flags: 0,
    };
    [Vec::from(header), payload.to_vec()].concat()
}

fn response(payload: Vec<u8>) -> Vec<u8> {
    Response {
        payload,
        ..Default::default()
    }
    .write_to_bytes()
    .unwrap()
}

/// An agent that answers every request with these bytes, for ever, and says how often it did.
async fn answers(mut stream: DuplexStream, payload: Vec<u8>) -> usize {
    let mut count = 0;
    while let Some((id, _)) = request(&mut stream).await {
        if stream
            .write_all(&frame(id, MESSAGE_TYPE_RESPONSE, &payload))
            .await
            .is_err()
        {
            break;
        }
        count += 1;
    }
    count
}

/// What the shim makes of one call to an agent that answers with these bytes.
async fn said<T, F: Future<Output = T>>(
    payload: Vec<u8>,
    call: impl FnOnce(Agent) -> F,
) -> (T, Option<Fault>) {
    let (theirs, agent) = connected();
    let guest = tokio::spawn(answers(theirs, payload));
    let result = timeout(DEADLINE * 2, call(agent.clone()))
        .await
        .expect("every call ends");
    let fault = timeout(Duration::from_millis(50), agent.failed())
        .await
        .ok();
    guest.abort();
    (result, fault)
}

async fn wait(agent: Agent) -> Option<u32> {
    agent.wait_process(&WaitProcessRequest::default()).await
}

async fn stats(agent: Agent) -> Result<Stats> {
    agent
        .stats(&StatsContainerRequest::default(), DEADLINE)
        .await
}

async fn signal(agent: Agent) -> Result<()> {
    agent
        .signal_process(&SignalProcessRequest::default(), DEADLINE)
        .await
}

fn status(code: i32, message: &str) -> Vec<u8> {
    let mut status = ttrpc::get_status(Code::UNKNOWN, message);
    status.code = protobuf::EnumOrUnknown::from_i32(code);
    Response {
        status: Some(status).into(),
        ..Default::default()
    }
    .write_to_bytes()
    .unwrap()
}

#[tokio::test]
async fn an_exit_status_is_one_byte() {
    for (said_status, expected) in [
        (0, 0),
        (255, 255),
        (256, 255),
        (-1, 255),
        (i32::MIN, 255),
        (137, 137),
    ] {
        let answer = WaitProcessResponse {
            status: said_status,
            ..Default::default()
        };
        let answer = response(answer.write_to_bytes().unwrap());
        assert_eq!(said(answer, wait).await, (Some(expected), None));
    }
}

#[tokio::test]
async fn a_wait_whose_answer_is_not_understood_ends_the_machine() {
    // No protobuf inside a response, and none outside.
    for garbage in [response(vec![0xff; 20]), vec![0xff; 20], vec![0x0a, 0xff]] {
        let (status, fault) = said(garbage, wait).await;
        assert_eq!(status, None);
        let Some(Fault::Garbled(reason)) = fault else {
            panic!("{fault:?}")
        };
        assert!(
            reason.starts_with("the guest agent's answer to WaitProcess is not understood: "),
            "{reason}"
        );
    }
    assert_eq!(
        said(status(2, "who?"), wait).await,
        (Some(UNKNOWN_STATUS), None),
        "an error is an answer"
    );
}

#[tokio::test]
async fn garbage_ends_the_machine_whatever_was_asked() {
    let (result, fault) = said(response(vec![0x0a, 0xff]), stats).await;
    assert_eq!(result.unwrap_err().code(), Code::UNAVAILABLE);
    assert!(matches!(fault, Some(Fault::Garbled(reason)) if reason.contains("StatsContainer")));
}

#[tokio::test]
async fn a_closed_connection_is_an_end_and_not_garbage() {
    let (theirs, agent) = connected();
    drop(theirs);
    assert_eq!(wait(agent.clone()).await, None);
    assert!(matches!(agent.failed().await, Fault::Lost(_)));
    // What asks later finds the client's end of it, which says it in other words.
    let (theirs, agent) = connected();
    drop(theirs);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(
        signal(agent.clone()).await.unwrap_err().code(),
        Code::UNAVAILABLE
    );
    timeout(DEADLINE, watch_oom(&agent, &drop)).await.unwrap();
    assert!(matches!(agent.failed().await, Fault::Lost(_)));
}

#[tokio::test]
async fn a_request_that_is_too_long_is_no_fault_of_the_agents() {
    let long = SignalProcessRequest {
        container_id: "a".repeat(5 << 20),
        ..Default::default()
    };
    let (result, fault) = said(response(Vec::new()), async |agent| {
        agent.signal_process(&long, DEADLINE).await
    })
    .await;
    assert_eq!((result.unwrap_err().code(), fault), (Code::INTERNAL, None));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_answers_is_late_and_keeps_its_connection() {
    let (_theirs, agent) = connected();
    let error = signal(agent.clone()).await.unwrap_err();
    assert_eq!(
        error,
        Error::deadline("the guest agent did not answer SignalProcess in time")
    );
    assert!(timeout(DEADLINE, agent.failed()).await.is_err());
}

#[tokio::test]
async fn an_error_is_one_short_line_with_a_code_that_is_one() {
    let (result, fault) = said(status(5, "no such process"), signal).await;
    assert_eq!(
        (result, fault),
        (Err(Error::not_found("no such process")), None)
    );
    let traced = "no container web\n\nStack backtrace:\n   0: <unknown>\n   1: <unknown>";
    assert_eq!(
        said(status(3, traced), signal)
            .await
            .0
            .unwrap_err()
            .to_string(),
        "no container web"
    );
    let evil = format!(
        "first\r\n\u{1b}[2Jsecond\u{202e}\u{0} third {}",
        "x".repeat(100_000)
    );
    let error = said(status(13, &evil), signal).await.0.unwrap_err();
    assert_eq!(error.code(), Code::INTERNAL);
    assert!(
        error.to_string().starts_with("first [2Jsecond third xxx"),
        "{}",
        error.to_string()
    );
    assert_eq!(error.to_string().len(), MAX_TEXT);
    // A code that there is not is success to the ttrpc client; an empty answer says no more than
    // "done".
    assert_eq!(said(status(4711, "?"), signal).await, (Ok(()), None));
}

#[test]
fn texts_are_cut_between_characters() {
    assert_eq!(text("äöü", 5), "äö");
    assert_eq!(text("  a\tb  \n c ", 100), "a b c");
    assert_eq!(text("abc def", 4), "abc");
    assert_eq!(text("abc def", 5), "abc d");
    assert_eq!(text("\u{1}\u{2}", 5), "");
}

#[tokio::test]
async fn features_are_those_that_we_know() {
    let details = AgentDetails {
        version: "9".repeat(1000),
        extra_features: (0..1000)
            .map(|number| format!("cofferdam.raw-stdio{number}"))
            .chain(["cofferdam.pod".to_owned()])
            .collect(),
        ..Default::default()
    };
    let answer = GuestDetailsResponse {
        agent_details: Some(details).into(),
        ..Default::default()
    };
    let answer = response(answer.write_to_bytes().unwrap());
    let features = said(answer, async |agent| agent.features(DEADLINE).await)
        .await
        .0
        .unwrap();
    assert_eq!(
        features,
        Features {
            version: "9".repeat(64),
            pod: true,
            ..Features::default()
        }
    );
}

#[tokio::test]
async fn more_output_than_asked_for_is_none() {
    let answer = |length| {
        let answer = ReadStreamResponse {
            data: vec![b'x'; length],
            ..Default::default()
        };
        response(answer.write_to_bytes().unwrap())
    };
    let read = async |agent: Agent| {
        let request = ReadStreamRequest {
            len: 100,
            ..Default::default()
        };
        agent.read(Channel::Stdout, &request).await
    };
    assert_eq!(said(answer(100), read).await.0.unwrap().unwrap().len(), 100);
    assert_eq!(said(answer(0), read).await.0.unwrap(), None);
    assert!(said(answer(101), read).await.0.is_err());
}

#[tokio::test]
async fn an_answer_too_large_ends_the_connection_and_every_wait() {
    let (theirs, agent) = connected();
    let waits: Vec<_> = (0..10).map(|_| tokio::spawn(wait(agent.clone()))).collect();
    let large = vec![0; MAX_FRAME as usize + 1];
    tokio::spawn(answers(theirs, large));
    for wait in waits {
        assert_eq!(timeout(DEADLINE, wait).await.unwrap().unwrap(), None);
    }
    let Fault::Lost(reason) = agent.failed().await else {
        panic!("garbled")
    };
    assert!(reason.contains("131073 bytes"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn an_oom_without_end_costs_ten_questions_a_second() {
    let (theirs, agent) = connected();
    let event = OOMEvent {
        container_id: "A".repeat(100_000),
        ..Default::default()
    };
    let guest = tokio::spawn(answers(theirs, response(event.write_to_bytes().unwrap())));
    let start = Instant::now();
    let flood = timeout(Duration::from_secs(60), watch_oom(&agent, &drop));
    assert!(flood.await.is_err());
    assert_eq!(start.elapsed().as_secs(), 60);
    drop(agent);
    let count = guest.await.unwrap();
    assert!((600..=621).contains(&count), "{count} in a minute");
}

/// A process of its own, for its memory: what a guest makes the shim keep and decode at its worst.
#[test]
fn the_shim_stays_small_whatever_a_guest_sends() {
    const CHILD: &str = "COFFERDAM_TEST_HOSTILE_GUEST";
    if std::env::var_os(CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args([
            "--exact",
            "from_guest::tests::the_shim_stays_small_whatever_a_guest_sends",
            "--nocapture",
        ]);
        let output = child.env(CHILD, "1").output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let fits = |length: usize| length - 64;
        let room = fits(MAX_FRAME as usize);
        // Two bytes each: the smallest entries of a list.
        let entries = vec![BlkioStatsEntry::default(); room / 2 - 64];
        let blkio = BlkioStats {
            io_serviced_recursive: entries,
            ..Default::default()
        };
        let list = CgroupStats {
            blkio_stats: Some(blkio).into(),
            ..Default::default()
        };
        let keys = (0..room as u64 / 14)
            .map(|number| (format!("{number:06x}"), number % 100))
            .collect();
        let memory = MemoryStats {
            stats: keys,
            ..Default::default()
        };
        let map = CgroupStats {
            memory_stats: Some(memory).into(),
            ..Default::default()
        };
        let mut bombs: Vec<Vec<u8>> = [list, map]
            .map(|stats| {
                let answer = StatsContainerResponse {
                    cgroup_stats: Some(stats).into(),
                    ..Default::default()
                };
                response(answer.write_to_bytes().unwrap())
            })
            .into();
        // Details of a status: field 1 of the response, in it field 3, each empty.
        let details: Vec<u8> = [0x1a, 0].repeat(room / 2);
        let mut status = vec![0x0a];
        protobuf::CodedOutputStream::vec(&mut status)
            .write_raw_varint32(details.len() as u32)
            .unwrap();
        bombs.push([status, details].concat());
        for bomb in bombs {
            assert!(
                bomb.len() <= MAX_FRAME as usize && bomb.len() > room / 2,
                "{}",
                bomb.len()
            );
            let (theirs, agent) = connected();
            tokio::spawn(answers(theirs, bomb));
            // As many as containers and scrapes may ask at a time.
            let calls = (0..100).map(|_| stats(agent.clone()));
            let _ = futures::future::join_all(calls).await;
        }
        // Frames of the largest size that the protocol knows, for calls that wait and for none.
        for (type_, id) in [(2, 1), (3, 1), (2, 4711), (3, 4711), (1, 1)] {
            let (mut theirs, agent) = connected();
            let waiting = tokio::spawn(wait(agent));
            request(&mut theirs).await.unwrap();
            let payload = vec![0; 4 << 20];
            let large = frame(id, type_, &payload);
            for _ in 0..20 {
                if theirs.write_all(&large).await.is_err() {
                    break;
                }
            }
            assert_eq!(waiting.await.unwrap(), None);
        }
    });
    // The test's own copies of what it sends, two times 4 MiB, count as well.
    assert!(peak() < 32 * 1024, "{} KiB", peak());
    eprintln!("peak {} KiB", peak());
}
