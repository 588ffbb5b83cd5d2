//! OCI hooks of the host: what clients such as nerdctl have run around a container, mostly to make
//! its network.
//!
//! They run on the host, as with runc, and are told the pid of the virtual machine, which is in the
//! sandbox's network namespace. Hooks that belong inside the container (createContainer,
//! startContainer) are left out: their programs are the host's.

use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks, Spec};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::error::{Error, IoContext, Result};

/// How long a hook may take that names no time of its own.
const DEADLINE: Duration = Duration::from_secs(30);

/// When hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPhase {
    /// The machine is there, the container is not.
    Create,
    /// The container's program runs.
    Started,
    /// The container is deleted.
    Deleted,
}

impl HookPhase {
    fn status(self) -> &'static str {
        match self {
            HookPhase::Create => "creating",
            HookPhase::Started => "running",
            HookPhase::Deleted => "stopped",
        }
    }

    #[allow(deprecated, reason = "prestart is what docker still uses")]
    fn of(self, hooks: &Hooks) -> Vec<Hook> {
        let lists = match self {
            HookPhase::Create => [hooks.prestart(), hooks.create_runtime()],
            HookPhase::Started => [hooks.poststart(), &None],
            HookPhase::Deleted => [hooks.poststop(), &None],
        };
        lists.into_iter().flatten().flatten().cloned().collect()
    }
}

/// A container's hooks, and what they are told.
#[derive(Clone, Debug, Default)]
pub struct HostHooks {
    hooks: Option<Hooks>,
    state: Value,
}

impl HostHooks {
    /// Those of a spec.
    pub fn of(spec: &Spec, id: &str, bundle: &str) -> HostHooks {
        let state = json!({"ociVersion": spec.version(), "id": id, "bundle": bundle,
            "annotations": spec.annotations()});
        HostHooks {
            hooks: spec.hooks().clone(),
            state,
        }
    }

    /// Runs the hooks of a moment, one after the other.
    ///
    /// # Errors
    /// The first one that fails, by its path and with its last line. Hooks after the start change
    /// nothing any more: theirs are only logged.
    pub async fn run(&self, moment: HookPhase, pid: u32) -> Result<()> {
        let mut state = self.state.clone();
        state["status"] = moment.status().into();
        state["pid"] = if moment == HookPhase::Deleted { 0 } else { pid }.into();
        for hook in self.hooks.iter().flat_map(|hooks| moment.of(hooks)) {
            match run_one(&hook, state.to_string()).await {
                Err(error) if moment == HookPhase::Create => return Err(error),
                Err(error) => tracing::warn!(%error, ?moment, "a hook failed"),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

async fn run_one(hook: &Hook, state: String) -> Result<()> {
    let path = hook.path();
    let doing = || format!("run the hook {}", path.display());
    let mut command = Command::new(path);
    // By the specification the first argument is the program's own name.
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env_clear();
    command.envs(
        hook.env()
            .iter()
            .flatten()
            .filter_map(|variable| variable.split_once('=')),
    );
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let deadline = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DEADLINE, Duration::from_secs);
    let run = async {
        let mut child = command.spawn().doing(doing)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read what it is told is no failure.
            let _ = stdin.write_all(state.as_bytes()).await;
        }
        child.wait_with_output().await.doing(doing)
    };
    let output = timeout(deadline, run).await;
    let output = output.map_err(|_| {
        Error::deadline(format!(
            "hook {} took longer than {deadline:?}",
            path.display()
        ))
    })??;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing on stderr");
    Err(Error::internal(format!(
        "hook {} failed ({}): {last}",
        path.display(),
        output.status
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(list: Value) -> HostHooks {
        let spec = json!({"ociVersion": "1.1.0", "root": {"path": "r"}, "annotations": {"a": "b"},
            "hooks": list});
        HostHooks::of(&serde_json::from_value(spec).unwrap(), "web", "/bundle")
    }

    #[tokio::test]
    async fn a_hook_is_told_of_the_machine() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("state");
        let script = format!("cat >{}; test $A = 1 && test $0 = name", out.display());
        let hooks = hooks(json!({"createRuntime": [
            {"path": "/bin/sh", "args": ["sh", "-c", script, "name"], "env": ["A=1"]}
        ]}));
        hooks.run(HookPhase::Create, 77).await.unwrap();
        let state: Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
        let wanted = json!({"ociVersion": "1.1.0", "id": "web", "bundle": "/bundle",
            "annotations": {"a": "b"},
            "status": "creating", "pid": 77});
        assert_eq!(state, wanted);
    }

    #[tokio::test]
    async fn a_failing_hook_says_why_in_one_line() {
        let failing = json!([{"path": "/bin/sh", "args": ["sh", "-c",
            "echo one >&2; echo no network >&2; exit 3"]}]);
        let error = hooks(json!({"prestart": failing}))
            .run(HookPhase::Create, 1)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/bin/sh") && error.contains("3") && error.ends_with("no network"),
            "{error}"
        );
        hooks(json!({"poststop": failing}))
            .run(HookPhase::Deleted, 1)
            .await
            .unwrap();
        let missing = json!([{"path": "/no/such/hook"}]);
        let error = hooks(json!({"prestart": missing}))
            .run(HookPhase::Create, 1)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/hook"), "{error}");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended() {
        let hanging = json!([{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]);
        let error = hooks(json!({"prestart": hanging}))
            .run(HookPhase::Create, 1)
            .await
            .unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::DEADLINE_EXCEEDED);
    }
}
