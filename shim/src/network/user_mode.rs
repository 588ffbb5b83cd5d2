//! The host's network for a guest (`hostNetwork`, `--net-host`), where the configuration allows it:
//! pasta (of passt) makes connections of the guest's the host's own, as a user without privileges.
//!
//! pasta makes a network namespace with one link, which has the host's addresses, and is then the
//! sandbox's as if CNI had made it. Who listens in the guest listens on the host: that is
//! `forward`'s, because pasta looks into its namespace for that, where nobody listens.
//!
//! pasta ends with the program that it runs in the namespace, which is `cat`: it ends when the
//! shim's end of its input does.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressMessage;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use vmm::process::Identity;

use super::netns::Netns;
use super::{LOOPBACK, rtnl};
use crate::deadlines::{USER_MODE_LOOK, USER_MODE_READY};
use crate::error::{Error, IoContext, Result};
use crate::host::death_signal;

/// Bytes of pasta's words that the log gets.
const MOST_WORDS: usize = 8 << 10;

/// pasta runs as long as this lives.
#[derive(Debug)]
pub struct UserMode {
    /// Has the child, which ends with it.
    task: JoinHandle<()>,
    ended: watch::Receiver<Option<String>>,
    _input: Option<ChildStdin>,
}

impl Drop for UserMode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Who runs pasta, and what as.
pub struct Plan<'a> {
    /// Its path.
    pub program: &'a Path,
    /// Its user and group.
    pub uid: u32,
    /// Files by which it enters its cgroup.
    pub cgroup_procs: Vec<PathBuf>,
}

impl UserMode {
    /// Starts pasta. `record` is told of its processes.
    ///
    /// # Errors
    /// One line: pasta's last words, or that there is no namespace in time.
    pub async fn start(
        plan: Plan<'_>,
        record: impl Fn(Identity) -> Result<()>,
    ) -> Result<(UserMode, Netns)> {
        let doing = || format!("run {}", plan.program.display());
        let mut command = Command::new(plan.program);
        command
            .args(["--foreground", "--quiet", "--config-net", "--no-map-gw"])
            .args([
                "-t", "none", "-u", "none", "-T", "none", "-U", "none", "--", "cat",
            ])
            // Nothing of containerd's, which may have passwords of proxies.
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .uid(plan.uid)
            .gid(plan.uid)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // SAFETY: the closure only makes system calls and allocates nothing.
        unsafe { command.pre_exec(death_signal::with_the_shim()) };
        let mut child = command.spawn().doing(doing)?;
        let pid = child.id().map_or(0, u32::cast_signed);
        record(Identity::of(pid).doing(doing)?)?;
        for file in &plan.cgroup_procs {
            std::fs::write(file, pid.to_string()).doing(doing)?;
        }
        let input = child.stdin.take();
        let ready = timeout(USER_MODE_READY, namespace(&mut child, pid, &record)).await;
        let late = |_| {
            Error::deadline(format!(
                "{} made no network within {USER_MODE_READY:?}",
                plan.program.display()
            ))
        };
        let netns = ready.map_err(late)??;
        let (sender, ended) = watch::channel(None);
        let task = tokio::spawn(async move {
            let why = watch_over(&mut child).await;
            sender.send_replace(Some(why));
        });
        let user_mode = UserMode {
            task,
            ended,
            _input: input,
        };
        Ok((user_mode, netns))
    }

    /// Waits for its end, without which the guest has no network; gives the reason.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        let why = ended.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or_default()
    }
}

/// Passes on what it says, as far as that is not too much, and tells how it ended.
async fn watch_over(child: &mut Child) -> String {
    let mut stderr = child.stderr.take();
    let (mut said, mut text) = (0, [0; 1024]);
    loop {
        let read = async {
            match &mut stderr {
                Some(stderr) => stderr.read(&mut text).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = child.wait() => {
                return match status {
                    Ok(status) => format!("pasta ended ({status})"),
                    Err(error) => error.to_string(),
                };
            }
            read = read => match read {
                Ok(length @ 1..) if said < MOST_WORDS => {
                    said += length;
                    let says = String::from_utf8_lossy(&text[..length]);
                    tracing::warn!(says = says.trim_end(), "pasta");
                }
                Ok(1..) => {}
                _ => stderr = None,
            }
        }
    }
}

/// The namespace, once its link has addresses.
async fn namespace(
    child: &mut Child,
    pid: i32,
    record: &impl Fn(Identity) -> Result<()>,
) -> Result<Netns> {
    let mut netns = None;
    loop {
        if let Some(status) = child.try_wait().doing(|| "wait for pasta".into())? {
            let mut said = String::new();
            if let Some(stderr) = &mut child.stderr {
                let _ = stderr.take(64 << 10).read_to_string(&mut said).await;
            }
            let last = said.trim_end().lines().last().unwrap_or_default();
            return Err(Error::internal(format!(
                "pasta ended ({status}): {last}; it needs user namespaces and a /dev/net/tun \
                 that everybody may open"
            )));
        }
        if netns.is_none()
            && let Some(inner) = child_of(pid)
            && let Ok(found) = Netns::of_process(inner)
            && !found.is_host()?
        {
            record(Identity::of(inner).doing(|| "look at pasta's child".into())?)?;
            netns = Some(found);
        }
        if let Some(found) = &netns
            && has_addresses(found).await?
            && let Some(netns) = netns.take()
        {
            return Ok(netns);
        }
        sleep(USER_MODE_LOOK).await;
    }
}

fn child_of(pid: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

async fn has_addresses(netns: &Netns) -> Result<bool> {
    let (_connection, netlink) = netns.netlink()?;
    let list = netlink.address().get().execute();
    let all: Vec<AddressMessage> = rtnl("list addresses", list.try_collect()).await?;
    let is_global = |message: &AddressMessage| {
        message.header.index != LOOPBACK && u8::from(message.header.scope) == 0
    };
    Ok(all.iter().any(is_global))
}
