//! Unix sockets of the host: a socket in the guest whose connections are carried to one on the
//! host.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use guest_protocol::carry::copy_both_ways;
use guest_protocol::protocols::agent::Storage;
use guest_protocol::stdio::ACCEPTED;
use guest_protocol::{
    HostSocketRequest, Listener, Stream, Transport, UDS_PORT_OPTION, is_socket_name,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::serve;
use crate::deadlines;
use crate::error::{Context, Error, Result};
use crate::gate::Incoming;

/// A listening socket. It ends, with its connections and its file, when it is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    task: AbortHandle,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path);
    }
}

/// Listens at the storage's mount point. Each connection is carried to the socket of the host that
/// the storage names.
///
/// # Errors
/// A storage without a port, a source that cannot be a socket's name, a mount point where no socket
/// can be made.
pub fn listen(storage: &Storage, host: Transport) -> Result<Socket> {
    let Storage {
        source,
        mount_point,
        ..
    } = storage;
    let port = storage
        .driver_options
        .iter()
        .find_map(|option| option.strip_prefix(UDS_PORT_OPTION)?.parse::<u32>().ok());
    let port = port.ok_or_else(|| {
        Error::Invalid(format!(
            "storage {mount_point} has no driver option {UDS_PORT_OPTION}"
        ))
    })?;
    if !is_socket_name(source) {
        return Err(Error::Invalid(format!(
            "{source:?} cannot be the name of a socket of the host"
        )));
    }
    let path = PathBuf::from(mount_point);
    let listener = bind(&path, &Owner::parse(&storage.options)?)
        .context(|| format!("listen on {mount_point}"))?;
    // The path is empty, so that the listener's drop removes no file: the drop of the `Socket`
    // does, and by the time the task ends there may be another socket of this name.
    let listener = Listener::Unix {
        listener,
        path: PathBuf::new(),
    };
    let source = source.clone();
    let carry = move |client| carry(client, host.clone(), port, source.clone());
    let task = tokio::spawn(serve(Incoming::Open(listener), "host socket", carry)).abort_handle();
    Ok(Socket { path, task })
}

/// Owner and permissions of the socket, as on the host.
struct Owner {
    mode: u32,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Owner {
    fn parse(options: &[String]) -> Result<Owner> {
        let mut owner = Owner {
            mode: 0o600,
            uid: None,
            gid: None,
        };
        for option in options {
            let bad = || Error::Invalid(format!("bad option {option:?} of a socket of the host"));
            match option.split_once('=').ok_or_else(bad)? {
                ("mode", text) => {
                    let mode = u32::from_str_radix(text, 8)
                        .ok()
                        .filter(|mode| *mode <= 0o7777);
                    owner.mode = mode.ok_or_else(bad)?;
                }
                ("uid", text) => owner.uid = Some(text.parse().map_err(|_| bad())?),
                ("gid", text) => owner.gid = Some(text.parse().map_err(|_| bad())?),
                _ => return Err(bad()),
            }
        }
        Ok(owner)
    }
}

fn bind(path: &Path, owner: &Owner) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // Left behind by an agent that was killed.
    if fs::symlink_metadata(path).is_ok_and(|left| left.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // No container has it yet. The owner goes first, because a change of it takes bits of the mode.
    chown(path, owner.uid, owner.gid)?;
    fs::set_permissions(path, fs::Permissions::from_mode(owner.mode))?;
    Ok(listener)
}

async fn carry(mut client: Stream, host: Transport, port: u32, source: String) -> io::Result<()> {
    let Stream::Unix(unix) = &client else {
        return Err(io::Error::other(
            "a client of a host socket that is on no unix socket",
        ));
    };
    let peer = unix.peer_cred()?;
    let request = HostSocketRequest {
        name: source,
        uid: peer.uid(),
        gid: peer.gid(),
    };
    let mut server = host.dial(port, deadlines::HOST_DIAL).await?;
    let ask = async {
        server.write_all(request.to_string().as_bytes()).await?;
        server.read_u8().await
    };
    if timeout(deadlines::HOST_SOCKET_ANSWER, ask).await?? != ACCEPTED {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the host answered with something unknown",
        ));
    }
    copy_both_ways(&mut client, &mut server).await
}
