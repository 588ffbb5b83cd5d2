//! What becomes of each kind of mount, and of sources that change.

use guest_protocol::GUEST_SHARE;
use nix::mount::{MsFlags, mount};
use serde_json::json;

use super::*;
use crate::host::dir::Dir;

const POD: OfPod<'_> = OfPod {
    shm: None,
    uid: Some("u1"),
};

fn mounts_of(list: serde_json::Value) -> Vec<Mount> {
    serde_json::from_value(list).unwrap()
}

/// Mounts belong to a process; a thread can have its own.
fn alone(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        mounts::enter_namespace().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let own = Dir::open(dir.path()).unwrap();
        mounts::make_shared(&own, "share").unwrap();
        test(dir.path());
        own.remove("share").unwrap();
    });
    thread.join().unwrap();
}

fn shares(dir: &Path) -> SharedVolumes {
    let open = || Dir::open(&dir.join("share")).unwrap();
    SharedVolumes::new(open(), open())
}

fn source(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn two_containers_see_one_volume() {
    alone(|dir| {
        let data = source(dir, "data");
        let shares = shares(dir);
        let list = mounts_of(json!([{"destination": "/d", "type": "bind", "source": data,
                "options": ["rbind"]}]));
        let first = prepare(&list, &shares, POD).unwrap();
        let second = prepare(&list, &shares, POD).unwrap();
        assert_eq!(first.mounts[0].source, second.mounts[0].source);
        drop(first);
        let place = dir
            .join("share/.volumes")
            .join(second.mounts[0].source.rsplit('/').next().unwrap());
        std::fs::write(data.join("file"), "").unwrap();
        assert!(place.join("file").exists());
        drop(second);
        assert!(!place.exists() && data.join("file").exists());
    });
}

#[test]
fn a_mount_point_with_any_name_stops_nobody() {
    use std::os::unix::ffi::OsStrExt;
    alone(|dir| {
        let data = source(dir, "data");
        let odd = dir.join(std::ffi::OsStr::from_bytes(b"data/\xff \n"));
        std::fs::create_dir(&odd).unwrap();
        mount(
            Some("tmpfs"),
            &odd,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let shares = shares(dir);
        let list = mounts_of(
            json!([{"destination": "/d", "type": "bind", "source": data, "options": ["rbind", "ro"]}]),
        );
        let volumes = prepare(&list, &shares, POD).unwrap();
        assert!(
            !volumes.mounts[0].options.contains(&"ro".to_owned()),
            "it is seen below"
        );
        drop(volumes);
        assert_eq!(
            std::fs::read_dir(dir.join("share/.volumes"))
                .unwrap()
                .count(),
            0
        );
        nix::mount::umount(&odd).unwrap();
    });
}

#[test]
fn a_reader_cannot_write_on_the_host_but_for_a_pods_scratch_space() {
    alone(|dir| {
        let shares = shares(dir);
        let (data, scratch) = (
            source(dir, "data"),
            source(dir, "pods/u1/volumes/kubernetes.io~empty-dir/cache"),
        );
        let mounted = |path: &Path| {
            let list = mounts_of(json!([
                {"destination": "/d", "type": "bind", "source": path, "options": ["rbind",
                    "ro"]}
            ]));
            let volumes = prepare(&list, &shares, POD).unwrap();
            let name = volumes.mounts[0]
                .source
                .rsplit('/')
                .next()
                .unwrap()
                .to_owned();
            (volumes, dir.join("share/.volumes").join(name))
        };
        let (_volumes, place) = mounted(&data);
        assert!(std::fs::write(place.join("file"), "").is_err());
        let (volumes, place) = mounted(&scratch);
        std::fs::write(place.join("file"), "").unwrap();
        assert!(
            volumes.mounts[0].options.contains(&"ro".to_owned()),
            "the guest keeps it read-only"
        );
    });
}

#[test]
fn a_reader_and_a_writer_have_one_volume() {
    alone(|dir| {
        let shares = shares(dir);
        let prepare = |path: &Path, options: &[&str]| {
            let list = mounts_of(json!([{"destination": "/d", "type": "bind", "source": path,
                    "options": options}]));
            prepare(&list, &shares, POD).unwrap()
        };
        let data = source(dir, "data");
        let reader = prepare(&data, &["rbind", "ro"]);
        assert_eq!(reader.to_be_writable().count(), 0);
        let writer = prepare(&data, &["rbind"]);
        assert_eq!(reader.mounts[0].source, writer.mounts[0].source);
        let volume = writer.to_be_writable().next().unwrap();
        assert!(writer.mounts[0].source.ends_with(volume.to_str().unwrap()));
        let other = source(dir, "other");
        let writer = prepare(&other, &["rbind"]);
        let reader = prepare(&other, &["rbind", "ro"]);
        assert_eq!(reader.mounts[0].source, writer.mounts[0].source);
        assert_eq!(writer.to_be_writable().count(), 0);
        assert!(reader.mounts[0].options.contains(&"ro".to_owned()));
        let strict = prepare(&other, &["rbind", "rro"]);
        assert_ne!(strict.mounts[0].source, writer.mounts[0].source);
        // What is mounted below stays writable to a reader too, and not because of a flag.
        let below = source(dir, "other/below");
        let flags = MsFlags::empty();
        mount(Some("tmpfs"), &below, Some("tmpfs"), flags, None::<&str>).unwrap();
        drop((writer, reader));
        let writer = prepare(&other, &["rbind"]);
        let reader = prepare(&other, &["rbind", "ro"]);
        assert_ne!(reader.mounts[0].source, writer.mounts[0].source);
        drop((writer, reader, strict));
        nix::mount::umount(&below).unwrap();
    });
}

#[test]
fn another_pods_volume_is_a_directory_like_any_other() {
    let kind = |path, uid| kind_of_volume(Path::new(path), uid);
    let scratch = "/k/pods/u1/volumes/kubernetes.io~empty-dir/c";
    assert_eq!(kind(scratch, Some("u1")), Some(EMPTY_DIR));
    assert_eq!(kind(scratch, None), None);
    assert_eq!(kind(scratch, Some("u2")), None);
    assert_eq!(kind("/srv/kubernetes.io~empty-dir/u1", Some("u1")), None);
}

#[test]
fn configuration_is_copied_in_the_guest() {
    alone(|dir| {
        let shares = shares(dir);
        let prepare = |path: &str, options: &[&str]| {
            let list = mounts_of(json!([{"destination": "/d", "type": "bind",
                    "source": source(dir, path), "options": options}]));
            prepare(&list, &shares, POD).unwrap()
        };
        let secret = "pods/u1/volumes/kubernetes.io~secret/s";
        let mut first = prepare(secret, &["rbind", "ro"]);
        let second = prepare(secret, &["rbind", "ro"]);
        assert_eq!(first.storages, second.storages, "one copy for both");
        let storage = first.storages[0].clone();
        assert_eq!(storage.driver, WATCHED_DRIVER);
        assert!(storage.source.starts_with(GUEST_SHARE), "{storage:?}");
        assert_eq!(first.mounts[0].source, storage.mount_point);
        first.watch_none();
        assert_eq!(first.mounts[0].source, storage.source);
        assert!(first.storages.is_empty());
        for (path, options) in [
            (secret, &["rbind"][..]),
            ("pods/u1/volumes/kubernetes.io~csi/s", &["rbind", "ro"]),
            ("pods/u2/volumes/kubernetes.io~secret/s", &["rbind", "ro"]),
        ] {
            assert!(
                prepare(path, options).storages.is_empty(),
                "{path} {options:?}"
            );
        }
    });
}

#[test]
fn what_is_mounted_below_a_read_only_volume_can_be_written() {
    alone(|dir| {
        let data = source(dir, "data");
        let below = source(dir, "data/below");
        mount(
            Some("tmpfs"),
            &below,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let shares = shares(dir);
        let list = |options: &[&str]| {
            mounts_of(json!([{"destination": "/d", "type": "bind", "source": data,
                    "options": options}]))
        };
        let volumes = prepare(&list(&["rbind", "ro"]), &shares, POD).unwrap();
        assert_eq!(
            volumes.mounts[0].options,
            ["rbind"],
            "the host alone keeps it read-only"
        );
        let place = dir
            .join("share/.volumes")
            .join(volumes.mounts[0].source.rsplit('/').next().unwrap());
        std::fs::write(place.join("below/file"), "").unwrap();
        assert!(std::fs::write(place.join("file"), "").is_err());
        let all = prepare(&list(&["rbind", "rro"]), &shares, POD).unwrap();
        let place = dir
            .join("share/.volumes")
            .join(all.mounts[0].source.rsplit('/').next().unwrap());
        assert!(std::fs::write(place.join("below/other"), "").is_err());
        drop((volumes, all));
        nix::mount::umount(&below).unwrap();
    });
}

#[test]
fn an_emptydir_in_memory_is_the_guests_own() {
    alone(|dir| {
        let path = source(dir, "pods/u1/volumes/kubernetes.io~empty-dir/cache");
        let flags = MsFlags::empty();
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            flags,
            Some("size=8m,mode=1777"),
        )
        .unwrap();
        let shares = shares(dir);
        let list = mounts_of(json!([{"destination": "/d", "type": "bind", "source": path,
                "options": ["rbind"]}]));
        let volumes = prepare(&list, &shares, POD).unwrap();
        let storage = &volumes.storages[0];
        assert_eq!(
            (storage.driver.as_str(), storage.shared),
            ("ephemeral", true)
        );
        assert_eq!(storage.options, ["size=8388608", "mode=1777"]);
        assert_eq!(
            volumes.mounts[0].source,
            "/run/kata-containers/sandbox/ephemeral/cache"
        );
        nix::mount::umount(&path).unwrap();
    });
}

#[test]
fn a_socket_of_the_host_goes_through_vsock() {
    alone(|dir| {
        let path = dir.join("server");
        let _server = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let shares = shares(dir);
        let list = mounts_of(json!([
            {"destination": "/a", "type": "bind", "source": path, "options": ["rbind", "rw"]},
            {"destination": "/b", "type": "uds", "source": path}
        ]));
        let volumes = prepare(&list, &shares, POD).unwrap();
        for (mount, storage) in volumes.mounts.iter().zip(&volumes.storages) {
            assert_eq!(
                (mount.type_.as_str(), &mount.source),
                ("bind", &storage.mount_point)
            );
            assert_eq!(
                (storage.driver.as_str(), storage.source.len()),
                (UDS_DRIVER, 32)
            );
        }
        assert_eq!(
            volumes
                .sockets
                .iter()
                .map(|socket| &socket.path)
                .collect::<Vec<_>>(),
            [&path, &path]
        );
    });
}

#[test]
fn what_the_guest_has_itself_is_left_to_it() {
    alone(|dir| {
        let shm = source(dir, "shm");
        let shares = shares(dir);
        let list = mounts_of(json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/null2", "type": "bind", "source": "/dev/null",
                "options": ["bind"]},
            {"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind"]}
        ]));
        let volumes = prepare(
            &list,
            &shares,
            OfPod {
                shm: Some(&shm),
                ..POD
            },
        )
        .unwrap();
        let sources: Vec<_> = volumes
            .mounts
            .iter()
            .map(|mount| mount.source.as_str())
            .collect();
        assert_eq!(sources, ["proc", "/dev/null", GUEST_SHM]);
        assert!(volumes.storages.is_empty());
        // A volume that the pod has put there is no shm of the pod's.
        let volumes = prepare(
            &list,
            &shares,
            OfPod {
                shm: Some(Path::new("/other")),
                ..POD
            },
        )
        .unwrap();
        assert!(volumes.mounts[2].source.contains(".volumes"));
        let list = mounts_of(json!([
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["size=65536k"]}
        ]));
        let volumes = prepare(
            &list,
            &shares,
            OfPod {
                shm: Some(Path::new("shm")),
                ..POD
            },
        )
        .unwrap();
        assert_eq!(
            (
                volumes.mounts[0].source.as_str(),
                volumes.mounts[0].type_.as_str()
            ),
            (GUEST_SHM, "bind")
        );
    });
}

#[test]
fn mounts_that_cannot_be_are_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("share")).unwrap();
    let shares = shares(dir.path());
    let refused = |mount: serde_json::Value| {
        prepare(&mounts_of(json!([mount])), &shares, POD)
            .unwrap_err()
            .to_string()
    };
    let message = refused(
        json!({"destination": "/d", "type": "bind", "source": "/tmp", "options": ["rbind",
            "rshared"]}),
    );
    assert!(
        message.contains("HostToContainer") && message.contains("/d"),
        "{message}"
    );
    let message = refused(
        json!({"destination": "/d", "type": "bind", "source": "/no/such", "options": ["bind"]}),
    );
    assert!(
        message.contains("/no/such") && message.contains("No such file"),
        "{message}"
    );
}

#[test]
fn a_tmpfs_without_a_size_has_half_of_what_may_be_there() {
    for (options, added) in [
        (&["nosuid", "mode=1777"][..], true),
        (&["size=64k"], false),
        (&["nr_blocks=4"], false),
    ] {
        let mut options: Vec<String> = options.iter().map(|one| (*one).to_owned()).collect();
        with_size(&mut options, 300);
        assert_eq!(options.contains(&"size=300m".to_owned()), added);
    }
}
