//! `cargo xtask check`: format, lints, docs, dependencies, generated files, and rules of the tree.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::{
    chart, paths,
    process::{cargo, cargo_tool, command, output, run, say},
};

const CARGO_DENY: &str = "0.20.2";

/// Runs every check; stops at the first that fails.
///
/// # Errors
/// If a check fails or its program cannot run.
pub(crate) fn run_all() -> Result<()> {
    say("format");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    say("rules of the tree");
    rules()?;
    say("lints");
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"]))?;
    say("docs");
    run(cargo().args(["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    say("generated files");
    run(cargo().args(["test", "--quiet", "--package", "proto", "--test", "generated"]))?;
    run(cargo().args(["test", "--quiet", "--package", "operator", "--lib", "crd"]))?;
    chart::check()?;
    say("dependencies");
    dependencies()
}

/// Licences, sources and bans of `deny.toml`. Advisories need a database from the network and are left to the schedule of whoever releases.
fn dependencies() -> Result<()> {
    let deny = cargo_tool("cargo-deny", CARGO_DENY)?;
    // Packages of other systems too: a build for this one fetched only its own.
    run(cargo().args(["fetch", "--locked", "--quiet"]))?;
    run(command(deny).args(["--offline", "check", "bans", "licenses", "sources"]))
}

/// Rules no tool knows: see [`broken_rule`].
fn rules() -> Result<()> {
    let root = paths::root();
    let tracked = output(command("git").args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]))?;
    let mut broken = Vec::new();
    for name in tracked.split('\0').filter(|n| !n.is_empty()) {
        let path = root.join(name);
        // Binary files and files deleted but not yet committed have no lines to check.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (at, line) in text.lines().enumerate() {
            if let Some(rule) = broken_rule(name, line) {
                broken.push(format!("{name}:{}: {rule}", at + 1));
            }
        }
        if name.ends_with(".rs") && !name.contains("/generated/") && !text.starts_with("//!") {
            broken.push(format!("{name}:1: a file opens with `//!`"));
        }
    }
    members_inherit_lints(&root, &mut broken)?;
    if !broken.is_empty() {
        bail!("{} rules are broken:\n{}", broken.len(), broken.join("\n"));
    }
    Ok(())
}

/// What is wrong with `line` of the file `name`, if anything.
fn broken_rule(name: &str, line: &str) -> Option<&'static str> {
    let fixture = name.starts_with("tests/fixtures/") || name == "Cargo.lock";
    let rust = name.ends_with(".rs") && !name.contains("/generated/");
    let code = line.split("//").next().unwrap_or(line);
    // Every second part lies between quotes.
    let outside_strings = || code.split('"').step_by(2);
    let word = |w: &str| outside_strings().any(|part| part.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|x| x == w));
    // Spelled in halves, so that this file does not break its own rules.
    let homes = [concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/Us", "ers/"), concat!("/wo", "rk/"), concat!("/tmp/", "model")];
    if !fixture && homes.iter().any(|h| line.contains(h)) {
        return Some("a path of one machine");
    }
    if rust && !name.starts_with("kernels/") && word("unsafe") {
        return Some("`unsafe` outside kernels");
    }
    if rust && [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")].iter().any(|w| line.contains(w)) {
        return Some("unfinished work is not left in the tree");
    }
    None
}

/// Every member's Cargo.toml takes the workspace's lints.
fn members_inherit_lints(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(root).with_context(|| format!("failed to list {}", root.display()))? {
        let manifest = entry?.path().join("Cargo.toml");
        let Ok(text) = fs::read_to_string(&manifest) else { continue };
        if !text.contains("[lints]\nworkspace = true") {
            broken.push(format!("{}: `[lints] workspace = true` is missing", manifest.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_see_what_they_forbid() {
        let unsafe_line = "    unsafe { f() }";
        assert!(broken_rule("engine/src/lib.rs", unsafe_line).is_some());
        assert!(broken_rule("kernels/src/lib.rs", unsafe_line).is_none());
        assert!(broken_rule("engine/src/lib.rs", "// nothing unsafe here").is_none());
        assert!(broken_rule("engine/src/lib.rs", "#![forbid(unsafe_code)]").is_none());
        assert!(broken_rule("README.md", &format!("see {}x", concat!("/ho", "me/"))).is_some());
        assert!(broken_rule("cli/src/main.rs", concat!("// TO", "DO: later")).is_some());
    }
}
