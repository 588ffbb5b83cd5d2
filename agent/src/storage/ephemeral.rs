//! Storages in the guest's memory: tmpfs and huge pages, and new sizes for those that are there.

use std::fs;
use std::path::Path;

use guest_protocol::protocols::agent::Storage;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use rustix::fs::CWD;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_string, fspick};

use super::{Driver, apply, driver_of, permissions, plain_mount};
use crate::error::{Context, Error, Result};
use crate::mount_options::Options;
use crate::stock::STOCK;

const HUGETLBFS: &str = "hugetlbfs";

/// A tmpfs in the guest's memory, with the size and mode that were asked for.
pub(super) fn make(storage: &Storage) -> Result<()> {
    let (_, group, rest) = permissions(&storage.options)?;
    let mut rest: Vec<String> = rest.into_iter().map(str::to_owned).collect();
    if storage.fstype == HUGETLBFS {
        reserve_huge_pages(&rest)?;
    } else {
        // The mode is the file system's own option here.
        rest.extend(
            storage
                .options
                .iter()
                .filter(|option| option.starts_with("mode="))
                .cloned(),
        );
    }
    if STOCK {
        rest.clear();
    }
    plain_mount(storage, &storage.source, &rest)?;
    apply(&storage.mount_point, None, group)
}

/// `pagesize=` and `size=` are bytes; the pages must be there before they can be mounted.
fn reserve_huge_pages(options: &[String]) -> Result<()> {
    let value = |key: &str| {
        options
            .iter()
            .find_map(|option| option.strip_prefix(key)?.parse::<u64>().ok())
    };
    let (Some(page), Some(size)) = (value("pagesize="), value("size=")) else {
        return Err(Error::Invalid(
            "a hugetlbfs storage needs pagesize= and size=".into(),
        ));
    };
    let file = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
        page / 1024
    );
    let present: u64 = fs::read_to_string(&file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let wanted = present + size / page.max(1);
    fs::write(&file, wanted.to_string()).context(|| format!("reserve huge pages in {file}"))?;
    let got: u64 = fs::read_to_string(&file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    if got < wanted {
        return Err(Error::Failed(format!(
            "the guest has room for {got} huge pages of {page} bytes, not {wanted}"
        )));
    }
    Ok(())
}

/// Gives tmpfs that were mounted as storages other options, such as a size. Huge pages keep theirs.
/// The flags of a mount stay as well: containers have mounts of their own of the same file system.
///
/// # Errors
/// A storage of another kind; an option that the kernel refuses, such as a
/// size that is less than what is in use.
pub fn update(storages: &[Storage]) -> Result<()> {
    // All of them are looked at before the first one is changed.
    for storage in storages {
        let mount_point = &storage.mount_point;
        if driver_of(storage)? != Driver::Ephemeral {
            return Err(Error::Invalid(format!(
                "storage {mount_point} is none of driver ephemeral: {:?}",
                storage.driver
            )));
        }
    }
    for storage in storages
        .iter()
        .filter(|storage| storage.fstype != HUGETLBFS)
    {
        let mount_point = &storage.mount_point;
        let attempt = || format!("remount {mount_point} with {:?}", storage.options);
        let (_, group, rest) = permissions(&storage.options)?;
        if statfs(Path::new(mount_point))
            .context(attempt)?
            .filesystem_type()
            != TMPFS_MAGIC
        {
            return Err(Error::Invalid(format!("storage {mount_point} is no tmpfs")));
        }
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_SYMLINK_NOFOLLOW;
        let data = Options::parse(&rest).data;
        let remount = || -> rustix::io::Result<()> {
            let file_system = fspick(CWD, mount_point.as_str(), flags)?;
            for option in data.split(',').filter(|option| !option.is_empty()) {
                let (key, value) = option.split_once('=').unwrap_or((option, ""));
                fsconfig_set_string(&file_system, key, value)?;
            }
            fsconfig_reconfigure(&file_system)
        };
        remount().context(attempt)?;
        apply(mount_point, None, group)?;
    }
    Ok(())
}
