//! The shim's command line as containerd writes it: Go flags (`-id x`, `-id=x`, `--id x`), then the
//! action.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use clap::error::ErrorKind;

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
    /// Print the version.
    Version,
    /// Be the server; only `start` runs this.
    Serve,
}

#[derive(Parser, Debug)]
#[command(disable_help_flag = true, disable_version_flag = true)]
struct Flags {
    #[arg(long, default_value = "")]
    namespace: String,
    #[arg(long, default_value = "")]
    id: String,
    #[arg(long, default_value = "")]
    address: String,
    #[arg(long, default_value = "")]
    publish_binary: String,
    #[arg(long)]
    bundle: Option<PathBuf>,
    #[arg(long)]
    socket: Option<PathBuf>,
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true,
        default_value = "false")]
    debug: bool,
    #[arg(long)]
    info: bool,
    #[arg(long, short = 'v')]
    version: bool,
    action: Option<String>,
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
    /// Parses a command line, the program's name first.
    ///
    /// # Errors
    /// One line that names the flag or action that is wrong.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args> {
        let flags =
            Flags::try_parse_from(args.into_iter().map(double_dash)).map_err(
                |error| match error.kind() {
                    ErrorKind::UnknownArgument => {
                        let flag = error
                            .get(clap::error::ContextKind::InvalidArg)
                            .map(ToString::to_string)
                            .unwrap_or_default();
                        Error::invalid(format!(
                            "unknown flag {flag}: see containerd's shim v2 contract"
                        ))
                    }
                    _ => Error::invalid(
                        error
                            .to_string()
                            .lines()
                            .next()
                            .unwrap_or("bad command line")
                            .to_owned(),
                    ),
                },
            )?;
        let action = match flags.action.as_deref() {
            _ if flags.version => Action::Version,
            _ if flags.info => Action::Info,
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some("serve") => Action::Serve,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "unknown action {other:?}: use start or delete"
                )));
            }
            None => {
                return Err(Error::invalid(
                    "no action: this program is run by containerd, with start or delete",
                ));
            }
        };
        if matches!(action, Action::Start | Action::Delete | Action::Serve) {
            for (flag, value) in [("-namespace", &flags.namespace), ("-id", &flags.id)] {
                if value.is_empty() {
                    return Err(Error::invalid(format!("{flag} is missing")));
                }
            }
        }
        Ok(Args {
            action,
            namespace: flags.namespace,
            id: flags.id,
            address: flags.address,
            bundle: flags.bundle.unwrap_or_else(|| PathBuf::from(".")),
            socket: flags.socket,
            debug: flags.debug,
        })
    }
}

/// Go's flag package takes `-name` for what is `--name` elsewhere.
fn double_dash(arg: OsString) -> OsString {
    match arg.to_str() {
        Some(text) if text.starts_with('-') && !text.starts_with("--") && text.len() > 2 => {
            format!("-{text}").into()
        }
        _ => arg,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(format!("shim {line}").split(' ').map(OsString::from))
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
        assert!(
            !parse("-namespace n -id i -debug=false delete -bundle /x")
                .unwrap()
                .debug
        );
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
            ("-namespace n -id i -nonsense start", "--nonsense"),
            ("-namespace n -id i stop", "\"stop\""),
            ("-namespace n -id i", "no action"),
            ("-namespace n start", "-id"),
            ("-namespace", "--namespace"),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(
                message.contains(part) && !message.contains('\n'),
                "{line}: {message}"
            );
        }
    }
}
