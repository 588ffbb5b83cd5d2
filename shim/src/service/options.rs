//! The runtime options that a `Create` request carries.

use std::path::Path;

use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::protos::runtimeoptions::Options;

/// containerd's message for runtimes other than runc.
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";

/// runc's, which containerd itself sends to any runtime for some pods; nothing in it concerns a
/// virtual machine.
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

/// The configuration that the options name and contain.
///
/// # Errors
/// `INVALID_ARGUMENT`: options of another type, a message that does not parse, a configuration with
/// a mistake.
pub fn config(options: Option<&Any>) -> Result<Config> {
    let options = match options {
        None => Options::default(),
        Some(any) if any.type_url.is_empty() && any.value.is_empty() => Options::default(),
        Some(any) => match any.type_url.rsplit('/').next() {
            Some(RUNTIME_OPTIONS) => Options::parse_from_bytes(&any.value).map_err(|error| {
                Error::invalid(format!("the runtime options do not parse: {error}"))
            })?,
            Some(RUNC_OPTIONS) => Options::default(),
            _ => {
                return Err(Error::invalid(format!(
                    "runtime options of type {:?} are not known: use {RUNTIME_OPTIONS} with a \
                     ConfigPath",
                    any.type_url
                )));
            }
        },
    };
    let path = Some(options.config_path.as_str()).filter(|path| !path.is_empty());
    Config::load(path.map(Path::new), &options.config_body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Default::default()
        }
    }

    /// A message as containerd writes it.
    fn message(fields: &[(u32, &str)]) -> Vec<u8> {
        let mut message = Vec::new();
        let mut output = protobuf::CodedOutputStream::vec(&mut message);
        for (number, text) in fields {
            output.write_string(*number, text).unwrap();
        }
        output.flush().unwrap();
        drop(output);
        message
    }

    #[test]
    fn a_config_path_is_read_and_the_options_beside_it_win() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "vcpus = 2\nmemory_mib = 300").unwrap();
        let path = file.path().to_str().unwrap();
        let config = |fields: &[_]| config(Some(&any(RUNTIME_OPTIONS, &message(fields))));
        assert_eq!(config(&[(1, "t"), (2, path)]).unwrap().vcpus, Some(2));
        let both = config(&[(2, path), (3, "vcpus = 3\n")]).unwrap();
        assert_eq!((both.vcpus, both.memory_mib), (Some(3), 300));
        let error = config(&[(2, "/no/such.toml")]).unwrap_err();
        assert!(error.to_string().contains("/no/such.toml"), "{error}");
    }

    #[test]
    fn keys_in_containerds_own_configuration_count() {
        let config = |body| config(Some(&any(RUNTIME_OPTIONS, &message(&[(3, body)]))));
        let body = "ConfigPath = \"\"\nTypeUrl = \"x\"\ndebug = true\nkernel_params = [\"quiet\"]\nvcpus = 3\n";
        let read = config(body).unwrap();
        assert_eq!(
            (read.debug, read.vcpus, read.kernel_params),
            (true, Some(3), vec!["quiet".to_owned()])
        );
        for (body, part) in [
            (
                "BinaryName = \"/usr/bin/runc\"",
                "unknown field `BinaryName`",
            ),
            (
                "debug = true\nvcpus = 2.5",
                "line 2: vcpus: must be a whole number from 1 to 240, not 2.5",
            ),
            ("vcpus", "line 1: "),
        ] {
            let error = config(body).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
            assert!(
                error.to_string().contains(part)
                    && error.to_string().contains("containerd's configuration"),
                "{error}"
            );
        }
    }

    #[test]
    fn options_that_say_nothing_are_the_defaults() {
        for options in [
            None,
            Some(any("", b"")),
            Some(any(RUNTIME_OPTIONS, b"")),
            Some(any(RUNC_OPTIONS, b"\x1a\x03abc")),
        ] {
            config(options.as_ref()).unwrap();
        }
        config(Some(&any(
            "type.googleapis.com/runtimeoptions.v1.Options",
            b"",
        )))
        .unwrap();
    }

    #[test]
    fn other_options_and_garbage_are_named() {
        let error = config(Some(&any("windows.Options", b""))).unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
        assert!(error.to_string().contains("windows.Options"));
        for garbage in [&b"\x12\xff"[..], b"\x0f", b"\x12\x05ab"] {
            assert_eq!(
                config(Some(&any(RUNTIME_OPTIONS, garbage)))
                    .unwrap_err()
                    .code(),
                ttrpc::Code::INVALID_ARGUMENT
            );
        }
    }
}
