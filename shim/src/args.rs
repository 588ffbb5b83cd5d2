//! The shim's command line as containerd writes it: Go flags (`-id x`, `-id=x`, `--id x`), then the
//! action. The `containerd-shim` crate reads it by Go's rules, so flags end at the action; which
//! ones must be there is decided here.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// What containerd asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leave a server behind, print its address.
    Start,
    /// Undo what a server left.
    Delete,
    /// Print a `RuntimeInfo`.
    Info,
    /// Print what the runtime can do, as `runc features` does; CRI-O asks so.
    Features,
    /// Print the version.
    Version,
    /// Be the server; only `start` runs this.
    Serve,
}

/// The parsed command line.
#[derive(Clone, Debug)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container or sandbox that the call is about.
    pub id: String,
    /// Address of containerd's gRPC socket.
    pub address: String,
    /// Directory of the bundle; containerd runs the shim inside it.
    pub bundle: PathBuf,
    /// Path of the server's socket (`serve` only).
    pub socket: Option<PathBuf>,
    /// Log at debug level.
    pub debug: bool,
}

impl Args {
    /// Parses a command line without the program's name.
    ///
    /// # Errors
    /// One line that names the flag or action that is wrong.
    pub fn parse(args: &[OsString]) -> Result<Args> {
        let flags = containerd_shim::parse(args).map_err(|error| {
            // The crate says of a wrong value only that there is one.
            Error::invalid(format!(
                "{error}, in {args:?}: see containerd's shim v2 contract"
            ))
        })?;
        let action = match flags.action.as_str() {
            _ if flags.version => Action::Version,
            _ if flags.info => Action::Info,
            "features" => Action::Features,
            "start" => Action::Start,
            "delete" => Action::Delete,
            "serve" => Action::Serve,
            "" => {
                return Err(Error::invalid(
                    "no action: this program is run by containerd, with start or delete",
                ));
            }
            other => {
                return Err(Error::invalid(format!(
                    "unknown action {other:?}: use start or delete"
                )));
            }
        };
        if matches!(action, Action::Start | Action::Delete | Action::Serve) {
            for (flag, value) in [("-namespace", &flags.namespace), ("-id", &flags.id)] {
                if value.is_empty() {
                    return Err(Error::invalid(format!("{flag} is missing")));
                }
            }
        }
        let path = |text: String| (!text.is_empty()).then(|| PathBuf::from(text));
        Ok(Args {
            action,
            namespace: flags.namespace,
            id: flags.id,
            address: flags.address,
            bundle: path(flags.bundle).unwrap_or_else(|| PathBuf::from(".")),
            socket: path(flags.socket),
            debug: flags.debug,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Args::parse(&args)
    }

    #[test]
    fn every_go_spelling_of_a_flag_is_the_same() {
        for line in [
            "-namespace n -address /a -publish-binary /b -id i -debug start",
            "-namespace=n -address=/a -publish-binary=/b -id=i -debug=true start",
            "--namespace n --address=/a --publish-binary /b --id i --debug start",
        ] {
            let args = parse(line).unwrap();
            assert_eq!(
                (args.action, args.namespace.as_str(), args.id.as_str()),
                (Action::Start, "n", "i")
            );
            assert_eq!((args.address.as_str(), args.debug), ("/a", true));
        }
        let args = parse("-namespace n -id i -debug=false -bundle /x delete").unwrap();
        assert_eq!((args.bundle, args.debug), (PathBuf::from("/x"), false));
    }

    #[test]
    fn questions_need_no_other_flag() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-version").unwrap().action, Action::Version);
        assert_eq!(parse("--info").unwrap().action, Action::Info);
    }

    #[test]
    fn mistakes_are_one_line_that_names_them() {
        for (line, part) in [
            ("-namespace n -id i -nonsense start", "-nonsense"),
            ("-namespace n -id i -debug=maybe start", "-debug=maybe"),
            ("-namespace n -id i stop", "\"stop\""),
            ("-namespace n -id i", "no action"),
            ("-namespace n start", "-id"),
            ("-namespace", "-namespace"),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(
                message.contains(part) && !message.contains('\n'),
                "{line}: {message}"
            );
        }
    }
}
