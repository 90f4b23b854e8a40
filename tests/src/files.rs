//! Where the tests' files are: fixtures, golden files, the reference model.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;

/// SHA-256 of the reference model, Gemma 3 270M Q4_K_M.
pub const REFERENCE_SHA256: &str = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818";

/// The folder of this package.
pub fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The tiny model called `name`.
pub fn fixture(name: &str) -> PathBuf {
    package().join("fixtures").join("models").join(name)
}

/// `expected.json` of the tiny model called `name`.
///
/// # Panics
/// If it is missing or no JSON.
pub fn expected(name: &str) -> Value {
    json(&fixture(name).join("expected.json"))
}

/// Copies the files of a fixture into a folder.
///
/// # Panics
/// If there is no such fixture, or the folder cannot be written.
pub fn copy_fixture(name: &str, to: &Path) {
    for file in fs::read_dir(fixture(name)).expect("the fixture") {
        let file = file.expect("an entry");
        fs::copy(file.path(), to.join(file.file_name())).expect("a copy");
    }
}

/// A folder with the files of a fixture, in whose `config.json` one text is replaced.
///
/// # Panics
/// If there is no such fixture, or no such text in it.
pub fn changed_fixture(name: &str, from: &str, to: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_fixture(name, folder.path());
    let config = folder.path().join("config.json");
    let text = fs::read_to_string(&config).expect("config.json");
    assert!(text.contains(from), "{from}");
    fs::write(&config, text.replace(from, to)).expect("a writable file");
    folder
}

/// The golden file called `name`.
///
/// # Panics
/// If it is missing or no JSON.
pub fn golden(name: &str) -> Value {
    json(&package().join("golden").join(name))
}

/// The text for perplexity.
pub fn text() -> PathBuf {
    package().join("fixtures").join("text").join("wikitext2-valid-300k.txt")
}

/// Skein's cache: `$SKEIN_CACHE`, else `$XDG_CACHE_HOME/skein`, else `~/.cache/skein`.
///
/// # Panics
/// If none of them is set.
pub fn cache() -> PathBuf {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("SKEIN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("skein")))
        .or_else(|| set("HOME").map(|p| p.join(".cache").join("skein")))
        .expect("SKEIN_CACHE, XDG_CACHE_HOME or HOME is set")
}

/// The reference model's file.
///
/// # Panics
/// If it is not in the cache.
pub fn reference() -> PathBuf {
    let blob = cache().join("blobs").join("sha256").join(REFERENCE_SHA256);
    assert!(blob.exists(), "the reference model is not at {}: run `cargo xtask model`", blob.display());
    blob
}

/// The folder of the sentence model, all-MiniLM-L6-v2.
///
/// # Panics
/// If it is not in the cache.
pub fn sentence_model() -> PathBuf {
    let folder = cache().join("models").join("all-MiniLM-L6-v2");
    assert!(folder.exists(), "the sentence model is not at {}: run `cargo xtask model`", folder.display());
    folder
}

/// The Python with the reference clients: `$SKEIN_TEST_PYTHON`, else where `cargo xtask test` puts it.
///
/// # Panics
/// If it is missing.
pub fn python() -> PathBuf {
    let python =
        env::var_os("SKEIN_TEST_PYTHON").map_or_else(|| cache().join("python").join("clients").join("bin").join("python"), PathBuf::from);
    assert!(python.exists(), "the Python clients are not at {}: run `cargo xtask test`", python.display());
    python
}

fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
