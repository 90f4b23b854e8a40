//! Fuzzes the parser `tokenizer_json`.
#![no_main]

use e2e::parsers::Parser;

libfuzzer_sys::fuzz_target!(init: fuzz::let_be_caught(), |file: &[u8]| {
    fuzz::escaping(|| {
        Parser::named("tokenizer_json").loads(file);
    });
});
