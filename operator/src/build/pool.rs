//! The routers of a namespace, which all its deployments share and own together.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::{Value, json};

use super::{
    Object, Settings, owned,
    pod::{restricted, template, token, volume_mount, with_args, with_identity},
    router_service,
};
use crate::names::{
    self, FLEET_TOKEN, POOL, POOL_PEERS, POOL_PORT, POOL_TOKEN, ROUTER_IDENTITY, ROUTER_PORTS, TOKENS, WORKER_ACCOUNT, WORKER_TOKEN,
};

/// Folder of the state that a router keeps.
const STATE: &str = "/var/lib/skein";
/// Longest that running requests may go on when a router is told to stop, and when it is killed.
const DRAIN: (u32, u32) = (30, 40);

/// Every object of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolResources {
    /// The identities of routers and workers, which may do nothing.
    pub accounts: [Object; 2],
    /// Metadata of the secret with the tokens; its data is drawn once.
    pub tokens: Object,
    /// Where requests go, whatever the model.
    pub service: Object,
    /// Where routers find each other, ready or not.
    pub peers: Object,
    /// Who may reach which of a router's ports.
    pub network_policy: Object,
    /// How many routers may be evicted at once.
    pub disruption_budget: Object,
    /// The routers.
    pub deployment: Object,
}

/// What selects the routers of a namespace.
pub(crate) fn selector() -> Value {
    json!({ "app.kubernetes.io/name": POOL, "app.kubernetes.io/component": "router" })
}

/// Builds the pool of a namespace whose deployments are `owners`; `meeting` is where a new router finds another, once that is known.
pub fn build_pool(owners: &[OwnerReference], settings: &Settings, meeting: Option<&str>) -> PoolResources {
    let labels = || names::labels("router");
    let account = |name: &str, component: &str| {
        let rest = json!({ "automountServiceAccountToken": false });
        owned(("v1", "ServiceAccount"), name.to_owned(), names::labels(component), owners, rest)
    };
    PoolResources {
        accounts: [account(POOL, "router"), account(WORKER_ACCOUNT, "worker")],
        tokens: owned(("v1", "Secret"), TOKENS.to_owned(), labels(), owners, json!({ "type": "Opaque" })),
        service: owned(("v1", "Service"), POOL.to_owned(), labels(), owners, json!({ "spec": router_service() })),
        peers: owned(("v1", "Service"), POOL_PEERS.to_owned(), labels(), owners, json!({ "spec": peers() })),
        network_policy: owned(
            ("networking.k8s.io/v1", "NetworkPolicy"),
            POOL.to_owned(),
            labels(),
            owners,
            json!({ "spec": network_policy() }),
        ),
        disruption_budget: owned(
            ("policy/v1", "PodDisruptionBudget"),
            POOL.to_owned(),
            labels(),
            owners,
            json!({ "spec": { "maxUnavailable": 1, "selector": { "matchLabels": selector() } } }),
        ),
        deployment: owned(("apps/v1", "Deployment"), POOL.to_owned(), labels(), owners, json!({ "spec": routers(settings, meeting) })),
    }
}

/// Routers meet before they are ready: that is how a new one learns the state while the operator is away.
fn peers() -> Value {
    json!({
        "type": "ClusterIP",
        "publishNotReadyAddresses": true,
        "selector": selector(),
        "ports": [{ "name": "pool", "port": POOL_PORT, "targetPort": "pool", "protocol": "TCP" }],
    })
}

/// Anybody reaches the API; the routers and workers of the namespace alone reach the port of the pool.
fn network_policy() -> Value {
    let workers = json!({ "app.kubernetes.io/component": "worker", "app.kubernetes.io/managed-by": names::MANAGER });
    json!({
        "podSelector": { "matchLabels": selector() },
        "policyTypes": ["Ingress"],
        "ingress": [
            { "ports": [{ "port": ROUTER_PORTS.0, "protocol": "TCP" }, { "port": ROUTER_PORTS.1, "protocol": "TCP" }] },
            {
                "from": [{ "podSelector": { "matchLabels": selector() } }, { "podSelector": { "matchLabels": workers } }],
                "ports": [{ "port": POOL_PORT, "protocol": "TCP" }],
            },
        ],
    })
}

fn routers(settings: &Settings, meeting: Option<&str>) -> Value {
    let mut container = json!({
        "name": "router",
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["/skein"],
        "args": [
            "router", "-v", "--log-format", "json",
            "--name", "$(POD_NAME)",
            "--fleet", settings.fleet_address,
            "--http", format!("0.0.0.0:{}", ROUTER_PORTS.0),
            "--grpc", format!("0.0.0.0:{}", ROUTER_PORTS.1),
            "--pool", format!("0.0.0.0:{POOL_PORT}"),
            "--state", format!("{STATE}/fleet.json"),
            "--drain-seconds", DRAIN.0.to_string(),
        ],
        "env": [
            { "name": "POD_NAME", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.name" } } },
            token("SKEIN_FLEET_TOKEN", FLEET_TOKEN),
            token("SKEIN_POOL_TOKEN", POOL_TOKEN),
            token("SKEIN_WORKER_TOKEN", WORKER_TOKEN),
        ],
        "ports": [
            { "name": "http", "containerPort": ROUTER_PORTS.0, "protocol": "TCP" },
            { "name": "grpc", "containerPort": ROUTER_PORTS.1, "protocol": "TCP" },
            { "name": "pool", "containerPort": POOL_PORT, "protocol": "TCP" },
        ],
        // A router answers from its first fleet state on, also for models that are not ready.
        "readinessProbe": { "httpGet": { "path": "/live", "port": "http" }, "periodSeconds": 2 },
        "resources": { "requests": { "cpu": settings.router_cpu, "memory": settings.router_memory } },
        "securityContext": restricted(),
        "volumeMounts": [volume_mount("state", STATE, false)],
    });
    if let Some(meeting) = meeting {
        with_args(&mut container, ["--peer", meeting]);
    }
    let mut pod = template(POOL, DRAIN.1, container);
    pod["volumes"] = json!([{ "name": "state", "emptyDir": {} }]);
    if settings.proven {
        with_identity(&mut pod, ROUTER_IDENTITY);
    }
    json!({
        "replicas": settings.pool_size,
        "selector": { "matchLabels": selector() },
        "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
        "template": { "metadata": { "labels": names::labels("router") }, "spec": pod },
    })
}
