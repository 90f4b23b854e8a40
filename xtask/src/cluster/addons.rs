//! Programs that a cluster has on demand: what autoscalers measure pods by, and nodes whose pods are played. They end with the cluster.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    folder::Cluster,
    network::NODE,
    processes::{self, Program},
    startup::{kubectl, succeeds, wait},
    tools::{KWOK, METRICS_SERVER},
};

/// What there is.
pub(crate) const NAMES: [&str; 2] = ["metrics-server", "kwok"];
/// Port of metrics-server on the node's address.
const METRICS_PORT: u16 = 4443;
/// Where metrics-server's API is.
const METRICS_API: &str = "v1beta1.metrics.k8s.io";
/// Addresses of pods that are played: in the block of the pods, and routed nowhere.
const PLAYED_PODS: &str = "198.18.128.1/18";
/// What says that a node is played.
const PLAYED_NODE: &str = "kwok.x-k8s.io/node=fake";

/// Starts the program called `name` in `cluster`, unless it runs, and waits until it serves; whether there is one of that name.
///
/// # Errors
/// If it cannot be built or started, or does not serve.
pub(crate) fn start(cluster: &Cluster, name: &str) -> Result<bool> {
    let start = match name {
        "metrics-server" => start_metrics_server,
        "kwok" => start_kwok,
        _ => return Ok(false),
    };
    let _lock = cluster.lock()?;
    start(cluster)?;
    Ok(true)
}

/// Starts what is not running; whether anything was to be done.
fn ensure_running(cluster: &Cluster, program: Program) -> Result<()> {
    let running = processes::recorded(cluster)?.iter().any(|p| p.program.name == program.name && p.alive(cluster));
    if running { Ok(()) } else { processes::start(cluster, program).map(drop) }
}

fn start_metrics_server(cluster: &Cluster) -> Result<()> {
    let admin = cluster.kubeconfig();
    let admin = admin.display();
    let args = [
        format!("--kubeconfig={admin}"),
        format!("--authentication-kubeconfig={admin}"),
        format!("--authorization-kubeconfig={admin}"),
        format!("--bind-address={NODE}"),
        format!("--secure-port={METRICS_PORT}"),
        format!("--cert-dir={}", cluster.make("metrics-server")?.display()),
        "--kubelet-insecure-tls".to_owned(),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        // The shortest it takes.
        "--metric-resolution=10s".to_owned(),
        "--kubelet-request-timeout=5s".to_owned(),
    ];
    ensure_running(cluster, Program::new(METRICS_SERVER.name(), &METRICS_SERVER.ensure()?, args))?;
    let objects = json!({ "apiVersion": "v1", "kind": "List", "items": metrics_api() });
    let file = cluster.write("metrics-api.json", &format!("{objects:#}"))?;
    kubectl(cluster, &["apply", "--server-side", "--filename", &file.to_string_lossy()])?;
    wait(cluster, METRICS_API, || {
        succeeds(cluster, &["kubectl", "wait", "--for=condition=Available", "--timeout=5s", &format!("apiservice/{METRICS_API}")])
    })
}

/// How the API server finds it: a service without pods, and the API it serves.
fn metrics_api() -> Vec<Value> {
    let (name, namespace) = (METRICS_SERVER.name(), "kube-system");
    let (group, version) = ("metrics.k8s.io", "v1beta1");
    vec![
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": METRICS_PORT, "protocol": "TCP"}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [NODE.to_string()], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": METRICS_PORT, "protocol": "TCP"}],
        }),
        json!({
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": METRICS_API},
            "spec": {
                "service": {"name": name, "namespace": namespace, "port": 443},
                "group": group,
                "version": version,
                "insecureSkipTLSVerify": true,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
            },
        }),
    ]
}

/// Nodes are played that say so in an annotation; it serves nobody, so there is nothing to wait for but that it stays.
fn start_kwok(cluster: &Cluster) -> Result<()> {
    let program = KWOK.ensure()?;
    let mut args = vec![
        format!("--kubeconfig={}", cluster.kubeconfig().display()),
        "--manage-all-nodes=false".to_owned(),
        format!("--manage-nodes-with-annotation-selector={PLAYED_NODE}"),
        format!("--cidr={PLAYED_PODS}"),
    ];
    for stage in KWOK.files()? {
        args.push(format!("--config={}", stage.to_str().context("a path that is no text")?));
    }
    ensure_running(cluster, Program::new(KWOK.name(), &program, args))
}
