//! Fuzzes the parser `packed`.
#![no_main]

use e2e::parsers::Parser;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    Parser::named("packed").loads(file);
});
