//! A container that `ctr run -d` made, and what a user does with it. It is removed with the value.

use std::path::PathBuf;
use std::time::Duration;

use crate::command::{Output, Running, run};
use crate::suite::Env;
use crate::task::Task;
use crate::{PATIENCE, eventually};

/// A container in the background.
pub struct Container<'e> {
    pub(crate) env: &'e Env,
    /// Its id.
    pub id: String,
}

impl<'e> Container<'e> {
    /// Takes care of a container that something else makes.
    pub fn adopt(env: &'e Env, id: &str) -> Container<'e> {
        Container {
            env,
            id: id.to_owned(),
        }
    }

    /// `ctr task exec` with an exec id of its own.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        self.exec_with(&[], command)
    }

    /// `ctr task exec` with flags.
    #[track_caller]
    pub fn exec_with(&self, flags: &[&str], command: &[&str]) -> Output {
        let exec_id = self.env.id();
        run(self.exec_command(&exec_id, flags, command), PATIENCE)
    }

    /// The command line of `ctr task exec`.
    pub fn exec_command(
        &self,
        exec_id: &str,
        flags: &[&str],
        command: &[&str],
    ) -> std::process::Command {
        let base = ["tasks", "exec", "--exec-id", exec_id];
        self.env
            .daemon
            .ctr_command([&base, flags, &[&self.id], command].concat())
    }

    /// `ctr task kill -s SIGNAL`, with further flags.
    #[track_caller]
    pub fn kill(&self, signal: &str, flags: &[&str]) -> Output {
        self.env
            .ctr(&[&["tasks", "kill", "-s", signal], flags, &[&self.id]].concat())
    }

    /// What `ctr task ls` says of it: pid and status.
    pub fn listed(&self) -> Option<(u32, String)> {
        let list = self.env.ctr(&["tasks", "ls"]).text();
        let mut fields = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id))?
            .split_whitespace();
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.to_owned()))
    }

    /// Waits until it has this status.
    #[track_caller]
    pub fn wait_for(&self, status: &str) {
        eventually(&format!("{} is {status}", self.id), PATIENCE, || {
            (self.listed().is_some_and(|(_, now)| now == status)).then_some(())
        });
    }

    /// Waits for the end of its init process and deletes the task; gives the exit status.
    #[track_caller]
    pub fn finish(&self) -> i32 {
        self.wait_for("STOPPED");
        let output = self.env.ctr(&["tasks", "rm", &self.id]).ok();
        assert!(
            self.listed().is_none(),
            "the task is still there: {}",
            output.errors()
        );
        // The only place where `ctr task rm` tells the status is a warning, and there is none for
        // 0.
        let errors = output.errors();
        let code = errors
            .split_once("exit with non-zero exit code ")
            .and_then(|(_, rest)| rest.split('"').next());
        code.map_or(0, |code| {
            code.parse()
                .unwrap_or_else(|_| panic!("not an exit code: {code}"))
        })
    }

    /// Waits until a file is there inside, the sign that a command got that far.
    #[track_caller]
    pub fn wait_for_file(&self, path: &str) {
        eventually(&format!("{path} in {}", self.id), PATIENCE, || {
            (self.exec(&["test", "-e", path]).status == 0).then_some(())
        });
    }

    /// The bundle's directory.
    pub fn bundle(&self) -> PathBuf {
        self.env.daemon.bundle(&self.id)
    }

    /// A connection of our own to its shim.
    #[track_caller]
    pub fn task(&self) -> Task {
        let read = |name: &str| std::fs::read(self.bundle().join(name));
        let address = read("address")
            .or_else(|_| read("bootstrap.json"))
            .expect("the shim's address is in the bundle");
        Task::connect(&crate::bundle::Reply::parse(&address).address, &self.id)
    }

    /// Pids of the processes with this command line inside, as `ctr task ps` has them on the host's
    /// side.
    pub fn pids(&self) -> Vec<u32> {
        let list = self.env.ctr(&["tasks", "ps", &self.id]).ok().text();
        list.lines()
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .collect()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let deadline = Duration::from_secs(30);
        let ctr = |args: &[&str]| {
            let running = Running::start(self.env.daemon.ctr_command(args), None);
            running
                .outcome(deadline)
                .is_ok_and(|output| output.status == 0)
        };
        ctr(&["tasks", "rm", "-f", &self.id]);
        if !ctr(&["containers", "rm", &self.id]) {
            ctr(&["tasks", "rm", "-f", &self.id]);
            ctr(&["containers", "rm", &self.id]);
        }
    }
}
