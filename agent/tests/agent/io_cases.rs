//! Standard input and output: raw streams, the polling calls, terminals.

use std::time::Duration;

use guest_protocol::protocols::agent::{
    CloseStdinRequest, ReadStreamRequest, TtyWinResizeRequest, WriteStreamRequest,
};
use guest_protocol::protocols::oci::{Box as Size, User};
use guest_protocol::stdio::Channel;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::Code;

use super::client::{Client, DEADLINE, Output, Streams, process, read_all, refusal, soon};

pub async fn output_and_status_come_back(client: &Client<'_>) {
    let output = client
        .script("output", "echo out; echo err >&2; exit 7", |_| {})
        .await;
    assert_eq!(
        output,
        Output {
            status: 7,
            stdout: "out\n".into(),
            stderr: "err\n".into()
        }
    );
}

pub async fn a_large_stream_passes_unchanged(client: &Client<'_>) {
    // Every byte value, and a length that is no multiple of anything.
    let input: Vec<u8> = (0..8_000_003_u32)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let Streams {
        stdin,
        stdout,
        stderr,
    } = client.streams("large", "").await;
    client.create("large", client.spec(&["cat"])).await.unwrap();
    client.start("large").await.unwrap();
    let mut stdin = stdin.unwrap();
    let write = async {
        stdin.write_all(&input).await.unwrap();
        drop(stdin);
    };
    let begun = std::time::Instant::now();
    let ((), output) = tokio::join!(write, read_all(stdout));
    eprintln!(
        "{} MB/s through cat",
        input.len() as u128 / begun.elapsed().as_micros().max(1)
    );
    assert!(
        output == input,
        "{} bytes came back of {}",
        output.len(),
        input.len()
    );
    assert_eq!(client.wait("large", "").await.unwrap(), 0);
    drop(stderr);
    client.remove("large").await.unwrap();
}

pub async fn output_written_just_before_exit_arrives(client: &Client<'_>) {
    for round in 0..5 {
        let id = format!("last-words-{round}");
        let output = client
            .script(
                &id,
                "head -c 50000 /dev/zero | tr '\\0' x; printf end; exit 2",
                |_| {},
            )
            .await;
        assert_eq!((output.status, output.stdout.len()), (2, 50003));
        assert!(output.stdout.ends_with("xend"));
    }
}

pub async fn the_status_does_not_wait_for_the_output(client: &Client<'_>) {
    let stdout = client.stream(Channel::Stdout, "unread", "").await;
    client
        .create(
            "unread",
            client.spec(&["sh", "-c", "head -c 60000 /dev/zero; exit 3"]),
        )
        .await
        .unwrap();
    client.start("unread").await.unwrap();
    assert_eq!(client.wait("unread", "").await.unwrap(), 3);
    // Nor does the end of the container.
    client.remove("unread").await.unwrap();
    assert_eq!(read_all(Some(stdout)).await.len(), 60000);
}

pub async fn a_reader_that_sleeps_blocks_nobody_else(client: &Client<'_>) {
    let blocked = client.stream(Channel::Stdout, "blocked", "").await;
    client
        .create("blocked", client.spec(&["sh", "-c", "yes"]))
        .await
        .unwrap();
    client.start("blocked").await.unwrap();
    let output = client
        .script("free", "seq 1 1000 | tail -n 1", |_| {})
        .await;
    assert_eq!(output.stdout, "1000\n");
    // A kill and a removal end it, whatever is in its pipes.
    client.kill("blocked", "", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("blocked", "").await.unwrap(), 137);
    client.remove("blocked").await.unwrap();
    drop(blocked);
}

pub async fn a_stream_that_was_not_opened_is_null(client: &Client<'_>) {
    let stdout = client.stream(Channel::Stdout, "null", "").await;
    let script = "cat; readlink /proc/self/fd/0; readlink /proc/self/fd/2; echo lost >&2";
    client
        .create("null", client.spec(&["sh", "-c", script]))
        .await
        .unwrap();
    client.start("null").await.unwrap();
    let text = read_all(Some(stdout)).await;
    assert_eq!(String::from_utf8(text).unwrap(), "/dev/null\n/dev/null\n");
    client.remove("null").await.unwrap();
}

async fn poll(client: &Client<'_>, stderr: bool, id: &str, exec_id: &str) -> String {
    let request = ReadStreamRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        len: 8192,
        ..Default::default()
    };
    let mut all = Vec::new();
    loop {
        let response = if stderr {
            client
                .rpc
                .agent
                .read_stderr(soon(), &request)
                .await
                .unwrap()
        } else {
            client
                .rpc
                .agent
                .read_stdout(soon(), &request)
                .await
                .unwrap()
        };
        if response.data.is_empty() {
            return String::from_utf8(all).unwrap();
        }
        all.extend(response.data);
    }
}

async fn write(client: &Client<'_>, id: &str, exec_id: &str, data: &[u8]) -> u32 {
    let request = WriteStreamRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        data: data.to_vec(),
        ..Default::default()
    };
    client
        .rpc
        .agent
        .write_stdin(soon(), &request)
        .await
        .unwrap()
        .len
}

pub async fn stdio_can_be_polled(client: &Client<'_>) {
    client
        .create(
            "polled",
            client.spec(&["sh", "-c", "cat; echo err >&2; exit 8"]),
        )
        .await
        .unwrap();
    client.start("polled").await.unwrap();
    let talk = async {
        assert_eq!(write(client, "polled", "", b"one ").await, 4);
        assert_eq!(write(client, "polled", "polled", b"two").await, 3);
        assert_eq!(write(client, "polled", "", b"").await, 0);
    };
    let (stdout, stderr, status, ()) = tokio::join!(
        poll(client, false, "polled", ""),
        poll(client, true, "polled", ""),
        client.wait("polled", ""),
        talk
    );
    assert_eq!(
        (stdout.as_str(), stderr.as_str(), status.unwrap()),
        ("one two", "err\n", 8)
    );
    client.remove("polled").await.unwrap();

    // An exec's output can be fetched after its exit was told.
    client.sleeper("polled").await;
    client
        .exec(
            "polled",
            "e1",
            client.process(&["sh", "-c", "cat; echo late"]),
        )
        .await
        .unwrap();
    let close = CloseStdinRequest {
        container_id: "polled".into(),
        exec_id: "e1".into(),
        ..Default::default()
    };
    client.rpc.agent.close_stdin(soon(), &close).await.unwrap();
    assert_eq!(client.wait("polled", "e1").await.unwrap(), 0);
    assert_eq!(
        refusal(client.wait("polled", "e1").await).0,
        Code::NOT_FOUND
    );
    assert_eq!(poll(client, false, "polled", "e1").await, "late\n");

    // A child that keeps the output open keeps nobody waiting.
    client
        .exec(
            "polled",
            "e2",
            client.process(&["sh", "-c", "sleep 1000 & echo parent"]),
        )
        .await
        .unwrap();
    assert_eq!(poll(client, false, "polled", "e2").await, "parent\n");
    assert_eq!(client.wait("polled", "e2").await.unwrap(), 0);
    client.remove("polled").await.unwrap();
}

async fn read_until(stream: &mut guest_protocol::Stream, wanted: &str) -> String {
    let mut text = String::new();
    let reading = async {
        while !text.contains(wanted) {
            let mut buffer = [0; 512];
            let length = stream.read(&mut buffer).await.unwrap();
            assert!(length > 0, "the terminal ended after {text:?}");
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    };
    timeout(DEADLINE, reading)
        .await
        .unwrap_or_else(|_| panic!("no {wanted:?}"));
    text
}

pub async fn a_terminal_behaves_like_one(client: &Client<'_>) {
    let mut spec = client.spec(&[
        "sh",
        "-c",
        "stty -echo; tty; echo hi >/dev/console; stty size; read line; stty size; sleep 1000",
    ]);
    process(&mut spec).Terminal = true;
    process(&mut spec).ConsoleSize = Some(Size {
        Height: 24,
        Width: 80,
        ..Default::default()
    })
    .into();
    let mut stdin = client.stream(Channel::Stdin, "tty", "").await;
    let mut stdout = client.stream(Channel::Stdout, "tty", "").await;
    client.create("tty", spec).await.unwrap();
    client.start("tty").await.unwrap();
    let text = read_until(&mut stdout, "24 80\r\n").await;
    assert_eq!(text, "/dev/pts/0\r\nhi\r\n24 80\r\n");
    let resize = TtyWinResizeRequest {
        container_id: "tty".into(),
        row: 50,
        column: 132,
        ..Default::default()
    };
    client
        .rpc
        .agent
        .tty_win_resize(soon(), &resize)
        .await
        .unwrap();
    stdin.write_all(b"go on\n").await.unwrap();
    read_until(&mut stdout, "50 132\r\n").await;
    // Control-C reaches the foreground; the first process of a namespace minds it only with a
    // handler.
    client.kill("tty", "", libc::SIGKILL).await.unwrap();
    assert_eq!(client.wait("tty", "").await.unwrap(), 137);
    let mut rest = Vec::new();
    timeout(DEADLINE, stdout.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    client.remove("tty").await.unwrap();
}

pub async fn an_exec_can_have_a_terminal(client: &Client<'_>) {
    client.sleeper("tty-exec").await;
    let mut process = client.process(&["sh", "-c", "stty -echo; tty; id -u; cat; exit 4"]);
    process.Terminal = true;
    process.User = Some(User {
        UID: 33,
        GID: 33,
        ..Default::default()
    })
    .into();
    let mut stdin = client.stream(Channel::Stdin, "tty-exec", "e1").await;
    let mut stdout = client.stream(Channel::Stdout, "tty-exec", "e1").await;
    client.exec("tty-exec", "e1", process).await.unwrap();
    read_until(&mut stdout, "33\r\n").await;
    stdin.write_all(b"echo\n\x04").await.unwrap();
    let mut rest = String::new();
    timeout(DEADLINE, stdout.read_to_string(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest, "echo\r\n");
    assert_eq!(client.wait("tty-exec", "e1").await.unwrap(), 4);

    client
        .exec("tty-exec", "e2", client.process(&["sleep", "1"]))
        .await
        .unwrap();
    let resize = TtyWinResizeRequest {
        container_id: "tty-exec".into(),
        exec_id: "e2".into(),
        ..Default::default()
    };
    let (code, _) = refusal(client.rpc.agent.tty_win_resize(soon(), &resize).await);
    assert_eq!(code, Code::UNAVAILABLE);
    client.remove("tty-exec").await.unwrap();
}

pub async fn a_container_can_reopen_its_output(client: &Client<'_>) {
    let output = client
        .script(
            "reopen",
            "echo out >/dev/stdout; echo err >/dev/stderr",
            |spec| {
                process(spec).User = Some(User {
                    UID: 33,
                    GID: 33,
                    ..Default::default()
                })
                .into();
            },
        )
        .await;
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\n", "err\n")
    );
    // Nobody reads for a while: nothing is lost.
    let stdout = client.stream(Channel::Stdout, "patient", "").await;
    client
        .create(
            "patient",
            client.spec(&["sh", "-c", "seq 1 200000; echo end"]),
        )
        .await
        .unwrap();
    client.start("patient").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let text = String::from_utf8(read_all(Some(stdout)).await).unwrap();
    assert!(text.ends_with("200000\nend\n") && text.lines().count() == 200_001);
    client.remove("patient").await.unwrap();
}
