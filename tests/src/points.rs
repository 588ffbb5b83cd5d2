//! Kill points (`sys::point`) from the outside: what is planted for a process to do at one, who is
//! harmed there and how, and the table of what came of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sys::point::{DIRECTORY, Failure, Point, Program};

use crate::assets;
use crate::procs::{self, Proc};

/// Who is harmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// The shim's `start`.
    Start,
    /// The sandbox's server.
    Server,
    /// The shim's `delete`.
    Delete,
    /// QEMU, and with it the agent, which is the guest's first process.
    Qemu,
    /// Both file servers: the processes that the shim started.
    Virtiofsd,
    /// What a virtiofsd without our confinement forks to serve.
    VirtiofsdChild,
    /// The user space vsock device.
    VsockDaemon,
    /// containerd.
    Containerd,
}

impl Victim {
    /// All of them.
    pub const ALL: [Victim; 8] = [
        Victim::Start,
        Victim::Server,
        Victim::Delete,
        Victim::Qemu,
        Victim::Virtiofsd,
        Victim::VirtiofsdChild,
        Victim::VsockDaemon,
        Victim::Containerd,
    ];

    /// Heading in the table.
    pub fn name(self) -> &'static str {
        match self {
            Victim::Start => "start",
            Victim::Server => "server",
            Victim::Delete => "delete",
            Victim::Qemu => "QEMU, agent",
            Victim::Virtiofsd => "virtiofsd",
            Victim::VirtiofsdChild => "its child",
            Victim::VsockDaemon => "vsock daemon",
            Victim::Containerd => "containerd",
        }
    }

    /// Whether it lives at a point.
    pub fn lives_at(self, point: Point) -> bool {
        let (at, ends) = (point.number(), Point::QemuQuitting.number());
        // The host's part of a container is made while the guest boots: there may be one or not.
        let beside = Point::ContainerFifosOpen..=Point::VolumesBound;
        let from = |first: Point| (first.number()..=ends).contains(&at) && !beside.contains(&point);
        match self {
            Victim::Start => at <= Point::StartServerReady.number(),
            Victim::Server => {
                point.program() == Program::Server || point == Point::StartServerReady
            }
            Victim::Delete => point.program() == Program::Delete && point != Point::UndoHalfDone,
            Victim::Qemu => from(Point::QemuForked) || point == Point::CapabilitiesAsked,
            Victim::VsockDaemon => {
                from(Point::VsockDaemonForked) && !Path::new("/dev/vhost-vsock").exists()
            }
            Victim::Virtiofsd => from(Point::VirtiofsdForked),
            Victim::VirtiofsdChild => from(Point::BeforeCont),
            Victim::Containerd => true,
        }
    }

    /// Its processes.
    fn processes(self) -> Vec<Proc> {
        let shim = |action: &str| {
            let mut found = procs::named("containerd-shim-cofferdam");
            found.retain(|process| process.args.ends_with(action));
            found
        };
        match self {
            Victim::Start => shim(" start"),
            Victim::Server => shim(" serve"),
            Victim::Delete => shim(" delete"),
            Victim::Qemu => procs::named("qemu-system"),
            Victim::Virtiofsd => procs::named("virtiofsd")
                .into_iter()
                .filter(|process| !procs::is_child_of(process.pid, "virtiofsd"))
                .collect(),
            Victim::VirtiofsdChild => procs::named("virtiofsd")
                .into_iter()
                .filter(|process| procs::is_child_of(process.pid, "virtiofsd"))
                .collect(),
            Victim::VsockDaemon => procs::named("vhost-device-vsock"),
            Victim::Containerd => procs::named("containerd")
                .into_iter()
                .filter(|process| process.program == "containerd")
                .collect(),
        }
    }

    /// Its processes, once there is one: a child that was just forked has another program's name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(self) -> Result<Vec<Proc>, String> {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let found = self.processes();
            if !found.is_empty() {
                return Ok(found);
            }
            if Instant::now() > end {
                return Err(format!("there is no {}", self.name()));
            }
            sleep(Duration::from_millis(5));
        }
    }
}

/// What is done to the victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Stop,
    /// The system call at the point fails: the disk is full.
    NoSpace,
    /// Too many open files.
    NoDescriptors,
    /// An input or output error.
    Io,
}

impl Deed {
    /// All of them, signals first.
    pub const ALL: &'static [Deed] = &[
        Deed::Kill,
        Deed::Stop,
        Deed::NoSpace,
        Deed::NoDescriptors,
        Deed::Io,
    ];

    /// Number and text of the error that it makes.
    pub fn error(self) -> Option<(i32, &'static str)> {
        match self {
            Deed::Kill | Deed::Stop => None,
            Deed::NoSpace => Some((nix::libc::ENOSPC, "No space left on device")),
            Deed::NoDescriptors => Some((nix::libc::EMFILE, "Too many open files")),
            Deed::Io => Some((nix::libc::EIO, "Input/output error")),
        }
    }

    /// Heading in the table.
    fn name(self) -> &'static str {
        match self {
            Deed::Kill => "KILL",
            Deed::Stop => "STOP",
            Deed::NoSpace => "ENOSPC",
            Deed::NoDescriptors => "EMFILE",
            Deed::Io => "EIO",
        }
    }
}

/// One trial: what is done to whom, and where. An error is the point's own, so its victim is the
/// process that comes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    /// Where.
    pub point: Point,
    /// To whom.
    pub victim: Victim,
    /// What.
    pub deed: Deed,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, name) = (self.point.number(), self.point.name());
        write!(
            f,
            "{number} {name}: {} {}",
            self.deed.name(),
            self.victim.name()
        )
    }
}

impl Cell {
    /// The trial of this process at a point.
    pub const fn new(point: Point, victim: Victim, deed: Deed) -> Cell {
        Cell {
            point,
            victim,
            deed,
        }
    }

    /// All that there are.
    pub fn all() -> Vec<Cell> {
        let mut cells = Vec::new();
        for &point in Point::ALL {
            for victim in Victim::ALL {
                let signals = [Deed::Kill, Deed::Stop].map(|deed| Cell::new(point, victim, deed));
                cells.extend(signals.into_iter().filter(|_| victim.lives_at(point)));
            }
            let errors = [Deed::NoSpace, Deed::NoDescriptors, Deed::Io];
            let can_fail = point.failure() == Failure::Returned;
            cells.extend(
                errors
                    .map(|deed| Cell::new(point, comes_to(point), deed))
                    .into_iter()
                    .filter(|_| can_fail),
            );
        }
        cells
    }
}

/// The process that comes to a point.
pub fn comes_to(point: Point) -> Victim {
    match point.program() {
        Program::Start => Victim::Start,
        Program::Server => Victim::Server,
        // The end of a server is where its state directory is first undone.
        Program::Delete if point == Point::UndoHalfDone => Victim::Server,
        Program::Delete => Victim::Delete,
    }
}

/// What `make test` tries: each point once, with a victim and a deed that it is worth most for.
pub const ONCE: [(Point, Victim, Deed); 64] = {
    use Deed::{Io, Kill, NoDescriptors, NoSpace, Stop};
    use Victim::{Containerd, Delete, Qemu, Server, Start, Virtiofsd, VsockDaemon};
    [
        (Point::StartBeforeLock, Start, NoDescriptors),
        (Point::StartUndoing, Start, Kill),
        (Point::StartSocketBound, Start, Kill),
        (Point::ServerForked, Start, Kill),
        (Point::ServerNotRecorded, Server, Kill),
        (Point::ServerRecorded, Server, NoSpace),
        (Point::ServerBeforeReady, Start, Kill),
        (Point::StartServerReady, Start, Io),
        (Point::CreateSpecRead, Server, Io),
        (Point::CreateNoShare, Server, NoSpace),
        (Point::SharesMounted, Server, Kill),
        (Point::CgroupRecorded, Server, Kill),
        (Point::CgroupMade, Server, NoSpace),
        (Point::NetnsOpened, Server, NoDescriptors),
        (Point::CapabilitiesAsked, Qemu, Kill),
        (Point::VsockAddressTaken, Server, Kill),
        (Point::QemuForked, Server, Kill),
        (Point::QemuNoGreeting, Qemu, Kill),
        (Point::VsockDaemonForked, VsockDaemon, Kill),
        (Point::VirtiofsdForked, Virtiofsd, Kill),
        (Point::VirtiofsdServes, Server, Kill),
        (Point::TapMade, Server, NoDescriptors),
        (Point::RedirectRecorded, Server, Kill),
        (Point::RedirectSet, Qemu, Kill),
        (Point::DeviceHalfAdded, Virtiofsd, Kill),
        (Point::BeforeCont, Server, Kill),
        (Point::Booting, Qemu, Kill),
        (Point::AgentDialled, VsockDaemon, Kill),
        (Point::InterfaceSetting, Qemu, Kill),
        (Point::SandboxCreating, Virtiofsd, Kill),
        (Point::RelaysMade, Containerd, Kill),
        (Point::ContainerFifosOpen, Server, Kill),
        (Point::RootfsMounted, Server, Io),
        (Point::VolumesBound, Server, NoSpace),
        (Point::MachineResizing, Qemu, Kill),
        (Point::HookRuns, Server, Kill),
        (Point::DiskHalfPlugged, Qemu, Kill),
        (Point::StdioDialled, VsockDaemon, Kill),
        (Point::ContainerCreating, Qemu, Kill),
        (Point::ContainerCreated, Qemu, Kill),
        (Point::ContainerStarting, Virtiofsd, Kill),
        (Point::ContainerStarted, Qemu, Kill),
        (Point::ExecAnnounced, Qemu, Kill),
        (Point::ExecStarting, Qemu, Kill),
        (Point::ExecRuns, Server, Kill),
        (Point::OutputWaits, Server, Kill),
        (Point::InputWaits, VsockDaemon, Kill),
        (Point::LogFileWriting, Server, NoSpace),
        (Point::Paused, Qemu, Stop),
        (Point::SignalSending, Virtiofsd, Stop),
        (Point::SigkillAnswered, VsockDaemon, Stop),
        (Point::InitEnded, Server, Kill),
        (Point::ExitTold, Server, Kill),
        (Point::ContainerRemoving, Qemu, Kill),
        (Point::DiskUnplugging, Server, Kill),
        (Point::Unmounting, Containerd, Kill),
        (Point::DeleteQueued, Server, Kill),
        (Point::ShutdownTaken, Server, Stop),
        (Point::QemuQuitting, Qemu, Stop),
        (Point::HelpersEnding, Server, Kill),
        (Point::UndoHalfDone, Server, Kill),
        (Point::DeleteWaits, Delete, Kill),
        (Point::DeleteKills, Delete, Stop),
        (Point::DeleteSweeps, Delete, Kill),
    ]
};

/// What it takes to come past a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// `ctr run --rm` of a program that says a word and ends.
    Run,
    /// The same in a network namespace with a link.
    Network,
    /// The same with a disk of the host's.
    Disk,
    /// The same with its output in a file.
    LogFile,
    /// The same with a hook that runs on the host.
    Hook,
    /// A second container, for which the machine has to grow.
    Growth,
    /// An exec.
    Exec,
    /// An exec on a terminal.
    Terminal,
    /// An exec that reads its input.
    Input,
    /// A pause.
    Pause,
    /// SIGTERM.
    Sigterm,
    /// SIGKILL.
    Sigkill,
}

impl Life {
    /// The least that comes there.
    pub fn past(point: Point) -> Life {
        match point {
            Point::TapMade
            | Point::RedirectRecorded
            | Point::RedirectSet
            | Point::InterfaceSetting => Life::Network,
            Point::DiskHalfPlugged | Point::DiskUnplugging => Life::Disk,
            Point::LogFileWriting => Life::LogFile,
            Point::HookRuns => Life::Hook,
            Point::MachineResizing => Life::Growth,
            Point::ExecAnnounced | Point::ExecStarting => Life::Exec,
            Point::ExecRuns => Life::Terminal,
            Point::InputWaits => Life::Input,
            Point::Paused => Life::Pause,
            Point::SignalSending => Life::Sigterm,
            Point::SigkillAnswered => Life::Sigkill,
            _ => Life::Run,
        }
    }
}

/// The directory that containerd and all below it look into.
fn directory() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    let find = || PathBuf::from(std::env::var_os(DIRECTORY).expect("the suite names a directory"));
    FOUND.get_or_init(find)
}

/// Forgets what was planted and reached.
pub fn clear() {
    let _ = fs::remove_dir_all(directory());
    fs::create_dir_all(directory()).unwrap();
}

/// Says what the next process at a point does there.
pub fn plant(point: Point, text: &str) {
    let hidden = directory().join(".new");
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, directory().join(point.name())).unwrap();
}

/// The process that has come to a point.
pub fn reached(point: Point) -> Option<u32> {
    let prefix = format!("{}.reached.", point.name());
    let mut entries = fs::read_dir(directory()).unwrap().flatten();
    entries.find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(&prefix)?.parse().ok()
    })
}

/// Sends a signal; a process that is gone is fine.
pub fn send(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
}

/// Where in the sources each point is reached.
fn places() -> BTreeMap<&'static str, String> {
    let mut places = BTreeMap::new();
    for dir in ["shim/src", "vmm/src"] {
        search(&assets::root().join(dir), &mut places);
    }
    places
}

fn search(dir: &Path, places: &mut BTreeMap<&'static str, String>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            search(&path, places);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for point in Point::ALL {
            if text.contains(&format!("Point::{})", point.name())) {
                let short = path.strip_prefix(assets::root()).unwrap();
                places.insert(point.name(), short.display().to_string());
            }
        }
    }
}

/// The lines between which the table is made.
const MARKERS: [&str; 2] = ["<!-- begin of the table -->", "<!-- end of the table -->"];

/// The results of all trials so far, as a document has them.
pub struct Table {
    path: PathBuf,
    results: BTreeMap<Cell, String>,
}

impl Table {
    /// Reads what is known; what is not in this document is not tried yet.
    pub fn read(path: PathBuf) -> Table {
        let text = fs::read_to_string(&path).unwrap();
        let mut results = BTreeMap::new();
        let rows = text.lines().filter_map(|line| {
            let columns: Vec<&str> = line.split('|').map(str::trim).collect();
            let number: usize = columns.get(1)?.parse().ok()?;
            Some((*Point::ALL.get(number.checked_sub(1)?)?, columns))
        });
        for (point, columns) in rows {
            for (heading, text) in headings().zip(columns.iter().skip(5)) {
                let mut known = text.split(' ');
                for deed in heading.1 {
                    let cell = Cell::new(point, heading.0.unwrap_or(comes_to(point)), *deed);
                    if let Some(result) = known.next().filter(|text| !["-", ".", ""].contains(text))
                    {
                        results.insert(cell, result.to_owned());
                    }
                }
            }
        }
        Table { path, results }
    }

    /// Notes a result. One that is not as it should be stays for the whole run.
    pub fn note(&mut self, cell: Cell, result: &str) {
        self.results.insert(cell, result.to_owned());
    }

    /// Writes the document with the present results.
    pub fn write(&self) {
        let text = fs::read_to_string(&self.path).unwrap();
        let (before, rest) = text.split_once(MARKERS[0]).expect("the table has a place");
        let (_, after) = rest.split_once(MARKERS[1]).expect("the table has an end");
        let [begin, end] = MARKERS;
        fs::write(
            &self.path,
            format!("{before}{begin}\n{}{end}{after}", self.rows()),
        )
        .unwrap();
    }

    fn rows(&self) -> String {
        let names: Vec<String> = headings().map(|heading| heading.2).collect();
        let mut text = format!(
            "| # | point | what has happened | in | {} |\n|--|--|--|--|{}\n",
            names.join(" | "),
            "--|".repeat(names.len())
        );
        let (places, all) = (places(), Cell::all());
        for &point in Point::ALL {
            let place = &places[point.name()];
            let results = headings().map(|(victim, deeds, _)| {
                let victim = victim.unwrap_or(comes_to(point));
                let result = |deed: &Deed| {
                    let cell = Cell::new(point, victim, *deed);
                    let known = self.results.get(&cell).map(String::as_str);
                    if all.contains(&cell) {
                        known.unwrap_or(".")
                    } else {
                        "-"
                    }
                };
                deeds.iter().map(result).collect::<Vec<_>>().join(" ")
            });
            text += &format!(
                "| {} | `{}` | {} | {place} | {} |\n",
                point.number(),
                point.name(),
                point.description(),
                results.collect::<Vec<_>>().join(" | ")
            );
        }
        text
    }
}

/// Whose column, the deeds in it, and its heading.
fn headings() -> impl Iterator<Item = (Option<Victim>, &'static [Deed], String)> {
    let (signals, errors) = Deed::ALL.split_at(2);
    let victims = Victim::ALL.into_iter();
    victims
        .map(move |victim| (Some(victim), signals, victim.name().to_owned()))
        .chain([(None, errors, "ENOSPC EMFILE EIO".to_owned())])
}
