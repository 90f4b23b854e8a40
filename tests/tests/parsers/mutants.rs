//! Files of the corpus, changed at random: the same changes in every run, as many as are counted here.

use std::{env, fs, panic::catch_unwind};

use e2e::parsers::Parser;

use crate::{
    Seed, corpus,
    held::{alone, meet},
};

/// Numbers that lengths, counts and offsets go wrong at.
const EDGES: [u64; 12] = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, (1 << 61) + 1, (1 << 63) - 1, u64::MAX];
/// Pieces of the languages that texts are in.
const WORDS: [&str; 24] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "\n",
    "null",
    "true",
    "-1",
    "0",
    "1e308",
    "18446744073709551615",
    "\\u0000",
    "{{",
    "}}",
    "{%",
    "%}",
    "(",
    ")",
    "*",
    "&a",
    "!!",
];

/// SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// A file made of `seeds`, every second time of a good one, by one to three changes.
fn mutant(seeds: &[Seed], random: &mut Random) -> Vec<u8> {
    let good: Vec<&Seed> = seeds.iter().filter(|seed| seed.name.starts_with("good-")).collect();
    let mut file = if random.below(2) == 0 { random.of(&good).bytes.clone() } else { random.of(seeds).bytes.clone() };
    for _ in 0..=random.below(3) {
        if file.is_empty() {
            break;
        }
        let at = random.below(file.len());
        match random.below(9) {
            0 => file[at] ^= 1 << random.below(8),
            1 => file[at] = *random.of(&EDGES) as u8,
            2 => {
                // A number of the file's own, or one near it, where a number stands.
                let width = *random.of(&[2, 4, 8]);
                let at = at.saturating_sub(at % width.min(4));
                let edge = *random.of(&EDGES);
                let near = (file.len() as u64).wrapping_add(edge);
                let value = if random.below(3) == 0 { near } else { edge };
                if let Some(place) = file.get_mut(at..at + width) {
                    place.copy_from_slice(&value.to_le_bytes()[..width]);
                }
            }
            3 => file.truncate(at),
            4 => drop(file.drain(at..file.len().min(at + 1 + random.below(16)))),
            5 => {
                let piece = file[at..file.len().min(at + 1 + random.below(64))].to_vec();
                drop(file.splice(at..at, piece));
            }
            6 => drop(file.splice(at..at, random.of(&WORDS).bytes())),
            7 => digits(&mut file, at, random),
            _ => {
                let other = &random.of(seeds).bytes;
                let from = random.below(other.len().max(1));
                file.truncate(at);
                file.extend_from_slice(other.get(from..).unwrap_or_default());
            }
        }
    }
    file
}

/// Writes another number over the next one that stands in digits.
fn digits(file: &mut Vec<u8>, from: usize, random: &mut Random) {
    let Some(begin) = (from..file.len()).find(|&i| file[i].is_ascii_digit()) else { return };
    let end = (begin..file.len()).find(|&i| !file[i].is_ascii_digit()).unwrap_or(file.len());
    let other = random.of(&EDGES).to_string();
    drop(file.splice(begin..end, other.into_bytes()));
}

/// Meets `count` mutants; some load and some are refused, or nothing was tried.
fn try_mutants(name: &str, count: usize) {
    let _alone = alone();
    let parser = Parser::named(name);
    let seeds: Vec<Seed> = corpus(&parser).into_iter().filter(|seed| seed.bytes.len() < 1 << 14).collect();
    let mut random = Random(name.bytes().fold(1, |n, byte| n.wrapping_mul(31).wrapping_add(byte.into())));
    let mut loaded = 0;
    for number in 0..count {
        let file = mutant(&seeds, &mut random);
        match catch_unwind(|| meet(&parser, &file)) {
            Ok(loads) => loaded += usize::from(loads),
            Err(_) => {
                let path = env::temp_dir().join(format!("skein-{name}-mutant-{number}"));
                fs::write(&path, &file).expect("a writable temporary folder");
                panic!("mutant {number} of {name} was not met well; it is in {}", path.display());
            }
        }
    }
    let (fewest, refused) = (count / 100, count - loaded);
    assert!(loaded > fewest && refused > fewest, "of {count} mutants of {name}, {loaded} load and {refused} are refused");
}

macro_rules! mutants {
    ($($name:ident: $count:expr,)*) => {
        $(
            #[test]
            fn $name() {
                try_mutants(stringify!($name), $count);
            }
        )*

        #[test]
        fn every_parser_has_mutants() {
            let tried = [$(stringify!($name)),*];
            assert!(e2e::parsers::PARSERS.iter().all(|parser| tried.contains(&parser.name)), "{tried:?}");
        }
    };
}

mutants! {
    gguf: 20_000,
    safetensors: 20_000,
    packed: 10_000,
    index: 20_000,
    pytorch: 20_000,
    tokenizer_json: 4_000,
    sentencepiece: 20_000,
    vocab_txt: 2_000,
    chat_template: 2_000,
    config_json: 20_000,
    adapter_json: 10_000,
    manifest: 10_000,
}
