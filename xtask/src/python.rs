//! Python environments in Skein's cache: made once, remade when what they should hold changes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    paths,
    process::{command, run, say},
};

/// Clients for the end-to-end tests, at fixed versions.
const CLIENTS: &[&str] = &["openai==3.54.0", "grpcio==1.85.1", "grpcio-reflection==1.85.1", "protobuf==7.36.2"];

/// The interpreter of the environment that holds the test clients.
///
/// # Errors
/// If Python 3 with venv is missing, or the packages cannot be installed.
pub(crate) fn clients() -> Result<PathBuf> {
    environment(&paths::cache()?.join("python").join("clients"), CLIENTS, &[])
}

/// The interpreter of the environment in `folder` with `packages` installed; `env` is set for the installer.
///
/// A stamp with the list of packages is written last, so a half-made environment is made again.
///
/// # Errors
/// If Python 3 with venv is missing, or the packages cannot be installed.
pub(crate) fn environment(folder: &Path, packages: &[&str], env: &[(&str, &str)]) -> Result<PathBuf> {
    let python = folder.join("bin").join("python");
    let stamp = folder.join("skein-packages.txt");
    let wanted = packages.join("\n");
    if python.exists() && fs::read_to_string(&stamp).is_ok_and(|has| has == wanted) {
        return Ok(python);
    }
    if !python.exists() {
        create(folder)?;
    }
    say(&format!("installing {} for Python", packages.join(", ")));
    run(command(&python)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(packages)
        .envs(env.iter().copied()))?;
    fs::write(&stamp, wanted).with_context(|| format!("failed to write {}", stamp.display()))?;
    Ok(python)
}

/// Fetches `packages` as they are, without what they depend on, into a folder below `scratch`; returns it.
///
/// # Errors
/// If Python 3 with venv is missing, or the packages cannot be fetched.
pub(crate) fn fetch(scratch: &Path, packages: &[String]) -> Result<PathBuf> {
    let (venv, folder) = (scratch.join("venv"), scratch.join("packages"));
    create(&venv)?;
    run(command(venv.join("bin").join("python"))
        .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir", "--no-deps", "--no-compile", "--target"])
        .arg(&folder)
        .args(packages))?;
    Ok(folder)
}

/// Makes an empty environment in `folder`, replacing what is there.
///
/// # Errors
/// If Python 3 with venv is missing; the message names the command that installs it.
pub(crate) fn create(folder: &Path) -> Result<()> {
    let version = Command::new("python3").arg("--version").stdin(Stdio::null()).output();
    if !version.is_ok_and(|v| v.status.success()) {
        bail!(
            "python3 was not found; install it with `apt-get install python3 python3-venv` (Debian, Ubuntu), `dnf install python3` (Fedora) or `brew install python` (macOS)"
        );
    }
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent).with_context(|| format!("failed to create {}", parent.display()))?;
    }
    run(command("python3").args(["-m", "venv", "--clear"]).arg(folder))
        .context("python3 cannot make a virtual environment; install its venv module with `apt-get install python3-venv` (Debian, Ubuntu)")
}
