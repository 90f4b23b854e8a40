//! A network namespace without a default route: nothing in it reaches the machine's network, and the machine's own rules stay untouched.

use std::{net::Ipv4Addr, path::PathBuf, process::Stdio};

use anyhow::{Context, Result};

use super::folder::Cluster;
use crate::process::{command, run};

/// The node's address. All three ranges are in the block for benchmarks between isolated networks (RFC 2544), which no real network uses.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 1);
/// Addresses of pods.
pub(crate) const PODS: &str = "198.18.0.0/17";
/// Addresses of services.
pub(crate) const SERVICES: &str = "198.19.0.0/16";
/// The address of the service `kubernetes`.
pub(crate) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);

/// Where the namespace is kept.
pub(crate) fn path(cluster: &Cluster) -> PathBuf {
    PathBuf::from("/run/netns").join(cluster.id())
}

/// The argument by which `nsenter` enters the namespace.
///
/// (`ip netns exec` mounts another /sys as well, in which the kubelet finds no cgroups.)
pub(crate) fn enter(cluster: &Cluster) -> String {
    format!("--net={}", path(cluster).display())
}

/// Makes the namespace with a loopback and a bridge that has the node's address.
///
/// # Errors
/// If `ip` fails, as it does where the kernel or the container around this program forbids namespaces.
pub(crate) fn create(cluster: &Cluster) -> Result<()> {
    run(command("ip").args(["netns", "add", cluster.id()]))
        .context("failed to make a network namespace; this needs root and CAP_SYS_ADMIN")?;
    let node = format!("{NODE}/32");
    let steps: &[&[&str]] = &[
        &["link", "set", "lo", "up"],
        // A bridge without ports stands in for a network card: not every kernel has dummy devices.
        &["link", "add", "node0", "type", "bridge"],
        &["address", "add", &node, "dev", "node0"],
        &["link", "set", "node0", "up"],
        // Service addresses need some route before kube-proxy's rules rewrite them, and lead nowhere where they do not.
        &["route", "add", SERVICES, "dev", "node0"],
    ];
    for step in steps {
        run(command("ip").args(["-netns", cluster.id()]).args(*step))?;
    }
    let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
    run(command("nsenter").arg(enter(cluster)).args(["sh", "-c", forward]))
}

/// Removes the namespace if it is there.
///
/// # Errors
/// If `ip` fails.
pub(crate) fn delete(cluster: &Cluster) -> Result<()> {
    if !path(cluster).exists() {
        return Ok(());
    }
    run(command("ip").args(["netns", "delete", cluster.id()]).stdout(Stdio::null()))
}
