//! Programs and guest files: where they are when the configuration says nothing, and whether they
//! are there.

use std::path::{Path, PathBuf};

use super::DEFAULT_PATH;
use crate::error::{Error, Result};

/// A file of this installation: `<prefix>/<relative>` for a shim in `<prefix>/bin`.
pub fn asset(relative: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program
        .parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("/usr/local"))
        .join(relative)
}

/// A helper of this installation, else one that distributions install outside PATH, else whatever
/// PATH has.
pub fn helper(name: &str, elsewhere: &[&str]) -> PathBuf {
    let ours = asset(&format!("libexec/cofferdam/{name}"));
    std::iter::once(ours)
        .chain(elsewhere.iter().map(PathBuf::from))
        .find(|path| path.is_file())
        .unwrap_or(name.into())
}

/// The file behind a configured program: a path as it is, a name looked up in PATH.
///
/// # Errors
/// One line with the configuration key to set.
pub fn find_program(program: &Path, key: &str) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = if program.components().count() > 1 {
        vec![program.to_owned()]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .map(|dir| dir.join(program))
            .collect()
    };
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::invalid(format!(
                "{} is not there: install it or set {key} in {DEFAULT_PATH}",
                program.display()
            ))
        })
}

/// A guest file, checked before anything is started for it.
///
/// # Errors
/// One line with the configuration key to set.
pub fn find_file(path: &Path, key: &str) -> Result<()> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::invalid(format!(
            "guest {key} {}: {error}; set {key} in {DEFAULT_PATH}",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_names_its_key() {
        let message = find_program(Path::new("/no/qemu"), "qemu")
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("/no/qemu") && message.contains("set qemu"),
            "{message}"
        );
        assert!(find_program(Path::new("sh"), "qemu").is_ok());
    }
}
