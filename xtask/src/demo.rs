//! `cargo xtask demo`: a real model answers from four worker processes, two stages of two ranks each.

use std::time::Instant;

use anyhow::Result;

use crate::{
    model, paths,
    process::{cargo, command, run, say},
};

/// Asked when nothing else is.
pub(crate) const QUESTION: &str = "The capital of France is";
const MANIFEST: &str = "manifests/samples/gemma3-270m.yaml";

/// Fetches the model, builds `skein`, shows the sample manifest's plan and answers `prompt`; with `keep` serves it afterwards.
///
/// # Errors
/// If a step fails.
pub(crate) fn answer(prompt: &str, keep: bool) -> Result<()> {
    let began = Instant::now();
    model::ensure()?;
    build()?;
    let skein = paths::skein()?;
    say(&format!("the plan of {MANIFEST}"));
    run(command(&skein).args(["plan", "-f", MANIFEST]))?;
    say(&format!("asking it on four worker processes: {prompt:?}"));
    run(command(&skein).args(["run", "-f", MANIFEST, "--max-tokens", "48", "--temperature", "0", prompt]))?;
    say(&format!("done in {:.0} s", began.elapsed().as_secs_f32()));
    if keep {
        say("serving it until Ctrl-C");
        run(command(&skein).args(["serve", "-f", MANIFEST]))?;
    }
    Ok(())
}

/// Builds the `skein` program in the profile and target of everything else.
///
/// # Errors
/// If the build fails.
pub(crate) fn build() -> Result<()> {
    say("building skein");
    run(cargo().args(["build", "--package", "cli"]))
}
