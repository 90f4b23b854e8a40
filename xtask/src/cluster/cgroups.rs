//! The cgroup below which all of a cluster's containers run: two kubelets that shared one would remove each other's pods.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use super::{folder::Cluster, processes};

/// The cgroup's path in every hierarchy.
pub(crate) fn name(cluster: &Cluster) -> String {
    format!("/{}", cluster.id())
}

/// Makes the cgroup in every hierarchy, as the kubelet expects its root to be there.
///
/// # Errors
/// If a hierarchy is read-only.
pub(crate) fn create(cluster: &Cluster) -> Result<()> {
    for (mount, kind) in hierarchies()? {
        let own = mount.join(cluster.id());
        if kind == "cgroup2" && mount.join("cgroup.controllers").exists() {
            let controllers = read(&mount.join("cgroup.controllers"))?;
            let wanted: Vec<String> = controllers.split_whitespace().map(|c| format!("+{c}")).collect();
            write(&mount.join("cgroup.subtree_control"), &wanted.join(" "))?;
        }
        fs::create_dir_all(&own).with_context(|| format!("failed to make the cgroup {}; this needs root", own.display()))?;
        // A new cgroup of version 1 has no processors and no memory nodes until it is given some.
        for set in ["cpuset.cpus", "cpuset.mems"] {
            if kind == "cgroup" && own.join(set).exists() {
                write(&own.join(set), &read(&mount.join(set))?)?;
            }
        }
    }
    Ok(())
}

/// Kills what runs in the cgroup, whose processes are the cluster's containers and nothing else, and removes it.
///
/// # Errors
/// If something in it cannot be killed.
pub(crate) fn delete(cluster: &Cluster) -> Result<()> {
    let own: Vec<PathBuf> = hierarchies()?.into_iter().map(|(mount, _)| mount.join(cluster.id())).filter(|own| own.exists()).collect();
    for folder in &own {
        let mut inside = folders(folder)?;
        // A container may start a process while its others are being killed.
        while kill(&inside)? {
            inside = folders(folder)?;
        }
    }
    for folder in &own {
        // Leaves first.
        for inside in folders(folder)?.iter().rev() {
            fs::remove_dir(inside).with_context(|| format!("failed to remove the cgroup {}", inside.display()))?;
        }
    }
    Ok(())
}

/// Kills the processes of these cgroups; returns whether there were any.
fn kill(folders: &[PathBuf]) -> Result<bool> {
    let mut any = false;
    for folder in folders {
        let list = folder.join("cgroup.procs");
        for pid in processes_in(&list)? {
            any = true;
            processes::end(pid, Duration::ZERO, || processes_in(&list).is_ok_and(|now| now.contains(&pid)))?;
        }
    }
    Ok(any)
}

fn processes_in(list: &Path) -> Result<Vec<i32>> {
    Ok(read(list)?.lines().filter_map(|line| line.parse().ok()).collect())
}

/// `folder` and everything below it, parents first.
fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![folder.to_path_buf()];
    let mut next = 0;
    while let Some(parent) = all.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(&parent).with_context(|| format!("failed to list {}", parent.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                all.push(entry.path());
            }
        }
    }
    Ok(all)
}

/// Where the hierarchies are mounted, and of which version each is (`cgroup` or `cgroup2`).
fn hierarchies() -> Result<Vec<(PathBuf, String)>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("failed to read the list of mounts")?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    Ok(fields.filter(|f| f.len() > 2 && matches!(f[2], "cgroup" | "cgroup2")).map(|f| (f[1].into(), f[2].to_owned())).collect())
}

fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(e).with_context(|| format!("failed to read {}", path.display())),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("failed to write {text:?} to {}", path.display()))
}
