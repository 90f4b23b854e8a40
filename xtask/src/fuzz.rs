//! `cargo xtask fuzz`: the parsers of what strangers write, on files that coverage leads to.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    paths,
    process::{cargo_tool, command, output, run, say},
};

const CARGO_FUZZ: &str = "0.13.2";

/// Options of `fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// The parser [default: each in turn].
    target: Option<String>,
    /// How long each runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Runs the fuzz targets, from the corpus in the tree and what earlier runs found.
///
/// # Errors
/// If nightly is missing, there is no such target, or one of them found something: the file is named.
pub(crate) fn run_targets(options: &Options) -> Result<()> {
    let corpora = paths::root().join("fuzz").join("corpus");
    let targets = targets(&corpora)?;
    let chosen = match &options.target {
        Some(name) if targets.contains(name) => std::slice::from_ref(name),
        Some(name) => bail!("no fuzz target is called {name}; there are {}", targets.join(", ")),
        None => &targets,
    };
    let nightly = command("rustup").args(["run", "nightly", "rustc", "--version"]).output();
    if !nightly.is_ok_and(|said| said.status.success()) {
        bail!(
            "fuzzing needs the nightly compiler (sanitizers and coverage are not on stable): `rustup toolchain install nightly --profile minimal`"
        );
    }
    let tool = cargo_tool("cargo-fuzz", CARGO_FUZZ)?;
    // An old or broken one says so here, not after minutes of building.
    output(command(&tool).arg("--version"))?;
    let found = paths::cache()?.join("fuzz");
    for target in chosen {
        say(&format!("fuzzing {target} for {} s", options.seconds));
        // New files go to the first folder; the tree is only read.
        let own = found.join("corpus").join(target);
        let artifacts = found.join("artifacts").join(target);
        for folder in [&own, &artifacts] {
            fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
        }
        run(command("rustup")
            .args(["run", "nightly"])
            .arg(&tool)
            .args(["run", "--fuzz-dir", "fuzz", target])
            .arg(&own)
            .arg(corpora.join(target))
            .arg("--")
            .args([&format!("-max_total_time={}", options.seconds), "-timeout=10", "-rss_limit_mb=4096", "-max_len=16384"])
            .arg(format!("-artifact_prefix={}/", artifacts.display())))
        .with_context(|| format!("{target}: what it found is in {}", artifacts.display()))?;
    }
    Ok(())
}

/// Names of the targets: those of the folders of the corpus.
fn targets(corpora: &Path) -> Result<Vec<String>> {
    let listed = fs::read_dir(corpora).with_context(|| format!("failed to list {}", corpora.display()))?;
    let mut names = listed.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_corpus_has_its_target() {
        let root = paths::root().join("fuzz");
        let names = targets(&root.join("corpus")).expect("the corpus");
        let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("its manifest");
        assert!(!names.is_empty());
        for name in &names {
            let code = fs::read_to_string(root.join("targets").join(format!("{name}.rs"))).expect("the target's code");
            assert!(code.contains(&format!("Parser::named(\"{name}\")")), "{name}");
            assert!(manifest.contains(&format!("[[bin]]\nname = \"{name}\"\npath = \"targets/{name}.rs\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), names.len());
    }
}
