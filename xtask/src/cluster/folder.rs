//! A cluster's run folder, and the names that derive from it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::{binaries, network, tools};
use crate::{
    paths,
    process::{command, say},
};

/// A cluster: everything it keeps on disk lies below one folder, and every name it has outside derives from that folder.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    name: String,
    folder: PathBuf,
    id: String,
}

impl Cluster {
    /// The cluster called `name`, whether it exists or not.
    ///
    /// # Errors
    /// If `name` cannot be part of a file's and a network namespace's name, or there is no cache folder.
    pub(crate) fn named(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 20 || !name.chars().all(plain) || name.starts_with('-') {
            bail!("a cluster's name has 1 to 20 of a-z, 0-9 and -, and does not begin with -; got {name:?}");
        }
        let clusters = paths::cache()?.join("clusters");
        fs::create_dir_all(&clusters).with_context(|| format!("failed to create {}", clusters.display()))?;
        // Processes are recognised by this path in their command lines and mounts by it in the kernel's table: it has no links in it.
        let folder = clusters.canonicalize().with_context(|| format!("failed to resolve {}", clusters.display()))?.join(name);
        let digest = Sha256::digest(folder.to_string_lossy().as_bytes());
        let short: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        Ok(Self { name: name.to_owned(), id: format!("skein-{name}-{short}"), folder })
    }

    /// What it is called on the command line.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Name of its network namespace, its cgroup and its pod network: no other run folder has the same.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The run folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A file or folder in the run folder.
    pub(crate) fn path(&self, part: &str) -> PathBuf {
        self.folder.join(part)
    }

    /// A folder in the run folder, made when missing.
    pub(crate) fn make(&self, part: &str) -> Result<PathBuf> {
        let path = self.path(part);
        fs::create_dir_all(&path).with_context(|| format!("failed to create {}", path.display()))?;
        Ok(path)
    }

    /// Writes a file in the run folder and returns its path.
    pub(crate) fn write(&self, part: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(part);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("failed to create {}", parent.display()))?;
        }
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path)
    }

    /// The administrator's kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    /// containerd's socket.
    pub(crate) fn containerd(&self) -> PathBuf {
        self.path("containerd.sock")
    }

    /// Whether the API server was ready once and its namespace is still there.
    pub(crate) fn exists(&self) -> bool {
        self.path(READY).exists() && network::path(self).exists()
    }

    /// Notes that the cluster was brought up whole.
    pub(crate) fn mark_ready(&self) -> Result<()> {
        self.write(READY, "").map(drop)
    }

    /// Keeps other runs of this program from changing the cluster until the result is dropped.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.folder.with_extension("lock");
        let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
        if file.try_lock().is_err() {
            say(&format!("waiting for another run that changes the cluster {}", self.name));
            file.lock().with_context(|| format!("failed to lock {}", path.display()))?;
        }
        Ok(file)
    }

    /// `program` in the cluster's network namespace, with KUBECONFIG set and the programs of Kubernetes and helm in PATH.
    pub(crate) fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<std::process::Command> {
        let mut inside = command("nsenter");
        inside.arg(network::enter(self)).arg(program).env("KUBECONFIG", self.kubeconfig());
        // By these a program inside reaches `xtask cluster` for this very cluster.
        inside.env("SKEIN_CLUSTER", &self.name).env("SKEIN_XTASK", std::env::current_exe().context("failed to find xtask itself")?);
        let mut folders = vec![binaries::folder()?, tools::HELM.folder()?];
        folders.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
        inside.env("PATH", std::env::join_paths(folders).context("the tools' folder cannot stand in PATH")?);
        // The namespace reaches no proxy.
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
            inside.env_remove(proxy);
        }
        Ok(inside)
    }
}

const READY: &str = "ready";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_derive_from_the_folder() {
        let (a, b) = (Cluster::named("one").expect("a name"), Cluster::named("two").expect("a name"));
        assert_ne!(a.id(), b.id());
        assert_eq!(a.id(), Cluster::named("one").expect("a name").id());
        assert!(a.id().starts_with("skein-one-"));
        assert!(a.path("x").starts_with(a.folder()));
    }

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        for name in ["", "-a", "A", "a/b", "..", "a.b", "aaaaaaaaaaaaaaaaaaaaa"] {
            assert!(Cluster::named(name).is_err(), "{name:?}");
        }
    }
}
