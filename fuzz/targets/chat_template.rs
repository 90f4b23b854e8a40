//! Fuzzes the parser `chat_template`.
#![no_main]

use e2e::parsers::Parser;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    Parser::named("chat_template").loads(file);
});
