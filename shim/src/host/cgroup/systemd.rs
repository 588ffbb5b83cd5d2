//! Scopes of systemd: where a spec names its cgroup in systemd's form (`slice:prefix:name`) and
//! systemd runs, the sandbox's cgroup is a unit of its, because a directory made behind its back it
//! neither accounts nor keeps.
//!
//! systemd is asked through its own programs: the few calls need no D-Bus of ours, and the programs
//! find the way to it on every version. A scope is made around a process, and is gone with its last
//! one. So there is a placeholder, which stays as long as the sandbox: without it the scope would
//! be gone before somebody can read there why QEMU was killed.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm::process::Identity;

use super::hierarchies;
use super::limits::Limits;
use crate::deadlines::{SCOPE_PLACEHOLDER_GONE, SCOPE_SET, SCOPE_UNDO};
use crate::error::{Error, IoContext, Result};
use crate::host::mount_table;

/// systemd's own limit for the name of a unit.
const MAX_NAME: usize = 255;

/// `systemctl`'s status for a unit that is not loaded.
const NOT_LOADED: i32 = 5;

/// A scope as a spec's `linux.cgroupsPath` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    slice: String,
    /// The unit: `prefix-name.scope`.
    pub unit: String,
}

impl Name {
    /// By a path of systemd's form. Another one is a directory's. As with runc, no slice is
    /// `system.slice`.
    pub fn parse(cgroups_path: &str) -> Option<Name> {
        let [slice, prefix, name] = cgroups_path.split(':').collect::<Vec<_>>()[..] else {
            return None;
        };
        let slice = if slice.is_empty() {
            "system"
        } else {
            slice.strip_suffix(".slice").unwrap_or(slice)
        };
        Some(Name {
            slice: format!("{slice}.slice"),
            unit: format!("{prefix}-{name}.scope"),
        })
    }

    /// Its directory below the root of a hierarchy.
    pub fn directory(&self) -> String {
        let slices = expand_slice(&self.slice);
        if slices.is_empty() {
            self.unit.clone()
        } else {
            format!("{slices}/{}", self.unit)
        }
    }

    /// systemd's programs put others in the place of letters that a unit's name cannot have: the
    /// scope would be another.
    fn check(&self) -> Result<()> {
        let good = |c: char| c.is_ascii_alphanumeric() || ":-_.\\".contains(c);
        // The root slice is the only name that begins with a dash; any other would be an option of
        // systemctl's.
        let is_option = |name: &str| name.starts_with('-') && name != "-.slice";
        let bad =
            |name: &&String| name.len() > MAX_NAME || !name.chars().all(good) || is_option(name);
        match [&self.slice, &self.unit].into_iter().find(bad) {
            Some(name) => Err(Error::invalid(format!(
                "linux.cgroupsPath: {name:?} is no name of a unit of systemd: it may have \
                 letters, digits and :-_.\\, \
                 and {MAX_NAME} of them"
            ))),
            None => Ok(()),
        }
    }

    /// What makes the scope around a process that gives back what it is told, and ends when nobody
    /// tells it more.
    fn arguments(&self, limits: Limits) -> Vec<String> {
        let mut arguments = vec![
            "--scope".to_owned(),
            "--quiet".to_owned(),
            // One that failed is forgotten too: nobody would.
            "--collect".to_owned(),
            "--no-ask-password".to_owned(),
            format!("--slice={}", self.slice),
            format!("--unit={}", self.unit),
            format!(
                "--description=Virtual machine of {}",
                self.unit.trim_end_matches(".scope")
            ),
        ];
        let own = [
            // All controllers, and what runs there is not stopped because one of it ran out of
            // memory.
            "Delegate=yes",
            // As runc: containers are not ended before containerd is when the host shuts down.
            "DefaultDependencies=no",
        ];
        for property in own
            .map(str::to_owned)
            .into_iter()
            .chain(limits.properties())
        {
            arguments.extend(["-p".to_owned(), property]);
        }
        arguments.push("cat".to_owned());
        arguments
    }
}

/// systemd's nesting: `a-b.slice` is below `a.slice`.
fn expand_slice(slice: &str) -> String {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    if stem.is_empty() || stem == "-" {
        return String::new();
    }
    let parts: Vec<&str> = stem.split('-').collect();
    (1..=parts.len())
        .map(|n| format!("{}.slice", parts[..n].join("-")))
        .collect::<Vec<_>>()
        .join("/")
}

/// Whether it is systemd that manages this host (sd_booted(3)).
pub fn runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// A scope that this sandbox made. Dropping it ends the placeholder, and with that the scope if
/// nobody else is in it.
#[derive(Debug)]
pub struct Scope {
    unit: String,
    placeholder: Placeholder,
}

impl Scope {
    /// Makes it, with limits. Takes the time of systemd, so call it where it may block.
    ///
    /// # Errors
    /// systemd's refusal; a unit of that name with processes in it is nobody's to take away.
    pub fn make(name: &Name, limits: Limits) -> Result<Scope> {
        name.check()?;
        let doing = |error: Error| {
            error.context(format!(
                "make {} in {} through systemd",
                name.unit, name.slice
            ))
        };
        let arguments = name.arguments(limits);
        let placeholder = match Placeholder::start(&arguments) {
            // It may be a leftover: of a sandbox that ended a moment ago, or one that systemd
            // remembers as failed.
            Err(refusal) if clear(&name.unit, SCOPE_SET).unwrap_or(false) => {
                tracing::info!(error = %refusal, unit = name.unit,
                    "a unit of this name was left over");
                Placeholder::start(&arguments)
            }
            result => result,
        };
        Ok(Scope {
            unit: name.unit.clone(),
            placeholder: placeholder.map_err(doing)?,
        })
    }

    /// The placeholder.
    ///
    /// # Errors
    /// It has just ended.
    pub fn placeholder(&self) -> Result<Identity> {
        let pid = self.placeholder.child.id().cast_signed();
        Identity::of(pid).doing(|| format!("look for the placeholder of {}", self.unit))
    }

    /// Changes the limits. Not by the cgroup's files: also of a scope that is delegated those are
    /// systemd's, which writes there again what it knows when something else changes. Blocks.
    ///
    /// # Errors
    /// systemd's refusal.
    pub fn set(&self, limits: Limits) -> Result<()> {
        let mut command = systemctl();
        command
            .args(["set-property", "--runtime", "--"])
            .arg(&self.unit)
            .args(limits.properties());
        let result = call(&mut command, SCOPE_SET);
        let result = result.and_then(|output| {
            if output.status.success() {
                Ok(())
            } else {
                Err(refusal(&output))
            }
        });
        result.map_err(|error| error.context(format!("limit {} through systemd", self.unit)))
    }
}

/// Takes back a scope that this sandbox made, after its processes are dead. One that is gone is as
/// good, and so is one where systemd does not run any more. Blocks for two seconds at most.
///
/// # Errors
/// Processes that are in it, or systemd's refusal.
pub fn undo(unit: &str) -> Result<()> {
    if !runs() {
        return Ok(());
    }
    let cleared = clear(unit, SCOPE_UNDO);
    if !cleared.map_err(|error| error.context(format!("stop {unit}")))? {
        return Err(Error::internal(format!(
            "stop {unit}: there are processes in it"
        )));
    }
    Ok(())
}

/// Stops and forgets a unit unless there are processes in it a second from now, which may be
/// anybody's.
fn clear(unit: &str, deadline: Duration) -> Result<bool> {
    let begun = Instant::now();
    let ask = |words: &[&str]| {
        let left = deadline.saturating_sub(begun.elapsed());
        call(systemctl().args(words).arg("--").arg(unit), left)
    };
    let shown = ask(&["show", "--property=LoadState,ControlGroup"])?;
    if !shown.status.success() {
        return Err(refusal(&shown));
    }
    let Some(group) = control_group(&String::from_utf8_lossy(&shown.stdout)) else {
        return Ok(true);
    };
    while group.as_deref().is_some_and(is_populated) {
        if begun.elapsed() > SCOPE_PLACEHOLDER_GONE {
            return Ok(false);
        }
        sleep(Duration::from_millis(5));
    }
    let stopped = ask(&["stop"])?;
    if !stopped.status.success() && stopped.status.code() != Some(NOT_LOADED) {
        return Err(refusal(&stopped));
    }
    // Of one that has not failed it says no.
    ask(&["reset-failed"])?;
    Ok(true)
}

/// By what `systemctl show` says of a unit: nothing if there is none, else its cgroup if it has
/// one.
fn control_group(shown: &str) -> Option<Option<String>> {
    let value = |key| {
        shown
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    };
    let group = value("ControlGroup")
        .map(|path| path.trim_start_matches('/'))
        .filter(|path| !path.is_empty());
    (value("LoadState") != Some("not-found")).then(|| group.map(str::to_owned))
}

/// Whether there are processes in a cgroup, in any hierarchy, by its path below their roots.
pub fn is_populated(group: &str) -> bool {
    // A table that cannot be read is told by whoever joins a cgroup.
    let mounts = mount_table::read().unwrap_or_default();
    hierarchies(&mounts)
        .into_iter()
        .map(|hierarchy| hierarchy.join(group))
        .any(|dir| {
            let read = |file| fs::read_to_string(dir.join(file)).unwrap_or_default();
            !read("cgroup.procs").trim().is_empty()
                || read("cgroup.events")
                    .lines()
                    .any(|line| line == "populated 1")
        })
}

fn systemctl() -> Command {
    let mut command = program("systemctl");
    command.args(["--quiet", "--no-ask-password", "--no-pager"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// One of systemd's, whose words are for us and not for the journal.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command
        .env("SYSTEMD_LOG_TARGET", "console")
        .env("SYSTEMD_COLORS", "0")
        .env("LC_ALL", "C")
        .current_dir("/");
    command
}

/// Runs a program that says little, and kills it if it takes longer than it may.
fn call(command: &mut Command, deadline: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().doing(|| format!("start {name}"))?;
    let status = wait(&mut child, deadline).doing(|| format!("wait for {name}"))?;
    let Some(status) = status else {
        end(&mut child);
        return Err(Error::deadline(format!(
            "{name} took longer than {deadline:?}"
        )));
    };
    let stdout = child.stdout.as_ref().map(available).unwrap_or_default();
    let stderr = child.stderr.as_ref().map(available).unwrap_or_default();
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

fn wait(
    child: &mut Child,
    deadline: Duration,
) -> std::io::Result<Option<std::process::ExitStatus>> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > end {
            return Ok(None);
        }
        sleep(Duration::from_millis(2));
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = wait(child, SCOPE_PLACEHOLDER_GONE);
}

/// What is in a pipe now: who else has its writing end may never close it.
fn available<F: AsFd>(pipe: &F) -> Vec<u8> {
    let mut text = Vec::new();
    if fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok()
        && let Ok(pipe) = pipe.as_fd().try_clone_to_owned()
    {
        // What came before it would block is kept.
        let _ = fs::File::from(pipe).read_to_end(&mut text);
    }
    text
}

/// The last thing that a program of systemd's said.
fn refusal(output: &Output) -> Error {
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty());
    Error::internal(last.map_or_else(
        || format!("it failed ({}) and says not why", output.status),
        str::to_owned,
    ))
}

/// `cat` in the scope, after `systemd-run`, which it was before. It ends with its standard input,
/// which is ours alone: when the shim does, however that happens.
#[derive(Debug)]
struct Placeholder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Placeholder {
    fn start(arguments: &[String]) -> Result<Placeholder> {
        let mut command = program("systemd-run");
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().doing(|| "start systemd-run".to_owned())?;
        let stdin = child.stdin.take();
        let mut placeholder = Placeholder { child, stdin };
        placeholder.wait_until_there()?;
        Ok(placeholder)
    }

    /// It is in the scope when a byte comes back.
    fn wait_until_there(&mut self) -> Result<()> {
        let doing = || "speak to the placeholder".to_owned();
        let (Some(stdin), Some(stdout)) = (&mut self.stdin, &mut self.child.stdout) else {
            return Err(Error::internal("the placeholder has no pipes"));
        };
        // If it is gone already, what it said is the better error.
        let _ = stdin.write_all(b"\n");
        let until = Instant::now() + SCOPE_SET;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let millis = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)],
                millis,
            ) {
                Ok(0) if left.is_zero() => {
                    return Err(Error::deadline(format!(
                        "systemd-run took longer than {SCOPE_SET:?}"
                    )));
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).doing(doing),
                Ok(_) => break,
            }
        }
        if stdout.read(&mut [0]).doing(doing)? == 1 {
            return Ok(());
        }
        match wait(&mut self.child, SCOPE_PLACEHOLDER_GONE).doing(doing)? {
            Some(status) => {
                let stderr = self
                    .child
                    .stderr
                    .as_ref()
                    .map(available)
                    .unwrap_or_default();
                Err(refusal(&Output {
                    status,
                    stdout: Vec::new(),
                    stderr,
                }))
            }
            None => Err(Error::internal("systemd-run closed its output")),
        }
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        end(&mut self.child);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        memory: 1 << 30,
        milli_cpus: Some(1250),
    };

    #[test]
    fn systemd_names_stand_for_its_directories() {
        let pod = Name::parse("kubepods-burstable-pod1.slice:cri-containerd:abc").unwrap();
        assert_eq!(pod.unit, "cri-containerd-abc.scope");
        let slices = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice";
        assert_eq!(
            pod.directory(),
            format!("{slices}/cri-containerd-abc.scope")
        );
        assert_eq!(
            Name::parse("system.slice:docker:a").unwrap().directory(),
            "system.slice/docker-a.scope"
        );
        assert_eq!(
            Name::parse(":docker:a"),
            Name::parse("system.slice:docker:a"),
            "as runc has it"
        );
        assert_eq!(
            Name::parse("-.slice:docker:a").unwrap().directory(),
            "docker-a.scope"
        );
        for directory in ["/kubepods/pod1/abc", "a:b", "a:b:c:d", ""] {
            assert_eq!(Name::parse(directory), None, "{directory}");
        }
    }

    #[test]
    fn a_name_that_systemd_would_change_is_refused() {
        for path in [
            "../etc:a:b",
            "a/b.slice:a:b",
            "a.slice:a:b/c",
            "a.slice:a:b c",
            "a.slice:a:b@",
        ] {
            let error = Name::parse(path).unwrap().check().unwrap_err();
            assert!(
                error.code() == ttrpc::Code::INVALID_ARGUMENT
                    && error.to_string().contains("cgroupsPath"),
                "{error}"
            );
        }
        Name::parse("a-b.slice:cri:x_1.y").unwrap().check().unwrap();
        Name::parse(&format!("a.slice:cri:{}", "x".repeat(MAX_NAME)))
            .unwrap()
            .check()
            .unwrap_err();
    }

    #[test]
    fn systemd_is_told_the_slice_the_unit_and_every_limit() {
        let arguments = Name::parse("cof:cri:web").unwrap().arguments(LIMITS);
        for wanted in [
            "--scope",
            "--collect",
            "--slice=cof.slice",
            "--unit=cri-web.scope",
        ] {
            assert!(
                arguments.iter().any(|one| one == wanted),
                "{wanted} in {arguments:?}"
            );
        }
        let properties: Vec<&str> = arguments
            .windows(2)
            .filter(|two| two[0] == "-p")
            .map(|two| two[1].as_str())
            .collect();
        assert_eq!(
            properties,
            [
                "Delegate=yes",
                "DefaultDependencies=no",
                "MemoryMax=1073741824",
                "MemorySwapMax=1073741824",
                "CPUQuota=125.0%",
                "TasksMax=512"
            ]
        );
        assert_eq!(arguments.last().unwrap(), "cat");
    }

    #[test]
    fn a_unit_is_there_or_not_and_has_a_cgroup_or_not() {
        assert_eq!(control_group("LoadState=not-found\nControlGroup=\n"), None);
        assert_eq!(
            control_group("ControlGroup=\nLoadState=loaded\n"),
            Some(None)
        );
        let there = control_group("LoadState=loaded\nControlGroup=/cof.slice/cri-web.scope\n");
        assert_eq!(there, Some(Some("cof.slice/cri-web.scope".to_owned())));
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_one_that_fails_is_quoted() {
        let shell = |script: &str, deadline| {
            let mut command = program("sh");
            command
                .args(["-c", script])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            call(&mut command, deadline)
        };
        let late = shell("exec sleep 1000", Duration::from_millis(50)).unwrap_err();
        assert_eq!(late.code(), ttrpc::Code::DEADLINE_EXCEEDED);
        // The other one keeps the pipes.
        let failed = shell(
            "echo first >&2; echo no such slice >&2; sleep 3 & exit 1",
            SCOPE_SET,
        )
        .unwrap();
        assert_eq!(refusal(&failed).to_string(), "no such slice");
        assert!(
            refusal(&shell("exit 3", SCOPE_SET).unwrap())
                .to_string()
                .contains("exit status: 3")
        );
    }

    #[test]
    fn a_missing_systemd_run_or_systemd_is_said() {
        // Where systemd does not run its programs say so; where they are not installed, that is the
        // error.
        if runs() {
            return;
        }
        let error = Scope::make(&Name::parse("cof.slice:cri:web").unwrap(), LIMITS).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("make cri-web.scope in cof.slice through systemd: "),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
        undo("cri-web.scope").unwrap();
    }
}
