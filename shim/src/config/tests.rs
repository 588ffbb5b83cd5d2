//! What an administrator and a user of pods see of the configuration.

use std::collections::HashMap;

use super::*;

fn parse(text: &str) -> Result<Config> {
    from_sources(&[text.as_bytes()])
}

/// A configuration file and its drop-ins, each as a file.
fn from_sources(sources: &[&[u8]]) -> Result<Config> {
    let (directory, file) = directory(sources);
    let result = Config::load(Some(&file), b"");
    let prefix = directory.path().display().to_string();
    result.map_err(|error| crate::error::Error::Found {
        code: error.code(),
        message: error.to_string().replace(&prefix, "/etc"),
    })
}

/// `c.toml`, `c.toml.d/1.toml`, `c.toml.d/2.toml`, …
fn directory(sources: &[&[u8]]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("c.toml");
    std::fs::create_dir(directory.path().join("c.toml.d")).unwrap();
    for (number, source) in sources.iter().enumerate() {
        let path = if number == 0 {
            file.clone()
        } else {
            directory.path().join(format!("c.toml.d/{number}.toml"))
        };
        std::fs::write(path, source).unwrap();
    }
    (directory, file)
}

fn annotated(config: &str, annotations: &[(&str, &str)]) -> Result<Config> {
    let annotations: HashMap<_, _> = annotations
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    parse(config).unwrap().annotated(&annotations)
}

#[track_caller]
fn says(result: Result<Config>, part: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
    assert!(
        error.to_string().contains(part),
        "wanted {part:?}, got {error}"
    );
    assert!(
        !error.to_string().contains(char::is_control),
        "one line: {error}"
    );
}

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn every_key_of_the_shipped_file_is_known() {
    let text = std::fs::read_to_string("../configs/cofferdam.toml").unwrap();
    assert_eq!(
        parse(&text).unwrap(),
        Config::default(),
        "as shipped, the file changes nothing"
    );
    let uncommented: String = text
        .lines()
        .map(|line| line.strip_prefix("#=").unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    parse(&uncommented).unwrap();
    let list = toml::from_str::<Config>("no_such_key = 1")
        .unwrap_err()
        .message()
        .to_owned();
    let keys: Vec<&str> = list.split('`').skip(3).step_by(2).collect();
    assert!(
        keys.contains(&"qemu") && keys.contains(&"enable_annotations"),
        "{list}"
    );
    for key in keys {
        assert!(
            text.contains(&format!("\n#={key} = ")),
            "configs/cofferdam.toml does not explain {key}"
        );
    }
}

#[test]
fn the_configuration_for_katas_agent_is_one() {
    let text = std::fs::read_to_string("../configs/kata-agent.toml").unwrap();
    let config = parse(&text).unwrap();
    assert_eq!(
        config.kernel_params,
        ["cgroup_no_v1=all", "systemd.unified_cgroup_hierarchy=1"]
    );
    assert_ne!(config.initramfs, Config::default().initramfs);
    parse(&text.replace("#=", "")).unwrap();
}

#[test]
fn a_mistake_names_file_line_key_and_what_was_expected() {
    for (text, part) in [
        (
            "\nmemory = 3\n",
            "/etc/c.toml line 2: unknown field `memory`, expected one of",
        ),
        (
            "vcpus = \"two\"",
            "/etc/c.toml line 1: vcpus: must be a whole number from 1 to 240, not \"two\"",
        ),
        (
            "\n\naccelerator = \"xen\"",
            "/etc/c.toml line 3: accelerator: unknown variant `xen`, expected one of",
        ),
        (
            "#\nmemory_mib = 3",
            "/etc/c.toml line 2: memory_mib: must be a whole number from 64 to",
        ),
        ("vcpus = 0", "line 1: vcpus: must be"),
        (
            "boot_timeout_seconds = 0",
            "line 1: boot_timeout_seconds: must be",
        ),
        (
            "kill_timeout_seconds = 0",
            "line 1: kill_timeout_seconds: must be a whole number from 1 to 3600",
        ),
        (
            "debug = 1",
            "line 1: debug: invalid type: integer `1`, expected a boolean",
        ),
        (
            "kernel_params = \"quiet\"",
            "line 1: kernel_params: must be a list of words",
        ),
        (
            "kernel_params = [\"a\\u0000\"]",
            "line 1: kernel_params: must be a list of words",
        ),
        (
            "qemu = \"./qemu\"",
            "line 1: qemu: must be an absolute path or a name in PATH, not \"./qemu\"",
        ),
        (
            "virtiofsd = \"\"",
            "line 1: virtiofsd: must be an absolute path or a name",
        ),
        (
            "kernel = \"vmlinux\"",
            "line 1: kernel: must be an absolute path, not \"vmlinux\"",
        ),
        (
            "debug = true\ndebug = true",
            "/etc/c.toml line 2: duplicate key",
        ),
        ("[qemu]\npath = 1", "/etc/c.toml line 1: qemu: "),
        ("qemu = [", "/etc/c.toml line 1"),
    ] {
        says(parse(text), part);
    }
    says(
        from_sources(&[b"debug = true\nqemu = \"\xff\""]),
        "/etc/c.toml line 2: is not UTF-8",
    );
}

#[test]
fn drop_ins_win_over_the_file_key_by_key_in_the_order_of_their_names() {
    let config = from_sources(&[
        b"memory_mib = 100\nvcpus = 2\nkernel_params = [\"a\"]",
        b"memory_mib = 200\nkernel_params = [\"b\"]",
        b"memory_mib = 300",
    ]);
    let config = config.unwrap();
    assert_eq!(
        (config.memory_mib, config.vcpus, config.kernel_params),
        (300, Some(2), vec!["b".to_owned()])
    );
    assert_eq!(config.debug, Config::default().debug);
}

#[test]
fn a_mistake_in_a_drop_in_is_reported_there_even_if_a_later_one_would_hide_it() {
    let sources: [&[u8]; 3] = [b"", b"\nvcpus = 1000", b"vcpus = 1"];
    says(
        from_sources(&sources),
        "configuration /etc/c.toml.d/1.toml line 2: vcpus: must be",
    );
}

#[test]
fn only_toml_files_are_drop_ins() {
    let (directory, file) = directory(&[b"", b"vcpus = 2"]);
    for name in ["README", "5.toml.bak", ".6.toml", "7.toml~"] {
        std::fs::write(directory.path().join("c.toml.d").join(name), "garbage").unwrap();
    }
    assert_eq!(Config::load(Some(&file), b"").unwrap().vcpus, Some(2));
    std::fs::create_dir(directory.path().join("c.toml.d/9.toml")).unwrap();
    says(Config::load(Some(&file), b""), "c.toml.d/9.toml");
}

#[test]
fn drop_ins_count_without_the_file_unless_the_options_name_it() {
    let (_directory, file) = directory(&[b"vcpus = 3", b"memory_mib = 300"]);
    std::fs::remove_file(&file).unwrap();
    let mut layers = Layers::default();
    layers.file(&file, false).unwrap();
    let config = layers.config().unwrap();
    assert_eq!(
        (config.memory_mib, config.vcpus),
        (300, Config::default().vcpus)
    );
    says(Config::load(Some(&file), b""), "cannot read configuration ");
}

#[test]
fn without_any_file_the_defaults_stay() {
    let directory = tempfile::tempdir().unwrap();
    let mut layers = Layers::default();
    layers
        .file(&directory.path().join("none/c.toml"), false)
        .unwrap();
    assert_eq!(layers.config().unwrap(), Config::default());
}

#[test]
fn containerds_options_win_over_the_file() {
    let (_directory, file) = directory(&[b"vcpus = 2\nmemory_mib = 100", b"vcpus = 3"]);
    let config = Config::load(
        Some(&file),
        b"vcpus = 4\nTypeUrl = \"x\"\nConfigPath = \"\"\n",
    )
    .unwrap();
    assert_eq!((config.vcpus, config.memory_mib), (Some(4), 100));
    says(parse("TypeUrl = \"x\""), "unknown field `TypeUrl`");
}

#[test]
fn allowed_annotations_win_over_everything() {
    let all = "memory_mib = 100\nenable_annotations = [\"memory_mib\", \"vcpus\", \"kernel_params\", \"debug\", \
               \"accelerator\", \"vsock\", \"boot_timeout_seconds\"]";
    let config = annotated(
        all,
        &[
            ("io.cofferdam.memory_mib", "2048"),
            ("io.cofferdam.vcpus", " 2"),
            ("io.cofferdam.kernel_params", "['quiet', \"x=1\"]"),
            ("io.cofferdam.debug", "true"),
            ("io.cofferdam.accelerator", "tcg"),
            ("io.cofferdam.vsock", "\"vhost-user\""),
            ("io.cofferdam.boot_timeout_seconds", "60"),
            ("io.kubernetes.cri.container-type", "sandbox"),
            ("io.cofferdamx", "not ours"),
        ],
    );
    let expected = Config {
        memory_mib: 2048,
        vcpus: Some(2),
        kernel_params: vec!["quiet".into(), "x=1".into()],
        debug: true,
        accelerator: Accelerator::Tcg,
        vsock: VsockDevice::VhostUser,
        boot_timeout_seconds: 60,
        ..parse(all).unwrap()
    };
    assert_eq!(config.unwrap(), expected);
}

#[test]
fn an_annotation_that_is_not_allowed_names_itself_and_the_key_to_set() {
    says(
        annotated("", &[("io.cofferdam.vcpus", "2")]),
        "annotation io.cofferdam.vcpus is not allowed",
    );
    let one = "enable_annotations = [\"debug\"]";
    says(
        annotated(one, &[("io.cofferdam.vcpus", "2")]),
        "add \"vcpus\" to enable_annotations",
    );
    annotated(
        one,
        &[
            ("io.cofferdam.debug", "true"),
            ("other/io.cofferdam.vcpus", "2"),
        ],
    )
    .unwrap();
}

#[test]
fn an_annotation_with_a_wrong_value_or_key_is_an_error() {
    let all = "enable_annotations = [\"vcpus\", \"debug\", \"kernel_params\", \"accelerator\"]";
    for (key, value, part) in [
        (
            "vcpus",
            "many",
            "annotation io.cofferdam.vcpus has a wrong value: vcpus: must be a whole number",
        ),
        (
            "vcpus",
            "2\nqemu = '/bin/sh'",
            "io.cofferdam.vcpus has a wrong value",
        ),
        ("vcpus", "0", "from 1 to 240, not 0"),
        ("vcpus", "{a = 1}", "from 1 to 240"),
        ("debug", "yes", "expected a boolean"),
        ("kernel_params", "quiet", "must be a list of words"),
        ("accelerator", "xen\n", "unknown variant"),
        ("accelerator", "", "unknown variant"),
        (
            "qemu",
            "/bin/sh",
            "annotation io.cofferdam.qemu sets nothing that annotations can set: they can set \
             kernel_p",
        ),
        (
            "enable_annotations",
            "['qemu']",
            "io.cofferdam.enable_annotations sets nothing",
        ),
        (
            "kill_timeout_seconds",
            "3600",
            "io.cofferdam.kill_timeout_seconds sets nothing",
        ),
        ("", "1", "annotation io.cofferdam. sets nothing"),
        ("a\nb", "1", "annotation io.cofferdam.a b sets nothing"),
    ] {
        says(
            annotated(all, &[(&format!("io.cofferdam.{key}"), value)]),
            part,
        );
    }
}

#[test]
fn programs_and_files_of_the_host_can_never_be_annotations() {
    for key in [
        "qemu",
        "kernel",
        "initramfs",
        "virtiofsd",
        "vhost_device_vsock",
        "enable_annotations",
        "nonsense",
    ] {
        let text = format!("debug = true\nenable_annotations = [\"debug\", \"{key}\"]");
        says(
            parse(&text),
            &format!(
                "line 2: enable_annotations: cannot have \"{key}\": annotations can set kernel_p"
            ),
        );
    }
    says(
        parse("enable_annotations = \"debug\""),
        "must be a list of keys",
    );
    says(parse("enable_annotations = [1]"), "must be a list of keys");
    // What can be allowed is a key, and not of a path.
    let paths = ["/x", "x"].map(|text| Value::String(text.into()));
    for (key, _) in annotations::SETTABLE {
        for path in &paths {
            let message = layers::check(key, path).unwrap_err();
            assert!(message.starts_with(&format!("{key}: ")), "{message}");
        }
    }
}

/// Numbers that look random and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit.max(1)
    }
}

#[test]
fn whatever_is_in_a_file_or_an_annotation_the_answer_is_a_configuration_or_one_line() {
    let shipped = std::fs::read_to_string("../configs/cofferdam.toml")
        .unwrap()
        .replace("#=", "");
    let pieces: [&[u8]; 12] = [
        b"[",
        b"]",
        b"\"",
        b"'''",
        b"\n",
        b"\r",
        b"=",
        b"\0",
        b"\xff\xc3",
        "ü\u{2028}".as_bytes(),
        b"1e999",
        b"[[a.b]]",
    ];
    let mut numbers = Numbers(1);
    let mut refused = 0;
    for _ in 0..3000 {
        let mut text = shipped.clone().into_bytes();
        for _ in 0..=numbers.below(4) {
            let at = numbers.below(text.len());
            match numbers.below(4) {
                0 => text.truncate(at),
                1 => drop(text.splice(at..at, pieces[numbers.below(pieces.len())].iter().copied())),
                2 => text
                    .get_mut(at)
                    .into_iter()
                    .for_each(|byte| *byte ^= 1 << (at % 8)),
                _ => drop(text.drain(at..(at + 30).min(text.len()))),
            }
        }
        let mut layers = Layers::default();
        if let Err(error) = layers.runtime_options(&text).and_then(|()| layers.config()) {
            refused += 1;
            assert!(!error.to_string().contains(char::is_control), "{error}");
            assert!(error.to_string().contains(" line "), "{error}");
        }
        let value = String::from_utf8_lossy(&text[text.len().saturating_sub(80)..]).into_owned();
        for key in ["vcpus", "kernel_params", "accelerator", &value] {
            let annotations = HashMap::from([(format!("io.cofferdam.{key}"), value.clone())]);
            let allowed = Config {
                enable_annotations: vec![key.to_owned()],
                ..Config::default()
            };
            if let Err(error) = allowed.annotated(&annotations) {
                assert!(!error.to_string().contains(char::is_control), "{error}");
            }
        }
    }
    assert!(
        refused > 1000,
        "only {refused} of the mutated files are refused: the mutations miss their target"
    );
}

#[test]
fn deep_nesting_is_refused_and_does_not_end_the_shim() {
    let deep = "[".repeat(200_000);
    says(
        parse(&format!("kernel_params = {deep}")),
        "/etc/c.toml line 1",
    );
    says(
        annotated(
            "enable_annotations = [\"vcpus\"]",
            &[("io.cofferdam.vcpus", &deep)],
        ),
        "io.cofferdam.vcpus",
    );
}
