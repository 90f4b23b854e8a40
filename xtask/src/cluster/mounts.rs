//! What is mounted in a cluster's run folder: volumes, file systems of containers, network namespaces of pods.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};

use super::folder::Cluster;

/// Unmounts everything below the run folder, what was mounted last first.
///
/// # Errors
/// If the list of mounts cannot be read or one cannot be unmounted.
pub(crate) fn clear(cluster: &Cluster) -> Result<()> {
    for mount in below(cluster)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("failed to unmount {}", mount.display()))?;
    }
    Ok(())
}

/// The mounts below the run folder, in the order in which they were made.
fn below(cluster: &Cluster) -> Result<Vec<PathBuf>> {
    let list = fs::read_to_string("/proc/self/mountinfo").context("failed to read the list of mounts")?;
    let places = list.lines().filter_map(|line| line.split(' ').nth(4)).map(|place| PathBuf::from(unescaped(place)));
    Ok(places.filter(|place| place.starts_with(cluster.folder())).collect())
}

/// A path of mountinfo, in which spaces, tabs, line breaks and backslashes are octal (proc_pid_mountinfo(5)).
fn unescaped(place: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(place.to_owned(), |text, (from, to)| text.replace(from, to))
}
