//! The host's side of networks: `ip` and `tc`, and network namespaces.

use std::process::Command;
use std::time::Duration;

use crate::command::{Output, run};

/// Runs `ip ARGS`.
#[track_caller]
pub fn ip(args: &[&str]) -> Output {
    let mut command = Command::new("ip");
    command.args(args);
    run(command, Duration::from_secs(20))
}

/// A network namespace under /run/netns that goes with the value.
pub struct Netns {
    /// Its name.
    pub name: String,
}

impl Netns {
    /// Makes it, with its loopback up.
    pub fn new(name: &str) -> Netns {
        ip(&["netns", "add", name]).ok();
        let netns = Netns {
            name: name.to_owned(),
        };
        netns.ip(&["link", "set", "lo", "up"]);
        netns
    }

    /// Its file.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs `ip ARGS` inside; gives what it says.
    #[track_caller]
    pub fn ip(&self, args: &[&str]) -> String {
        ip(&[&["-n", &self.name], args].concat()).ok().text()
    }

    /// Runs a program of the host inside.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> String {
        ip(&[&["netns", "exec", &self.name], command].concat())
            .ok()
            .text()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.name]);
    }
}
