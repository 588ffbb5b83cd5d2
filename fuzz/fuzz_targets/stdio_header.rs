#![no_main]

use guest_protocol::stdio::Header;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(header) = text.parse::<Header>() {
        assert_eq!(header.to_string(), text);
    }
});
