//! The QMP connection against a monitor that misbehaves in every way we could think of. Nothing may
//! hang, and nothing may break but what the misbehaviour itself broke.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::Qmp;
use super::commands::Command;
use crate::error::{Error, Result};

const SOON: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);
const GREETING: &str =
    "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 1, \"major\": 11}}}}\r\n";

/// A command with a name of its own, so that tests do not depend on those of the crate.
#[derive(Serialize)]
struct Ask {
    number: u32,
}

impl Command for Ask {
    const NAME: &'static str = "ask";
    type Reply = Value;
}

/// The monitor's side, on a thread of its own.
struct Monitor {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Monitor {
    fn say(&mut self, text: &str) {
        // The connection under test may have hung up on us; that is its right.
        let _ = self.socket.write_all(text.as_bytes());
    }

    /// The next command, or none at the end of the connection.
    fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect("commands are JSON")),
        }
    }

    fn answer(&mut self, command: &Value) {
        let number = &command["arguments"]["number"];
        self.say(&format!(
            "{}\r\n",
            json!({"return": number, "id": command["id"]})
        ));
    }

    fn negotiate(&mut self) {
        self.say(GREETING);
        let command = self.hear().expect("negotiation");
        assert_eq!(command["execute"], "qmp_capabilities");
        self.say(&format!(
            "{}\r\n",
            json!({"return": {}, "id": command["id"]})
        ));
    }
}

fn monitor(script: impl FnOnce(Monitor) + Send + 'static) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let lines = BufReader::new(theirs.try_clone().unwrap());
    (
        ours,
        std::thread::spawn(move || {
            script(Monitor {
                socket: theirs,
                lines,
            })
        }),
    )
}

/// A negotiated connection to a monitor that then follows `script`.
async fn connected(script: impl FnOnce(Monitor) + Send + 'static) -> (Qmp, JoinHandle<()>) {
    let (socket, thread) = monitor(|mut monitor| {
        monitor.negotiate();
        script(monitor);
    });
    let (qmp, version) = Qmp::open(socket, SOON).await.unwrap();
    assert_eq!(version, "11.1.2");
    (qmp, thread)
}

/// What the monitor asserts counts too. Joined aside: the connection's task runs on this thread.
async fn finished(thread: JoinHandle<()>) {
    tokio::task::spawn_blocking(|| thread.join().unwrap())
        .await
        .unwrap();
}

async fn ask(qmp: &Qmp, number: u32) -> Result<Value> {
    qmp.execute_within(&Ask { number }, SOON).await
}

#[tokio::test]
async fn frames_cut_anywhere_and_events_before_the_greeting_are_read() {
    let (socket, _thread) = monitor(|mut monitor| {
        monitor.say("{\"event\": \"EARLY\"}\n\r\n");
        for byte in GREETING.as_bytes().chunks(1) {
            monitor.say(std::str::from_utf8(byte).unwrap());
        }
        let command = monitor.hear().unwrap();
        monitor.say(&format!(
            "{{\"event\": \"X\"}}\n{{\"id\": {},",
            command["id"]
        ));
        std::thread::sleep(Duration::from_millis(5));
        monitor.say(" \"return\": {}}\n");
        let command = monitor.hear().unwrap();
        monitor.answer(&command);
        monitor.hear();
    });
    let (qmp, _) = Qmp::open(socket, SOON).await.unwrap();
    assert_eq!(ask(&qmp, 5).await.unwrap(), 5);
}

#[tokio::test]
async fn a_monitor_that_never_greets_is_given_up() {
    let (socket, _thread) = monitor(|mut monitor| drop(monitor.hear()));
    let error = Qmp::open(socket, SHORT).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU's greeting took longer than 50ms");
}

#[tokio::test]
async fn garbage_and_early_ends_are_said_at_once() {
    for (text, wanted) in [
        ("SSH-2.0-OpenSSH\r\n", "not QMP: \"SSH-2.0-OpenSSH\""),
        ("", "end of file"),
        ("{\"QMP\": {\"ver", "end of file"),
        ("\u{0}\u{1}binary\n", "not QMP: \"binary\""),
    ] {
        let (socket, _thread) = monitor(move |mut monitor| monitor.say(text));
        let error = Qmp::open(socket, SOON).await.unwrap_err().to_string();
        assert_eq!(
            error,
            format!("connection to QEMU's monitor is closed: {wanted}"),
            "{text:?}"
        );
    }
}

#[tokio::test]
async fn an_endless_line_ends_the_connection_and_not_the_memory() {
    let (socket, thread) = monitor(|mut monitor| {
        let piece = "x".repeat(1 << 20);
        let mut sent = 0;
        while monitor.socket.write_all(piece.as_bytes()).is_ok() {
            sent += 1;
            assert!(sent < 100, "nobody stopped me");
        }
    });
    let error = Qmp::open(socket, SOON).await.unwrap_err().to_string();
    assert!(error.ends_with("a line of more than 1 MiB"), "{error}");
    finished(thread).await;
}

#[tokio::test]
async fn a_reply_of_half_a_megabyte_is_a_reply() {
    let (qmp, _thread) = connected(|mut monitor| {
        let command = monitor.hear().unwrap();
        monitor.say(&format!(
            "{}\r\n",
            json!({"return": "y".repeat(1 << 19), "id": command["id"]})
        ));
        monitor.hear();
    })
    .await;
    assert_eq!(ask(&qmp, 1).await.unwrap().as_str().unwrap().len(), 1 << 19);
}

#[tokio::test]
async fn a_silent_drop_costs_one_deadline_and_its_late_reply_nothing() {
    let (qmp, _thread) = connected(|mut monitor| {
        let swallowed = monitor.hear().unwrap();
        let second = monitor.hear().unwrap();
        monitor.answer(&swallowed);
        monitor.say("{\"return\": \"for nobody\", \"id\": 4711}\n{\"error\": {\"class\": \"C\", \"desc\": \"d\"}}\n");
        monitor.answer(&second);
        monitor.hear();
    })
    .await;
    let error = qmp
        .execute_within(&Ask { number: 1 }, SHORT)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "QEMU's answer to ask took longer than 50ms"
    );
    assert_eq!(ask(&qmp, 2).await.unwrap(), 2);
}

#[tokio::test]
async fn a_dropped_caller_does_not_break_the_stream() {
    let (qmp, _thread) = connected(|mut monitor| {
        while let Some(command) = monitor.hear() {
            monitor.answer(&command);
        }
    })
    .await;
    for number in 0..50 {
        let abandoned = ask(&qmp, 1000 + number);
        // Polled a few times at most: before, while or after it is sent.
        let _ = tokio::time::timeout(Duration::from_micros(u64::from(number) * 5), abandoned).await;
        assert_eq!(ask(&qmp, number).await.unwrap(), number);
    }
}

#[tokio::test]
async fn replies_find_their_callers_in_any_order() {
    let (qmp, _thread) = connected(|mut monitor| {
        let mut commands: Vec<Value> = (0..8).map(|_| monitor.hear().unwrap()).collect();
        commands.reverse();
        for command in commands {
            monitor.answer(&command);
        }
        monitor.hear();
    })
    .await;
    let callers: Vec<_> = (0..8)
        .map(|number| {
            tokio::spawn({
                let qmp = qmp.clone();
                async move { ask(&qmp, number).await.unwrap() }
            })
        })
        .collect();
    for (number, caller) in callers.into_iter().enumerate() {
        assert_eq!(caller.await.unwrap(), number);
    }
}

#[tokio::test]
async fn the_ninth_command_waits_for_an_answer() {
    let (qmp, thread) = connected(|mut monitor| {
        let first: Vec<Value> = (0..8).map(|_| monitor.hear().unwrap()).collect();
        monitor.socket.set_read_timeout(Some(SHORT)).unwrap();
        assert!(monitor.hear().is_none(), "a ninth command came");
        monitor.socket.set_read_timeout(None).unwrap();
        monitor.answer(&first[3]);
        let ninth = monitor.hear().unwrap();
        for command in first
            .iter()
            .filter(|command| **command != first[3])
            .chain([&ninth])
        {
            monitor.answer(command);
        }
        monitor.hear();
    })
    .await;
    let callers: Vec<_> = (0..9)
        .map(|number| {
            tokio::spawn({
                let qmp = qmp.clone();
                async move { ask(&qmp, number).await.unwrap() }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    drop(qmp);
    finished(thread).await;
}

#[tokio::test]
async fn a_flood_of_events_delays_nobody_and_slow_readers_learn_it() {
    let (qmp, _thread) = connected(|mut monitor| {
        let command = monitor.hear().unwrap();
        let flood =
            "{\"event\": \"RTC_CHANGE\", \"data\": {\"offset\": 1}, \"timestamp\": {\"seconds\": \
             1}}\r\n"
                .repeat(100);
        for _ in 0..1000 {
            monitor.say(&flood);
        }
        monitor.answer(&command);
        monitor.say("{\"event\": \"LAST\"}\r\n");
        monitor.hear();
    })
    .await;
    let mut events = qmp.events();
    assert_eq!(ask(&qmp, 7).await.unwrap(), 7);
    let mut missed = 0;
    loop {
        match tokio::time::timeout(SOON, events.recv())
            .await
            .expect("the last event")
        {
            Ok(event) if event.name == "LAST" => break,
            Ok(_) => {}
            Err(tokio::sync::broadcast::error::RecvError::Lagged(count)) => missed += count,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(missed > 90_000, "missed {missed}");
}

#[tokio::test]
async fn the_end_in_the_middle_of_a_line_ends_every_caller_at_once() {
    let (qmp, _thread) = connected(|mut monitor| {
        monitor.hear();
        monitor.hear();
        monitor.say("{\"return\": {}, \"id\"");
    })
    .await;
    let began = Instant::now();
    let (first, second) = tokio::join!(ask(&qmp, 1), ask(&qmp, 2));
    for error in [
        first.unwrap_err(),
        second.unwrap_err(),
        ask(&qmp, 3).await.unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::Closed { reason } if reason == "end of file"),
            "{error}"
        );
    }
    assert_eq!(qmp.closing().await, "end of file");
    assert!(began.elapsed() < SOON);
}

#[tokio::test]
async fn a_reset_is_an_end() {
    let (qmp, _thread) = connected(|monitor| {
        // Unread bytes at the close make the kernel answer with ECONNRESET.
        monitor.socket.peek_one();
    })
    .await;
    let (first, second) = tokio::join!(ask(&qmp, 1), ask(&qmp, 2));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        assert!(
            matches!(&error, Error::Closed { reason } if reason.contains("reset")),
            "{error}"
        );
    }
}

/// Waits until there is something to read and leaves it there.
trait PeekOne {
    fn peek_one(&self);
}

impl PeekOne for UnixStream {
    fn peek_one(&self) {
        use std::os::fd::AsRawFd;
        let mut byte = 0_u8;
        // SAFETY: peeks at most one byte into a local variable.
        unsafe { libc::recv(self.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_PEEK) };
    }
}

#[tokio::test]
async fn an_error_of_the_monitor_keeps_class_and_text() {
    let (qmp, _thread) = connected(|mut monitor| {
        let command = monitor.hear().unwrap();
        let error = json!({"error": {"class": "DeviceNotFound", "desc": "no such thing"},
            "id": command["id"]});
        monitor.say(&format!("{error}\n"));
        monitor.hear();
    })
    .await;
    let error = ask(&qmp, 1).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused ask: no such thing");
    assert!(matches!(error, Error::Refused { class, .. } if class == "DeviceNotFound"));
}

#[tokio::test]
async fn a_monitor_that_does_not_read_costs_deadlines_only() {
    let (qmp, _thread) = connected(|mut monitor| {
        // Never reads on; says something now and then.
        for _ in 0..40 {
            monitor.say("{\"event\": \"TICK\"}\n");
            std::thread::sleep(Duration::from_millis(5));
        }
    })
    .await;
    let callers: Vec<_> = (0..20)
        .map(|number| {
            tokio::spawn({
                let qmp = qmp.clone();
                async move { qmp.execute_within(&Ask { number }, SHORT).await }
            })
        })
        .collect();
    for caller in callers {
        assert!(matches!(caller.await.unwrap(), Err(Error::Deadline { .. })));
    }
}

#[tokio::test]
async fn descriptors_arrive_with_their_own_command() {
    let (qmp, thread) = connected(|mut monitor| {
        for _ in 0..20 {
            let (line, fd) = receive(&monitor.socket);
            let command: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(command["execute"], "getfd");
            let mut name = String::new();
            std::fs::File::from(fd).read_to_string(&mut name).unwrap();
            assert_eq!(command["arguments"]["fdname"], name);
            monitor.say(&format!(
                "{}\r\n",
                json!({"return": {}, "id": command["id"]})
            ));
        }
        monitor.hear();
    })
    .await;
    let callers: Vec<_> = (0..20)
        .map(|number| {
            tokio::spawn({
                let qmp = qmp.clone();
                async move {
                    let name = format!("fd{number}");
                    let (read, mut write) = std::io::pipe().unwrap();
                    write.write_all(name.as_bytes()).unwrap();
                    drop(write);
                    qmp.pass_fd(&name, read.into()).await.unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    drop(qmp);
    finished(thread).await;
}

/// One `recvmsg`: a line and the descriptor that came with it.
fn receive(socket: &UnixStream) -> (String, OwnedFd) {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::AsRawFd;
    let mut bytes = [0; 4096];
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )
    .unwrap();
    let fds: Vec<i32> = message
        .cmsgs()
        .unwrap()
        .flat_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(fds.len(), 1, "one descriptor for one command");
    let count = message.bytes;
    (
        String::from_utf8(bytes[..count].to_vec()).unwrap(),
        // SAFETY: the kernel made this descriptor for us just now.
        unsafe { OwnedFd::from_raw_fd(fds[0]) },
    )
}
