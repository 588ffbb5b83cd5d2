//! Unix sockets of the host that containers connect to, through vsock.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The sockets, by the names that the guest knows.
#[derive(Clone, Debug, Default)]
pub struct Sockets {
    names: Arc<Mutex<HashMap<String, PathBuf>>>,
    port: Option<u32>,
}

impl Sockets {
    /// The host port that the guest dials, if it can.
    pub fn port(&self) -> Option<u32> {
        self.port
    }

    /// From now on the guest may connect to this one.
    pub fn allow(&self, name: String, path: PathBuf) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(name, path);
    }

    /// No new connection to it.
    pub fn forbid(&self, name: &str) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}
