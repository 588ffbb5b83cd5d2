//! Kill points: places in the code by name, at which a test stops the process, kills it, or lets a
//! system call fail, while the process is exactly there.
//!
//! Without the cargo feature `points` each of them is an empty inlined function. With it, the
//! environment variable [`DIRECTORY`] names a directory; containerd hands its environment on to
//! `start` and `delete`, and `start` to the server. A process that comes to a point whose name is a
//! file there renames the file to `<name>.reached.<pid>`, so that it acts once, and does what the
//! file says:
//!
//! | text | what happens |
//! |---|---|
//! | `stop` | SIGSTOP to the own process, until somebody sends SIGCONT |
//! | `kill` | SIGKILL to the own process |
//! | `error <errno>` | [`reach`] returns this error |
//! | nothing | nothing: the renamed file says that the place was passed |

use std::io;

/// The environment variable with the directory of what to do.
pub const DIRECTORY: &str = "COFFERDAM_POINTS";

/// Whose code a point is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `containerd-shim-cofferdam-v2 start`.
    Start,
    /// The server of a sandbox.
    Server,
    /// `containerd-shim-cofferdam-v2 delete`, or the server at its own end.
    Delete,
}

/// What a point does when it is told to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It is part of something that can fail: the error is passed on ([`reach`]).
    Returned,
    /// Nothing can fail there, so no error is made ([`pass`]).
    Impossible,
}

macro_rules! points {
    ($($name:ident, $program:ident, $failure:ident, $description:literal;)*) => {
        /// A place in the code, numbered from 1 in the order of a sandbox's life.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Point {
            $(#[doc = $description] $name,)*
        }

        impl Point {
            /// All of them, in order.
            pub const ALL: &'static [Point] = &[$(Point::$name,)*];

            /// The name of the file that tells what to do there.
            pub fn name(self) -> &'static str {
                match self { $(Point::$name => stringify!($name),)* }
            }

            /// What has happened by then, and what has not, in one line.
            pub fn description(self) -> &'static str {
                match self { $(Point::$name => $description,)* }
            }

            /// Who comes to it first.
            pub fn program(self) -> Program {
                match self { $(Point::$name => Program::$program,)* }
            }

            /// Whether something can fail there.
            pub fn failure(self) -> Failure {
                match self { $(Point::$name => Failure::$failure,)* }
            }
        }
    };
}

points! {
    StartBeforeLock, Start, Returned, "start: before the lock of all starts";
    StartUndoing, Start, Returned, "start: lock held, about to undo what a former server left";
    StartSocketBound, Start, Returned, "start: socket bound, no server";
    ServerForked, Server, Returned, "server: forked by start, ledger not opened";
    ServerNotRecorded, Server, Returned, "server: ledger opened, itself not recorded";
    ServerRecorded, Server, Returned, "server: itself recorded";
    ServerBeforeReady, Server, Returned, "server: everything made, start not told";
    StartServerReady, Start, Returned, "start: told that the server is ready, address not printed";
    CreateSpecRead, Server, Returned, "create: spec read, nothing noted";
    CreateNoShare, Server, Returned, "create: container noted, no share mounted";
    SharesMounted, Server, Returned, "create: both shares mounted";
    CgroupRecorded, Server, Returned, "boot: cgroup recorded, not made";
    CgroupMade, Server, Returned, "boot: cgroup made";
    NetnsOpened, Server, Returned, "boot: network namespace opened, or one made";
    CapabilitiesAsked, Server, Returned, "boot: another QEMU is asked what it can do";
    VsockAddressTaken, Server, Returned, "boot: context id taken, listening for the ready notice";
    QemuForked, Server, Returned, "boot: QEMU forked, not in the ledger";
    QemuNoGreeting, Server, Returned, "boot: QEMU up, its greeting not read";
    VsockDaemonForked, Server, Returned, "boot: vsock daemon forked, not in the ledger";
    VirtiofsdForked, Server, Returned, "boot: virtiofsd forked, not in the ledger";
    VirtiofsdServes, Server, Returned, "boot: QEMU is connected to virtiofsd";
    TapMade, Server, Returned, "boot: tap made";
    RedirectRecorded, Server, Returned, "boot: redirection recorded, not set";
    RedirectSet, Server, Returned, "boot: redirection set";
    DeviceHalfAdded, Server, Returned, "boot: a device's back end is in QEMU, the device is not";
    BeforeCont, Server, Returned, "boot: CPUs still stopped";
    Booting, Server, Returned, "boot: the guest runs, its agent is not there yet";
    AgentDialled, Server, Returned, "boot: ready notice read, agent dialled";
    InterfaceSetting, Server, Returned, "boot: the guest is asked to set up an interface";
    SandboxCreating, Server, Returned, "boot: CreateSandbox in flight";
    RelaysMade, Server, Returned, "boot: relay and forwarder made";
    ContainerFifosOpen, Server, Returned, "container: fifos open";
    RootfsMounted, Server, Returned, "container: root file system mounted";
    VolumesBound, Server, Returned, "container: volumes bound";
    MachineResizing, Server, Returned, "container: the machine is being resized";
    HookRuns, Server, Returned, "container: a createRuntime hook runs";
    DiskHalfPlugged, Server, Returned, "container: a disk's back end is in QEMU, the disk is not";
    StdioDialled, Server, Returned, "container: stdio streams dialled";
    ContainerCreating, Server, Returned, "container: CreateContainer in flight";
    ContainerCreated, Server, Impossible, "container: CreateContainer answered, not yet told";
    ContainerStarting, Server, Returned, "container: StartContainer in flight";
    ContainerStarted, Server, Impossible, "container: StartContainer answered, not yet told";
    ExecAnnounced, Server, Impossible, "exec: announced, its streams on their way";
    ExecStarting, Server, Returned, "exec: ExecProcess in flight";
    ExecRuns, Server, Impossible, "exec: runs, on a terminal";
    OutputWaits, Server, Impossible, "stdio: output read from the guest, not written";
    InputWaits, Server, Impossible, "stdio: input read from the client, not given to the guest";
    LogFileWriting, Server, Returned, "stdio: output about to be written to a log file";
    Paused, Server, Impossible, "task: paused";
    SignalSending, Server, Returned, "task: a signal in flight";
    SigkillAnswered, Server, Impossible, "task: SIGKILL answered by the agent";
    InitEnded, Server, Impossible, "exit: init ended, nobody told";
    ExitTold, Server, Impossible, "exit: told, output draining";
    ContainerRemoving, Server, Returned, "delete: RemoveContainer in flight";
    DiskUnplugging, Server, Returned, "delete: a disk about to be unplugged";
    Unmounting, Server, Impossible, "delete: mounts about to be taken off";
    DeleteQueued, Server, Impossible, "delete: TaskDelete queued";
    ShutdownTaken, Server, Impossible, "end: Shutdown taken, the socket still there";
    QemuQuitting, Server, Impossible, "end: QEMU about to be told to quit";
    HelpersEnding, Server, Impossible, "end: helpers about to be ended";
    UndoHalfDone, Delete, Returned, "end: resources undone, the state directory still there";
    DeleteWaits, Delete, Returned, "delete: about to wait for the server";
    DeleteKills, Delete, Returned, "delete: about to kill and undo what is left";
    DeleteSweeps, Delete, Impossible, "delete: answer printed, about to sweep";
}

impl Point {
    /// Its number, from 1 on.
    pub fn number(self) -> usize {
        self as usize + 1
    }
}

/// Says that the process is at a point. An error is to be passed on as if a system call had failed
/// there.
///
/// # Errors
/// The one that a test asks for; none without the feature `points`.
#[inline(always)]
pub fn reach(point: Point) -> io::Result<()> {
    #[cfg(feature = "points")]
    return act::at(point);
    #[cfg(not(feature = "points"))]
    {
        let _ = point;
        Ok(())
    }
}

/// As [`reach`], where nothing can fail.
#[inline(always)]
pub fn pass(point: Point) {
    let _ = reach(point);
}

#[cfg(feature = "points")]
mod act {
    use std::ffi::c_int;
    use std::io;
    use std::path::PathBuf;

    use super::{DIRECTORY, Point};

    // asm-generic/signal.h
    const SIGKILL: c_int = 9;
    const SIGSTOP: c_int = 19;

    unsafe extern "C" {
        fn raise(signal: c_int) -> c_int;
    }

    pub(super) fn at(point: Point) -> io::Result<()> {
        let Some(directory) = std::env::var_os(DIRECTORY) else {
            return Ok(());
        };
        let planted = PathBuf::from(directory).join(point.name());
        let reached = planted.with_extension(format!("reached.{}", std::process::id()));
        // Of several processes one gets it.
        if std::fs::rename(&planted, &reached).is_err() {
            return Ok(());
        }
        let text = std::fs::read_to_string(&reached)?;
        let mut words = text.split_whitespace();
        match (words.next(), words.next()) {
            (Some("stop"), None) => send(SIGSTOP),
            (Some("kill"), None) => send(SIGKILL),
            (Some("error"), Some(errno)) => {
                return Err(io::Error::from_raw_os_error(
                    errno.parse().map_err(io::Error::other)?,
                ));
            }
            _ => {}
        }
        Ok(())
    }

    fn send(signal: c_int) {
        // SAFETY: an integer only; a signal to the calling thread, which acts on the whole process
        // before the call returns.
        let _ = unsafe { raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn there_are_64_points_with_a_name_each() {
        assert_eq!(Point::ALL.len(), 64);
        let names: HashSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), 64);
        for (index, point) in Point::ALL.iter().enumerate() {
            assert_eq!(point.number(), index + 1);
        }
    }

    #[test]
    fn the_document_has_all_points_in_order() {
        let document = include_str!("../../docs/kill-points.md");
        let (_, table) = document.split_once("<!-- begin of the table -->").unwrap();
        let rows = table.lines().filter_map(|line| {
            let mut columns = line.split('|').map(str::trim).skip(1);
            let number: usize = columns.next()?.parse().ok()?;
            let name = columns.next()?.trim_matches('`');
            Some((number, name, columns.next()?))
        });
        let wanted = Point::ALL
            .iter()
            .map(|point| (point.number(), point.name(), point.description()));
        assert!(rows.eq(wanted), "run `make killtest` for a new table");
    }

    #[cfg(feature = "points")]
    #[test]
    fn a_planted_error_is_returned_once() {
        let directory = std::env::temp_dir().join(format!("points-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        // SAFETY: no other thread of this test program reads the environment.
        unsafe { std::env::set_var(DIRECTORY, &directory) };
        std::fs::write(directory.join("RootfsMounted"), "error 28").unwrap();
        reach(Point::VolumesBound).unwrap();
        let error = reach(Point::RootfsMounted).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(28));
        reach(Point::RootfsMounted).unwrap();
        let reached = format!("RootfsMounted.reached.{}", std::process::id());
        assert!(directory.join(reached).exists());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
