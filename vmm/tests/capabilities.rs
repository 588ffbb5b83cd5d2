//! Asking binaries what they can do: a real QEMU, and things that are none.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{names, program, qemu};
use vmm::capabilities::query;

#[tokio::test]
async fn qemu_is_asked_once_and_the_answer_is_kept() {
    let cache = tempfile::tempdir().unwrap();
    let first = query(&qemu(), cache.path()).await.unwrap();
    assert!(
        first.version.starts_with(|c: char| c.is_ascii_digit()),
        "{first:?}"
    );
    assert!(
        first.has("tcg-accel") || first.has("kvm-accel"),
        "{first:?}"
    );
    assert_eq!(names(cache.path()).len(), 1);
    // What is in the cache is believed, so QEMU was not asked again.
    let file = cache.path().join(&names(cache.path())[0]);
    let kept = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, kept.replace(&first.version, "0.0.1")).unwrap();
    assert_eq!(query(&qemu(), cache.path()).await.unwrap().version, "0.0.1");
}

#[tokio::test]
async fn a_spoilt_cache_is_written_anew() {
    let cache = tempfile::tempdir().unwrap();
    let first = query(&qemu(), cache.path()).await.unwrap();
    let file = cache.path().join(&names(cache.path())[0]);
    let good = std::fs::read(&file).unwrap();
    // Whatever has other fields was made by another version of this program.
    let other = String::from_utf8(good.clone()).unwrap();
    let other = other.replace("\"types\"", "\"kvm\"").into_bytes();
    assert_ne!(other, good);
    for bad in [
        &b""[..],
        b"{}",
        b"\xff\xff",
        &good[..good.len() / 2],
        &other,
    ] {
        std::fs::write(&file, bad).unwrap();
        assert_eq!(query(&qemu(), cache.path()).await.unwrap(), first);
        assert_eq!(std::fs::read(&file).unwrap(), good);
    }
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_costs_time_only() {
    let file = tempfile::NamedTempFile::new().unwrap();
    query(&qemu(), &file.path().join("below-a-file"))
        .await
        .unwrap();
}

#[tokio::test]
async fn what_is_no_qemu_is_one_line_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "hello").unwrap();
    let other_arch = dir.path().join("other");
    std::fs::write(&other_arch, b"\x7fELF\x02\x01\x01").unwrap();
    std::fs::set_permissions(
        &other_arch,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let dies = program(
        dir.path(),
        "dies",
        "echo >&2 'no such option: -nodefaults'; exit 7",
    );
    let hello = "for a; do case $a in *fd=*) echo hello >&${a##*fd=};; esac; done; exec sleep 100";
    let garbage = program(
        dir.path(),
        "garbage",
        &format!("exec bash -c '{hello}' bash \"$@\""),
    );
    // One without our machine, as those are that have a few others only.
    let bare = program(
        dir.path(),
        "bare",
        &format!(
            "exec bash -c 'exec {} \"${{@/q35,/q34,}}\"' bash \"$@\"",
            qemu().display()
        ),
    );
    for (binary, wanted) in [
        (
            &*bare,
            "bare exited with status 1: qemu-system-x86_64: unsupported machine type",
        ),
        (Path::new("/no/qemu"), "cannot use /no/qemu: No such file"),
        (dir.path(), "not an executable file"),
        (&plain, "not an executable file"),
        (&other_arch, "other exited with status "),
        (
            &dies,
            "dies exited with status 7: no such option: -nodefaults",
        ),
        (&garbage, "connection to QEMU's monitor is closed: "),
        (Path::new("/bin/true"), "/bin/true exited with status 0"),
    ] {
        let began = Instant::now();
        let error = query(binary, dir.path()).await.unwrap_err().to_string();
        assert!(
            error.contains(wanted) && !error.contains('\n'),
            "{}: {error}",
            binary.display()
        );
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{} took {:?}",
            binary.display(),
            began.elapsed()
        );
    }
}
