//! A container's bind mounts: each source is shared with the guest, and the mount's source becomes its place there.
//!
//! Everything else (proc, sysfs, tmpfs, devpts, mqueue, cgroup) the guest makes itself.

use std::fs::File;
use std::path::Path;

use agent_client::protocols::oci as proto;
use oci_spec::runtime::Mount;

use crate::error::{Error, IoContext, Result};
use crate::sandbox::mounts;

/// Binds the sources of a container's bind mounts below `host_dir` and returns all its mounts with guest sources;
/// `guest_dir` is where the guest sees `host_dir`.
///
/// # Errors
/// One line that names the mount; the caller takes `host_dir` apart.
pub fn share_all(list: &[Mount], host_dir: &Path, guest_dir: &str) -> Result<Vec<proto::Mount>> {
    list.iter().enumerate().map(|(index, mount)| share(mount, index, host_dir, guest_dir)).collect()
}

fn share(from: &Mount, index: usize, host_dir: &Path, guest_dir: &str) -> Result<proto::Mount> {
    let options = from.options().clone().unwrap_or_default();
    let mut to = proto::Mount {
        destination: from.destination().to_string_lossy().into_owned(),
        source: from.source().as_ref().map(|source| source.to_string_lossy().into_owned()).unwrap_or_default(),
        type_: from.typ().clone().unwrap_or_default(),
        options,
        ..Default::default()
    };
    let recursive = to.options.iter().any(|option| option == "rbind") || to.type_ == "rbind";
    let is_bind = recursive || to.type_ == "bind" || to.options.iter().any(|option| option == "bind");
    let of_guest = ["/proc", "/sys", "/dev"].iter().any(|root| Path::new(&to.source).starts_with(root));
    if !is_bind || of_guest {
        return Ok(to);
    }
    let source = Path::new(&to.source);
    let metadata = std::fs::metadata(source).map_err(|error| {
        Error::invalid(format!("mount source {} for {}: {error}", source.display(), to.destination))
    })?;
    let name = format!("mount-{index}");
    let target = host_dir.join(&name);
    let doing = || format!("make {}", target.display());
    if metadata.is_dir() {
        std::fs::create_dir(&target).doing(doing)?;
    } else {
        File::create(&target).doing(doing)?;
    }
    match to.options.iter().any(|option| option == "ro" || option == "rro") {
        true => mounts::bind_read_only(source, &target, recursive)?,
        false => mounts::bind(source, &target, recursive)?,
    }
    to.source = format!("{guest_dir}/{name}");
    Ok(to)
}
