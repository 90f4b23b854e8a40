//! Programs that are published as Go modules and install as they are: helm, metrics-server, kwok. Each is built once, into a folder of Skein's cache.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::binaries::{VERSION, require_go};
use crate::{
    paths,
    process::{command, output, run, say},
};

/// A program of a Go module.
pub(crate) struct Tool {
    name: &'static str,
    module: &'static str,
    version: &'static str,
    /// What is set in it when it is linked, beyond what makes it small.
    flags: fn() -> String,
    /// Files of the module that it is started with.
    files: &'static [&'static str],
}

/// What installs charts (about five minutes to build on two cores).
pub(crate) const HELM: Tool = Tool { name: "helm", module: "helm.sh/helm/v3", version: "3.22.0", flags: helm_flags, files: &[] };

/// What tells autoscalers how much processor pods use (about three minutes).
pub(crate) const METRICS_SERVER: Tool =
    Tool { name: "metrics-server", module: "sigs.k8s.io/metrics-server", version: "0.9.0", flags: String::new, files: &[] };

/// What plays nodes and their pods (about three minutes), and how it plays them.
pub(crate) const KWOK: Tool = Tool {
    name: "kwok",
    module: "sigs.k8s.io/kwok",
    version: "0.8.0",
    flags: String::new,
    files: &[
        "kustomize/stage/node/fast/node-initialize.yaml",
        "kustomize/stage/node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
        "kustomize/stage/pod/fast/pod-complete.yaml",
        "kustomize/stage/pod/fast/pod-delete.yaml",
        "kustomize/stage/pod/fast/pod-ready.yaml",
    ],
};

fn helm_flags() -> String {
    let mut flags = format!(" -X helm.sh/helm/v3/internal/version.version=v{}", HELM.version);
    // Which Kubernetes charts are rendered for where no cluster is asked.
    let mut parts = VERSION.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    for package in ["pkg/chartutil", "pkg/lint/rules"] {
        flags.push_str(&format!(
            " -X helm.sh/helm/v3/{package}.k8sVersionMajor={major} -X helm.sh/helm/v3/{package}.k8sVersionMinor={minor}"
        ));
    }
    flags
}

impl Tool {
    /// What it is called.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    fn home(&self) -> Result<PathBuf> {
        Ok(paths::cache()?.join(format!("{}-v{}", self.name, self.version)))
    }

    /// Its folder, whether it is there yet or not.
    ///
    /// # Errors
    /// If there is no cache folder.
    pub(crate) fn folder(&self) -> Result<PathBuf> {
        Ok(self.home()?.join("bin"))
    }

    /// The program, if it was built before.
    ///
    /// # Errors
    /// If there is no cache folder.
    pub(crate) fn built(&self) -> Result<Option<PathBuf>> {
        Ok(Some(self.folder()?.join(self.name)).filter(|program| program.exists()))
    }

    /// The files of its module that it is started with; they are there once it is.
    ///
    /// # Errors
    /// If there is no cache folder.
    pub(crate) fn files(&self) -> Result<Vec<PathBuf>> {
        let home = self.home()?;
        Ok(self.files.iter().map(|file| home.join(name_of(file))).collect())
    }

    /// The program, built when it is missing.
    ///
    /// # Errors
    /// If Go is missing, modules cannot be fetched, or the build fails.
    pub(crate) fn ensure(&self) -> Result<PathBuf> {
        if let Some(program) = self.built()? {
            return Ok(program);
        }
        let (home, bin) = (self.home()?, self.folder()?);
        fs::create_dir_all(&bin).with_context(|| format!("failed to create {}", bin.display()))?;
        let lock = File::create(home.join("lock")).context("failed to create a lock")?;
        lock.lock().with_context(|| format!("failed to lock the cache of {}", self.name))?;
        // Another run may have built it meanwhile.
        if let Some(program) = self.built()? {
            return Ok(program);
        }
        require_go()?;
        let Self { name, module, version, .. } = self;
        say(&format!("building {name} {version} from its Go module, once"));
        let began = Instant::now();
        let partial = home.join("partial");
        let flags = format!("-s -w{}", (self.flags)());
        run(command("go")
            .args(["install", "-trimpath", "-ldflags", &flags, &format!("{module}/cmd/{name}@v{version}")])
            .env("GOBIN", &partial)
            .env("CGO_ENABLED", "0"))
        .with_context(|| format!("failed to build {name}"))?;
        self.copy_files(&home)?;
        // Last, so that whoever finds the program finds everything.
        let program = bin.join(name);
        fs::rename(partial.join(name), &program).with_context(|| format!("failed to put {name} in its place"))?;
        say(&format!("built {name} in {:.0} s", began.elapsed().as_secs_f64()));
        Ok(program)
    }

    fn copy_files(&self, home: &Path) -> Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let told = output(command("go").args(["mod", "download", "-json", &format!("{}@v{}", self.module, self.version)]))?;
        let told: Value = serde_json::from_str(&told).context("go told of a module in other than JSON")?;
        let module = told["Dir"].as_str().with_context(|| format!("go has no folder of {}", self.module))?;
        for file in self.files {
            let (from, to) = (Path::new(module).join(file), home.join(name_of(file)));
            // Read and written, not copied: files of modules are read-only.
            let text = fs::read(&from).with_context(|| format!("failed to read {}", from.display()))?;
            fs::write(&to, text).with_context(|| format!("failed to write {}", to.display()))?;
        }
        Ok(())
    }
}

fn name_of(file: &str) -> &str {
    file.rsplit('/').next().unwrap_or(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helm_knows_its_version_and_that_of_kubernetes() {
        let flags = helm_flags();
        assert!(flags.contains("internal/version.version=v3.22.0") && flags.contains("pkg/chartutil.k8sVersionMinor=34"), "{flags}");
    }

    #[test]
    fn files_of_a_module_have_names_of_their_own() {
        let mut names: Vec<_> = KWOK.files().expect("a cache folder");
        assert!(names.iter().all(|path| path.extension().is_some_and(|e| e == "yaml")), "{names:?}");
        names.dedup();
        assert_eq!(names.len(), KWOK.files.len());
    }
}
