//! Running a program with a deadline and catching everything it says.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code, or 128 plus the signal's number.
    pub status: i32,
    /// From the start to the exit.
    pub took: Duration,
    what: String,
}

impl Output {
    /// Standard output as text without surrounding white space.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text without surrounding white space, and without the warning that
    /// containerd 2.2 and later have for ctr on a host with cgroup v1.
    pub fn errors(&self) -> String {
        let text = String::from_utf8_lossy(&self.stderr);
        let lines = text
            .lines()
            .filter(|line| !line.contains("DEPRECATION: The support for cgroup v1"));
        lines.collect::<Vec<_>>().join("\n").trim().to_owned()
    }

    /// Insists on exit status 0.
    #[track_caller]
    pub fn ok(self) -> Output {
        self.exits(0)
    }

    /// Insists on this exit status.
    #[track_caller]
    pub fn exits(self, status: i32) -> Output {
        assert_eq!(
            self.status,
            status,
            "{}: stdout {:?}, stderr {:?}",
            self.what,
            self.text(),
            self.errors()
        );
        self
    }

    /// Insists on failure with one line of error that has every one of `parts`.
    #[track_caller]
    pub fn fails_with(self, parts: &[&str]) -> Output {
        let errors = self.errors();
        assert_ne!(
            self.status,
            0,
            "{} succeeded: stdout {:?}, stderr {errors:?}",
            self.what,
            self.text()
        );
        // containerd 1.6 and later may say more with a logger of their own; the user's line begins
        // with "ctr:".
        let line = errors
            .lines()
            .find(|line| line.starts_with("ctr: "))
            .unwrap_or(&errors);
        for part in parts {
            assert!(
                line.contains(part),
                "{}: no {part:?} in {errors:?}",
                self.what
            );
        }
        assert!(
            !line.contains("Others("),
            "Rust debug text reaches the user: {errors:?}"
        );
        assert!(
            errors.lines().count() <= 2,
            "more than a line of error: {errors:?}"
        );
        self
    }
}

/// A program that runs, its output being collected.
pub struct Running {
    /// The process.
    pub child: Child,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
    began: Instant,
    what: String,
}

fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        let _ = send.send(bytes);
    });
    receive
}

impl Running {
    /// Starts `command` with `stdin` (`None`: /dev/null). Output goes where the command says, else
    /// into pipes.
    pub fn start(mut command: Command, stdin: Option<File>) -> Running {
        let what = format!("{:?}", command);
        command
            .stdin(stdin.map_or(Stdio::null(), Stdio::from))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Running::spawn(command, what)
    }

    /// Like [`Running::start`], with standard output into a file.
    pub fn start_into(mut command: Command, stdin: Option<File>, stdout: File) -> Running {
        let what = format!("{:?}", command);
        command
            .stdin(stdin.map_or(Stdio::null(), Stdio::from))
            .stdout(stdout)
            .stderr(Stdio::piped());
        Running::spawn(command, what)
    }

    /// Like [`Running::start`], with standard input from a pipe that the caller takes from `child`.
    pub fn start_piped(mut command: Command) -> Running {
        let what = format!("{:?}", command);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Running::spawn(command, what)
    }

    fn spawn(mut command: Command, what: String) -> Running {
        let began = Instant::now();
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
        let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
        Running {
            child,
            stdout,
            stderr,
            began,
            what,
        }
    }

    /// Waits for the end; a program that takes longer is killed, and the test fails with what it
    /// had said.
    #[track_caller]
    pub fn wait(self, deadline: Duration) -> Output {
        self.outcome(deadline)
            .unwrap_or_else(|message| panic!("{message}"))
    }

    /// As [`Running::wait`], for those that may not panic.
    ///
    /// # Errors
    /// What took too long, and what it had said.
    pub fn outcome(mut self, deadline: Duration) -> Result<Output, String> {
        let mut pause = Duration::from_millis(1);
        let (status, late) = loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                break (status, false);
            }
            if self.began.elapsed() > deadline {
                let _ = self.child.kill();
                break (self.child.wait().map_err(|error| error.to_string())?, true);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        };
        let took = self.began.elapsed();
        let status = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        // A grandchild that holds the pipe is a bug worth a message of its own.
        let held = |_| {
            format!(
                "{}: its output is still held open by another process after its end",
                self.what
            )
        };
        let stdout = self
            .stdout
            .recv_timeout(Duration::from_secs(10))
            .map_err(held)?;
        let stderr = self
            .stderr
            .recv_timeout(Duration::from_secs(10))
            .map_err(held)?;
        let output = Output {
            stdout,
            stderr,
            status,
            took,
            what: self.what,
        };
        if late {
            let (what, said, errors) = (&output.what, output.text(), output.errors());
            return Err(format!(
                "{what} took longer than {deadline:?}: stdout {said:?}, stderr {errors:?}"
            ));
        }
        Ok(output)
    }
}

/// Runs `command` to its end with nothing on its standard input.
#[track_caller]
pub fn run(command: Command, deadline: Duration) -> Output {
    Running::start(command, None).wait(deadline)
}
