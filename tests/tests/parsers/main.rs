//! What strangers write, damaged and hostile: every parser answers, says where, and holds little more than what it was given.
//!
//! The corpus is `fuzz/corpus`, which coverage-guided runs (`cargo xtask fuzz`) begin with too.

mod held;
mod mutants;
mod weaknesses;

use std::{fs, path::PathBuf};

use e2e::parsers::Parser;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// A file of the corpus.
struct Seed {
    name: String,
    bytes: Vec<u8>,
}

/// The corpus of a parser, by name.
fn corpus(parser: &Parser) -> Vec<Seed> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(parser.name);
    let listed = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut seeds: Vec<Seed> = listed
        .map(|entry| {
            let entry = entry.expect("an entry of the corpus");
            let name = entry.file_name().into_string().expect("a name in UTF-8");
            Seed { name, bytes: fs::read(entry.path()).expect("a file of the corpus") }
        })
        .collect();
    seeds.sort_by(|a, b| a.name.cmp(&b.name));
    seeds
}
