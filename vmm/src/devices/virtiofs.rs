//! A shared directory (vhost-user-fs), served by virtiofsd.

use std::os::fd::OwnedFd;

use serde_json::json;
use sys::point::{Point, reach};

use super::Plug;
use crate::error::{Doing, Result};

/// A directory that the guest mounts by its tag.
#[derive(Debug)]
pub struct VirtioFs {
    /// What the guest mounts, at most 36 bytes.
    pub tag: String,
    /// Connected to virtiofsd ([`crate::helpers::Virtiofsd::spawn`]).
    pub connection: OwnedFd,
    /// Requests under way at a time; a power of two.
    pub queue_size: u16,
}

impl VirtioFs {
    pub(super) async fn plug(self, plug: &mut Plug<'_>) -> Result<()> {
        let chardev = plug.vhost_user(self.connection).await?;
        reach(Point::DeviceHalfAdded).doing(|| format!("add {}", self.tag))?;
        let properties =
            json!({"chardev": chardev, "tag": self.tag, "queue-size": self.queue_size});
        plug.device_add("vhost-user-fs-pci", properties).await?;
        reach(Point::VirtiofsdServes).doing(|| format!("add {}", self.tag))
    }
}
