//! Fuzzes the parser `index`.
#![no_main]

use e2e::parsers::Parser;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    Parser::named("index").loads(file);
});
