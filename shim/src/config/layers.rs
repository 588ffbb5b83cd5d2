//! The sources of a configuration, put one above the other: a later one wins, key by key. Each is
//! checked by itself, so that a mistake is reported with its own file and line, also where a later
//! source would have hidden it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Spanned, Table, Value};

use super::Config;
use crate::error::{Error, Result};

/// Keys in containerd's table of runtime options that are its own.
const OF_CONTAINERD: [&str; 2] = ["TypeUrl", "ConfigPath"];

/// What all sources so far say.
#[derive(Debug, Default)]
pub struct Layers(Table);

impl Layers {
    /// Adds a file, which may be missing unless it is `required`, and its drop-ins:
    /// `<file>.d/*.toml` in the order of their names. Drop-ins count without the file too.
    pub fn file(&mut self, path: &Path, required: bool) -> Result<()> {
        match std::fs::read(path) {
            Ok(text) => self.toml(&text, &format!("configuration {}", path.display()), &[])?,
            Err(error) if error.kind() == ErrorKind::NotFound && !required => {}
            Err(error) => return Err(unreadable(path, &error)),
        }
        for path in drop_ins(path)? {
            let text = std::fs::read(&path).map_err(|error| unreadable(&path, &error))?;
            self.toml(&text, &format!("configuration {}", path.display()), &[])?;
        }
        Ok(())
    }

    /// Adds the table of runtime options in containerd's configuration.
    pub fn runtime_options(&mut self, text: &[u8]) -> Result<()> {
        self.toml(
            text,
            "the runtime's options in containerd's configuration",
            &OF_CONTAINERD,
        )
    }

    fn toml(&mut self, text: &[u8], whence: &str, ignored: &[&str]) -> Result<()> {
        let bad = |offset: usize, what: &str| {
            let line = 1 + text
                .iter()
                .take(offset)
                .filter(|byte| **byte == b'\n')
                .count();
            Error::invalid(format!(
                "{whence} line {line}: {}",
                what.replace(char::is_control, " ")
            ))
        };
        let utf8 = std::str::from_utf8(text)
            .map_err(|error| bad(error.valid_up_to(), "is not UTF-8 text"))?;
        let table: BTreeMap<String, Spanned<Value>> = toml::from_str(utf8)
            .map_err(|error| bad(error.span().map_or(0, |span| span.start), error.message()))?;
        for (key, value) in table {
            if ignored.contains(&key.as_str()) {
                continue;
            }
            let offset = value.span().start;
            let value = value.into_inner();
            check(&key, &value).map_err(|what| bad(offset, &what))?;
            self.0.insert(key, value);
        }
        Ok(())
    }

    /// The defaults with all of it above them.
    pub fn config(self) -> Result<Config> {
        // Each key has been checked, and none depends on another.
        Config::deserialize(self.0)
            .map_err(|error| Error::invalid(format!("configuration: {}", error.message())))
    }
}

/// The configuration of one key and defaults.
pub fn check(key: &str, value: &Value) -> std::result::Result<Config, String> {
    let table = Table::from_iter([(key.to_owned(), value.clone())]);
    Config::deserialize(table).map_err(|error| match error.message() {
        unknown if unknown.starts_with("unknown field") => unknown.to_owned(),
        message => format!("{key}: {message}"),
    })
}

/// The drop-ins of a file. Hidden ones are those that editors and package managers leave.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>> {
    let mut directory = file.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(&directory, &error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|error| unreadable(&directory, &error))?
            .path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden
            && path
                .extension()
                .is_some_and(|extension| extension == "toml")
        {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::invalid(format!(
        "cannot read configuration {}: {error}",
        path.display()
    ))
}
