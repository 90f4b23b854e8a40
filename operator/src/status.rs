//! Fifth step: what came of it, as status and events. Computed from what was applied and what stands; pure but for the last function.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType},
};
use plan::{manifest::API_VERSION, shard::ExecutionPlan};
use serde_json::json;

use crate::{
    build::urls,
    dereference::Standing,
    names::{self, MANAGER},
    resource::{Address, Condition, ModelDeployment, ModelStatus, PlanStatus, ReplicaPhase, ReplicaStatus, StageStatus, Status, now},
    validate::{Rejection, ValidatedDeployment},
};

/// The spec was understood and can be planned.
pub const ACCEPTED: &str = "Accepted";
/// The model's header was read.
pub const MODEL_RESOLVED: &str = "ModelResolved";
/// Every worker has a node.
pub const SCHEDULED: &str = "Scheduled";
/// A token came out of every replica.
pub const REPLICAS_READY: &str = "ReplicasReady";
/// A router reports.
pub const ROUTER_READY: &str = "RouterReady";
/// Requests are answered.
pub const AVAILABLE: &str = "Available";
/// Everything above.
pub const READY: &str = "Ready";

/// Conditions that `Ready` sums up, in the order in which they come true.
const SUMMED: [&str; 6] = [ACCEPTED, MODEL_RESOLVED, SCHEDULED, REPLICAS_READY, ROUTER_READY, AVAILABLE];
/// Most replicas listed.
const LISTED: usize = 64;
/// Restarts of a container after which it is said to crash again and again.
const RESTARTS: i32 = 3;

/// One condition's value: true or not, reason, message.
type Value<'a> = (bool, &'a str, String);

/// Status of a deployment whose model is being looked at.
pub fn resolving(object: &ModelDeployment) -> Status {
    let mut status = begin(object);
    let message = "the header of the model is being read".to_owned();
    set_unknown(&mut status, object, MODEL_RESOLVED, "Resolving", message);
    summarize(&mut status, object);
    status
}

/// Status of a deployment that is refused. What runs goes on, and stays listed.
pub fn rejected(object: &ModelDeployment, rejection: &Rejection) -> Status {
    let mut status = begin(object);
    if rejection.condition == MODEL_RESOLVED {
        set(&mut status, object, ACCEPTED, (true, "Accepted", "the spec is valid".to_owned()));
    }
    set(&mut status, object, rejection.condition, (false, rejection.reason, rejection.message.clone()));
    summarize(&mut status, object);
    status
}

/// Status of a deployment that is planned, and of which nothing was built yet.
pub fn planned(object: &ModelDeployment, valid: &ValidatedDeployment) -> Status {
    let mut status = begin(object);
    status.current_revision = Some(valid.revision.clone());
    status.model = Some(model(valid));
    status.plan = Some(plan(&valid.plan));
    let name = &valid.manifest.spec().model.uri;
    set(&mut status, object, ACCEPTED, (true, "Accepted", format!("planned: {}", valid.plan.message)));
    set(&mut status, object, MODEL_RESOLVED, (true, "Resolved", format!("the header of {name} was read")));
    summarize(&mut status, object);
    status
}

/// Status of a deployment whose objects could not all be written.
pub fn failed(object: &ModelDeployment, valid: &ValidatedDeployment, reason: Option<&'static str>, message: &str) -> Status {
    let mut status = planned(object, valid);
    if let Some(reason) = reason {
        set(&mut status, object, ROUTER_READY, (false, reason, message.to_owned()));
    }
    summarize(&mut status, object);
    status
}

/// Status of a deployment whose objects stand.
pub fn applied(object: &ModelDeployment, valid: &ValidatedDeployment, standing: &Standing, existing: usize) -> Status {
    let mut status = planned(object, valid);
    let replicas: Vec<ReplicaStatus> = (0..valid.replicas()).map(|number| replica(valid, number, standing)).collect();
    let ready = replicas.iter().filter(|r| r.phase == ReplicaPhase::Ready).count() as u32;
    status.replicas = (existing / valid.plan.stages.len().max(1)) as u32;
    status.updated_replicas = valid.replicas();
    status.ready_replicas = ready;
    status.available_replicas = if standing.load.routers > 0 { ready } else { 0 };
    let addresses = urls(&valid.name, &valid.namespace);
    status.url = addresses.first().map(|(_, url)| url.clone());
    status.addresses = addresses.into_iter().map(|(name, url)| Address { name: name.to_owned(), url }).collect();
    let pods = workers(valid, standing);
    set(&mut status, object, SCHEDULED, scheduled(&pods));
    set(&mut status, object, REPLICAS_READY, replicas_ready(&replicas, &pods));
    let routers = match standing.load.routers {
        0 => (false, "Deploying", "no router of the namespace's pool reports yet".to_owned()),
        n => (true, "Ready", format!("{n} of the namespace's routers report")),
    };
    set(&mut status, object, ROUTER_READY, routers);
    let available = match (valid.replicas(), status.available_replicas) {
        (0, _) => (false, "ScaledToZero", "no replicas are wanted; raise spec.replicas".to_owned()),
        (_, 0) => (false, "Unavailable", "no replica answers".to_owned()),
        (wanted, n) => (true, "MinimumReplicasAvailable", format!("{n} of {wanted} replicas answer")),
    };
    set(&mut status, object, AVAILABLE, available);
    status.replica_states = replicas.into_iter().take(LISTED).collect();
    summarize(&mut status, object);
    status
}

/// The old status as the start of the next, for this generation.
fn begin(object: &ModelDeployment) -> Status {
    let mut status = object.status.clone().unwrap_or_default();
    status.observed_generation = object.generation();
    status.selector = names::scale_selector(object.name());
    status.desired_replicas = object.spec["replicas"].as_u64().unwrap_or(1) as u32;
    status
}

fn model(valid: &ValidatedDeployment) -> ModelStatus {
    let (header, config) = (&valid.header, &valid.header.config);
    ModelStatus {
        format: format!("{:?}", header.format),
        architecture: format!("{:?}", config.architecture),
        layers: config.layers.len() as u32,
        parameters: header.tensors.values().map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>()).sum(),
        size_bytes: header.files.iter().map(|f| f.bytes).sum(),
        context_tokens: config.context as u64,
        digest: valid.manifest.spec().model.digest.clone(),
    }
}

fn plan(plan: &ExecutionPlan) -> PlanStatus {
    let stage = |(index, stage): (usize, &plan::shard::Stage)| StageStatus {
        index: index as u32,
        first_layer: stage.layers.start as u32,
        last_layer: stage.layers.end.saturating_sub(1) as u32,
        ranks: stage.shards.len() as u32,
        weight_bytes: stage.shards.iter().map(|s| s.weight_bytes).max().unwrap_or(0),
        kv_bytes: stage.shards.iter().map(|s| s.kv_bytes).max().unwrap_or(0),
    };
    PlanStatus { stages: plan.stages.iter().enumerate().map(stage).collect(), fits: plan.fits, message: plan.message.clone() }
}

/// The pod of each worker that is wanted, where it exists.
fn workers<'a>(valid: &ValidatedDeployment, standing: &'a Standing) -> Vec<(String, Option<&'a Pod>)> {
    let mut found = Vec::new();
    for number in 0..valid.replicas() {
        for (stage, of) in valid.plan.stages.iter().enumerate() {
            for rank in 0..of.shards.len() {
                let name = pod_name(valid, number, stage, rank);
                let pod = standing.pod(&name);
                found.push((name, pod));
            }
        }
    }
    found
}

/// Name of a worker's pod.
pub fn pod_name(valid: &ValidatedDeployment, replica: u32, stage: usize, rank: usize) -> String {
    format!("{}-{rank}", names::stateful_set(&valid.replica_name(replica), stage))
}

fn replica(valid: &ValidatedDeployment, number: u32, standing: &Standing) -> ReplicaStatus {
    let name = valid.replica_name(number);
    let prefix = format!("{name}-s");
    let running = standing.pods.iter().filter(|p| p.metadata.name.as_ref().is_some_and(|n| n.starts_with(&prefix)) && is_running(p));
    let said = standing.load.replicas.get(&name);
    let ready_workers = running.count() as u32;
    let workers: usize = valid.plan.stages.iter().map(|s| s.shards.len()).sum();
    let phase = match said {
        Some(said) if said.ready => ReplicaPhase::Ready,
        _ if ready_workers as usize == workers => ReplicaPhase::Starting,
        _ => ReplicaPhase::Pending,
    };
    let last_failure = said.filter(|s| !s.ready).and_then(|s| s.last_failure.clone());
    ReplicaStatus { name, revision: valid.revision.clone(), phase, ready_workers, workers: workers as u32, last_failure }
}

fn is_running(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    status.and_then(|s| s.container_statuses.as_ref()).is_some_and(|c| !c.is_empty() && c.iter().all(|c| c.ready))
}

/// Whether every worker has a node; which resource is missing where one has none.
fn scheduled(pods: &[(String, Option<&Pod>)]) -> Value<'static> {
    for (name, pod) in pods {
        let conditions = pod.and_then(|p| p.status.as_ref()?.conditions.as_ref());
        let refused = conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False");
        if let Some(condition) = refused {
            let message = condition.message.clone().unwrap_or_default();
            let reason = if message.contains("Insufficient") { "InsufficientCapacity" } else { "Unschedulable" };
            return (false, reason, format!("{name}: {message}"));
        }
    }
    let placed = |pod: &Option<&Pod>| pod.is_some_and(|p| p.spec.as_ref().is_some_and(|s| s.node_name.is_some()));
    match pods.iter().filter(|(_, pod)| placed(pod)).count() {
        n if n < pods.len() => (false, "GangPending", format!("{n} of {} workers have a node", pods.len())),
        n => (true, "AllReplicasScheduled", format!("{n} workers have a node")),
    }
}

/// Whether every replica answers; what stands in the way where one does not.
fn replicas_ready(replicas: &[ReplicaStatus], pods: &[(String, Option<&Pod>)]) -> Value<'static> {
    let ready = replicas.iter().filter(|r| r.phase == ReplicaPhase::Ready).count();
    let counts = format!("{ready} of {} replicas answer", replicas.len());
    if ready == replicas.len() {
        return (true, "AllReady", counts);
    }
    let containers = pods.iter().flat_map(|(name, pod)| {
        let all = pod.and_then(|p| p.status.as_ref()?.container_statuses.as_ref());
        all.into_iter().flatten().map(move |container| (name, container))
    });
    for (name, container) in containers {
        let waiting = container.state.as_ref().and_then(|s| s.waiting.as_ref());
        let why = waiting.and_then(|w| w.reason.as_deref()).unwrap_or_default();
        let detail = waiting.and_then(|w| w.message.clone()).unwrap_or_default();
        match why {
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
                return (false, "ImagePullFailed", format!("{counts}; {name}: {why}: {detail}; check the operator's --image"));
            }
            "CrashLoopBackOff" => return (false, "CrashLooping", format!("{counts}; {name} {}", ended(container))),
            _ if container.restart_count >= RESTARTS && !container.ready => {
                return (false, "CrashLooping", format!("{counts}; {name} {}", ended(container)));
            }
            _ => {}
        }
    }
    let pending = replicas.iter().find(|r| r.phase == ReplicaPhase::Pending);
    if let Some(replica) = pending {
        let message = format!("{counts}; {} of {} workers of {} run", replica.ready_workers, replica.workers, replica.name);
        return (false, "Starting", message);
    }
    match replicas.iter().find_map(|r| r.last_failure.as_ref().map(|f| (r, f))) {
        // Routers say so from the start: a worker that loads cannot open a session.
        Some((replica, failure)) => (false, "LoadingWeights", format!("{counts}; {}: {failure}", replica.name)),
        None => (false, "LoadingWeights", counts),
    }
}

/// How a container ended last.
fn ended(container: &ContainerStatus) -> String {
    let last = container.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    match last {
        Some(last) => {
            let said = last.message.as_deref().unwrap_or_default().trim();
            let said = if said.is_empty() { String::new() } else { format!(": {said}") };
            format!("ended with exit code {} ({} restarts){said}; see its log", last.exit_code, container.restart_count)
        }
        None => format!("ended ({} restarts); see its log", container.restart_count),
    }
}

fn set(status: &mut Status, object: &ModelDeployment, kind: &str, (truth, reason, message): Value<'_>) {
    put(status, object, kind, if truth { "True" } else { "False" }, reason, message);
}

fn set_unknown(status: &mut Status, object: &ModelDeployment, kind: &str, reason: &str, message: String) {
    put(status, object, kind, "Unknown", reason, message);
}

/// Sets a condition; its time changes with its status alone.
fn put(status: &mut Status, object: &ModelDeployment, kind: &str, truth: &str, reason: &str, message: String) {
    let old = status.conditions.iter().position(|c| c.kind == kind).map(|at| status.conditions.remove(at));
    let since = old.filter(|c| c.status == truth).map_or_else(now, |c| c.last_transition_time);
    let condition = Condition {
        kind: kind.to_owned(),
        status: truth.to_owned(),
        observed_generation: object.generation(),
        last_transition_time: since,
        reason: reason.to_owned(),
        message,
    };
    let order = |kind: &str| SUMMED.iter().position(|k| *k == kind).unwrap_or(SUMMED.len());
    let at = status.conditions.iter().position(|c| order(&c.kind) > order(kind)).unwrap_or(status.conditions.len());
    status.conditions.insert(at, condition);
}

/// `Ready`, from all others: its reason is that of the first which is not true.
fn summarize(status: &mut Status, object: &ModelDeployment) {
    let state = |kind: &str| status.conditions.iter().find(|c| c.kind == kind).filter(|c| c.observed_generation == object.generation());
    let value = match SUMMED.iter().find(|kind| state(kind).is_none_or(|c| c.status != "True")) {
        None => (true, "Ready".to_owned(), "a token came out of the last stage of every replica".to_owned()),
        Some(kind) => match state(kind) {
            Some(first) => (false, first.reason.clone(), first.message.clone()),
            None => (false, "Starting".to_owned(), format!("{kind} is not known yet")),
        },
    };
    set(status, object, READY, (value.0, &value.1, value.2));
}

/// What is worth an event between two statuses: type, reason, note.
pub fn news(old: Option<&Status>, new: &Status) -> Vec<Event> {
    let event = |type_, reason: &str, note: &str| Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note.chars().take(1000).collect()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    let mut events = Vec::new();
    for condition in &new.conditions {
        let before = old.and_then(|o| o.conditions.iter().find(|c| c.kind == condition.kind));
        if before.is_some_and(|b| (&b.status, &b.reason) == (&condition.status, &condition.reason)) {
            continue;
        }
        let reason = match (condition.kind.as_str(), condition.status.as_str(), condition.reason.as_str()) {
            (MODEL_RESOLVED, "True", _) => {
                events.push(event(EventType::Normal, "ModelResolved", &condition.message));
                continue;
            }
            (ACCEPTED, "False", "PlanInfeasible") => "PlanInfeasible",
            (ACCEPTED, "False", _) | (ROUTER_READY, "False", "PortConflict") => "ReconcileError",
            (MODEL_RESOLVED, "False", "DigestMismatch") => "DigestMismatch",
            (MODEL_RESOLVED, "False", _) => "DownloadFailed",
            (SCHEDULED, "False", "InsufficientCapacity" | "Unschedulable") => "InsufficientCapacity",
            (REPLICAS_READY, "False", "CrashLooping" | "ImagePullFailed") => "StageFailed",
            _ => continue,
        };
        events.push(event(EventType::Warning, reason, &condition.message));
    }
    if let Some(plan) = &new.plan
        && old.is_none_or(|o| o.current_revision != new.current_revision)
    {
        events.push(event(EventType::Normal, "PlanComputed", &plan.message));
    }
    for replica in &new.replica_states {
        let before = old.and_then(|o| o.replica_states.iter().find(|r| r.name == replica.name));
        if before.is_none() {
            events.push(event(EventType::Normal, "ReplicaCreated", &format!("{} with {} workers", replica.name, replica.workers)));
        }
        if replica.phase == ReplicaPhase::Ready && before.is_none_or(|b| b.phase != ReplicaPhase::Ready) {
            events.push(event(EventType::Normal, "ReplicaReady", &format!("a token came out of the last stage of {}", replica.name)));
        }
    }
    events
}

/// Writes a status, unless it stands already.
///
/// # Errors
/// When the API server refuses, or does not answer.
pub async fn update_status(client: &Client, object: &ModelDeployment, status: &Status) -> Result<bool, kube::Error> {
    if object.status.as_ref() == Some(status) {
        return Ok(false);
    }
    let body = json!({ "apiVersion": API_VERSION, "kind": plan::manifest::KIND, "metadata": { "name": object.name() }, "status": status });
    let api = Api::<ModelDeployment>::namespaced(client.clone(), object.namespace());
    api.patch_status(object.name(), &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await?;
    Ok(true)
}

#[cfg(test)]
mod tests;
