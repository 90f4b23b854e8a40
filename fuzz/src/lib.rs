//! Panics in fuzzing: what is caught below is an answer, and what escapes is a find.
//!
//! The runtime of libFuzzer ends the process at every panic, whoever would have caught it. The `tokenizers` crate panics at some damaged files,
//! which is caught where it is called.

use std::{
    panic::{UnwindSafe, catch_unwind, set_hook},
    sync::{Mutex, PoisonError},
};

/// What the last panic said, and where.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Takes the runtime's hook away.
pub fn let_be_caught() {
    set_hook(Box::new(|panic| *LAST.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string()));
}

/// Ends the process if a panic escapes from `work`.
pub fn escaping(work: impl FnOnce() + UnwindSafe) {
    if catch_unwind(work).is_err() {
        eprintln!("escaped: {}", LAST.lock().unwrap_or_else(PoisonError::into_inner));
        std::process::abort();
    }
}
