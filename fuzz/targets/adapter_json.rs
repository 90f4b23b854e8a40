//! Fuzzes the parser `adapter_json`.
#![no_main]

use e2e::parsers::Parser;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    Parser::named("adapter_json").loads(file);
});
