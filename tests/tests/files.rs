//! Files in a container's root and in directories of the host: rights, attributes, device nodes, file
//! systems that a container mounts itself. What differs from runc is in docs/files.md, and here
//! behind `env.is_vm()`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed condition is a failed test"
)]

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cofferdam_tests::command::{Running, run};
use cofferdam_tests::procs::Proc;
use cofferdam_tests::{Container, Env, PATIENCE, Suite, assets, cases, eventually, procs};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

fn main() -> ExitCode {
    Suite::new().run(cases![
        Core: acls_are_obeyed_and_inherited, device_nodes_open;
        Once: acl_of_the_host_is_obeyed, trusted_attributes_are_for_root,
            writes_of_others_drop_setuid_and_capabilities, names_that_are_taken,
            directory_of_the_host_behaves_as_there, absent_name_is_seen_when_the_host_makes_it,
            overlay_with_its_upper_directory_on_a_volume, file_systems_in_files,
            program_that_ends_while_its_file_is_read;
    ])
}

/// A container with `/t/files` and a directory of the host's at `/v`.
struct Fixture<'e> {
    container: Container<'e>,
    volume: PathBuf,
    program: PathBuf,
}

impl<'e> Fixture<'e> {
    fn new(env: &'e Env, flags: &[&str]) -> Fixture<'e> {
        Fixture::prepared(env, flags, |_, _| ())
    }

    /// What the host has in the directory before, made with the program's path and the directory's.
    fn prepared(env: &'e Env, flags: &[&str], prepare: impl FnOnce(&Path, &Path)) -> Fixture<'e> {
        let (volume, tools) = (env.dir.join(env.id()), env.dir.join(env.id()));
        fs::create_dir(&volume).unwrap();
        fs::create_dir(&tools).unwrap();
        let program = assets::program(&tools, "files");
        prepare(&program, &volume);
        let mounts = [
            (&volume, "/v", "rw"),
            (&volume, "/ro", "ro"),
            (&tools, "/t", "ro"),
        ];
        let mounts = mounts.map(|(from, to, mode)| {
            format!(
                "type=bind,src={},dst={to},options=rbind:{mode}",
                from.display()
            )
        });
        let mut all = vec!["--null-io"];
        all.extend(flags);
        for mount in &mounts {
            all.extend(["--mount", mount]);
        }
        Fixture {
            container: env.detached(&all, &["sleep", "3600"]),
            volume,
            program,
        }
    }

    fn sh(&self, script: &str) -> String {
        self.container.exec(&["sh", "-c", script]).ok().text()
    }

    fn sh_as(&self, user: &str, script: &str) -> String {
        let command = ["sh", "-c", script];
        self.container
            .exec_with(&["--user", user], &command)
            .ok()
            .text()
    }

    fn on_host(&self, words: &[&str]) -> String {
        on_host(&self.program, words)
    }
}

impl Drop for Fixture<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.container.kill("SIGKILL", &[]).ok();
            self.container.finish();
        }
    }
}

fn on_host(program: &Path, words: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(words);
    run(command, PATIENCE).ok().text()
}

fn acls_are_obeyed_and_inherited(env: &Env) {
    let fixture = Fixture::new(env, &[]);
    for dir in ["/v", "/root-of-it"] {
        let set = fixture.sh(&format!(
            "mkdir -p {dir} && cd {dir} && umask 077 && echo secret >file && mkdir below && chmod 755 . below &&
             /t/files acl access file 1000 && /t/files acl default below 1000 && echo new >below/new &&
             stat -c %a file below/new"
        ));
        // The group's place shows the mask.
        assert_eq!(set, "acl ok\nacl ok\n640\n640", "{dir}");
        let read = format!("cat {dir}/file {dir}/below/new");
        assert_eq!(fixture.sh_as("1000", &read), "secret\nnew", "{dir}");
        let other = fixture
            .container
            .exec_with(&["--user", "1001"], &["cat", &format!("{dir}/file")]);
        assert!(
            other.errors().contains("Permission denied"),
            "{dir}: {other:?}"
        );
    }
    let file = fixture.volume.join("below/new");
    let names = fixture.on_host(&["list", file.to_str().unwrap()]);
    assert_eq!(names, "system.posix_acl_access", "the host has the ACL");
}

/// Its root goes while the file server has not answered: a kernel that does not wait for that dies
/// of the answer.
fn program_that_ends_while_its_file_is_read(env: &Env) {
    let tools = env.dir.join(env.id());
    fs::create_dir(&tools).unwrap();
    assets::program(&tools, "files");
    let mount = format!("type=bind,src={},dst=/t,options=rbind:rw", tools.display());
    let script = "dd if=/dev/zero of=/large bs=1M count=32 2>/dev/null && \
                  exec /t/files ahead /large /t/ready";
    let id = env.id();
    let flags = ["--rm", "--mount", &mount];
    let mut running = Running::start_piped(env.run_command(&id, &flags, &["sh", "-c", script]));
    eventually("the program has its file", PATIENCE, || {
        tools.join("ready").exists().then_some(())
    });
    let family = procs::family(&id);
    let of_this = |process: &Proc| family.contains(&process.pid);
    let servers: Vec<Proc> = procs::named("virtiofsd")
        .into_iter()
        .filter(of_this)
        .collect();
    assert!(servers.len() >= 2, "{servers:?}");
    servers.iter().for_each(Proc::stop);
    running.child.stdin.take().unwrap().write_all(b"x").unwrap();
    procs::come_to_rest(&family);
    servers.iter().for_each(Proc::resume);
    running.wait(PATIENCE).exits(7);
}

fn acl_of_the_host_is_obeyed(env: &Env) {
    let fixture = Fixture::prepared(env, &[], |program, volume| {
        let file = volume.join("file");
        fs::write(&file, "secret").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        on_host(program, &["acl", "access", file.to_str().unwrap(), "1000"]);
    });
    assert_eq!(fixture.sh_as("1000", "cat /v/file"), "secret");
    let other = fixture
        .container
        .exec_with(&["--user", "1001"], &["cat", "/v/file"]);
    assert!(other.errors().contains("Permission denied"), "{other:?}");
}

fn trusted_attributes_are_for_root(env: &Env) {
    let fixture = Fixture::new(env, &["--privileged"]);
    for dir in ["/v", "/tmp"] {
        let script = format!(
            "cd {dir} && echo x >file && /t/files set file trusted.one value && /t/files get file trusted.one &&
             /t/files list file"
        );
        assert_eq!(fixture.sh(&script), "set ok\nvalue\ntrusted.one", "{dir}");
        let hidden = format!("/t/files get {dir}/file trusted.one");
        assert_eq!(fixture.sh_as("1000", &hidden), "ENODATA", "{dir}");
        if env.is_vm() {
            // Nobody there can make one by the name that it has on the host.
            let forged = format!("/t/files set {dir}/file user.virtiofs.trusted.two value");
            assert_eq!(fixture.sh(&forged), "set EPERM", "{dir}");
        }
    }
    let file = fixture.volume.join("file");
    let on_host = if env.is_vm() {
        "user.virtiofs.trusted.one"
    } else {
        "trusted.one"
    };
    assert_eq!(fixture.on_host(&["list", file.to_str().unwrap()]), on_host);
}

fn writes_of_others_drop_setuid_and_capabilities(env: &Env) {
    let fixture = Fixture::new(env, &[]);
    for dir in ["/v", "/tmp"] {
        // A file server that has made a file for somebody believes to be less than it is.
        fixture.sh(&format!("mkdir -m 777 {dir}/open"));
        fixture.sh_as("1000", &format!("touch {dir}/open/made"));
        let make = format!(
            "cd {dir} && for name in write cut root; do echo old >$name && chmod 4777 $name &&
             /t/files capability $name; done"
        );
        assert_eq!(fixture.sh(&make), ["capability ok"; 3].join("\n"), "{dir}");
        fixture.sh_as("1000", &format!("cd {dir} && echo new >>write && : >cut"));
        // Root may keep setuid, but no capability of what it writes to. A volume's file server has
        // nothing of the host's root.
        let kept = if env.is_vm() && dir == "/v" {
            777
        } else {
            4777
        };
        let seen = format!(
            "cd {dir} && echo new >>root && stat -c %a write cut root &&
             for name in write cut root; do /t/files get $name security.capability; done"
        );
        assert_eq!(
            fixture.sh(&seen),
            format!("777\n777\n{kept}\nENODATA\nENODATA\nENODATA"),
            "{dir}"
        );
    }
}

/// A new name is asked of the file server by making it; who may not make it still learns that it is
/// there.
fn names_that_are_taken(env: &Env) {
    let fixture = Fixture::prepared(env, &[], |_, volume| {
        for dir in ["one", "two", "three"] {
            fs::create_dir_all(volume.join(dir).join("taken")).unwrap();
        }
    });
    let errors = |said: &str| -> Vec<String> {
        said.lines()
            .map(|line| line.rsplit(' ').next().unwrap().to_owned())
            .collect()
    };
    let mut wanted = ["EEXIST"; 7];
    wanted[6] = "EADDRINUSE";
    assert_eq!(errors(&fixture.sh("/t/files taken /v/one")), wanted);
    assert_eq!(
        errors(&fixture.sh_as("1000", "/t/files taken /v/two")),
        wanted,
        "no rights"
    );
    assert_eq!(
        errors(&fixture.sh("/t/files taken /ro/three")),
        wanted,
        "a read-only mount"
    );
    fixture.sh("mkdir -p /tmp/taken /ro/three/taken /bin/../v/two/taken");
    assert_eq!(errors(&fixture.sh("/t/files taken /tmp")), wanted);
    fixture.sh_as("1000", "mkdir -p /v/two/taken");
}

/// Of calls that a directory of the host answers otherwise inside: docs/files.md.
const DIFFERENT: [&str; 7] = [
    "fallocate(file, FALLOC_FL_COLLAPSE_RANGE, 0, 4096)",
    "ioctl(other, FS_IOC_GETFLAGS",
    "open(\".\", O_TMPFILE",
    "time of birth",
    "fsetxattr(file, \"security.one\"",
    "mknod(\"null\", S_IFCHR",
    "open(\"null\"",
];

fn directory_of_the_host_behaves_as_there(env: &Env) {
    let fixture = Fixture::prepared(env, &["--privileged"], |_, volume| {
        fs::create_dir(volume.join("inside")).unwrap();
        fs::create_dir(volume.join("there")).unwrap();
    });
    let inside = fixture.sh("/t/files probe /v/inside");
    let there = fixture.on_host(&["probe", fixture.volume.join("there").to_str().unwrap()]);
    let differences: Vec<_> = inside
        .lines()
        .zip(there.lines())
        .filter(|(inside, there)| inside != there)
        .filter(|(inside, _)| {
            !env.is_vm() || !DIFFERENT.iter().any(|line| inside.starts_with(line))
        })
        .collect();
    assert!(differences.is_empty(), "{differences:#?}");
    assert_eq!(inside.lines().count(), there.lines().count());
}

fn absent_name_is_seen_when_the_host_makes_it(env: &Env) {
    let fixture = Fixture::new(env, &[]);
    let waiting = "until [ -e /v/go ]; do :; done; cat /v/go";
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| fixture.sh(waiting));
        for _ in 0..3 {
            fixture.sh("test ! -e /v/later");
        }
        fs::write(fixture.volume.join("later"), "later").unwrap();
        assert_eq!(fixture.sh("cat /v/later"), "later");
        // As a whole, so that the reader sees all of it.
        fs::write(fixture.volume.join("go.new"), "go").unwrap();
        fs::rename(fixture.volume.join("go.new"), fixture.volume.join("go")).unwrap();
        assert_eq!(waiter.join().unwrap(), "go");
    });
}

fn device_nodes_open(env: &Env) {
    let fixture = Fixture::prepared(env, &[], |_, volume| {
        let mode = Mode::from_bits_truncate(0o666);
        mknod(&volume.join("zero"), SFlag::S_IFCHR, mode, makedev(1, 5)).unwrap();
        mknod(&volume.join("memory"), SFlag::S_IFCHR, mode, makedev(1, 1)).unwrap();
    });
    let chroot = "mkdir -p /jail/dev /jail/bin && cp /bin/busybox /jail/bin/sh &&
                  mknod -m 666 /jail/dev/null c 1 3 && mknod -m 666 /jail/dev/zero c 1 5 &&
                  chroot /jail sh -c 'echo >/dev/null && echo opened </dev/zero'";
    assert_eq!(fixture.sh(chroot), "opened");
    // What the host has put there, as far as the container's devices allow.
    assert_eq!(fixture.sh("head -c 3 /v/zero | wc -c"), "3");
    let refused = fixture.container.exec(&["cat", "/v/memory"]);
    assert!(refused.errors().contains("not permitted"), "{refused:?}");
    if env.is_vm() {
        let made = fixture.container.exec(&["mknod", "/v/null", "c", "1", "3"]);
        assert!(
            made.errors().contains("not permitted"),
            "it would lie on the host: {made:?}"
        );
    } else {
        fixture.sh("mknod /v/null c 1 3 && echo >/v/null");
    }
}

/// As docker and buildkit use it: copies up, removes, renames, and hides what is below.
const OVERLAY: &str = "mkdir -p lower/old upper work mnt && echo a >lower/file &&
    echo b >lower/gone && echo c >lower/old/name && ln -s file lower/link &&
    mount -t overlay o -o lowerdir=lower,upperdir=upper,workdir=work mnt &&
    echo more >>mnt/file && rm mnt/gone && mv mnt/file mnt/moved && mv mnt/link mnt/renamed &&
    rm -r mnt/old && mkdir mnt/old && cat mnt/moved lower/file && stat -c %F upper/gone &&
    umount mnt && mount -t overlay o -o lowerdir=lower,upperdir=upper,workdir=work mnt &&
    ls mnt mnt/old && umount mnt";
const OVERLAID: &str = "a\nmore\na\ncharacter special file\n\
                        mnt:\nmoved\nold\nrenamed\n\nmnt/old:";

fn overlay_with_its_upper_directory_on_a_volume(env: &Env) {
    let fixture = Fixture::new(env, &["--privileged"]);
    assert_eq!(fixture.sh(&format!("cd /v && {OVERLAY}")), OVERLAID);
    let gone = fixture
        .volume
        .join("upper/gone")
        .symlink_metadata()
        .unwrap();
    assert_eq!(
        (gone.mode() & 0o170_000, gone.rdev()),
        (0o020_000, 0),
        "a whiteout"
    );
}

fn file_systems_in_files(env: &Env) {
    let fixture = Fixture::prepared(env, &["--privileged"], |_, volume| {
        let image = volume.join("image");
        fs::File::create_new(&image)
            .unwrap()
            .set_len(16 << 20)
            .unwrap();
        let mut command = Command::new("mkfs.ext4");
        command.arg("-q").arg(&image);
        run(command, PATIENCE).ok();
    });
    let script = "mkdir /m && cp /v/image /image && for image in /v/image /image; do
            mount -o loop $image /m && echo kept >/m/file && umount /m &&
            mount -o loop $image /m && cat /m/file && umount /m || exit 1; done
        device=$(losetup -f) && losetup $device /v/image && blockdev --getsize64 $device && losetup -d $device";
    assert_eq!(fixture.sh(script), format!("kept\nkept\n{}", 16 << 20));
}
