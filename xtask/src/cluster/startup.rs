//! Bringing a cluster up.

use std::{
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    addons, binaries, certificates, cgroups, components,
    configuration::{self, NODE_NAME},
    folder::Cluster,
    images, mirror, network, packages, processes, require, teardown, tools,
};
use crate::{
    model,
    process::{run, say},
};

/// How long a step of the cluster's start may take; it takes seconds on an idle machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
/// How long a program that is stopped may take; the API server would wait for its clients' watches to end.
const GRACE: Duration = Duration::from_secs(3);
/// Between two looks at something that is awaited.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of disk that a cluster with its images, logs and state may come to need.
const DISK: u64 = 2 << 30;
/// What puts Skein into the cluster.
const CHART: &str = "charts/skein";
/// Name of its release.
const RELEASE: &str = "skein";
/// Namespace of its release.
const SYSTEM: &str = "skein-system";

/// What is put into a cluster.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Content {
    /// Nothing.
    Bare,
    /// Skein, built now.
    Built,
    /// Skein as it was built last.
    AsBuilt,
}

/// Installs and builds what a cluster with Skein in it needs and this machine lacks.
///
/// # Errors
/// If it cannot be had.
pub(crate) fn prepare() -> Result<()> {
    packages::ensure()?;
    binaries::ensure()?;
    for tool in [tools::HELM, tools::METRICS_SERVER, tools::KWOK] {
        tool.ensure()?;
    }
    Ok(())
}

/// Brings `cluster` up, unless it is, and puts `content` into it.
///
/// # Errors
/// If something is missing or a program does not become ready; its log is named.
pub(crate) fn up(cluster: &Cluster, content: Content) -> Result<()> {
    let began = Instant::now();
    packages::ensure()?;
    let bin = binaries::ensure()?;
    if content != Content::Bare {
        tools::HELM.ensure()?;
        model::ensure()?;
    }
    let _lock = cluster.lock()?;
    if cluster.exists() && healthy(cluster)? {
        say(&format!("the cluster {} is up already", cluster.name()));
    } else {
        teardown::clear(cluster)?;
        start(cluster, &bin)
            .with_context(|| format!("the cluster {} did not start; logs are in {}", cluster.name(), cluster.path("logs").display()))?;
    }
    mirror::add_reference_model(cluster)?;
    match content {
        Content::Bare => {}
        Content::Built => {
            images::build_and_load(cluster)?;
            install(cluster)?;
        }
        Content::AsBuilt => {
            images::load(cluster)?;
            install(cluster)?;
        }
    }
    say(&format!(
        "ready after {:.1} s; inside: `cargo xtask cluster --name {} exec -- kubectl get nodes`",
        began.elapsed().as_secs_f64(),
        cluster.name()
    ));
    println!("export KUBECONFIG={}", cluster.kubeconfig().display());
    Ok(())
}

/// Pods on a full disk fail one by one, and late.
fn require_space(folder: &Path) -> Result<()> {
    let disk = rustix::fs::statvfs(folder).with_context(|| format!("failed to look at the disk of {}", folder.display()))?;
    let free = disk.f_bavail * disk.f_frsize;
    if free < DISK {
        bail!("{} MiB are free on the disk of {}; a cluster needs {} MiB", free >> 20, folder.display(), DISK >> 20);
    }
    Ok(())
}

fn start(cluster: &Cluster, bin: &Path) -> Result<()> {
    say(&format!("starting the cluster {} in {}", cluster.name(), cluster.folder().display()));
    cluster.make("")?;
    require_space(cluster.folder())?;
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
    wait(cluster, "containerd", || succeeds(cluster, &[&runtime.to_string_lossy(), "--address", &socket, "version"]))?;
    images::load_pause(cluster)?;
    wait(cluster, "the API server", || succeeds(cluster, &["kubectl", "get", "--raw", "/readyz"]))?;
    processes::start(cluster, components::kubelet(cluster, bin))?;
    for program in components::clients(cluster, bin) {
        processes::start(cluster, program)?;
    }
    wait(cluster, "the node", || {
        succeeds(cluster, &["kubectl", "wait", "--for=condition=Ready", "--timeout=5s", &format!("node/{NODE_NAME}")])
    })?;
    // Pods are refused until the controller has made their namespace's account.
    wait(cluster, "service accounts", || succeeds(cluster, &["kubectl", "get", "serviceaccount", "default"]))?;
    cluster.mark_ready()
}

/// Installs the chart as anyone would, with the cluster's mirror as the model hub and folders of the run as those of nodes, in a namespace that
/// lets nothing privileged in.
fn install(cluster: &Cluster) -> Result<()> {
    say(&format!("installing {CHART}"));
    let namespace = cluster.write("skein-system.json", &format!("{:#}", namespace()))?;
    kubectl(cluster, &["apply", "--server-side", "--filename", &namespace.to_string_lossy()])?;
    let endpoint = format!("--set=sources.hf.endpoint={}", mirror::endpoint());
    // This machine is the node: what is in these folders is what a node has.
    let (models, cache) = (cluster.make("models")?, cluster.make("node-cache")?);
    let models = format!("--set-json=sources.hostPaths={}", serde_json::json!([models]));
    let cache = format!("--set-json=sources.nodeCache={}", serde_json::json!(cache));
    let flags = ["upgrade", "--install", RELEASE, CHART, "--namespace", SYSTEM, &endpoint, &models, &cache, "--wait", "--timeout=180s"];
    // It says which commands come next; whoever brings a cluster up knows them.
    run(cluster.inside("helm")?.args(flags).stdout(Stdio::null()))
}

fn namespace() -> serde_json::Value {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": SYSTEM, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    })
}

/// Stops the recorded process called `program`.
///
/// # Errors
/// If there is none of that name, or it does not end.
pub(crate) fn stop_program(cluster: &Cluster, program: &str) -> Result<()> {
    require(cluster)?;
    find(cluster, program)?.end(cluster, GRACE)
}

/// Starts the recorded process called `program` again, unless it runs; or one of those that a cluster has on demand.
///
/// # Errors
/// If there is none of that name, or it cannot start.
pub(crate) fn start_program(cluster: &Cluster, program: &str) -> Result<()> {
    require(cluster)?;
    if addons::start(cluster, program)? {
        return Ok(());
    }
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
    let (has, more) = (names.join(", "), addons::NAMES.join(" and "));
    found.with_context(|| format!("the cluster has no program {program:?}; it has {has}, and starts {more} on demand"))
}

/// Whether every program runs and the API server and node are ready.
fn healthy(cluster: &Cluster) -> Result<bool> {
    let alive = processes::recorded(cluster)?.iter().all(|p| p.alive(cluster));
    let node = ["kubectl", "wait", "--for=condition=Ready", "--timeout=10s", "--request-timeout=10s", &format!("node/{NODE_NAME}")];
    Ok(alive && succeeds(cluster, &node)?)
}

/// Waits until `done` says so; fails at once when one of the cluster's programs has ended.
pub(super) fn wait(cluster: &Cluster, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
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
pub(super) fn succeeds(cluster: &Cluster, line: &[&str]) -> Result<bool> {
    let (program, args) = line.split_first().context("no command was given")?;
    let mut inside = cluster.inside(program)?;
    let status = inside.args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    Ok(status.with_context(|| format!("failed to start {program}"))?.success())
}

pub(super) fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<()> {
    run(cluster.inside("kubectl")?.args(args))
}
