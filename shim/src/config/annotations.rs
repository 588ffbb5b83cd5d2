//! Annotations of a pod (or of a single container) that set configuration keys:
//! `io.cofferdam.<key>`.
//!
//! Whoever may create a pod may write annotations, so the administrator lists the keys that they
//! may set. One that is not listed is an error: a pod that runs without what it asks for is harder
//! to notice than one that does not start.

use std::collections::{BTreeMap, HashMap};

use toml::Value;

use super::{Config, layers};
use crate::error::{Error, Result};

const PREFIX: &str = "io.cofferdam.";

/// Takes one key over from a configuration.
type Set = fn(&mut Config, Config);

/// The keys that can be allowed. Not those that name programs or files: with them a pod could have
/// any program of the host run as root.
pub const SETTABLE: [(&str, Set); 8] = [
    ("kernel_params", |to, from| {
        to.kernel_params = from.kernel_params
    }),
    ("accelerator", |to, from| to.accelerator = from.accelerator),
    ("vsock", |to, from| to.vsock = from.vsock),
    ("memory_mib", |to, from| to.memory_mib = from.memory_mib),
    ("vcpus", |to, from| to.vcpus = from.vcpus),
    ("root_in_memory", |to, from| {
        to.root_in_memory = from.root_in_memory
    }),
    ("boot_timeout_seconds", |to, from| {
        to.boot_timeout_seconds = from.boot_timeout_seconds
    }),
    ("debug", |to, from| to.debug = from.debug),
];

/// Their names, for a message.
pub fn names() -> String {
    SETTABLE.map(|(name, _)| name).join(", ")
}

impl Config {
    /// The configuration with what a sandbox's annotations set.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` that names the annotation: not allowed, no such key, not a value of it.
    pub fn annotated(mut self, annotations: &HashMap<String, String>) -> Result<Config> {
        // Sorted, so that of several mistakes it is always the same that is reported.
        let ours: BTreeMap<_, _> = annotations
            .iter()
            .filter_map(|(name, text)| Some((name.strip_prefix(PREFIX)?, text)))
            .collect();
        for (key, text) in ours {
            let bad = |what: &str| {
                Error::invalid(
                    format!("annotation {PREFIX}{key} {what}").replace(char::is_control, " "),
                )
            };
            let Some((_, set)) = SETTABLE.iter().find(|(name, _)| *name == key) else {
                return Err(bad(&format!(
                    "sets nothing that annotations can set: they can set {}",
                    names()
                )));
            };
            if !self.enable_annotations.iter().any(|allowed| allowed == key) {
                return Err(bad(&format!(
                    "is not allowed on this host: its administrator can add \"{key}\" to \
                     enable_annotations in \
                     Cofferdam's configuration"
                )));
            }
            let value = text
                .trim()
                .parse()
                .unwrap_or_else(|_| Value::String(text.clone()));
            let from = layers::check(key, &value)
                .map_err(|what| bad(&format!("has a wrong value: {what}")))?;
            set(&mut self, from);
            tracing::info!(key, %value, "configuration by annotation");
        }
        Ok(self)
    }
}
