//! A one-node Kubernetes cluster on this machine: real API server, scheduler, kubelet and containerd, in a network namespace of its own.
//!
//! Everything a cluster keeps lies in its run folder, `clusters/NAME` in Skein's cache; the names of its namespace, cgroup and pod network derive
//! from that folder, so that clusters do not disturb each other and what is left of a dead one is found and cleared away.

mod addons;
mod archive;
mod binaries;
mod certificates;
mod cgroups;
mod components;
mod configuration;
mod folder;
mod images;
mod mirror;
mod mounts;
mod network;
mod packages;
mod processes;
mod startup;
mod teardown;
mod testing;
mod tools;

use std::{ffi::OsString, os::unix::process::CommandExt};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use folder::Cluster;
use startup::Content;
pub(crate) use testing::{during, prepare};
pub(crate) use tools::HELM;

use crate::process::forget_package;

/// Options of `cluster`.
#[derive(Args)]
pub(crate) struct Options {
    /// Which cluster; each has its own run folder and disturbs no other.
    #[arg(long, global = true, env = "SKEIN_CLUSTER", default_value = "default")]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Bring the cluster up with Skein in it, building and installing what is missing; does nothing where it is up.
    Up {
        /// Leave Skein out.
        #[arg(long)]
        bare: bool,
        /// Load Skein's programs as they were built last.
        #[arg(long, conflicts_with = "bare")]
        as_built: bool,
    },
    /// End everything that belongs to the cluster and remove its run folder.
    Down,
    /// Build Skein's programs and load their images into the cluster.
    LoadImage,
    /// Run a command inside the cluster's network, with KUBECONFIG set and kubectl in PATH.
    Exec {
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Stop one of the cluster's programs, such as kube-apiserver.
    Stop {
        /// Its name.
        program: String,
    },
    /// Start a program that was stopped or that died; or metrics-server, which tells autoscalers what pods use, or kwok, which plays nodes.
    Start {
        /// Its name.
        program: String,
    },
    /// Serve model files by a hub's paths; the cluster's own process.
    #[command(hide = true)]
    Mirror(mirror::Options),
}

/// Does what `options` says.
///
/// # Errors
/// If it cannot be done; messages name what is missing.
pub(crate) fn run(options: Options) -> Result<()> {
    if let Action::Mirror(mirror) = options.action {
        return mirror::serve(mirror);
    }
    require_root()?;
    let cluster = Cluster::named(&options.name)?;
    match options.action {
        Action::Up { bare: true, .. } => startup::up(&cluster, Content::Bare),
        Action::Up { as_built: true, .. } => startup::up(&cluster, Content::AsBuilt),
        Action::Up { .. } => startup::up(&cluster, Content::Built),
        Action::Down => {
            let _lock = cluster.lock()?;
            teardown::clear(&cluster)
        }
        Action::LoadImage => {
            let _lock = cluster.lock()?;
            require(&cluster)?;
            images::build_and_load(&cluster)
        }
        Action::Exec { command } => exec(&cluster, &command),
        Action::Stop { program } => startup::stop_program(&cluster, &program),
        Action::Start { program } => startup::start_program(&cluster, &program),
        Action::Mirror(_) => Ok(()),
    }
}

fn require_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a cluster needs namespaces, mounts and cgroups: run this as root");
    }
    Ok(())
}

fn require(cluster: &Cluster) -> Result<()> {
    if !cluster.exists() {
        bail!("the cluster {name} is not up; `cargo xtask cluster --name {name} up` starts it", name = cluster.name());
    }
    Ok(())
}

/// Becomes the command, so that its exit status, signals and terminal are its own.
fn exec(cluster: &Cluster, command: &[OsString]) -> Result<()> {
    require(cluster)?;
    let (program, args) = command.split_first().context("no command was given")?;
    let mut inside = cluster.inside(program)?;
    forget_package(&mut inside);
    let here = std::env::current_dir().context("the working folder is gone")?;
    Err(inside.args(args).current_dir(here).stdin(std::process::Stdio::inherit()).exec()).context("failed to start nsenter")
}
