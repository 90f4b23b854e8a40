//! Where things are: the checkout, the build's output and Skein's cache.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// The checkout's root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The folder of built programs: the one this program was built into, so that everything shares one profile.
pub(crate) fn built() -> Result<PathBuf> {
    let exe = env::current_exe().context("failed to find the path of xtask itself")?;
    exe.parent().map(Path::to_path_buf).context("xtask's own path has no folder")
}

/// The `skein` program in [`built`].
pub(crate) fn skein() -> Result<PathBuf> {
    Ok(built()?.join(format!("skein{}", env::consts::EXE_SUFFIX)))
}

/// Skein's cache: `$SKEIN_CACHE`, else `$XDG_CACHE_HOME/skein`, else `~/.cache/skein`.
pub(crate) fn cache() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("SKEIN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("skein")))
        .or_else(|| set("HOME").map(|p| p.join(".cache").join("skein")))
        .context("no cache folder: set SKEIN_CACHE, XDG_CACHE_HOME or HOME")
}
