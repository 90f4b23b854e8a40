//! `cargo xtask test`: everything the tests need, then all of them.

use std::thread;

use anyhow::{Result, anyhow};

use crate::{
    model,
    process::{cargo, run, say},
    python,
};

/// Prepares the reference model and the Python clients while the workspace builds, then runs all tests whose name contains `filter`.
///
/// # Errors
/// If something cannot be prepared or a test fails.
pub(crate) fn all(filter: Option<&str>) -> Result<()> {
    let fetching = thread::spawn(|| model::ensure().and_then(|_| python::clients()));
    say("building the workspace");
    // The end-to-end tests start the program itself: the tests of its own package make cargo build it, once, with everybody's features.
    let built = run(cargo().args(["test", "--workspace", "--no-run"]));
    let python = fetching.join().map_err(|_| anyhow!("the thread that prepares the model and the Python clients panicked"))??;
    built?;
    say("running all tests");
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]).env("SKEIN_TEST_PYTHON", python);
    if let Some(filter) = filter {
        tests.args(["--", filter]);
    }
    run(&mut tests)
}
