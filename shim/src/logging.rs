//! The server's log: lines in logrus style into the bundle's `log` fifo, which containerd copies to
//! its own log.
//!
//! The fifo fills up while containerd is stopped. A line that does not fit is dropped: a log must
//! never hold up a container. What a user needs to know also travels in the error of the call.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// Sends everything that is logged from now on to the bundle's fifo. Without one (a bundle made by
/// hand) nothing is logged.
pub fn start(bundle: &Path, id: &str, debug: bool) {
    // Read and write: opening never waits for a reader, and containerd's restart is no broken pipe.
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"));
    let Ok(fifo) = fifo else { return };
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let layer = Fifo {
        fifo,
        id: id.to_owned(),
    }
    .with_filter(level);
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer));
    std::panic::set_hook(Box::new(|info| tracing::error!("panic: {info}")));
}

struct Fifo {
    fifo: File,
    id: String,
}

impl<S: Subscriber> Layer<S> for Fifo {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let line = line(event, &self.id);
        let mut line = line.into_bytes();
        // A write of at most PIPE_BUF bytes is all or nothing (pipe(7)), so lines never tear.
        if line.len() > libc::PIPE_BUF {
            line.truncate(libc::PIPE_BUF - 1);
            line.push(b'\n');
        }
        let _ = (&self.fifo).write(&line);
    }
}

fn line(event: &Event<'_>, id: &str) -> String {
    let level = match *event.metadata().level() {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    };
    let mut fields = Fields::default();
    event.record(&mut fields);
    let time = rfc3339(OffsetDateTime::now_utc());
    format!(
        "time=\"{time}\" level={level} msg={:?}{} id={id}\n",
        fields.message, fields.rest
    )
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.rest, " {name}={:?}", format!("{value:?}")),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            name => {
                let _ = write!(self.rest, " {name}={value:?}");
            }
        }
    }
}

/// UTC in whole seconds.
fn rfc3339(time: OffsetDateTime) -> String {
    time.truncate_to_second()
        .format(&Rfc3339)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn times_are_utc_in_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_709_251_200_999);
        assert_eq!(rfc3339(time.into()), "2024-03-01T00:00:00Z");
    }

    #[test]
    fn a_full_fifo_never_holds_the_server_up() {
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let layer = Fifo {
            fifo,
            id: "web".into(),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for _ in 0..10_000 {
                tracing::info!(
                    answer = 42,
                    "a line of some length, far more of them than a pipe can hold"
                );
            }
        });
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let mut text = Vec::new();
        let _ = std::io::Read::read_to_end(&mut reader, &mut text);
        // The layer is gone and nobody holds the fifo, so what it held may be gone too; reaching
        // this line is the test.
    }
}
