//! A network card (virtio-net) on tap queues that the caller has opened, in whatever network
//! namespace they are.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use serde_json::{Map, json};

use super::{Plug, Undo};
use crate::error::{Doing, Error, Result};
use crate::qmp::commands::NetdevAdd;

// linux/if_tun.h: _IOR('T', 210, unsigned int).
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;

/// A network card.
#[derive(Debug)]
pub struct Net {
    /// Name of the link that it stands for: what an error calls it.
    pub name: String,
    /// The open queues of one tap device, made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and with
    /// IFF_MULTI_QUEUE if there are several.
    pub taps: Vec<OwnedFd>,
    /// `/dev/vhost-net`, opened once for each queue; or none, and QEMU moves the packets itself.
    pub vhost: Vec<OwnedFd>,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The largest packet, which the guest takes over by itself and cannot exceed.
    pub mtu: Option<u16>,
}

impl Net {
    /// QEMU finds out too, but a bad queue behind a good one leaves it with half a netdev that
    /// cannot be removed.
    pub(super) fn check(&self) -> Result<()> {
        let queues = self.taps.len();
        if queues == 0 || !(self.vhost.is_empty() || self.vhost.len() == queues) {
            let vhost = self.vhost.len();
            return Err(Error::Unsupported(format!(
                "a network card of {queues} tap queues and {vhost} of vhost-net"
            )));
        }
        self.taps.iter().try_for_each(check_tap)
    }

    pub(super) async fn plug(self, plug: &mut Plug<'_>) -> Result<()> {
        let queues = self.taps.len();
        let steps_before = plug.undo.len();
        let netdev = format!("{}-tap", plug.id);
        let mut arguments = Map::from_iter([
            ("type".to_owned(), json!("tap")),
            ("id".to_owned(), json!(netdev.as_str())),
        ]);
        arguments.insert(
            "fds".into(),
            json!(pass_all(plug, "queue", self.taps).await?),
        );
        if !self.vhost.is_empty() {
            arguments.insert(
                "vhostfds".into(),
                json!(pass_all(plug, "vhost", self.vhost).await?),
            );
        }
        plug.qmp.execute(&NetdevAdd(arguments)).await?;
        // The netdev has taken the descriptors.
        plug.undo.truncate(steps_before);
        plug.undo.push(Undo::RemoveNetdev(netdev.clone()));
        // No ROM: nobody boots from this card, and the file may not be installed.
        let mut properties =
            json!({"netdev": netdev, "mac": sys::mac_text(&self.mac), "romfile": ""});
        if queues > 1 {
            properties["mq"] = json!(true);
            // One for each direction of a queue, one for the control queue, one for changes of
            // configuration.
            properties["vectors"] = json!(2 * queues + 2);
        }
        if let Some(mtu) = self.mtu {
            properties["host_mtu"] = json!(mtu);
        }
        plug.device_add("virtio-net-pci", properties).await
    }
}

/// Passes descriptors under names of ours, and returns them as QEMU wants a list of names.
async fn pass_all(plug: &mut Plug<'_>, what: &str, fds: Vec<OwnedFd>) -> Result<String> {
    let mut names = Vec::new();
    for (index, fd) in fds.into_iter().enumerate() {
        let name = format!("{}-{what}{index}", plug.id);
        plug.qmp.pass_fd(&name, fd).await?;
        plug.undo.push(Undo::CloseFd(name.clone()));
        names.push(name);
    }
    Ok(names.join(":"))
}

/// Whether it is an open queue of a tap device in the form that the guest's packets have.
fn check_tap(fd: &OwnedFd) -> Result<()> {
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl writes an ifreq at the address of a local one.
    let asked = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) };
    Errno::result(asked).doing(|| format!("use descriptor {} as a tap queue", fd.as_raw_fd()))?;
    // SAFETY: a successful TUNGETIFF has written the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if flags & needed != needed {
        let what = "a tap queue must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR";
        return Err(Error::Unsupported(format!(
            "{what}: its flags are {flags:#x}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_said() {
        let error = check_tap(&std::fs::File::open("/dev/null").unwrap().into())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("cannot use descriptor ") && error.contains(" as a tap queue: "),
            "{error}"
        );
    }
}
