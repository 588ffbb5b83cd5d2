//! The runtime options that a `Create` request carries.

use std::path::PathBuf;

use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, rt::WireType};

use crate::config::Config;
use crate::error::{Error, Result};

/// containerd's message for runtimes other than runc.
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";

/// runc's, which containerd itself sends to any runtime for some pods; nothing in it concerns a virtual machine.
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

/// The configuration that the options name.
///
/// # Errors
/// `INVALID_ARGUMENT`: options of another type, a message that does not parse, a configuration with a mistake.
pub fn config(options: Option<&Any>) -> Result<Config> {
    let path = match options {
        None => None,
        Some(any) if any.type_url.is_empty() && any.value.is_empty() => None,
        Some(any) => match any.type_url.rsplit('/').next() {
            Some(RUNTIME_OPTIONS) => config_path(&any.value)?,
            Some(RUNC_OPTIONS) => None,
            _ => {
                return Err(Error::invalid(format!(
                    "runtime options of type {:?} are not known: use {RUNTIME_OPTIONS} with a ConfigPath",
                    any.type_url
                )));
            }
        },
    };
    Config::load(path.as_deref())
}

/// Field 2 of `runtimeoptions.v1.Options {type_url = 1, config_path = 2, config_body = 3}`.
fn config_path(message: &[u8]) -> Result<Option<PathBuf>> {
    let bad = |error| Error::invalid(format!("the runtime options do not parse: {error}"));
    let mut input = CodedInputStream::from_bytes(message);
    let mut path = None;
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(bad)? {
        match (tag >> 3, WireType::new(tag & 7)) {
            (2, Some(WireType::LengthDelimited)) => path = Some(input.read_string().map_err(bad)?),
            (_, Some(wire_type)) => input.skip_field(wire_type).map_err(bad)?,
            (_, None) => return Err(Error::invalid("the runtime options do not parse: unknown wire type")),
        }
    }
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Default::default() }
    }

    #[test]
    fn a_config_path_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "vcpus = 2").unwrap();
        let path = file.path().to_str().unwrap();
        let mut message = b"\x0a\x01t\x12".to_vec();
        message.push(u8::try_from(path.len()).unwrap());
        message.extend(path.as_bytes());
        message.extend(b"\x1a\x04body");
        assert_eq!(config(Some(&any(RUNTIME_OPTIONS, &message))).unwrap().vcpus, 2);
    }

    #[test]
    fn options_that_say_nothing_are_the_defaults() {
        for options in
            [None, Some(any("", b"")), Some(any(RUNTIME_OPTIONS, b"")), Some(any(RUNC_OPTIONS, b"\x1a\x03abc"))]
        {
            config(options.as_ref()).unwrap();
        }
        config(Some(&any("type.googleapis.com/runtimeoptions.v1.Options", b""))).unwrap();
    }

    #[test]
    fn other_options_and_garbage_are_named() {
        let error = config(Some(&any("windows.Options", b""))).unwrap_err();
        assert_eq!(error.code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(error.message.contains("windows.Options"));
        for garbage in [&b"\x12\xff"[..], b"\x0f", b"\x12\x05ab"] {
            assert_eq!(config(Some(&any(RUNTIME_OPTIONS, garbage))).unwrap_err().code, ttrpc::Code::INVALID_ARGUMENT);
        }
    }
}
