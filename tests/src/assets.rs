//! Where the tested things are: the installed shim, the releases of containerd, the image. Each one
//! that is missing is named together with the command that makes it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::command::run;
use crate::suite::Release;

/// Name of the image that [`image`] holds.
pub const IMAGE: &str = "docker.io/cofferdam/busybox:local";

/// Name of the image that [`programs`] holds.
pub const PROGRAMS: &str = "docker.io/cofferdam/programs:local";

/// The checkout.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The prefix the shim is installed in: `COFFERDAM_PREFIX`, else `target/prefix`.
pub fn prefix() -> PathBuf {
    std::env::var_os("COFFERDAM_PREFIX").map_or_else(|| root().join("target/prefix"), PathBuf::from)
}

/// A file of the installation.
///
/// # Panics
/// It is not there.
pub fn installed(relative: &str) -> PathBuf {
    let path = prefix().join(relative);
    assert!(
        path.exists(),
        "{} is not there: run `make install PREFIX={}`",
        path.display(),
        prefix().display()
    );
    path
}

/// The shim.
///
/// # Panics
/// It is not installed.
pub fn shim() -> PathBuf {
    installed("bin/containerd-shim-cofferdam-v2")
}

fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(home, PathBuf::from)
        .join("cofferdam")
}

/// crictl, of the cri-tools that the checkout pins: scripts/lib.sh knows where they are.
///
/// # Panics
/// It is not there.
pub fn crictl() -> PathBuf {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        let mut command = Command::new("bash");
        command
            .args(["-c", r#". "$0" && echo "$cri_tools""#])
            .arg(root().join("scripts/lib.sh"));
        let path = PathBuf::from(run(command, Duration::from_secs(10)).ok().text()).join("crictl");
        assert!(
            path.exists(),
            "{} is not there: run `scripts/setup test`",
            path.display()
        );
        path
    };
    FOUND.get_or_init(find).clone()
}

/// nerdctl, of the checkout's module.
///
/// # Panics
/// It is not there.
pub fn nerdctl() -> PathBuf {
    let path = cache().join("nerdctl/nerdctl");
    assert!(
        path.exists(),
        "{} is not there: run `scripts/setup docker`",
        path.display()
    );
    path
}

/// The folder with erofs-utils, with which containerd makes layers and so do tests.
///
/// # Panics
/// It is not there.
pub fn erofs() -> PathBuf {
    let dir = cache().join("erofs-trixie/bin");
    assert!(
        dir.join("mkfs.erofs").exists(),
        "{} is not there: run `scripts/setup test`",
        dir.display()
    );
    dir
}

/// The folder with the programs of a containerd release.
///
/// # Panics
/// It is not there.
pub fn release_bin(release: Release) -> PathBuf {
    if release == Release::V1_6 {
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&dirs)
            .find(|dir| dir.join("containerd").exists() && dir.join("ctr").exists());
        return found.unwrap_or_else(|| panic!("containerd is not in PATH: run scripts/setup"));
    }
    let cache = cache();
    let wanted = format!("containerd-{}.", release.name());
    let found = std::fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .flatten()
        .find(|entry| {
            entry.file_name().to_string_lossy().starts_with(&wanted)
                && entry.path().join("bin/ctr").exists()
        });
    let dir = found.unwrap_or_else(|| {
        panic!(
            "{}/{wanted}* is not there: run `scripts/setup test`",
            cache.display()
        )
    });
    dir.path().join("bin")
}

/// The OCI archive with [`IMAGE`], and for pods those of [`crate::cri`], made once a run in `dir`.
pub fn image(dir: &Path, pods: bool) -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let tar = dir.join("image.tar");
        let mut command = Command::new(root().join("scripts/image"));
        command.arg(&tar).args(pods.then_some("pods"));
        run(command, Duration::from_secs(60)).ok();
        tar
    };
    MADE.get_or_init(make).clone()
}

/// The OCI archive with [`PROGRAMS`]; made by the first who asks, which takes minutes.
///
/// # Panics
/// It cannot be made.
pub fn programs() -> PathBuf {
    let command = Command::new(root().join("scripts/programs"));
    PathBuf::from(run(command, Duration::from_secs(1800)).ok().text())
}

/// The directory of docker's programs.
///
/// # Panics
/// They are not there.
pub fn docker() -> PathBuf {
    let dir = cache().join("docker-trixie/bin");
    assert!(
        dir.join("dockerd").is_file(),
        "{} has no dockerd: run `scripts/setup docker`",
        dir.display()
    );
    dir
}

/// Fills `dir` with the tree that [`IMAGE`] also has: busybox and its names.
pub fn busybox_tree(dir: &Path) {
    let script = r#"set -e; mkdir -p bin dev etc proc root run sys tmp usr var; cp "$(command -v busybox)" bin/busybox
        for name in $(bin/busybox --list); do [ "$name" = busybox ] || ln -s busybox "bin/$name"; done
        echo root:x:0:0:root:/root:/bin/sh >etc/passwd; echo root:x:0: >etc/group"#;
    std::fs::create_dir_all(dir).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", script]).current_dir(dir);
    run(command, Duration::from_secs(60)).ok();
}

/// A program of tests/images, by its name.
///
/// # Panics
/// It does not compile.
pub fn program(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let mut compiler = Command::new("gcc");
    compiler.args(["-static", "-O1", "-pthread", "-Wall", "-Werror", "-o"]);
    compiler.arg(&path);
    compiler.arg(root().join(format!("tests/images/{name}.c")));
    run(compiler, Duration::from_secs(60)).ok();
    path
}

/// tests/images/code.c with so many pages of code, and with the number that the first one returns.
/// Two of a size have their code at the same addresses.
///
/// # Panics
/// It does not compile.
pub fn code_program(dir: &Path, pages: u32, number: u32) -> PathBuf {
    let path = dir.join(format!("code-{pages}-{number}"));
    let mut compiler = Command::new("gcc");
    compiler.args(["-static", "-no-pie", "-O1", "-Wall", "-Werror"]);
    compiler.arg(format!("-DPAGES={pages}"));
    compiler.arg(format!("-DSALT={number}"));
    compiler.arg("-o").arg(&path);
    compiler.arg(root().join("tests/images/code.c"));
    run(compiler, Duration::from_secs(60)).ok();
    path
}
