//! Running other programs, with messages that name what is missing.

use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::paths;

/// Says what is being done, on stderr.
pub(crate) fn say(what: &str) {
    eprintln!("==> {what}");
}

/// `program` with the checkout as its working folder and no input.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(paths::root()).stdin(Stdio::null());
    command
}

/// The cargo that runs this chore.
pub(crate) fn cargo() -> Command {
    let mut command = command(cargo_path());
    forget_package(&mut command);
    command
}

/// Where that cargo is.
pub(crate) fn cargo_path() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// A program of cargo's, installed once into Skein's cache.
///
/// # Errors
/// If it cannot be installed.
pub(crate) fn cargo_tool(name: &str, version: &str) -> Result<PathBuf> {
    let folder = paths::cache()?.join("tools").join(format!("{name}-{version}"));
    let program = folder.join("bin").join(name);
    if !program.exists() {
        say(&format!("installing {name} {version} (once; minutes)"));
        run(cargo().args(["install", name, "--locked", "--version", version, "--root"]).arg(&folder))?;
    }
    Ok(program)
}

/// Takes from `command` what `cargo run` set for this program: build scripts that watch it would see changes, and whole trees would be built again.
pub(crate) fn forget_package(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|n| n.starts_with("CARGO_PKG_") || n.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
}

/// Runs `command` with its output passed through.
///
/// # Errors
/// If it cannot start or does not exit with 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|e| cannot_start(command, e))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs `command` and returns its stdout; stderr is passed through.
///
/// # Errors
/// If it cannot start, does not exit with 0, or does not write UTF-8.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command.stderr(Stdio::inherit()).output().map_err(|e| cannot_start(command, e))?;
    if !done.status.success() {
        bail!("{} failed: {}", shown(command), done.status);
    }
    String::from_utf8(done.stdout).with_context(|| format!("{} wrote something other than UTF-8", shown(command)))
}

fn cannot_start(command: &Command, error: io::Error) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("failed to start {}", shown(command)))
}

fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let mut line = program.to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}
