#![no_main]

use vmm::qmp::Decoder;

// The same messages, however the stream is cut.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let read = |chunk: usize| {
        let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
        for part in bytes.chunks(chunk) {
            decoder.extend(part);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(_) => return messages,
                }
            }
        }
        messages
    };
    assert_eq!(read(usize::MAX), read(7));
});
