#![no_main]

use guest_protocol::{KEY_LINE, Key};

libfuzzer_sys::fuzz_target!(|line: [u8; KEY_LINE]| {
    if let Some(key) = Key::parse(line) {
        assert!(key.is_shown_by(&line) && key.line() == &line);
    }
});
