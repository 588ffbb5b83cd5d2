//! One QEMU by itself: its start, its monitor, the devices on its buses, its sizes and its
//! death. [`crate::boot`] and [`crate::machine`] make a machine of it and the helpers.

mod resize;
#[cfg(test)]
pub(crate) mod scripted;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use sys::point::{Point, pass, reach};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use self::resize::Limits;
use crate::confine::{INITRAMFS, KERNEL};
use crate::console::{self, Console};
use crate::deadlines::{QEMU_KILL, QEMU_LAST_WORDS, UNPLUG_LOOK_AGAIN};
use crate::devices::{self, Attached, Device, Plug, Undo};
use crate::error::{Doing, Error, Result};
use crate::process::{Child, Exit, Process, Spawn, last_words};
use crate::qemu::{Inherited, MachineConfig, arguments, place, places};
use crate::qmp::Qmp;
use crate::qmp::commands::{Cont, DeviceDel, QueryVirtioStatus, Quit};

/// A QEMU process that nobody has spoken to yet. Dropping it kills it.
#[derive(Debug)]
pub struct Starting {
    /// QEMU: known before anything can go wrong with it.
    pub process: Child,
    console: Option<Console>,
    socket: UnixStream,
    root_ports: u8,
    places: u8,
    virtio_status: bool,
    limits: Limits,
}

/// A QEMU process with an open monitor. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    /// QEMU, whose end [`Vm::died`] explains.
    pub process: Child,
    _console: Option<Console>,
    qmp: Qmp,
    virtio_status: bool,
    limits: Limits,
    devices: Mutex<Devices>,
    /// One change of size at a time.
    resizing: tokio::sync::Mutex<()>,
    death: watch::Receiver<Option<Death>>,
}

#[derive(Debug, Default)]
struct Devices {
    next: u32,
    root_ports: u8,
    /// Places without a device, the lowest one last.
    free: Vec<u8>,
    attached: HashMap<String, (u8, Vec<Undo>)>,
}

/// How a virtual machine ended. `Display` is one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// QEMU's process id.
    pub pid: i32,
    /// How the process ended.
    pub exit: Exit,
    /// Its last lines on stderr.
    pub stderr: Vec<String>,
    /// The last event that explains it: a guest that powered off, panicked or rebooted, or our own
    /// quit.
    pub event: Option<String>,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU (process {}) {}", self.pid, self.exit)?;
        if let Some(event) = &self.event {
            write!(f, ": {event}")?;
        }
        match last_words(&self.stderr) {
            Some(line) => write!(f, ": {line}"),
            None => Ok(()),
        }
    }
}

impl Vm {
    /// Starts QEMU, with its CPUs stopped. The process exists when this returns;
    /// [`Starting::connect`] finds out whether it likes what it was given.
    ///
    /// # Errors
    /// The binary cannot be executed, a cgroup is not there, or the configuration asks for what
    /// cannot be.
    pub async fn spawn(config: &MachineConfig) -> Result<Starting> {
        let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
        let (console, shown) = match &config.console {
            Some(file) => console::keep(file)?,
            None => (None, None),
        };
        let (kernel, initramfs) = match config.confinement {
            Some(_) => (
                Path::new(KERNEL),
                config.initramfs.is_some().then_some(Path::new(INITRAMFS)),
            ),
            None => (config.kernel.as_path(), config.initramfs.as_deref()),
        };
        let inherited = Inherited {
            monitor: theirs.as_raw_fd(),
            console: console.as_ref().map(AsRawFd::as_raw_fd),
            kernel,
            initramfs,
        };
        let arguments = arguments(config, &inherited)?;
        let process = Child::spawn(Spawn {
            fds: [Some(OwnedFd::from(theirs)), console]
                .into_iter()
                .flatten()
                .collect(),
            cgroup_procs: config.cgroup_procs.clone(),
            netns: config.netns.clone(),
            oom_score_adj: config.oom_score_adj,
            jail: jail(config).await?,
            ..Spawn::new(&config.qemu, arguments)
        })?;
        reach(Point::QemuForked).doing(|| format!("start {}", config.qemu.display()))?;
        let virtio_status = config.capabilities.virtio_status();
        let limits = Limits {
            vcpus: config.vcpus,
            max_vcpus: config.max_vcpus,
            memory_mib: config.memory_mib,
            max_memory_mib: config.max_memory_mib,
            vcpus_can_go: config.accel.kvm,
        };
        Ok(Starting {
            process,
            socket: ours,
            root_ports: config.root_ports,
            places: places(config),
            virtio_status,
            limits,
            console: shown,
        })
    }

    /// Adds a device, before the CPUs run or after. Several may be added side by side. If it fails,
    /// nothing of it stays.
    ///
    /// # Errors
    /// No free PCI slot, a helper that is gone, QEMU's own.
    pub async fn attach(&self, device: Device) -> Result<Attached> {
        let name = device.name();
        let attached = self.attach_nameless(device).await;
        attached.map_err(|error| match name {
            Some(device) => Error::Device {
                device,
                source: Box::new(error),
            },
            None => error,
        })
    }

    async fn attach_nameless(&self, device: Device) -> Result<Attached> {
        device.check()?;
        let (id, number, place) = {
            let mut devices = self.devices();
            let Some(number) = devices.free.pop() else {
                return Err(Error::Unsupported(
                    "every PCI slot of the virtual machine has a device".into(),
                ));
            };
            devices.next += 1;
            let id = format!("{}{}", device.kind(), devices.next);
            (id, number, place(devices.root_ports, number))
        };
        let mut plug = Plug {
            qmp: &self.qmp,
            id: id.clone(),
            place: &place,
            undo: Vec::new(),
        };
        let plugged = device.plug(&mut plug).await;
        let undo = plug.undo;
        match plugged {
            Ok(()) => {
                self.devices().attached.insert(id.clone(), (number, undo));
                Ok(Attached {
                    id,
                    pci_path: place.pci_path,
                })
            }
            Err(error) => {
                let error = self.explained(error).await;
                if !matches!(error, Error::Died { .. } | Error::Closed { .. }) {
                    devices::undo(&self.qmp, undo).await;
                    self.devices().release(number);
                }
                Err(error)
            }
        }
    }

    /// Removes a device. The guest has a say in it: it may refuse, or not answer.
    ///
    /// # Errors
    /// No such device, the guest's refusal, or the deadline; the device is still there then.
    pub async fn detach(&self, id: &str, timeout: Duration) -> Result<()> {
        if !self.devices().attached.contains_key(id) {
            return Err(Error::Unsupported(format!("no device {id} is attached")));
        }
        match self.unplug(id, timeout).await {
            Ok(()) => {
                self.forget(id).await;
                Ok(())
            }
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Asks the guest to let go of what has this id, and waits until it has.
    async fn unplug(&self, id: &str, timeout: Duration) -> Result<()> {
        reach(Point::DiskUnplugging).doing(|| format!("unplug {id}"))?;
        let mut events = self.qmp.events();
        match self
            .qmp
            .execute_within(&DeviceDel { id: id.into() }, timeout)
            .await
        {
            Ok(_) => {}
            Err(error) if error.is_class("DeviceNotFound") => return Ok(()),
            Err(error) => return Err(error),
        }
        let until = Instant::now() + timeout;
        let refused = loop {
            match timeout_at(until.min(Instant::now() + UNPLUG_LOOK_AGAIN), events.recv()).await {
                Ok(Ok(event)) if event.is_end_of(id) => return Ok(()),
                Ok(Ok(event)) if event.is_refusal_of(id) => break true,
                Ok(Ok(_)) => {}
                Ok(Err(RecvError::Closed)) => break false,
                Err(_) if Instant::now() >= until => break false,
                // Some events were missed and this one may be among them, or QEMU sends none, as
                // for an emulated CPU.
                Ok(Err(RecvError::Lagged(_))) | Err(_) => {
                    if !devices::exists(&self.qmp, id).await? {
                        return Ok(());
                    }
                }
            }
        };
        // An event is a hint, a query is the truth.
        match devices::exists(&self.qmp, id).await? {
            false => Ok(()),
            true if refused => Err(Error::Unsupported(format!(
                "the guest keeps the device {id}"
            ))),
            true => Err(Error::Deadline {
                doing: format!("the guest to let go of {id}"),
                timeout,
            }),
        }
    }

    async fn forget(&self, id: &str) {
        let removed = self.devices().attached.remove(id);
        if let Some((number, undo)) = removed {
            devices::undo(&self.qmp, undo).await;
            self.devices().release(number);
        }
    }

    /// Lets the CPUs run.
    ///
    /// # Errors
    /// QEMU's own, or its death.
    pub async fn cont(&self) -> Result<()> {
        reach(Point::BeforeCont).doing(|| "let the guest run".into())?;
        match self.qmp.execute(&Cont {}).await {
            Ok(_) => reach(Point::Booting).doing(|| "wait for the guest".into()),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Whether the guest's driver of a virtio device is up; none if this QEMU cannot tell.
    ///
    /// # Errors
    /// No such device, or QEMU's death.
    pub async fn driver_ok(&self, id: &str) -> Result<Option<bool>> {
        if !self.virtio_status {
            return Ok(None);
        }
        let path = format!("/machine/peripheral/{id}/virtio-backend");
        match self.qmp.execute(&QueryVirtioStatus { path }).await {
            Ok(status) => Ok(Some(status.driver_ok())),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Waits for the end of QEMU, however it comes; any number of callers may, at any time.
    pub async fn died(&self) -> Death {
        let mut death = self.death.clone();
        let seen = death
            .wait_for(Option::is_some)
            .await
            .map(|death| death.clone());
        seen.ok().flatten().unwrap_or_else(|| Death {
            pid: self.process.identity().pid,
            exit: Exit::Unknown,
            stderr: self.process.stderr_tail(),
            event: None,
        })
    }

    /// Ends QEMU: asks it to quit, kills it when `timeout` has passed, and waits for the end. May
    /// be called again.
    ///
    /// # Errors
    /// The kernel does not let it die (10 s after SIGKILL).
    pub async fn stop(&self, timeout: Duration) -> Result<Death> {
        let asked = async {
            pass(Point::QemuQuitting);
            // With an answer, an error or none: only its end counts.
            let _ = self.qmp.execute_within(&Quit {}, timeout).await;
            self.process.exited().await
        };
        if tokio::time::timeout(timeout, asked).await.is_err() {
            tracing::warn!(
                pid = self.process.identity().pid,
                ?timeout,
                "QEMU did not quit in time and is killed"
            );
            self.process.kill_and_wait(QEMU_KILL).await?;
        }
        Ok(self.died().await)
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        sys::lock(&self.devices)
    }

    /// A closed monitor is mostly QEMU's death, which explains more.
    async fn explained(&self, error: Error) -> Error {
        match error {
            Error::Closed { .. } => self.process.explain(error, QEMU_LAST_WORDS).await,
            other => other,
        }
    }
}

impl Devices {
    fn release(&mut self, number: u8) {
        self.free.push(number);
        self.free.sort_unstable_by(|a, b| b.cmp(a));
    }
}

impl Starting {
    /// Opens the monitor. When this returns, QEMU has made its machine.
    ///
    /// # Errors
    /// QEMU ended (with its last line), or did not answer in time; either way it is dead.
    pub async fn connect(self, timeout: Duration) -> Result<Vm> {
        reach(Point::QemuNoGreeting).doing(|| "open QEMU's monitor".into())?;
        let (qmp, version) = match Qmp::open(self.socket, timeout).await {
            Ok(open) => open,
            Err(error) => return Err(self.process.explain(error, QEMU_LAST_WORDS).await),
        };
        tracing::debug!(version, pid = self.process.identity().pid, "QEMU is up");
        let (sender, death) = watch::channel(None);
        tokio::spawn(watch_over(
            self.process.watched(),
            qmp.closing(),
            qmp.last_word(),
            sender,
        ));
        let devices = Mutex::new(Devices {
            free: (0..self.places).rev().collect(),
            root_ports: self.root_ports,
            ..Devices::default()
        });
        let Starting {
            process,
            virtio_status,
            limits,
            console,
            ..
        } = self;
        Ok(Vm {
            process,
            _console: console,
            qmp,
            virtio_status,
            limits,
            devices,
            resizing: tokio::sync::Mutex::default(),
            death,
        })
    }
}

/// QEMU's jail; the guest's kernel and initramfs are in it as they are now, whatever becomes of
/// their paths.
async fn jail(config: &MachineConfig) -> Result<Option<launcher::Jail>> {
    let Some(confinement) = &config.confinement else {
        return Ok(None);
    };
    let mut boot: Vec<_> = config
        .capabilities
        .data_dirs()
        .cloned()
        .map(launcher::Entry::ReadOnly)
        .collect();
    for (path, to) in [
        (Some(&config.kernel), KERNEL),
        (config.initramfs.as_ref(), INITRAMFS),
    ] {
        let Some(path) = path else { continue };
        let file = File::open(path).doing(|| format!("open {}", path.display()))?;
        boot.push(launcher::Entry::Descriptor {
            file: Arc::new(file.into()),
            to: to.into(),
        });
    }
    confinement
        .qemu(&config.qemu, &config.cache_dir, config.accel.kvm, boot)
        .await
        .map(Some)
}

/// Waits for what comes first, the end of the process or of its monitor, and makes sure of the
/// other.
async fn watch_over(
    process: Arc<Process>,
    closing: impl Future<Output = String>,
    last_word: Arc<Mutex<Option<String>>>,
    sender: watch::Sender<Option<Death>>,
) {
    let mut closing = std::pin::pin!(closing);
    let exit = tokio::select! {
        exit = process.exited() => {
            // The event that says why may still be on its way.
            let _ = tokio::time::timeout(QEMU_LAST_WORDS, closing).await;
            exit
        }
        reason = &mut closing => match tokio::time::timeout(QEMU_LAST_WORDS, process.exited()).await {
            Ok(exit) => exit,
            Err(_) => {
                tracing::warn!(reason, "QEMU's monitor is gone and QEMU is not: it is killed");
                process.kill();
                process.exited().await
            }
        },
    };
    let event = sys::lock(&last_word).take();
    let death = Death {
        pid: process.identity().pid,
        exit,
        stderr: process.stderr_tail(),
        event,
    };
    sender.send_replace(Some(death));
}
