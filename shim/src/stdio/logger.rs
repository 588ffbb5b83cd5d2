//! A logger process (`binary:///path?key=value`): it reads a container's output from descriptors 3
//! and 4 and closes descriptor 5 when it is ready.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::timeout;

use crate::deadlines::{LOGGER_END, LOGGER_READY};
use crate::error::{Error, IoContext, Result};

/// A running logger. It ends when its pipes do; one that does not is killed.
pub struct Logger {
    child: Option<tokio::process::Child>,
}

impl Logger {
    /// Starts the program that the URI names; the URI's query becomes its arguments, keys and
    /// values in turn. Returns the writing ends of its output and error pipes.
    ///
    /// # Errors
    /// One line that names the program; one that is not ready in time is killed.
    pub async fn start(uri: &str, namespace: &str, id: &str) -> Result<(Logger, Sender, Sender)> {
        let (program, arguments) = parse(uri)?;
        let doing = || format!("start the logger {program}");
        let (stdout_reader, stdout) = pipe2(OFlag::O_CLOEXEC).doing(doing)?;
        let (stderr_reader, stderr) = pipe2(OFlag::O_CLOEXEC).doing(doing)?;
        let (ready, ready_writer) = pipe2(OFlag::O_CLOEXEC).doing(doing)?;
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // Above the numbers they get in the child, so that no dup2 closes another's source.
        let high = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&fd, 10).doing(doing);
        let passed = [
            high(stdout_reader)?,
            high(stderr_reader)?,
            high(ready_writer)?,
        ];
        let pass = move || {
            for (fd, number) in passed.iter().zip(3..) {
                // SAFETY: dup2 is async-signal-safe, and the numbers are free in the child: all
                // other descriptors are close-on-exec.
                if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure only makes system calls and allocates nothing.
        unsafe { command.pre_exec(pass) };
        let mut command = tokio::process::Command::from(command);
        let child = command.kill_on_drop(true).spawn().doing(doing)?;
        // The command holds the child's ends; with it gone, only the logger does.
        drop(command);
        let mut ready = Receiver::from_owned_fd(ready).doing(doing)?;
        if timeout(LOGGER_READY, ready.read(&mut [0])).await.is_err() {
            return Err(Error::deadline(format!(
                "the logger {program} was not ready within {LOGGER_READY:?}"
            )));
        }
        let sender =
            |fd: OwnedFd| -> Result<Sender> { Sender::from_file(File::from(fd)).doing(doing) };
        Ok((
            Logger { child: Some(child) },
            sender(stdout)?,
            sender(stderr)?,
        ))
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        // It may still be writing what it has read; its input has ended by now.
        if let Some(mut child) = self.child.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { timeout(LOGGER_END, child.wait()).await.is_ok() });
        }
    }
}

fn parse(uri: &str) -> Result<(String, Vec<String>)> {
    let rest = uri
        .strip_prefix("binary://")
        .or_else(|| uri.strip_prefix("binary:"))
        .unwrap_or(uri);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if !path.starts_with('/') {
        return Err(Error::invalid(format!(
            "logger URI {uri:?} names no absolute path"
        )));
    }
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key));
        if !value.is_empty() {
            arguments.push(decode(value));
        }
    }
    Ok((decode(path), arguments))
}

/// Percent decoding of a URI; `+` is a space only in old form bodies and stays.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match hex.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tokio::io::AsyncWriteExt;

    use super::*;

    fn script(dir: &std::path::Path, text: &str) -> String {
        let path = dir.join("logger");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        format!("binary://{}?--to&{}/out", path.display(), dir.display())
    }

    #[test]
    fn the_query_becomes_the_arguments() {
        let (program, arguments) = parse("binary:///usr/bin/log?--id=a%20b&flag&x=").unwrap();
        assert_eq!(
            (program.as_str(), arguments),
            (
                "/usr/bin/log",
                vec!["--id".into(), "a b".into(), "flag".into(), "x".into()]
            )
        );
        assert!(parse("binary://relative").is_err());
    }

    #[tokio::test]
    async fn a_logger_gets_the_output_and_who_it_is_from() {
        let dir = tempfile::tempdir().unwrap();
        let uri = script(
            dir.path(),
            "#!/bin/sh\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE $CONTAINER_ID; cat <&3; } > $2\n",
        );
        let (mut logger, mut stdout, stderr) = Logger::start(&uri, "default", "web").await.unwrap();
        stdout.write_all(b"hello").await.unwrap();
        drop((stdout, stderr));
        logger.child.take().unwrap().wait().await.unwrap();
        assert_eq!(
            std::fs::read_to_string(dir.path().join("out")).unwrap(),
            "default web\nhello"
        );
    }

    #[tokio::test]
    async fn a_logger_that_is_missing_is_named() {
        let error = Logger::start("binary:///no/such/logger", "default", "web")
            .await
            .err()
            .unwrap();
        assert!(error.to_string().contains("/no/such/logger"), "{error}");
    }
}
