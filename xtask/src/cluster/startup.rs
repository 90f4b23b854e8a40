//! Bringing a cluster up.

use std::{
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    binaries, certificates, cgroups, components,
    configuration::{self, NODE_NAME},
    folder::Cluster,
    images, mirror, network, packages, processes, require, teardown,
};
use crate::{model, paths, process::say};

/// How long a step of the cluster's start may take; it takes seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long a program that is stopped may take; the API server would wait for its clients' watches to end.
const GRACE: Duration = Duration::from_secs(3);
/// Between two looks at something that is awaited.
const PAUSE: Duration = Duration::from_millis(100);
/// Manifests that put Skein into the cluster, in the order in which they are applied.
const MANIFESTS: &[&str] = &["manifests/crd.yaml", "manifests/install.yaml"];

/// Brings `cluster` up, unless it is; with Skein in it unless `bare`.
///
/// # Errors
/// If something is missing or a program does not become ready; its log is named.
pub(crate) fn up(cluster: &Cluster, bare: bool) -> Result<()> {
    let began = Instant::now();
    packages::ensure()?;
    let bin = binaries::ensure()?;
    if !bare {
        model::ensure()?;
    }
    let _lock = cluster.lock()?;
    if cluster.exists() && healthy(cluster, &bin)? {
        say(&format!("the cluster {} is up already", cluster.name()));
    } else {
        teardown::clear(cluster)?;
        start(cluster, &bin)
            .with_context(|| format!("the cluster {} did not start; logs are in {}", cluster.name(), cluster.path("logs").display()))?;
    }
    mirror::add_reference_model(cluster)?;
    if !bare {
        install(cluster, &bin)?;
    }
    say(&format!(
        "ready after {:.1} s; inside: `cargo xtask cluster --name {} exec -- kubectl get nodes`",
        began.elapsed().as_secs_f64(),
        cluster.name()
    ));
    println!("export KUBECONFIG={}", cluster.kubeconfig().display());
    Ok(())
}

fn start(cluster: &Cluster, bin: &Path) -> Result<()> {
    say(&format!("starting the cluster {} in {}", cluster.name(), cluster.folder().display()));
    cluster.make("")?;
    network::create(cluster)?;
    cgroups::create(cluster)?;
    certificates::create(cluster, NODE_NAME)?;
    let cni = packages::path("/usr/lib/cni/bridge")?;
    configuration::create(cluster, cni.parent().unwrap_or(Path::new("/")))?;

    processes::start(cluster, components::etcd(cluster)?)?;
    processes::start(cluster, components::api_server(cluster, bin))?;
    processes::start(cluster, components::containerd(cluster)?)?;
    processes::start(cluster, mirror::program(cluster)?)?;
    let runtime = packages::path("ctr")?;
    let socket = cluster.containerd().display().to_string();
    wait(cluster, "containerd", || succeeds(cluster, bin, &[&runtime.to_string_lossy(), "--address", &socket, "version"]))?;
    images::load_pause(cluster)?;
    wait(cluster, "the API server", || succeeds(cluster, bin, &["kubectl", "get", "--raw", "/readyz"]))?;
    processes::start(cluster, components::kubelet(cluster, bin))?;
    for program in components::clients(cluster, bin) {
        processes::start(cluster, program)?;
    }
    wait(cluster, "the node", || {
        succeeds(cluster, bin, &["kubectl", "wait", "--for=condition=Ready", "--timeout=5s", &format!("node/{NODE_NAME}")])
    })?;
    // Pods are refused until the controller has made their namespace's account.
    wait(cluster, "service accounts", || succeeds(cluster, bin, &["kubectl", "get", "serviceaccount", "default"]))?;
    cluster.mark_ready()
}

/// Loads Skein's images and applies its manifests.
fn install(cluster: &Cluster, bin: &Path) -> Result<()> {
    images::load_all(cluster)?;
    for manifest in MANIFESTS {
        let path = paths::root().join(manifest);
        if !path.exists() {
            bail!("{manifest} is not in this checkout; `cargo xtask cluster up --bare` starts a cluster without Skein");
        }
        say(&format!("applying {manifest}"));
        kubectl(cluster, bin, &["apply", "--server-side", "--force-conflicts", "-f", &path.to_string_lossy()])?;
    }
    let endpoint = format!("HF_ENDPOINT={}", mirror::endpoint());
    kubectl(cluster, bin, &["--namespace=skein-system", "set", "env", "deployment/skein-operator", &endpoint])?;
    say("waiting for the operator");
    kubectl(cluster, bin, &["--namespace=skein-system", "rollout", "status", "deployment/skein-operator", "--timeout=180s"])
}

/// Stops the recorded process called `program`.
///
/// # Errors
/// If there is none of that name, or it does not end.
pub(crate) fn stop_program(cluster: &Cluster, program: &str) -> Result<()> {
    require(cluster)?;
    find(cluster, program)?.end(cluster, GRACE)
}

/// Starts the recorded process called `program` again, unless it runs.
///
/// # Errors
/// If there is none of that name, or it cannot start.
pub(crate) fn start_program(cluster: &Cluster, program: &str) -> Result<()> {
    require(cluster)?;
    let recorded = find(cluster, program)?;
    if recorded.alive(cluster) {
        return Ok(());
    }
    processes::start(cluster, recorded.program).map(drop)
}

fn find(cluster: &Cluster, program: &str) -> Result<processes::Process> {
    let all = processes::recorded(cluster)?;
    let names: Vec<String> = all.iter().map(|p| p.program.name.clone()).collect();
    let found = all.into_iter().find(|p| p.program.name == program);
    found.with_context(|| format!("the cluster has no program {program:?}; it has {}", names.join(", ")))
}

/// Whether every program runs and the API server and node are ready.
fn healthy(cluster: &Cluster, bin: &Path) -> Result<bool> {
    let alive = processes::recorded(cluster)?.iter().all(|p| p.alive(cluster));
    let node = ["kubectl", "wait", "--for=condition=Ready", "--timeout=10s", "--request-timeout=10s", &format!("node/{NODE_NAME}")];
    Ok(alive && succeeds(cluster, bin, &node)?)
}

/// Waits until `done` says so; fails at once when one of the cluster's programs has ended.
fn wait(cluster: &Cluster, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    say(&format!("waiting for {what}"));
    let began = Instant::now();
    while !done()? {
        if let Some(dead) = processes::recorded(cluster)?.iter().find(|p| !p.alive(cluster)) {
            bail!("{} ended; see {}", dead.program.name, cluster.path(&format!("logs/{}.log", dead.program.name)).display());
        }
        if began.elapsed() > PATIENCE {
            bail!("waited {} s for {what}", PATIENCE.as_secs());
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Whether a command inside the cluster succeeds; what it writes is of no interest.
fn succeeds(cluster: &Cluster, bin: &Path, line: &[&str]) -> Result<bool> {
    let (program, args) = line.split_first().context("no command was given")?;
    let mut inside = cluster.inside(program, bin)?;
    let status = inside.args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    Ok(status.with_context(|| format!("failed to start {program}"))?.success())
}

fn kubectl(cluster: &Cluster, bin: &Path, args: &[&str]) -> Result<()> {
    crate::process::run(cluster.inside("kubectl", bin)?.args(args))
}
