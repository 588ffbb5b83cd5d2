//! Devices that a sandbox adds to the base machine. There is one way for all of them, before the
//! CPUs run and after: QMP commands that end in a `device_add` into a free place, undone in
//! reverse order if one fails.

pub mod block;
pub(crate) mod memory;
pub mod net;
pub mod virtiofs;
pub mod vsock;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::qemu::Place;
use crate::qmp::Qmp;
use crate::qmp::commands::{
    BlockdevDel, ChardevAdd, ChardevRemove, DeviceAdd, NetdevDel, ObjectDel, QomList, RemoveFd,
    connected_socket,
};

/// A device to attach.
#[derive(Debug)]
pub enum Device {
    /// The way to the guest agent.
    Vsock(vsock::VsockDevice),
    /// A shared directory.
    VirtioFs(virtiofs::VirtioFs),
    /// A disk.
    Block(block::Block),
    /// A network card.
    Net(net::Net),
    /// Memory; made by [`crate::Machine::resize_memory`].
    Memory(memory::Memory),
}

/// An attached device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// What [`crate::Machine::detach`] takes; unique in this virtual machine.
    pub id: String,
    /// Where the guest finds it: slot of the root port or bridge and of the device behind it,
    /// hexadecimal: `04/00`.
    pub pci_path: String,
}

impl Device {
    /// First part of the id.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Device::Vsock(_) => "vsock",
            Device::VirtioFs(_) => "fs",
            Device::Block(_) => "blk",
            Device::Net(_) => "net",
            Device::Memory(_) => memory::KIND,
        }
    }

    /// What a user calls it, if that says more than the error does.
    pub(crate) fn name(&self) -> Option<String> {
        match self {
            Device::Net(net) => Some(format!("NIC {}", net.name)),
            _ => None,
        }
    }

    /// Whether it can be plugged at all: what QEMU would find out too late.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Device::Net(net) => net.check(),
            _ => Ok(()),
        }
    }

    /// Sends what it takes, and notes in `plug` what undoes it.
    pub(crate) async fn plug(self, plug: &mut Plug<'_>) -> Result<()> {
        match self {
            Device::Vsock(vsock) => vsock.plug(plug).await,
            Device::VirtioFs(virtiofs) => virtiofs.plug(plug).await,
            Device::Block(block) => block.plug(plug).await,
            Device::Net(net) => net.plug(plug).await,
            Device::Memory(memory) => memory.plug(plug).await,
        }
    }
}

/// One step back.
#[derive(Debug)]
pub(crate) enum Undo {
    CloseFd(String),
    RemoveFdSet(u64),
    RemoveChardev(String),
    RemoveBlockNode(String),
    RemoveNetdev(String),
    RemoveObject(String),
}

/// A device on its way into the machine.
pub(crate) struct Plug<'a> {
    pub qmp: &'a Qmp,
    pub id: String,
    pub place: &'a Place,
    pub undo: Vec<Undo>,
}

impl Plug<'_> {
    /// The connected socket of a vhost-user helper, as a character device whose id is returned.
    async fn vhost_user(&mut self, connection: std::os::fd::OwnedFd) -> Result<String> {
        let (fdname, id) = (format!("{}-fd", self.id), format!("{}-chr", self.id));
        self.qmp.pass_fd(&fdname, connection).await?;
        self.undo.push(Undo::CloseFd(fdname.clone()));
        self.qmp
            .execute(&ChardevAdd {
                id: id.clone(),
                backend: connected_socket(&fdname),
            })
            .await?;
        // The character device has taken the descriptor.
        self.undo.pop();
        self.undo.push(Undo::RemoveChardev(id.clone()));
        Ok(id)
    }

    /// The last step: `properties` with driver, id and place added.
    async fn device_add(&mut self, driver: &str, properties: Value) -> Result<()> {
        let mut arguments = match properties {
            Value::Object(properties) => properties,
            _ => Map::new(),
        };
        let Place { bus, slot, .. } = self.place;
        arguments.extend(
            [("driver", driver), ("id", &self.id), ("bus", bus)].map(|(k, v)| (k.into(), json!(v))),
        );
        // Behind a bridge: the bus has many slots, and QEMU takes a device there for one that old
        // drivers use, which needs space for IO ports.
        if *slot != 0 {
            arguments.insert("addr".into(), json!(format!("{slot:#x}")));
            // Those of vhost-user are never such.
            if driver.starts_with("virtio-") {
                arguments.insert("disable-legacy".into(), json!("on"));
            }
        }
        match self.qmp.execute(&DeviceAdd(arguments)).await {
            Ok(_) => Ok(()),
            // No answer does not mean not done.
            Err(late @ Error::Deadline { .. }) => match exists(self.qmp, &self.id).await {
                Ok(true) => Ok(()),
                _ => Err(late),
            },
            Err(error) => Err(error),
        }
    }
}

/// Whether the machine has a device with this id.
pub(crate) async fn exists(qmp: &Qmp, id: &str) -> Result<bool> {
    let devices = qmp
        .execute(&QomList {
            path: "/machine/peripheral".into(),
        })
        .await?;
    Ok(devices.iter().any(|device| device.name == id))
}

/// Takes steps back, the last one first. One that fails is logged: the others still have to be
/// taken.
pub(crate) async fn undo(qmp: &Qmp, steps: Vec<Undo>) {
    for step in steps.into_iter().rev() {
        let done = match &step {
            Undo::CloseFd(name) => match qmp.close_fd(name).await {
                // There is none of that name: the command that failed had taken it.
                Err(Error::Refused { .. }) => Ok(()),
                done => done,
            },
            Undo::RemoveFdSet(fdset_id) => qmp
                .execute(&RemoveFd {
                    fdset_id: *fdset_id,
                })
                .await
                .map(drop),
            Undo::RemoveChardev(id) => qmp
                .execute(&ChardevRemove { id: id.clone() })
                .await
                .map(drop),
            Undo::RemoveBlockNode(node_name) => qmp
                .execute(&BlockdevDel {
                    node_name: node_name.clone(),
                })
                .await
                .map(drop),
            Undo::RemoveObject(id) => qmp.execute(&ObjectDel { id: id.clone() }).await.map(drop),
            Undo::RemoveNetdev(id) => qmp.execute(&NetdevDel { id: id.clone() }).await.map(drop),
        };
        if let Err(error) = done {
            tracing::warn!(?step, %error, "a part of a device stays in QEMU");
        }
    }
}
