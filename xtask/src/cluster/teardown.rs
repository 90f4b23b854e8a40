//! Taking a cluster down, whole, half or dead: nothing of it is left running, mounted or on disk.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::{cgroups, folder::Cluster, mounts, network, processes};
use crate::process::say;

/// Ends everything that belongs to `cluster` and removes its run folder.
///
/// # Errors
/// If something does not end or cannot be removed; running it again goes on from there.
pub(crate) fn clear(cluster: &Cluster) -> Result<()> {
    let there = cluster.folder().exists() || network::path(cluster).exists();
    if there {
        say(&format!("clearing away the cluster {}", cluster.name()));
    }
    // What would start containers again ends first.
    let mut recorded = processes::recorded(cluster)?;
    recorded.sort_by_key(|p| !matches!(p.program.name.as_str(), "kubelet" | "containerd"));
    for process in &recorded {
        process.end(cluster, Duration::ZERO)?;
    }
    cgroups::delete(cluster)?;
    for shim in processes::naming(cluster, "containerd-shim")? {
        processes::end(shim, Duration::ZERO, || processes::naming(cluster, "containerd-shim").is_ok_and(|now| now.contains(&shim)))?;
    }
    let sockets = shim_sockets(cluster)?;
    mounts::clear(cluster)?;
    network::delete(cluster)?;
    for socket in sockets {
        remove_file(&socket)?;
    }
    remove_results(Path::new("/var/lib/cni/results"), cluster)?;
    remove_links("/var/log/containers", &cluster.path("pod-logs"))?;
    match fs::remove_dir_all(cluster.folder()) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("failed to remove {}", cluster.folder().display())),
    }
    let left = processes::naming(cluster, "")?;
    if !left.is_empty() {
        bail!("processes that name {} are still running: {left:?}", cluster.folder().display());
    }
    Ok(())
}

/// The sockets of the cluster's shims, which lie outside the run folder: each names its own in its bundle.
fn shim_sockets(cluster: &Cluster) -> Result<Vec<PathBuf>> {
    let bundles = cluster.path("containerd/state/io.containerd.runtime.v2.task/k8s.io");
    let mut sockets = Vec::new();
    for bundle in list(&bundles)? {
        if let Ok(address) = fs::read_to_string(bundle.join("address")) {
            let socket = PathBuf::from(address.trim().trim_start_matches("unix://"));
            if socket.starts_with("/run/containerd/s") {
                sockets.push(socket);
            }
        }
    }
    Ok(sockets)
}

/// Removes what the CNI library noted of the cluster's pods: each note names the pod's namespace, which is mounted in the run folder.
fn remove_results(folder: &Path, cluster: &Cluster) -> Result<()> {
    let own = format!("{}/", cluster.folder().display());
    for path in list(folder)? {
        if fs::read_to_string(&path).is_ok_and(|note| note.contains(&own)) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Removes the links of `folder` that lead into `target`.
fn remove_links(folder: &str, target: &Path) -> Result<()> {
    for path in list(Path::new(folder))? {
        if fs::read_link(&path).is_ok_and(|to| to.starts_with(target)) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("failed to list {}", folder.display())),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("failed to remove {}", path.display())),
    }
}
