//! Third step: the objects of a deployment, as they are applied. Pure.

pub mod pod;
pub mod pool;
#[cfg(test)]
mod tests;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use plan::worker::WorkerSpec;
use serde_json::{Map, Value, json};

use self::pod::{CACHE, SPEC, restricted, volume_mount};
use crate::{
    names::{self, DEPLOYMENT, REPLICA, REVISION, ROUTER_PORTS, SERVICE_PORT, STAGE, WORKER_PORT},
    resource::ModelDeployment,
    validate::ValidatedDeployment,
};

/// What the operator was started with, as far as objects depend on it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Image of routers and workers.
    pub image: String,
    /// When it is pulled.
    pub image_pull_policy: String,
    /// Where routers find the operator.
    pub fleet_address: String,
    /// Base URL of `hf://` sources.
    pub hf_endpoint: Option<String>,
    /// CPU that a worker asks for.
    pub worker_cpu: String,
    /// CPU that a router asks for.
    pub router_cpu: String,
    /// Memory that a router asks for.
    pub router_memory: String,
}

/// One object: exactly the fields that the operator owns.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Its name.
    pub name: String,
    /// The object.
    pub body: Value,
}

/// Every object of a deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Resources {
    /// Worker specifications.
    pub config_maps: Vec<Object>,
    /// Gives workers names in DNS.
    pub worker_service: Object,
    /// Who may reach workers.
    pub network_policy: Object,
    /// How many workers may be evicted at once.
    pub disruption_budget: Object,
    /// Where requests go.
    pub service: Object,
    /// One for each replica and stage.
    pub stateful_sets: Vec<Object>,
}

/// Most bytes of specifications in one ConfigMap, whose limit is 1 MiB with everything around them.
const PART: usize = 768 << 10;
/// Bytes that a worker needs beside weights and KV cache: code, buffers, the runtime.
const OVERHEAD: u64 = 96 << 20;
/// Longest that a worker may take to end its sessions.
const WORKER_GRACE: u32 = 10;

/// A deployment too large to be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the specification of stage {stage} rank {rank} has {bytes} bytes, expected at most {PART}; use more stages")]
pub struct TooLarge {
    stage: usize,
    rank: usize,
    bytes: usize,
}

/// Builds everything.
///
/// # Errors
/// When a worker's specification does not fit into a ConfigMap.
pub fn build(valid: &ValidatedDeployment, object: &ModelDeployment, settings: &Settings) -> Result<Resources, TooLarge> {
    let deployment = Build { valid, owner: object.owner(true), settings };
    let specs = valid.worker_specs();
    let mut config_maps = Vec::new();
    let mut parts = Vec::new();
    for stage in 0..valid.plan.stages.len() {
        let of_stage: Vec<&WorkerSpec> = specs.iter().filter(|s| s.shard.stage == stage).collect();
        let maps = deployment.specifications(stage, &of_stage)?;
        parts.push(maps.iter().map(|m| m.name.clone()).collect::<Vec<_>>());
        config_maps.extend(maps);
    }
    let stateful_sets = (0..valid.replicas())
        .flat_map(|replica| (0..parts.len()).map(move |stage| (replica, stage)))
        .map(|(replica, stage)| deployment.stateful_set(replica, stage, &parts[stage]))
        .collect();
    Ok(Resources {
        config_maps,
        worker_service: deployment.worker_service(),
        network_policy: deployment.network_policy(),
        disruption_budget: deployment.disruption_budget(),
        service: deployment.service(),
        stateful_sets,
    })
}

struct Build<'a> {
    valid: &'a ValidatedDeployment,
    owner: OwnerReference,
    settings: &'a Settings,
}

impl Build<'_> {
    /// Labels of an object of `component`, with `more`.
    fn labels(&self, component: &str, more: &[(&str, &str)]) -> Value {
        let mut labels = names::labels(component);
        labels[DEPLOYMENT] = self.valid.name.as_str().into();
        for (key, value) in more {
            labels[*key] = (*value).into();
        }
        labels
    }

    /// What selects this deployment's workers.
    fn workers(&self) -> Value {
        json!({ "app.kubernetes.io/component": "worker", DEPLOYMENT: self.valid.name })
    }

    fn object(&self, (version, kind): (&str, &str), name: String, labels: Value, rest: Value) -> Object {
        owned((version, kind), name, labels, std::slice::from_ref(&self.owner), rest)
    }

    /// The specifications of a stage's ranks, packed into as few ConfigMaps as hold them.
    fn specifications(&self, stage: usize, specs: &[&WorkerSpec]) -> Result<Vec<Object>, TooLarge> {
        let mut parts: Vec<(usize, Map<String, Value>)> = vec![(0, Map::new())];
        for spec in specs {
            let text = serde_json::to_string(spec).unwrap_or_else(|error| unreachable!("a specification is plain data: {error}"));
            let (rank, bytes) = (spec.shard.rank, text.len());
            if bytes > PART {
                return Err(TooLarge { stage, rank, bytes });
            }
            if parts.last().is_some_and(|(used, _)| used + bytes > PART) {
                parts.push((0, Map::new()));
            }
            if let Some((used, data)) = parts.last_mut() {
                *used += bytes;
                data.insert(format!("rank-{rank}.json"), text.into());
            }
        }
        let valid = self.valid;
        let map = |(part, (_, data)): (usize, (usize, Map<String, Value>))| {
            let name = names::specification(&valid.name, &valid.uid, &valid.revision, stage, part);
            let labels = self.labels("worker", &[(REVISION, &valid.revision), (STAGE, &stage.to_string())]);
            self.object(("v1", "ConfigMap"), name, labels, json!({ "data": data, "immutable": true }))
        };
        Ok(parts.into_iter().enumerate().map(map).collect())
    }

    /// The workers of one stage of one replica: the ordinal is the rank.
    fn stateful_set(&self, replica: u32, stage: usize, parts: &[String]) -> Object {
        let (valid, settings) = (self.valid, self.settings);
        let shards = &valid.plan.stages[stage].shards;
        let replica_name = valid.replica_name(replica);
        let identity = [(REVISION, valid.revision.as_str()), (REPLICA, &replica.to_string()), (STAGE, &stage.to_string())];
        let labels = self.labels("worker", &identity);
        let selector = json!({ DEPLOYMENT: valid.name, REVISION: valid.revision, REPLICA: replica.to_string(), STAGE: stage.to_string() });
        let need = shards.iter().map(|s| s.weight_bytes + s.kv_bytes).max().unwrap_or(0) + OVERHEAD;
        let mut resources = json!({ "requests": { "cpu": settings.worker_cpu, "memory": need.to_string() } });
        if let Some(limit) = valid.manifest.spec().workers.resources.limits.memory {
            resources["limits"] = json!({ "memory": limit.0.to_string() });
            resources["requests"]["memory"] = need.min(limit.0).to_string().into();
        }
        let mut env = vec![
            json!({ "name": "RANK", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": format!("metadata.labels['{}']", names::RANK) } } }),
            json!({ "name": "POD_IP", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "status.podIP" } } }),
            pod::token("SKEIN_WORKER_TOKEN", names::WORKER_TOKEN),
        ];
        if let Some(endpoint) = &settings.hf_endpoint {
            env.push(json!({ "name": "HF_ENDPOINT", "value": endpoint }));
        }
        let sources: Vec<Value> = parts.iter().map(|name| json!({ "configMap": { "name": name } })).collect();
        let container = json!({
            "name": "worker",
            "image": settings.image,
            "imagePullPolicy": settings.image_pull_policy,
            "command": ["/skein"],
            "args": [
                "worker", "-v", "--log-format", "json",
                "--spec", format!("{SPEC}/rank-$(RANK).json"),
                "--replica", replica_name,
                "--threads", "auto",
                "--listen", format!("$(POD_IP):{WORKER_PORT}"),
                "--cache", CACHE,
            ],
            "env": env,
            "ports": [{ "name": "worker", "containerPort": WORKER_PORT, "protocol": "TCP" }],
            "readinessProbe": { "tcpSocket": { "port": "worker" }, "periodSeconds": 5 },
            "resources": resources,
            "securityContext": restricted(),
            "volumeMounts": [volume_mount("spec", SPEC, true), volume_mount("cache", CACHE, false)],
        });
        let mut template = pod::template(names::WORKER_ACCOUNT, WORKER_GRACE, container);
        template["volumes"] = json!([{ "name": "spec", "projected": { "sources": sources } }, { "name": "cache", "emptyDir": {} }]);
        let rest = json!({ "spec": {
            "replicas": shards.len(),
            "serviceName": names::workers(&valid.name),
            "podManagementPolicy": "Parallel",
            // Workers are replaced by the operator's decision alone, never because a template changed.
            "updateStrategy": { "type": "OnDelete" },
            "selector": { "matchLabels": selector },
            "template": { "metadata": { "labels": labels.clone() }, "spec": template },
        }});
        self.object(("apps/v1", "StatefulSet"), names::stateful_set(&replica_name, stage), labels, rest)
    }

    /// Workers find each other while they are not ready: that is when they meet.
    fn worker_service(&self) -> Object {
        let spec = json!({
            "clusterIP": "None",
            "publishNotReadyAddresses": true,
            "selector": self.workers(),
            "ports": [{ "name": "worker", "port": WORKER_PORT, "targetPort": "worker", "protocol": "TCP" }],
        });
        self.object(("v1", "Service"), names::workers(&self.valid.name), self.labels("worker", &[]), json!({ "spec": spec }))
    }

    /// Routers reach the worker's port; workers of the deployment reach each other on any, since ranks meet on ports they choose.
    fn network_policy(&self) -> Object {
        let spec = json!({
            "podSelector": { "matchLabels": self.workers() },
            "policyTypes": ["Ingress"],
            "ingress": [
                { "from": [{ "podSelector": { "matchLabels": pool::selector() } }], "ports": [{ "port": WORKER_PORT, "protocol": "TCP" }] },
                { "from": [{ "podSelector": { "matchLabels": self.workers() } }] },
            ],
        });
        self.object(
            ("networking.k8s.io/v1", "NetworkPolicy"),
            names::workers(&self.valid.name),
            self.labels("worker", &[]),
            json!({ "spec": spec }),
        )
    }

    fn disruption_budget(&self) -> Object {
        let spec = json!({ "maxUnavailable": 1, "selector": { "matchLabels": self.workers() } });
        self.object(
            ("policy/v1", "PodDisruptionBudget"),
            names::workers(&self.valid.name),
            self.labels("worker", &[]),
            json!({ "spec": spec }),
        )
    }

    /// The deployment's own address, which is the pool's.
    fn service(&self) -> Object {
        self.object(("v1", "Service"), self.valid.name.clone(), self.labels("router", &[]), json!({ "spec": router_service() }))
    }
}

/// A service in front of the namespace's pool.
fn router_service() -> Value {
    json!({
        "type": "ClusterIP",
        "selector": pool::selector(),
        "ports": [
            { "name": "http", "port": SERVICE_PORT, "targetPort": "http", "protocol": "TCP", "appProtocol": "http" },
            { "name": "grpc", "port": ROUTER_PORTS.1, "targetPort": "grpc", "protocol": "TCP", "appProtocol": "kubernetes.io/h2c" },
        ],
    })
}

/// An object with its owners.
fn owned((version, kind): (&str, &str), name: String, labels: Value, owners: &[OwnerReference], rest: Value) -> Object {
    let metadata = json!({ "name": name, "labels": labels, "ownerReferences": owners });
    let mut body = json!({ "apiVersion": version, "kind": kind, "metadata": metadata });
    if let (Some(body), Value::Object(rest)) = (body.as_object_mut(), rest) {
        body.extend(rest);
    }
    Object { name, body }
}

/// Addresses of a deployment's service, by protocol.
pub fn urls(name: &str, namespace: &str) -> [(&'static str, String); 2] {
    let host = format!("{name}.{namespace}");
    [("http", format!("http://{host}")), ("grpc", format!("http://{host}:{}", ROUTER_PORTS.1))]
}
