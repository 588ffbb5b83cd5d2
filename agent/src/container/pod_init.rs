//! PID 1 of the pid namespace that a pod's containers share: what a pause container is elsewhere. A
//! copy of the agent that does nothing but outlive them, so it costs the few pages that it touches.

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use tokio::time::{Instant, timeout_at};

use super::child;
use crate::cgroup::Cgroup;
use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::guest::reaper::Reaper;
use crate::log::log;
use crate::spawn::step::Step;
use crate::spawn::{self, Handle, Report};

/// What `ps` shows: the name that pause containers have.
const NAME: &std::ffi::CStr = c"pause";

/// The process and its namespace.
#[derive(Debug)]
pub struct PodInit {
    cgroup: Cgroup,
    namespace: OwnedFd,
    exit: tokio::sync::oneshot::Receiver<i32>,
}

impl PodInit {
    /// Starts it in a cgroup of its own below `cgroups`.
    ///
    /// # Errors
    /// The failed system call.
    pub async fn start(cgroups: &Path, reaper: &Reaper) -> Result<PodInit> {
        let cgroup = Cgroup::create_named(cgroups, "pod-init")?;
        match Self::spawn(&cgroup, reaper).await {
            Ok((namespace, exit)) => Ok(PodInit {
                cgroup,
                namespace,
                exit,
            }),
            Err(error) => {
                if let Err(left) = cgroup
                    .remove(Instant::now() + deadlines::FAILED_CREATE_CLEANUP)
                    .await
                {
                    log!("pod init: {left}");
                }
                Err(error)
            }
        }
    }

    async fn spawn(
        cgroup: &Cgroup,
        reaper: &Reaper,
    ) -> Result<(OwnedFd, tokio::sync::oneshot::Receiver<i32>)> {
        let by = Instant::now() + deadlines::POD_INIT_SETUP;
        let mut child = spawn::spawn(libc::CLONE_NEWPID, Some(cgroup.dir()), run)?;
        let exit = reaper.watch(child.pid);
        let path = format!("/proc/{}/ns/pid", child.pid);
        let namespace = File::open(&path).context(|| format!("open {path}"))?;
        match child.next_report(by).await? {
            Report::Ready(_) => Ok((namespace.into(), exit)),
            Report::Closed => Err(Error::Failed(
                "the pod's init died before it was ready".into(),
            )),
        }
    }

    pub fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// Ends it, and with it every process that is left in the namespace.
    pub async fn stop(self) {
        let by = Instant::now() + deadlines::PROCESS_EXIT_AFTER_SIGKILL;
        if let Err(error) = self.cgroup.remove(by).await {
            log!("pod init: {error}");
        }
        if timeout_at(by, self.exit).await.is_err() {
            log!("the pod's init does not die");
        }
    }
}

fn run(handle: &mut Handle) -> Step<Infallible> {
    handle.close_others(&[]);
    // Containers of the pod may look into this process.
    crate::gate::forget();
    child::detach()?;
    // SAFETY: plain numbers and a C string. A first process that ignores SIGCHLD has its orphans
    // collected by the kernel, and it ignores every other signal from inside its namespace as long
    // as it has no handlers.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
    }
    handle.report_ready(None);
    loop {
        // SAFETY: it has no arguments.
        unsafe { libc::pause() };
    }
}
