//! The forms of containerd's request to `start` and of the answer it understands.
//!
//! Every containerd takes the plain address. 2.3 and later send a protobuf `BootstrapParams` on
//! stdin and want a protobuf back. Earlier ones send the runtime options as an `Any`, whose bytes
//! also parse as `BootstrapParams`: only id and namespace that equal the flags tell the two apart.

use std::path::PathBuf;

use containerd_shim::StartOpts;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;

use crate::container::layers;
use crate::error::{Error, Result};
use crate::host::identity::SOCKET_DIR;

/// Newest version of the task API that the server speaks.
const TASK_API: i32 = containerd_shim_protos::TASK_API_VERSION;

/// Longest directory for a socket whose name has 64 characters, in bytes.
const MAX_SOCKET_DIR: usize = 42;

/// `extensions` of `BootstrapResult`, since containerd 2.4.
const EXTENSIONS: u32 = 6;

/// An `Extension` with containerd's message `MountCapabilities`: the mounts of root file systems
/// that are left to us.
fn mounts_extension() -> Vec<u8> {
    const TYPES: u32 = 1;
    const TRANSFORMS: u32 = 2;
    let mut capabilities = Empty::new();
    let fields = capabilities.special_fields.mut_unknown_fields();
    for name in layers::TYPES {
        fields.add_length_delimited(TYPES, name.into());
    }
    for name in layers::TRANSFORMS {
        fields.add_length_delimited(TRANSFORMS, name.into());
    }
    // Writing to memory does not fail.
    let any = Any {
        type_url: "containerd.types.MountCapabilities".to_owned(),
        value: capabilities.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    };
    let extension = Extension {
        value: Some(any).into(),
        ..Default::default()
    };
    extension.write_to_bytes().unwrap_or_default()
}

/// What containerd wrote to the standard input of `start`.
#[derive(Debug)]
pub enum Request {
    /// Nothing, or the runtime options alone.
    Plain,
    /// containerd 2.3 or later.
    Bootstrap(Box<StartOpts>),
}

impl Request {
    /// Decodes what came on stdin.
    ///
    /// # Errors
    /// Parameters for another container than the flags name.
    pub fn decode(stdin: &[u8], namespace: &str, id: &str) -> Result<Request> {
        let Ok(params) = BootstrapParams::parse_from_bytes(stdin) else {
            return Ok(Request::Plain);
        };
        if params.instance_id == id && params.namespace == namespace {
            return Ok(Request::Bootstrap(Box::new(params.into())));
        }
        // An `Any` puts its type URL where the id is, and the options where the namespace is.
        let is_any = stdin.is_empty()
            || params.instance_id.contains(['.', '/']) && params.containerd_grpc_address.is_empty();
        if is_any {
            return Ok(Request::Plain);
        }
        Err(Error::invalid(format!(
            "bootstrap parameters are for {}/{}, the flags say {namespace}/{id}",
            params.namespace, params.instance_id
        )))
    }

    /// The directory for the server's socket.
    ///
    /// # Errors
    /// A directory that is too long for a socket in it.
    pub fn socket_dir(&self) -> Result<PathBuf> {
        let asked = match self {
            Request::Plain => None,
            Request::Bootstrap(options) => options.socket_dir.as_deref(),
        };
        let dir = asked.unwrap_or(SOCKET_DIR);
        if dir.len() > MAX_SOCKET_DIR {
            return Err(Error::invalid(format!(
                "socket_dir {dir} has {} bytes, {MAX_SOCKET_DIR} is the most a socket path has \
                 room for",
                dir.len()
            )));
        }
        Ok(PathBuf::from(dir))
    }

    /// Whether the log level asks for debug messages.
    pub fn debug(&self) -> bool {
        matches!(self, Request::Bootstrap(options) if options.debug)
    }

    /// The bytes that go to stdout.
    ///
    /// # Errors
    /// None in practice; protobuf's own.
    pub fn reply(&self, address: &str) -> Result<Vec<u8>> {
        match self {
            Request::Plain => Ok(address.as_bytes().to_vec()),
            Request::Bootstrap(_) => {
                let mut result = BootstrapResult {
                    version: TASK_API,
                    address: address.to_owned(),
                    protocol: "ttrpc".to_owned(),
                    ..Default::default()
                };
                result
                    .special_fields
                    .mut_unknown_fields()
                    .add_length_delimited(EXTENSIONS, mounts_extension());
                result.write_to_bytes().map_err(|error| {
                    Error::internal(format!("cannot encode the start reply: {error}"))
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: &str = "unix:///run/containerd/s/abc";

    #[test]
    fn older_daemons_get_the_plain_address() {
        let options = |type_url: &str, value: &[u8]| {
            let any = Any {
                type_url: type_url.into(),
                value: value.into(),
                ..Default::default()
            };
            any.write_to_bytes().unwrap()
        };
        for stdin in [
            Vec::new(),
            options("runtimeoptions.v1.Options", b"\x12\x04/etc"),
            options("containerd.runc.v1.Options", b""),
            options("types.containerd.io/opencontainers/x", &[0xff, 0xfe]),
            b"\xff\xff not protobuf".to_vec(),
        ] {
            let request = Request::decode(&stdin, "default", "web").unwrap();
            assert_eq!(request.reply(ADDRESS).unwrap(), ADDRESS.as_bytes());
            assert_eq!(request.socket_dir().unwrap(), PathBuf::from(SOCKET_DIR));
        }
    }

    #[test]
    fn newer_daemons_get_protobuf_and_their_socket_directory() {
        let params = BootstrapParams {
            instance_id: "web".into(),
            namespace: "default".into(),
            socket_dir: Some("/run/s".into()),
            log_level: protobuf::EnumOrUnknown::from_i32(-4),
            ..Default::default()
        };
        let request = Request::decode(&params.write_to_bytes().unwrap(), "default", "web").unwrap();
        assert!(request.debug());
        assert_eq!(request.socket_dir().unwrap(), PathBuf::from("/run/s"));
        let reply = BootstrapResult::parse_from_bytes(&request.reply(ADDRESS).unwrap()).unwrap();
        assert_eq!(
            (
                reply.version,
                reply.address.as_str(),
                reply.protocol.as_str()
            ),
            (3, ADDRESS, "ttrpc")
        );
    }

    #[test]
    fn parameters_for_another_container_are_refused() {
        let params = BootstrapParams {
            instance_id: "other".into(),
            namespace: "default".into(),
            containerd_grpc_address: "/run/containerd/containerd.sock".into(),
            ..Default::default()
        };
        let error =
            Request::decode(&params.write_to_bytes().unwrap(), "default", "web").unwrap_err();
        assert_eq!(
            error.to_string(),
            "bootstrap parameters are for default/other, the flags say default/web"
        );
    }

    #[test]
    fn a_socket_directory_without_room_is_refused() {
        let params = BootstrapParams {
            instance_id: "web".into(),
            namespace: "default".into(),
            socket_dir: Some("/".repeat(43)),
            ..Default::default()
        };
        let request = Request::decode(&params.write_to_bytes().unwrap(), "default", "web").unwrap();
        assert!(
            request
                .socket_dir()
                .unwrap_err()
                .to_string()
                .contains("43 bytes")
        );
    }
}
