//! Kubernetes' own programs, built from their Go modules once into a cache outside the checkout.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};

use crate::{
    paths,
    process::{command, run, say},
};

/// Version of Kubernetes.
pub(crate) const VERSION: &str = "1.34.4";

const PROGRAMS: &[&str] = &["kubelet", "kube-proxy", "kube-scheduler", "kubectl", "kube-controller-manager", "kube-apiserver"];

/// Modules that live in Kubernetes' own repository, from which its go.mod replaces them by relative paths. A program outside
/// has to name their published versions instead, so that `go install k8s.io/kubernetes/…` does not work as it is.
const STAGING: &[&str] = &[
    "api",
    "apiextensions-apiserver",
    "apimachinery",
    "apiserver",
    "cli-runtime",
    "client-go",
    "cloud-provider",
    "cluster-bootstrap",
    "code-generator",
    "component-base",
    "component-helpers",
    "controller-manager",
    "cri-api",
    "cri-client",
    "csi-translation-lib",
    "dynamic-resource-allocation",
    "endpointslice",
    "externaljwt",
    "kms",
    "kube-aggregator",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "metrics",
    "mount-utils",
    "pod-security-admission",
    "sample-apiserver",
    "sample-cli-plugin",
    "sample-controller",
];

/// The folder of Kubernetes' programs, whether they are there yet or not.
///
/// # Errors
/// If there is no cache folder.
pub(crate) fn folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("k8s-v{VERSION}")).join("bin"))
}

/// The folder that holds Kubernetes' programs, built when one is missing (about ten minutes on two cores, and 3 GB of Go's caches).
///
/// # Errors
/// If Go is missing, its modules cannot be fetched, or a build fails.
pub(crate) fn ensure() -> Result<PathBuf> {
    let bin = folder()?;
    let home = bin.parent().context("a folder without a parent")?.to_path_buf();
    let missing = || PROGRAMS.iter().filter(|name| !bin.join(name).exists()).collect::<Vec<_>>();
    if missing().is_empty() {
        return Ok(bin);
    }
    fs::create_dir_all(&bin).with_context(|| format!("failed to create {}", bin.display()))?;
    let lock = File::create(home.join("lock")).context("failed to create a lock")?;
    lock.lock().context("failed to lock the cache of Kubernetes' programs")?;
    // Another run may have built them meanwhile.
    let missing = missing();
    if missing.is_empty() {
        return Ok(bin);
    }
    require_go()?;
    let module = home.join("module");
    prepare(&module)?;
    for (at, name) in missing.iter().enumerate() {
        say(&format!("building {name} {VERSION} from its Go module, once ({} of {})", at + 1, missing.len()));
        let began = Instant::now();
        build(&module, name, &bin)?;
        say(&format!("built {name} in {:.0} s", began.elapsed().as_secs_f64()));
    }
    Ok(bin)
}

/// Makes sure that there is Go.
///
/// # Errors
/// If there is not; the message has the command that installs it.
pub(crate) fn require_go() -> Result<()> {
    let version = command("go").arg("version").output();
    if !version.is_ok_and(|v| v.status.success()) {
        bail!(
            "go was not found; the cluster's programs are built with Go 1.24 or newer: `apt-get install golang-go` (Debian 13 and newer), `dnf install golang`, or its own installer"
        );
    }
    Ok(())
}

/// Writes the module whose requirements are Kubernetes and its parts at one version.
fn prepare(module: &Path) -> Result<()> {
    let (requirements, imports) = (requirements(), imports());
    let stamp = module.join("made-from.txt");
    let wanted = format!("{requirements}\n{imports}");
    if fs::read_to_string(&stamp).is_ok_and(|has| has == wanted) {
        return Ok(());
    }
    say("resolving the Go modules of Kubernetes");
    fs::create_dir_all(module).with_context(|| format!("failed to create {}", module.display()))?;
    for (name, text) in [("go.mod", &requirements), ("tools.go", &imports)] {
        let path = module.join(name);
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
    }
    run(command("go").args(["mod", "tidy"]).current_dir(module)).context("the Go modules of Kubernetes could not be fetched")?;
    fs::write(&stamp, wanted).with_context(|| format!("failed to write {}", stamp.display()))
}

fn requirements() -> String {
    let mut text = format!("module skein.dev/kubernetes\n\ngo 1.24.0\n\nrequire k8s.io/kubernetes v{VERSION}\n\nreplace (\n");
    // v1.34.4 of Kubernetes is published with v0.34.4 of its parts.
    let parts = VERSION.replacen('1', "0", 1);
    for name in STAGING {
        text.push_str(&format!("\tk8s.io/{name} => k8s.io/{name} v{parts}\n"));
    }
    text.push_str(")\n");
    text
}

fn imports() -> String {
    let mut text = "//go:build tools\n\npackage tools\n\nimport (\n".to_owned();
    for name in PROGRAMS {
        text.push_str(&format!("\t_ \"k8s.io/kubernetes/cmd/{name}\"\n"));
    }
    text.push_str(")\n");
    text
}

fn build(module: &Path, name: &str, bin: &Path) -> Result<()> {
    let version = "k8s.io/component-base/version";
    let minor = VERSION.split('.').nth(1).unwrap_or_default();
    let flags = format!(
        "-s -w -X {version}.gitVersion=v{VERSION} -X {version}.gitMajor=1 -X {version}.gitMinor={minor} -X {version}.gitTreeState=clean"
    );
    let partial = bin.join(format!("{name}.partial"));
    run(command("go")
        .args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &flags, "-o"])
        .arg(&partial)
        .arg(format!("k8s.io/kubernetes/cmd/{name}"))
        .env("CGO_ENABLED", "0")
        .current_dir(module))
    .with_context(|| format!("failed to build {name}"))?;
    fs::rename(&partial, bin.join(name)).with_context(|| format!("failed to put {name} in its place"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_required_at_the_version_published_with_kubernetes() {
        let text = requirements();
        assert!(text.contains("require k8s.io/kubernetes v1.34.4\n"));
        assert!(text.contains("\tk8s.io/api => k8s.io/api v0.34.4\n"));
        assert!(imports().contains("_ \"k8s.io/kubernetes/cmd/kube-apiserver\""));
    }
}
