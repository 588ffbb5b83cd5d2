#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shim::fuzz::ledger(bytes));
