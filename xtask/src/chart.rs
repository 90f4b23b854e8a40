//! Files that are made from the Helm chart: its README, and the manifest for those without helm.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    paths,
    process::{command, output, run, say},
};

/// The chart's folder.
const CHART: &str = "charts/skein";
/// What precedes the rendered manifest.
const HEAD: &str = "\
# The operator, in namespace skein-system; rendered from charts/skein by `cargo xtask codegen`. The resource itself is in crd.yaml, and is applied first:
#   kubectl apply --server-side -f manifests/crd.yaml
#   kubectl apply --server-side -f manifests/install.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: skein-system
  labels:
    app.kubernetes.io/part-of: skein
    pod-security.kubernetes.io/enforce: restricted
";

/// Writes every generated file; the manifest only where there is a helm.
///
/// # Errors
/// If a source cannot be read, rendered or a file be written.
pub(crate) fn write() -> Result<()> {
    for (name, text) in generated(helm()?.as_deref())? {
        let path = paths::root().join(&name);
        if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
            fs::write(&path, text).with_context(|| format!("failed to write {name}"))?;
            say(&format!("wrote {name}"));
        }
    }
    Ok(())
}

/// Lints the chart with each of its example values where there is a helm, and compares generated files with what they are made from.
///
/// # Errors
/// If a file is stale or the chart has a fault.
pub(crate) fn check() -> Result<()> {
    let helm = helm()?;
    match &helm {
        Some(helm) => lint(helm)?,
        None => say("helm was not built yet: manifests/install.yaml and the chart's templates are checked before the tests on a cluster"),
    }
    current(helm.as_deref())
}

/// The helm that `cargo xtask cluster` built.
#[cfg(target_os = "linux")]
fn helm() -> Result<Option<PathBuf>> {
    crate::cluster::HELM.built()
}

#[cfg(not(target_os = "linux"))]
fn helm() -> Result<Option<PathBuf>> {
    Ok(None)
}

fn current(helm: Option<&Path>) -> Result<()> {
    for (name, text) in generated(helm)? {
        let has = fs::read_to_string(paths::root().join(&name)).with_context(|| format!("failed to read {name}"))?;
        if has != text {
            bail!("{name} is stale: run `cargo xtask codegen`");
        }
    }
    Ok(())
}

fn lint(helm: &Path) -> Result<()> {
    run(command(helm).args(["lint", "--strict", "--quiet", CHART]))?;
    let examples = paths::root().join(CHART).join("ci");
    for entry in fs::read_dir(&examples).with_context(|| format!("failed to list {}", examples.display()))? {
        let values = entry?.path();
        run(command(helm).args(["lint", "--strict", "--quiet", CHART, "--values"]).arg(&values))?;
        output(command(helm).args(["template", "skein", CHART, "--values"]).arg(&values))?;
    }
    // The schema refuses what no value is called: otherwise the above would prove nothing.
    let wrong = command(helm).args(["template", "skein", CHART, "--set", "operator.replica=2"]).output().context("failed to start helm")?;
    if wrong.status.success() {
        bail!("values.schema.json lets a value through that the chart does not have");
    }
    Ok(())
}

/// Names and texts of the generated files.
fn generated(helm: Option<&Path>) -> Result<Vec<(String, String)>> {
    let read = |name: &str| fs::read_to_string(paths::root().join(name)).with_context(|| format!("failed to read {name}"));
    let mut files = vec![(format!("{CHART}/README.md"), readme(&read(&format!("{CHART}/values.yaml"))?)?)];
    if let Some(helm) = helm {
        let settings = "crds.install=false,tests.enabled=false";
        let rendered = output(command(helm).args(["template", "skein", CHART, "--namespace=skein-system", "--set", settings]))?;
        files.push(("manifests/install.yaml".to_owned(), format!("{HEAD}{}", plain(&rendered))));
    }
    Ok(files)
}

/// A rendered chart without what says that helm manages it.
fn plain(rendered: &str) -> String {
    let helms = |line: &&str| {
        let line = line.trim_start();
        ["# Source: ", "app.kubernetes.io/managed-by: Helm", "helm.sh/chart: "].iter().any(|own| line.starts_with(own))
    };
    rendered.lines().filter(|line| !helms(line)).map(|line| format!("{line}\n")).collect()
}

/// One value of the chart.
#[derive(Debug, PartialEq)]
struct Value {
    path: String,
    default: String,
    description: String,
}

/// The chart's README, from its values.
fn readme(values: &str) -> Result<String> {
    let mut text = "\
# Helm chart of Skein

Generated from `values.yaml` by `cargo xtask codegen`.

```console
$ helm install skein charts/skein --namespace skein-system --create-namespace
$ helm test skein --namespace skein-system
```

Everything it installs passes Pod Security `restricted`. The definition of ModelDeployment is a template, so that `helm upgrade` upgrades it, and stays with all ModelDeployments when the chart is uninstalled, unless `crds.keep` is false.
While the operator is away, routers and workers go on.

| value | default | |
|---|---|---|
"
    .to_owned();
    for value in parse(values)? {
        text.push_str(&format!("| `{}` | {} | {} |\n", value.path, value.default, value.description.replace('|', "\\|")));
    }
    Ok(text)
}

/// The values that a file describes, by the comments that begin with two dashes.
fn parse(text: &str) -> Result<Vec<Value>> {
    let mut values: Vec<Value> = Vec::new();
    let mut parents: Vec<(usize, String)> = Vec::new();
    let mut description = None;
    for (at, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(words) = trimmed.strip_prefix("# -- ") {
            description = Some(words.to_owned());
        }
        if trimmed.starts_with('#') || trimmed.is_empty() {
            continue;
        }
        let Some((key, default)) = trimmed.split_once(':') else { continue };
        parents.retain(|(depth, _)| *depth < indent);
        parents.push((indent, key.to_owned()));
        let path = parents.iter().map(|(_, key)| key.as_str()).collect::<Vec<_>>().join(".");
        let default = default.trim();
        match description.take() {
            Some(description) => {
                let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
                values.push(Value { path, default, description });
            }
            // Part of a described value that is a map itself, such as resources.
            None if values.iter().any(|value| path.starts_with(&format!("{}.", value.path))) => {}
            None => bail!("values.yaml:{}: {path} is not described by a comment that begins with `# -- `", at + 1),
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_described() {
        let value = |path: &str, default: &str, description: &str| Value {
            path: path.to_owned(),
            default: default.to_owned(),
            description: description.to_owned(),
        };
        let found = parse("# -- One.\na:\n  # -- Two.\n  b: 1\n\n# -- Three.\nc:\n  d:\n    e: 2\n").expect("values");
        assert_eq!(found, [value("a", "", "One."), value("a.b", "`1`", "Two."), value("c", "", "Three.")]);
        assert!(parse("a: 1\n").is_err());
    }

    #[test]
    fn the_committed_readme_is_current() {
        current(None).expect("a current file");
    }

    #[test]
    fn what_helm_says_of_itself_is_left_out() {
        assert_eq!(plain("---\n# Source: x\na: b\n  helm.sh/chart: x\n  app.kubernetes.io/managed-by: Helm\n"), "---\na: b\n");
    }
}
