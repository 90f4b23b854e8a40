//! Third step: the objects of a deployment, as they are applied. Pure.

pub mod place;
pub mod pod;
pub mod pool;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use plan::{fleet::FleetDraft, manifest::CacheSpec, shard::Stage, worker::WorkerSpec};
use serde_json::{Map, Value, json};

use self::{
    pod::{CACHE, CREDENTIALS, SPEC, restricted, volume_mount, with_args, with_identity},
    pool::Routers,
};
use crate::{
    host::Folders,
    names::{self, DEPLOYMENT, DRAFT, DRAINING, REPLICA, REVISION, ROUTER_PORTS, SERVICE_PORT, STAGE, WORKER_PORT},
    resource::ModelDeployment,
    revision::{self, DraftRecord, Record, Revision, StageRecord},
    rollout::{Id, Slot},
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
    /// Folders of nodes that deployments may have, where their namespaces allow it.
    pub folders: Folders,
    /// CPU that a worker asks for.
    pub worker_cpu: String,
    /// Routers of a namespace.
    pub pool_size: u32,
    /// CPU that a router asks for.
    pub router_cpu: String,
    /// Memory that a router asks for.
    pub router_memory: String,
    /// Whether internal connections are encrypted, and each end proves its name.
    pub proven: bool,
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
    /// What is kept of the spec's revision.
    pub revision: Object,
    /// Worker specifications of the spec's revision.
    pub config_maps: Vec<Object>,
    /// Gives workers names in DNS.
    pub worker_service: Object,
    /// Who may reach workers.
    pub network_policy: Object,
    /// How many workers may be evicted at once.
    pub disruption_budget: Object,
    /// Where requests go.
    pub service: Object,
    /// One for each replica and stage, and for each replica's draft model.
    pub stateful_sets: Vec<Object>,
}

/// Where a deployment's requests and workers find routers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach<'a> {
    /// Its own routers serve it; else those of its namespace.
    pub own: bool,
    /// Where workers find a router that does not find them. It is no part of a revision, since it changes nothing about a worker.
    pub meeting: Option<&'a str>,
}

/// Data of a ConfigMap.
type Data = Map<String, Value>;

/// Most bytes of specifications in one ConfigMap, whose limit is 1 MiB with everything around them.
const PART: usize = 768 << 10;
/// Bytes that a worker needs beside weights and KV cache: code, buffers, the runtime.
const OVERHEAD: u64 = 96 << 20;
/// Longest that a worker may take to end its sessions.
const WORKER_GRACE: u32 = 10;

/// A deployment too large to be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum TooLarge {
    #[error("the specification of stage {stage} rank {rank} has {bytes} bytes, expected at most {PART}; use more stages")]
    Worker { stage: usize, rank: usize, bytes: usize },
    #[error("the specification of the draft model has {bytes} bytes, expected at most {PART}; use a smaller one")]
    Draft { bytes: usize },
}

/// Builds everything: `slots` are the replicas that are to exist, each of one of the `revisions`; `present` is the spec's. A replica of a
/// revision that is not known stays as it is.
///
/// # Errors
/// When a worker's specification does not fit into a ConfigMap.
pub fn build(
    valid: &ValidatedDeployment,
    object: &ModelDeployment,
    present: &Revision,
    revisions: &BTreeMap<&str, &Revision>,
    slots: &[Slot],
    reach: Reach<'_>,
) -> Result<Resources, TooLarge> {
    let deployment = Build { object, owner: object.owner(true), reach };
    let specs = valid.worker_specs();
    let mut config_maps = Vec::new();
    for stage in 0..valid.plan.stages.len() {
        let parts = specifications(valid, &specs, &present.name, stage)?;
        config_maps.extend(parts.into_iter().map(|(name, data)| deployment.specification(name, &present.name, &stage.to_string(), data)));
    }
    if let Some((name, data)) = draft_specification(valid, &present.name)? {
        config_maps.push(deployment.specification(name, &present.name, DRAFT, data));
    }
    let known = slots.iter().filter_map(|slot| Some((slot, &revisions.get(slot.id.revision.as_str())?.record)));
    let sets = |(slot, record): (&Slot, &Record)| {
        let stages = (0..record.stages.len()).map(|stage| deployment.stage(slot, record, stage));
        stages.chain(record.draft.as_ref().map(|draft| deployment.draft(slot, record, draft))).collect::<Vec<_>>()
    };
    Ok(Resources {
        revision: present.object(object),
        config_maps,
        worker_service: deployment.worker_service(),
        network_policy: deployment.network_policy(),
        disruption_budget: deployment.disruption_budget(),
        service: deployment.service(),
        stateful_sets: known.flat_map(|(slot, record)| sets((slot, record))).collect(),
    })
}

/// The stages of `revision`, as they are written down.
///
/// # Errors
/// When a worker's specification does not fit into a ConfigMap.
pub fn stages(valid: &ValidatedDeployment, revision: &str, settings: &Settings) -> Result<Vec<StageRecord>, TooLarge> {
    let specs = valid.worker_specs();
    let stage = |(index, stage): (usize, &Stage)| {
        let config_maps: Vec<String> = specifications(valid, &specs, revision, index)?.into_iter().map(|(name, _)| name).collect();
        let pod = with_model(worker(settings, need(stage), valid, &config_maps), valid);
        Ok(StageRecord { ranks: stage.shards.len(), config_maps, pod })
    };
    valid.plan.stages.iter().enumerate().map(stage).collect()
}

/// The draft model of `revision`, as it is written down.
///
/// # Errors
/// When its worker's specification does not fit into a ConfigMap.
pub fn draft(valid: &ValidatedDeployment, revision: &str, settings: &Settings) -> Result<Option<DraftRecord>, TooLarge> {
    let Some((draft, (name, _))) = valid.draft.as_ref().zip(draft_specification(valid, revision)?) else { return Ok(None) };
    let need = draft.plan.stages.iter().map(need).max().unwrap_or(0);
    let config_maps = vec![name];
    // It is on a server, and shown nothing.
    let pod = worker(settings, need, valid, &config_maps);
    let FleetDraft { limits, cost, .. } = draft.fleet.clone();
    Ok(Some(DraftRecord { limits, cost, worker: StageRecord { ranks: 1, config_maps, pod } }))
}

/// Bytes that the fullest worker of a stage asks for.
fn need(stage: &Stage) -> u64 {
    stage.shards.iter().map(|s| s.weight_bytes + s.kv_bytes).max().unwrap_or(0) + OVERHEAD
}

/// The specifications of a stage's ranks, packed into as few ConfigMaps as hold them: name and data of each.
fn specifications(
    valid: &ValidatedDeployment,
    specs: &[WorkerSpec],
    revision: &str,
    stage: usize,
) -> Result<Vec<(String, Data)>, TooLarge> {
    let parts = pack(specs.iter().filter(|s| s.shard.stage == stage))?;
    let name = |part: usize| names::specification(&valid.name, &valid.uid, revision, stage, part);
    Ok(parts.into_iter().enumerate().map(|(part, data)| (name(part), data)).collect())
}

/// The specification of the draft model's worker: name and data of its ConfigMap.
fn draft_specification(valid: &ValidatedDeployment, revision: &str) -> Result<Option<(String, Data)>, TooLarge> {
    let Some(spec) = valid.draft_spec() else { return Ok(None) };
    let text = text(&spec);
    if text.len() > PART {
        return Err(TooLarge::Draft { bytes: text.len() });
    }
    let data = Map::from_iter([(key(0), text.into())]);
    Ok(Some((names::draft_specification(&valid.name, &valid.uid, revision), data)))
}

fn text(spec: &WorkerSpec) -> String {
    serde_json::to_string(spec).unwrap_or_else(|error| unreachable!("a specification is plain data: {error}"))
}

/// The file that a worker of this rank reads.
fn key(rank: usize) -> String {
    format!("rank-{rank}.json")
}

/// Packs specifications into as few maps as hold them.
fn pack<'a>(specs: impl Iterator<Item = &'a WorkerSpec>) -> Result<Vec<Data>, TooLarge> {
    let mut parts: Vec<(usize, Data)> = vec![(0, Map::new())];
    for spec in specs {
        let text = text(spec);
        let (stage, rank, bytes) = (spec.shard.stage, spec.shard.rank, text.len());
        if bytes > PART {
            return Err(TooLarge::Worker { stage, rank, bytes });
        }
        if parts.last().is_some_and(|(used, _)| used + bytes > PART) {
            parts.push((0, Map::new()));
        }
        if let Some((used, data)) = parts.last_mut() {
            *used += bytes;
            data.insert(key(rank), text.into());
        }
    }
    Ok(parts.into_iter().map(|(_, data)| data).collect())
}

/// The pod of a worker, of whichever model. It is the same for every replica and rank: they tell themselves apart by their pod's labels.
fn worker(settings: &Settings, need: u64, valid: &ValidatedDeployment, config_maps: &[String]) -> Value {
    let spec = valid.manifest.spec();
    let limit = spec.workers.resources.limits.memory.map(|m| m.0);
    let mut resources = json!({ "requests": { "cpu": settings.worker_cpu, "memory": need.to_string() } });
    if let Some(limit) = limit {
        resources["limits"] = json!({ "memory": limit.to_string() });
        resources["requests"]["memory"] = need.min(limit).to_string().into();
    }
    let mut env = vec![
        pod::field("RANK", &format!("metadata.labels['{}']", names::RANK)),
        pod::field("REPLICA", &format!("metadata.labels['{}']", names::REPLICA_NAME)),
        pod::field("POD_IP", "status.podIP"),
        pod::token("SKEIN_WORKER_TOKEN", names::WORKER_TOKEN),
    ];
    if let Some(endpoint) = &settings.hf_endpoint {
        env.push(json!({ "name": "HF_ENDPOINT", "value": endpoint }));
    }
    let sources: Vec<Value> = config_maps.iter().map(|name| json!({ "configMap": { "name": name } })).collect();
    let container = json!({
        "name": "worker",
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["/skein"],
        "args": [
            "worker", "-v", "--log-format", "json",
            "--spec", format!("{SPEC}/rank-$(RANK).json"),
            "--replica", "$(REPLICA)",
            "--threads", "auto",
            "--listen", format!("$(POD_IP):{WORKER_PORT}"),
            "--cache", cache_folder(valid),
        ],
        "env": env,
        "ports": [{ "name": "worker", "containerPort": WORKER_PORT, "protocol": "TCP" }],
        "readinessProbe": { "tcpSocket": { "port": "worker" }, "periodSeconds": 5 },
        "resources": resources,
        "securityContext": restricted(),
        // A worker that fails says why in its last lines.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [volume_mount("spec", SPEC, true), volume_mount("cache", CACHE, false)],
    });
    let mut pod = pod::template(names::WORKER_ACCOUNT, WORKER_GRACE, container);
    pod::schedule(&mut pod, &spec.workers);
    pod["volumes"] = json!([{ "name": "spec", "projected": { "sources": sources } }, cache(&spec.cache, valid.node_cache.as_deref())]);
    pod
}

/// Gives a worker what it finds the model by, where that is on no server, and what its source is shown.
fn with_model(mut pod: Value, valid: &ValidatedDeployment) -> Value {
    if let Some(place) = &valid.place {
        place.mount(&mut pod);
    }
    if let Some(secret) = &valid.manifest.spec().model.credentials_secret_ref {
        pod::with_secret(&mut pod, ("credentials", CREDENTIALS), &secret.name);
    }
    pod
}

/// The volume of fetched weights; `node`: a folder of the node that it is.
fn cache(spec: &CacheSpec, node: Option<&str>) -> Value {
    match (node, &spec.pvc_name, spec.size_limit) {
        // One that is not there is not made: it would belong to root, and no worker could write to it.
        (Some(folder), ..) => json!({ "name": "cache", "hostPath": { "path": folder, "type": "Directory" } }),
        (None, Some(claim), _) => json!({ "name": "cache", "persistentVolumeClaim": { "claimName": claim } }),
        (None, None, Some(limit)) => json!({ "name": "cache", "emptyDir": { "sizeLimit": limit.0.to_string() } }),
        (None, None, None) => json!({ "name": "cache", "emptyDir": {} }),
    }
}

/// Where a worker keeps what it fetches. On a node each namespace has a folder of its own: what is found in a cache is not asked for again, so
/// whoever may fetch into one decides what others load from it, and has what they were let in for.
fn cache_folder(valid: &ValidatedDeployment) -> String {
    if valid.node_cache.is_some() { format!("{CACHE}/{}", valid.namespace) } else { CACHE.to_owned() }
}

struct Build<'a> {
    object: &'a ModelDeployment,
    owner: OwnerReference,
    reach: Reach<'a>,
}

impl Build<'_> {
    /// Labels of an object of `component`, with `more`.
    fn labels(&self, component: &str, more: &[(&str, &str)]) -> Value {
        let mut labels = names::labels(component);
        labels[DEPLOYMENT] = self.object.name().into();
        for (key, value) in more {
            labels[*key] = (*value).into();
        }
        labels
    }

    /// What selects this deployment's workers.
    fn workers(&self) -> Value {
        json!({ "app.kubernetes.io/component": "worker", DEPLOYMENT: self.object.name() })
    }

    fn object(&self, (version, kind): (&str, &str), name: String, labels: Value, rest: Value) -> Object {
        owned((version, kind), name, labels, std::slice::from_ref(&self.owner), rest)
    }

    /// A part of the specifications of a stage of a revision, or that of its draft model.
    fn specification(&self, name: String, revision: &str, stage: &str, data: Data) -> Object {
        let labels = self.labels("worker", &[(REVISION, revision), (STAGE, stage)]);
        self.object(("v1", "ConfigMap"), name, labels, json!({ "data": data, "immutable": true }))
    }

    /// The workers of one stage of one replica: the ordinal is the rank.
    fn stage(&self, slot: &Slot, record: &Record, stage: usize) -> Object {
        let replica = revision::replica_name(self.object, &slot.id);
        self.stateful_set(slot, (&replica, stage, &stage.to_string()), &record.stages[stage], record.plain)
    }

    /// The worker of the draft model of one replica: it is a replica of its own, of one stage.
    fn draft(&self, slot: &Slot, record: &Record, draft: &DraftRecord) -> Object {
        let replica = FleetDraft::name(&revision::replica_name(self.object, &slot.id));
        self.stateful_set(slot, (&replica, 0, DRAFT), &draft.worker, record.plain)
    }

    /// Workers of the stage `stage` of `replica`, which `label` stands for; `plain`: they prove no names.
    fn stateful_set(&self, slot: &Slot, (replica, stage, label): (&str, usize, &str), workers: &StageRecord, plain: bool) -> Object {
        let Id { revision, number } = &slot.id;
        let identity = [(REVISION, revision.as_str()), (REPLICA, &number.to_string()), (STAGE, label)];
        let labels = self.labels("worker", &identity);
        let mut of_pod = labels.clone();
        of_pod[names::REPLICA_NAME] = replica.into();
        let mut selector = json!({ DEPLOYMENT: self.object.name() });
        identity.iter().for_each(|(key, value)| selector[*key] = (*value).into());
        let mut pod = workers.pod.clone();
        if let Some(meeting) = self.reach.meeting {
            with_args(&mut pod["containers"][0], ["--announce", meeting]);
        }
        if !plain {
            with_identity(&mut pod, &names::identity(replica, stage));
        }
        let rest = json!({ "spec": {
            "replicas": workers.ranks,
            "serviceName": names::workers(self.object.name()),
            "podManagementPolicy": "Parallel",
            // Workers are replaced by the operator's decision alone, never because a template changed.
            "updateStrategy": { "type": "OnDelete" },
            "selector": { "matchLabels": selector },
            "template": { "metadata": { "labels": of_pod }, "spec": pod },
        }});
        let mut set = self.object(("apps/v1", "StatefulSet"), names::stateful_set(replica, stage), labels, rest);
        if let Some(since) = slot.draining {
            set.body["metadata"]["annotations"] = json!({ DRAINING: since.to_string() });
        }
        set
    }

    /// Workers find each other while they are not ready: that is when they meet.
    fn worker_service(&self) -> Object {
        let spec = json!({
            "clusterIP": "None",
            "publishNotReadyAddresses": true,
            "selector": self.workers(),
            "ports": [{ "name": "worker", "port": WORKER_PORT, "targetPort": "worker", "protocol": "TCP" }],
        });
        self.object(("v1", "Service"), names::workers(self.object.name()), self.labels("worker", &[]), json!({ "spec": spec }))
    }

    /// Routers reach the worker's port; workers of the deployment reach each other on any, since ranks meet on ports they choose.
    fn network_policy(&self) -> Object {
        let spec = json!({
            "podSelector": { "matchLabels": self.workers() },
            "policyTypes": ["Ingress"],
            "ingress": [
                { "from": [{ "podSelector": { "matchLabels": pool::any_router() } }], "ports": [{ "port": WORKER_PORT, "protocol": "TCP" }] },
                { "from": [{ "podSelector": { "matchLabels": self.workers() } }] },
            ],
        });
        self.object(
            ("networking.k8s.io/v1", "NetworkPolicy"),
            names::workers(self.object.name()),
            self.labels("worker", &[]),
            json!({ "spec": spec }),
        )
    }

    fn disruption_budget(&self) -> Object {
        // A replica answers without its draft model too.
        let of_stages = json!([{ "key": STAGE, "operator": "NotIn", "values": [DRAFT] }]);
        let spec = json!({ "maxUnavailable": 1, "selector": { "matchLabels": self.workers(), "matchExpressions": of_stages } });
        self.object(
            ("policy/v1", "PodDisruptionBudget"),
            names::workers(self.object.name()),
            self.labels("worker", &[]),
            json!({ "spec": spec }),
        )
    }

    /// The deployment's own address, which leads to the routers that serve it.
    fn service(&self) -> Object {
        let name = self.object.name();
        let routers = Routers { own_of: self.reach.own.then_some(name), count: 0 };
        self.object(("v1", "Service"), name.to_owned(), self.labels("router", &[]), json!({ "spec": router_service(routers) }))
    }
}

/// A service in front of routers.
fn router_service(routers: Routers<'_>) -> Value {
    json!({
        "type": "ClusterIP",
        "selector": routers.selector(),
        "ports": [
            { "name": "http", "port": SERVICE_PORT, "targetPort": "http", "protocol": "TCP", "appProtocol": "http" },
            { "name": "grpc", "port": ROUTER_PORTS.1, "targetPort": "grpc", "protocol": "TCP", "appProtocol": "kubernetes.io/h2c" },
        ],
    })
}

/// An object with its owners.
pub(crate) fn owned((version, kind): (&str, &str), name: String, labels: Value, owners: &[OwnerReference], rest: Value) -> Object {
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
