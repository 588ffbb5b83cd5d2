//! The last lines that a child wrote to its stderr: its own words on why it ended. A child that
//! writes without end costs a bounded amount of memory.

use std::collections::VecDeque;

/// So many lines are kept, and so much of each.
const TAIL_LINES: usize = 20;
const TAIL_LINE_BYTES: usize = 512;

/// The last lines of a stream.
#[derive(Debug, Default)]
pub(super) struct Tail {
    lines: VecDeque<String>,
    /// The line that has no end yet.
    line: Vec<u8>,
}

impl Tail {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < TAIL_LINE_BYTES {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = printable(&self.line);
            self.line.clear();
            if line.is_empty() {
                continue;
            }
            tracing::debug!(line, "stderr of a child");
            if self.lines.len() == TAIL_LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(line);
        }
    }

    /// The lines, the one without an end last.
    pub(super) fn lines(&self) -> Vec<String> {
        let rest = (!self.line.is_empty()).then(|| printable(&self.line));
        self.lines.iter().cloned().chain(rest).collect()
    }
}

fn printable(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    line.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The last line that may say why a process ended: QEMU's warnings do not, nor its advice ("Use
/// -machine help to list supported machines").
pub(crate) fn last_words(stderr: &[String]) -> Option<&str> {
    stderr
        .iter()
        .map(String::as_str)
        .rfind(|line| !line.contains(": warning: ") && !line.starts_with("Use -"))
}
