//! The routers of a namespace, which all its deployments share and own together, and a deployment's own.

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

/// The routers of a namespace, or a deployment's own.
#[derive(Clone, Copy, Debug)]
pub struct Routers<'a> {
    /// The deployment whose own they are.
    pub own_of: Option<&'a str>,
    /// How many there are.
    pub count: u32,
}

/// Every object of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolResources {
    /// The identities of routers and workers, which may do nothing; that of a deployment's own routers is made before, and owns all else.
    pub accounts: Vec<Object>,
    /// Metadata of the secret with the tokens of the namespace; its data is drawn once.
    pub tokens: Option<Object>,
    /// Where requests go, whatever the model. A deployment's own routers are reached at its service alone.
    pub service: Option<Object>,
    /// Where routers find each other, ready or not.
    pub peers: Object,
    /// Who may reach which of a router's ports.
    pub network_policy: Object,
    /// How many routers may be evicted at once.
    pub disruption_budget: Object,
    /// The routers.
    pub deployment: Object,
}

impl Routers<'_> {
    /// Name of their deployment, account, budget and policy.
    pub fn name(&self) -> String {
        self.own_of.map_or_else(|| POOL.to_owned(), names::own_router)
    }

    /// Name of the Secret with their certificate.
    pub fn identity(&self) -> String {
        self.own_of.map_or_else(|| ROUTER_IDENTITY.to_owned(), names::own_identity)
    }

    fn peers(&self) -> String {
        self.own_of.map_or_else(|| POOL_PEERS.to_owned(), names::own_peers)
    }

    /// Labels of everything of theirs.
    pub fn labels(&self) -> Value {
        let mut labels = names::labels("router");
        if let Some(deployment) = self.own_of {
            labels["app.kubernetes.io/name"] = names::OWN_ROUTER.into();
            labels[names::ROUTER_OF] = deployment.into();
        }
        labels
    }

    /// What selects them.
    pub(crate) fn selector(&self) -> Value {
        match self.own_of {
            None => json!({ "app.kubernetes.io/name": POOL, "app.kubernetes.io/component": "router" }),
            Some(deployment) => {
                let name = names::OWN_ROUTER;
                json!({ "app.kubernetes.io/name": name, "app.kubernetes.io/component": "router", names::ROUTER_OF: deployment })
            }
        }
    }
}

/// What selects every router of a namespace, whosever it is.
pub(super) fn any_router() -> Value {
    json!({ "app.kubernetes.io/component": "router", "app.kubernetes.io/managed-by": names::MANAGER })
}

/// The account of routers, or of workers.
pub fn account(name: String, labels: Value, owners: &[OwnerReference]) -> Object {
    owned(("v1", "ServiceAccount"), name, labels, owners, json!({ "automountServiceAccountToken": false }))
}

/// Builds the pool of a namespace whose deployments are `owners`, or a deployment's own, whose account is the owner; `meeting` is where a new
/// router finds another, once that is known.
pub fn build_pool(pool: Routers<'_>, owners: &[OwnerReference], settings: &Settings, meeting: Option<&str>) -> PoolResources {
    let (name, labels) = (pool.name(), || pool.labels());
    let shared = pool.own_of.is_none();
    let accounts = [account(name.clone(), labels(), owners), account(WORKER_ACCOUNT.to_owned(), names::labels("worker"), owners)];
    let object = |(version, kind), name, rest| owned((version, kind), name, labels(), owners, rest);
    PoolResources {
        accounts: if shared { accounts.into() } else { Vec::new() },
        tokens: shared.then(|| object(("v1", "Secret"), TOKENS.to_owned(), json!({ "type": "Opaque" }))),
        service: shared.then(|| object(("v1", "Service"), name.clone(), json!({ "spec": router_service(pool) }))),
        peers: object(("v1", "Service"), pool.peers(), json!({ "spec": peers(pool) })),
        network_policy: object(("networking.k8s.io/v1", "NetworkPolicy"), name.clone(), json!({ "spec": network_policy(pool) })),
        disruption_budget: object(
            ("policy/v1", "PodDisruptionBudget"),
            name.clone(),
            json!({ "spec": { "maxUnavailable": 1, "selector": { "matchLabels": pool.selector() } } }),
        ),
        deployment: object(("apps/v1", "Deployment"), name, json!({ "spec": routers(pool, settings, meeting) })),
    }
}

/// Routers meet before they are ready: that is how a new one learns the state while the operator is away.
fn peers(pool: Routers<'_>) -> Value {
    json!({
        "type": "ClusterIP",
        "publishNotReadyAddresses": true,
        "selector": pool.selector(),
        "ports": [{ "name": "pool", "port": POOL_PORT, "targetPort": "pool", "protocol": "TCP" }],
    })
}

/// Anybody reaches the API; the routers and workers of the namespace alone reach the port of the pool.
fn network_policy(pool: Routers<'_>) -> Value {
    let workers = json!({ "app.kubernetes.io/component": "worker", "app.kubernetes.io/managed-by": names::MANAGER });
    json!({
        "podSelector": { "matchLabels": pool.selector() },
        "policyTypes": ["Ingress"],
        "ingress": [
            { "ports": [{ "port": ROUTER_PORTS.0, "protocol": "TCP" }, { "port": ROUTER_PORTS.1, "protocol": "TCP" }] },
            {
                "from": [{ "podSelector": { "matchLabels": any_router() } }, { "podSelector": { "matchLabels": workers } }],
                "ports": [{ "port": POOL_PORT, "protocol": "TCP" }],
            },
        ],
    })
}

fn routers(pool: Routers<'_>, settings: &Settings, meeting: Option<&str>) -> Value {
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
    if let Some(deployment) = pool.own_of {
        with_args(&mut container, ["--deployment", deployment]);
    }
    let mut pod_spec = template(&pool.name(), DRAIN.1, container);
    pod_spec["volumes"] = json!([{ "name": "state", "emptyDir": {} }]);
    if settings.proven {
        with_identity(&mut pod_spec, &pool.identity());
    }
    json!({
        "replicas": pool.count,
        "selector": { "matchLabels": pool.selector() },
        "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
        "template": { "metadata": { "labels": pool.labels() }, "spec": pod_spec },
    })
}
