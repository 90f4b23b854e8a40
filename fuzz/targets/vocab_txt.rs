//! Fuzzes the parser `vocab_txt`.
#![no_main]

use e2e::parsers::Parser;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    Parser::named("vocab_txt").loads(file);
});
