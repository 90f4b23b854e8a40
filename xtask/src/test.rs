//! `cargo xtask test`: everything the tests need, then all of them.

use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::{
    model, paths,
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
    let built = run(cargo().args(["test", "--workspace", "--no-run"]));
    let python = fetching.join().map_err(|_| anyhow!("the thread that prepares the model and the Python clients panicked"))??;
    built?;
    let skein = paths::skein()?;
    skein.try_exists().ok().filter(|there| *there).with_context(|| format!("the build left no {}", skein.display()))?;
    say("running all tests");
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]).env("SKEIN_TEST_PYTHON", python);
    if let Some(filter) = filter {
        tests.args(["--", filter]);
    }
    run(&mut tests)
}
