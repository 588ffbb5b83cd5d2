//! For tests: a machine whose QEMU is a script at the other end of a socket.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::resize::Limits;
use super::{Starting, Vm};
use crate::process::{Child, Spawn};

/// A machine of two CPUs and 128 MiB at most, half of them to begin with. A process that does
/// nothing stands for QEMU's.
pub(crate) async fn vm(monitor: UnixStream, virtio_status: bool) -> Vm {
    let process = Child::spawn(Spawn::new("/bin/sleep", vec!["1000".into()])).unwrap();
    let starting = Starting {
        process,
        console: None,
        socket: monitor,
        root_ports: 8,
        places: 8,
        virtio_status,
        limits: Limits {
            vcpus: 1,
            max_vcpus: 2,
            memory_mib: 64,
            max_memory_mib: 128,
            vcpus_can_go: true,
        },
    };
    starting.connect(Duration::from_secs(5)).await.unwrap()
}
