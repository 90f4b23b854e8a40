//! `cargo xtask codegen`: the committed code in `proto/src/generated/`, `manifests/crd.yaml`, and what is made from the chart.

use anyhow::Result;

#[cfg(feature = "codegen")]
#[path = "../../proto/codegen.rs"]
mod generator;

/// Writes what the `.proto` files give, and removes what they no longer give.
///
/// # Errors
/// If a `.proto` file is wrong or a file cannot be written.
#[cfg(feature = "codegen")]
pub(crate) fn run() -> Result<()> {
    use anyhow::{Context, anyhow};
    use std::{env, fs, process};

    let package = crate::paths::root().join("proto");
    let folder = package.join("src").join("generated");
    let scratch = env::temp_dir().join(format!("skein-codegen-{}", process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("failed to create {}", scratch.display()))?;
    let generated = generator::generate(&package, &scratch).map_err(|e| anyhow!("{e}"));
    fs::remove_dir_all(&scratch).with_context(|| format!("failed to remove {}", scratch.display()))?;
    let generated = generated?;
    for entry in fs::read_dir(&folder).with_context(|| format!("failed to list {}", folder.display()))? {
        let entry = entry?;
        if !generated.contains_key(entry.file_name().to_string_lossy().as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    for (name, contents) in generated {
        let path = folder.join(name);
        fs::write(&path, contents).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(())
}

/// Starts this program again, built with the compiler of `.proto` files.
///
/// # Errors
/// If that fails.
#[cfg(not(feature = "codegen"))]
pub(crate) fn run() -> Result<()> {
    use crate::process::{cargo, run};
    run(cargo().args(["run", "--quiet", "--package", "xtask", "--features", "codegen", "--", "codegen"]))?;
    definition()?;
    crate::chart::write()
}

/// Writes the definition of the resource, which the operator makes from the manifest's types.
#[cfg(not(feature = "codegen"))]
fn definition() -> Result<()> {
    use crate::process::{cargo, output};
    use anyhow::Context;
    let path = crate::paths::root().join("manifests").join("crd.yaml");
    let text = output(cargo().args(["run", "--quiet", "--package", "operator", "--", "--print-crd"]))?;
    std::fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
}
