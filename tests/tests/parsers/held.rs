//! How much a parser holds at once, beside what it was given.

use std::{
    backtrace::Backtrace,
    sync::{Mutex, MutexGuard, Once, PoisonError},
};

use e2e::parsers::Parser;

use crate::ALLOCATOR;

/// What is counted is of the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Where backtraces are wanted (`RUST_BACKTRACE`), a parser's library that panics inside has the symbols of this program read, which stay.
static SYMBOLS: Once = Once::new();

/// Keeps other tests of this program from running.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a file loads.
///
/// # Panics
/// If the parser panics, does not say where, or holds more than it may.
pub(crate) fn meet(parser: &Parser, file: &[u8]) -> bool {
    SYMBOLS.call_once(|| drop(Backtrace::capture().to_string()));
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let loads = parser.loads(file);
    let held = ALLOCATOR.peak_usage() - before;
    let (times, more) = parser.held;
    let most = times * file.len() + more;
    assert!(held <= most, "{}: {held} bytes were held for a file of {}, expected at most {most}", parser.name, file.len());
    loads
}

/// A parser that believes what it reads: it allocates before it checks, and says nothing of where.
fn gullible(bytes: &[u8]) -> Result<(), String> {
    let claimed = bytes.first_chunk().map_or(0, |len| u32::from_le_bytes(*len)) as usize;
    let room = vec![0_u8; claimed];
    if room.len() > bytes.len() { Err("too long".to_owned()) } else { Ok(()) }
}

const GULLIBLE: Parser = Parser { name: "gullible", read: gullible, places: &["too"], held: (20, 256 << 10) };

#[test]
fn a_parser_that_believes_a_length_is_found_out() {
    let _alone = alone();
    assert!(meet(&GULLIBLE, &[0, 0, 0, 0]));
    assert!(!meet(&GULLIBLE, &[100, 0, 0, 0]));
    let believed = std::panic::catch_unwind(|| meet(&GULLIBLE, &[0, 0, 0, 1]));
    let said = believed.expect_err("16 MiB for 4 bytes").downcast::<String>().expect("a message");
    assert!(said.contains("bytes were held"), "{said}");
}

#[test]
fn a_refusal_that_does_not_say_where_is_found_out() {
    let _alone = alone();
    let silent = Parser { places: &["at byte "], ..GULLIBLE };
    let said = std::panic::catch_unwind(|| meet(&silent, &[100, 0, 0, 0])).expect_err("no place").downcast::<String>().expect("a message");
    assert!(said.contains("does not say where: too long"), "{said}");
}
