//! Block devices of the host in a container: which node of the guest each one is, and what that
//! means for the spec.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use guest_protocol::protocols::agent::Device;
use guest_protocol::protocols::oci;

use crate::error::{Context, Error, Result};
use crate::storage::block_device;

/// Major and minor.
type Numbers = (i64, i64);

/// Resolves the devices that the host has plugged in, and gives the spec's entries and rules for
/// them the numbers that they have in the guest.
///
/// # Errors
/// An unknown type; a device that does not come in time, or that the spec does not name.
pub async fn place(
    devices: &[Device],
    spec: &mut oci::Spec,
    hotplug_timeout: Duration,
) -> Result<()> {
    let mut guest_numbers = HashMap::new();
    for device in devices {
        let (host, guest) = place_one(device, spec, hotplug_timeout).await?;
        guest_numbers.insert(host, guest);
    }
    translate_rules(spec, &guest_numbers);
    Ok(())
}

/// Returns the numbers that the spec's entry had, which are the host's, and those of the guest.
async fn place_one(
    device: &Device,
    spec: &mut oci::Spec,
    hotplug_timeout: Duration,
) -> Result<(Numbers, Numbers)> {
    let node = match device.type_.as_str() {
        "blk" => block_device(&device.id, hotplug_timeout).await?,
        other => {
            return Err(Error::Invalid(format!(
                "unknown device type {other:?} for {}",
                device.container_path
            )));
        }
    };
    let number = fs::metadata(&node)
        .context(|| format!("stat {node}"))?
        .rdev();
    let linux = spec.Linux.mut_or_insert_default();
    let entry = linux
        .Devices
        .iter_mut()
        .find(|entry| entry.Path == device.container_path)
        .ok_or_else(|| {
            Error::Invalid(format!(
                "device {} is missing in the spec's linux.devices",
                device.container_path
            ))
        })?;
    let host = (entry.Major, entry.Minor);
    let guest = (
        i64::from(libc::major(number)),
        i64::from(libc::minor(number)),
    );
    entry.Type = "b".into();
    (entry.Major, entry.Minor) = guest;
    Ok((host, guest))
}

/// Gives the rules about disks of the host the numbers that those have here.
fn translate_rules(spec: &mut oci::Spec, guest_numbers: &HashMap<Numbers, Numbers>) {
    let resources = spec
        .Linux
        .as_mut()
        .and_then(|linux| linux.Resources.as_mut());
    for rule in resources
        .into_iter()
        .flat_map(|resources| &mut resources.Devices)
        .filter(|rule| rule.Type == "b")
    {
        if let Some(guest) = guest_numbers.get(&(rule.Major, rule.Minor)) {
            (rule.Major, rule.Minor) = *guest;
        }
    }
}
