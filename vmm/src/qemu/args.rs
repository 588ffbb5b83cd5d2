//! Command line arguments as typed items. Values are escaped here and nowhere else, and never
//! joined by hand.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// A command line under construction.
#[derive(Debug, Default)]
pub(crate) struct Arguments(Vec<OsString>);

impl Arguments {
    /// An option without a value.
    pub(crate) fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    /// An option whose value QEMU takes as it is (`-kernel`, `-append`, …).
    pub(crate) fn plain(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.flag(name);
        self.0.push(value.as_ref().to_owned());
    }

    /// An option whose value is a list of properties.
    pub(crate) fn list(&mut self, name: &str, properties: Properties) {
        self.flag(name);
        self.0.push(properties.0);
    }

    pub(crate) fn into_vec(self) -> Vec<OsString> {
        self.0
    }
}

/// `kind,key=value,…`, with commas in values doubled.
#[derive(Debug)]
pub(crate) struct Properties(OsString);

impl Properties {
    /// A list that begins with a driver, backend or type, whose name is ours.
    pub(crate) fn new(kind: &str) -> Properties {
        Properties(kind.into())
    }

    /// A list of nothing but pairs.
    pub(crate) fn pairs() -> Properties {
        Properties(OsString::new())
    }

    pub(crate) fn with(mut self, key: &str, value: impl AsRef<OsStr>) -> Properties {
        if !self.0.is_empty() {
            self.0.push(",");
        }
        self.0.push(key);
        self.0.push("=");
        let mut escaped = Vec::new();
        for byte in value.as_ref().as_bytes() {
            escaped.push(*byte);
            if *byte == b',' {
                escaped.push(b',');
            }
        }
        self.0.push(OsString::from_vec(escaped));
        self
    }

    pub(crate) fn number(self, key: &str, value: impl Into<u64>) -> Properties {
        self.with(key, value.into().to_string())
    }

    pub(crate) fn on(self, key: &str) -> Properties {
        self.with(key, "on")
    }

    pub(crate) fn off(self, key: &str) -> Properties {
        self.with(key, "off")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_values_are_doubled_and_in_plain_values_are_not() {
        let mut arguments = Arguments::default();
        arguments.flag("-S");
        arguments.plain("-append", "a=1,2");
        arguments.list(
            "-device",
            Properties::new("virtio-rng-pci")
                .with("id", "a,b=c")
                .number("n", 3_u32)
                .on("x"),
        );
        arguments.list(
            "-name",
            Properties::pairs().with("guest", OsStr::from_bytes(b"\xff,")),
        );
        let wanted: [&[u8]; 7] = [
            b"-S",
            b"-append",
            b"a=1,2",
            b"-device",
            b"virtio-rng-pci,id=a,,b=c,n=3,x=on",
            b"-name",
            b"guest=\xff,,",
        ];
        assert_eq!(arguments.into_vec(), wanted.map(OsStr::from_bytes));
    }
}
