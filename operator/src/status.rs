//! Fifth step: what came of it, as status. Computed from what was applied and what stands; pure but for the last function.

mod adapters;
mod drafts;
mod news;
mod replicas;

use std::collections::BTreeMap;

use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use plan::{
    manifest::API_VERSION,
    shard::{ExecutionPlan, Shard},
};
use serde_json::json;

pub use self::news::news;
use self::replicas::{degraded, progressing, replicas_ready, scheduled, weights_ready};
use crate::{
    autoscale::Decision,
    build::{place::explain_cache, urls},
    cache,
    dereference::Standing,
    names::{self, MANAGER},
    resource::{
        Address, Condition, DraftPlanStatus, ModelDeployment, ModelStatus, PlanStatus, ReplicaPhase, ReplicaStatus, RevisionStatus,
        RoutersStatus, StageStatus, Status, now,
    },
    revision::Revision,
    rollout::{Goal, Plan, Progress},
    scaling::{self, SCALING_ACTIVE},
    validate::{Rejection, ValidatedDeployment},
};

/// The spec was understood and can be planned.
pub const ACCEPTED: &str = "Accepted";
/// The model's header was read.
pub const MODEL_RESOLVED: &str = "ModelResolved";
/// Every worker has a node.
pub const SCHEDULED: &str = "Scheduled";
/// Weights are there, and are those that were asked for.
pub const WEIGHTS_READY: &str = "WeightsReady";
/// A token came out of every replica.
pub const REPLICAS_READY: &str = "ReplicasReady";
/// A router reports.
pub const ROUTER_READY: &str = "RouterReady";
/// Requests are answered.
pub const AVAILABLE: &str = "Available";
/// Everything above.
pub const READY: &str = "Ready";
/// The spec's revision takes over, or has.
pub const PROGRESSING: &str = "Progressing";
/// A replica that answered does not.
pub const DEGRADED: &str = "Degraded";

/// Conditions that `Ready` sums up, in the order in which they come true.
const SUMMED: [&str; 7] = [ACCEPTED, MODEL_RESOLVED, SCHEDULED, WEIGHTS_READY, REPLICAS_READY, ROUTER_READY, AVAILABLE];
/// Every reason of every condition but `Ready`, whose reason is that of the first condition which is not true. Documentation and alerts go by
/// these names: a reason that is not listed is refused where a program is built with assertions, and one that no test reaches fails the tests.
pub const REASONS: [(&str, &[&str]); 10] = [
    (ACCEPTED, &["Accepted", "InvalidSpec", "NameTaken", "HostPathForbidden", "PlanInfeasible", "UnsupportedArchitecture"]),
    (MODEL_RESOLVED, &["Resolved", "Resolving", "NotFound", "Unauthorized", "DigestMismatch", "SourceUnreachable"]),
    (SCHEDULED, &["AllReplicasScheduled", "InsufficientCapacity", "GangPending", "Unschedulable"]),
    (WEIGHTS_READY, &["Ready", "Downloading", "DownloadFailed", "InsufficientDisk", "VerificationFailed"]),
    (REPLICAS_READY, &["AllReady", "Starting", "ImagePullFailed", "LoadingWeights", "StageFailed", "CrashLooping"]),
    (ROUTER_READY, &["Ready", "Deploying", "NoEndpoints", "PortConflict"]),
    (AVAILABLE, &["MinimumReplicasAvailable", "Unavailable", "ScaledToZero"]),
    (PROGRESSING, &["NewRevision", "RollingOut", "Paused", "ProgressDeadlineExceeded", "RolloutComplete"]),
    (DEGRADED, &["AsExpected", "StageRecovering", "ReplicaUnavailable", "AdapterFailed", "DraftFailed"]),
    (SCALING_ACTIVE, &["ValidMetrics", "MetricsStale", "AtMax", "AtZero", "ExternallyManaged", "Disabled"]),
];

/// Whether a condition may have a reason.
fn is_listed(kind: &str, reason: &str) -> bool {
    let summed = kind == READY && ["Ready", "Starting"].contains(&reason);
    let of = |(condition, reasons): &(&str, &[&str])| {
        let counts = *condition == kind || kind == READY && SUMMED.contains(condition);
        counts && reasons.contains(&reason)
    };
    summed || REASONS.iter().any(of)
}

/// Most replicas listed.
const LISTED: usize = 64;
/// Most revisions listed.
const REVISIONS: usize = 10;

/// One condition's value: true or not, reason, message.
type Value = (bool, &'static str, String);

/// What a status is computed from, once objects stand.
pub struct View<'a> {
    /// The spec, valid.
    pub valid: &'a ValidatedDeployment,
    /// Its revision.
    pub revision: &'a Revision,
    /// Names that had to be passed over.
    pub collisions: u32,
    /// Every revision that is written down.
    pub revisions: &'a BTreeMap<&'a str, &'a Revision>,
    /// What is wanted.
    pub goal: &'a Goal,
    /// What was done.
    pub plan: &'a Plan,
    /// What stands.
    pub standing: &'a Standing,
    /// Which routers serve it, where they are its own, or were.
    pub routers: Option<RoutersStatus>,
    /// A replica that was taken back and is not there now, and what it misses.
    pub shortage: Option<(String, String)>,
}

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
    // What is not known yet is not wrong.
    let truth = if rejection.reason == "Resolving" { "Unknown" } else { "False" };
    put(&mut status, object, rejection.condition, truth, rejection.reason, rejection.message.clone());
    summarize(&mut status, object);
    status
}

/// Status of a deployment that is planned, and of which nothing was built yet.
pub fn planned(object: &ModelDeployment, valid: &ValidatedDeployment, revision: &Revision, collisions: u32) -> Status {
    let mut status = begin(object);
    status.update_revision = Some(revision.name.clone());
    status.current_revision.get_or_insert_with(|| revision.name.clone());
    status.collision_count = collisions;
    status.desired_replicas = valid.replicas();
    status.model = Some(model(valid));
    status.plan = Some(plan(valid));
    let name = &valid.manifest.spec().model.uri;
    set(&mut status, object, ACCEPTED, (true, "Accepted", format!("planned: {}", valid.plan.message)));
    set(&mut status, object, MODEL_RESOLVED, (true, "Resolved", format!("the header of {name} was read")));
    summarize(&mut status, object);
    status
}

/// The status of a deployment whose objects could not all be written.
pub fn failed(mut status: Status, object: &ModelDeployment, reason: Option<&'static str>, message: &str) -> Status {
    if let Some(reason) = reason {
        set(&mut status, object, ROUTER_READY, (false, reason, message.to_owned()));
    }
    summarize(&mut status, object);
    status
}

/// Status of a deployment whose objects stand.
pub fn applied(object: &ModelDeployment, view: &View<'_>) -> Status {
    let View { valid, revision, goal, plan, standing, .. } = view;
    let mut status = planned(object, valid, revision, view.collisions);
    let replicas: Vec<ReplicaStatus> = replicas::states(object, view);
    let live = || replicas.iter().filter(|r| r.phase != ReplicaPhase::Draining);
    let ready = live().filter(|r| r.phase == ReplicaPhase::Ready).count() as u32;
    status.desired_replicas = goal.replicas;
    status.replicas = replicas.len() as u32;
    status.updated_replicas = live().filter(|r| r.revision == revision.name).count() as u32;
    status.ready_replicas = ready;
    status.available_replicas = if standing.load.open > 0 { ready } else { 0 };
    status.revisions = revisions(view, &replicas);
    if plan.progress == Progress::Complete {
        status.current_revision = Some(revision.name.clone());
    }
    let addresses = urls(&valid.name, &valid.namespace);
    status.url = addresses.first().map(|(_, url)| url.clone());
    status.addresses = addresses.into_iter().map(|(name, url)| Address { name: name.to_owned(), url }).collect();
    // Where as many answer as are wanted, one that is being made beside them stands in nobody's way.
    let missing = replicas::missing(object, view, &replicas);
    status.cache = replicas::cache(object, view, status.cache);
    set(&mut status, object, SCHEDULED, scheduled(view, &missing));
    let weights = weights_ready(&missing, status.cache.as_ref());
    set(&mut status, object, WEIGHTS_READY, explained(valid, weights));
    set(&mut status, object, REPLICAS_READY, explained(valid, replicas_ready((ready, goal.replicas), &missing)));
    status.routers.clone_from(&view.routers);
    let whose = if view.routers.as_ref().is_some_and(|r| r.dedicated) { "its own" } else { "the namespace's" };
    let routers = match (standing.load.routers, standing.load.open) {
        (0, _) => (false, "Deploying", format!("none of {whose} routers reports yet")),
        (_, 0) => (false, "NoEndpoints", format!("{whose} routers report, but no pod of them is ready, so services lead nowhere")),
        // How many is not said: a router that is silent for a moment is no news of every deployment.
        _ => (true, "Ready", format!("{whose} routers report")),
    };
    set(&mut status, object, ROUTER_READY, routers);
    let available = match (goal.replicas, status.available_replicas) {
        (0, _) if valid.manifest.spec().suspend => {
            (false, "ScaledToZero", "the deployment is suspended; set spec.suspend to false".to_owned())
        }
        (0, _) if scaling::wakes(object) => {
            (true, "ScaledToZero", "there are no replicas while there is no request; the next one wakes it".to_owned())
        }
        (0, _) => (false, "ScaledToZero", "no replicas are wanted; raise spec.replicas".to_owned()),
        (_, 0) => (false, "Unavailable", "no replica answers".to_owned()),
        (wanted, n) => (true, "MinimumReplicasAvailable", format!("{n} of {wanted} replicas answer")),
    };
    set(&mut status, object, AVAILABLE, available);
    let (truth, reason, message) = progressing(object, view, &replicas);
    put(&mut status, object, PROGRESSING, truth, reason, message);
    status.adapters = adapters::states(view, &replicas);
    let beside = || adapters::degraded(&status.adapters).or_else(|| drafts::degraded(&replicas));
    let degraded = degraded(view, &replicas).or_else(beside);
    let degraded = degraded.unwrap_or_else(|| (false, "AsExpected", "every replica that answered does".to_owned()));
    set(&mut status, object, DEGRADED, degraded);
    status.replica_states = replicas.into_iter().take(LISTED).collect();
    summarize(&mut status, object);
    status
}

/// What pods say of the folders that they are given, in words for those who see claims and nodes.
fn explained(valid: &ValidatedDeployment, (truth, reason, said): Value) -> Value {
    let said = valid.place.as_ref().map_or_else(|| said.clone(), |place| place.explain(&said));
    let said = valid.node_cache.as_ref().map_or_else(|| said.clone(), |folder| explain_cache(folder, &said));
    // A pod whose node lacks a folder waits, and says so in its events alone.
    let folders = valid.node_folders();
    let waits = reason == "Starting" && !folders.is_empty();
    (truth, reason, if waits { format!("{said}; their nodes must have {}", folders.join(" and ")) } else { said })
}

/// The latest revisions that are written down, and how many replicas each has.
fn revisions(view: &View<'_>, replicas: &[ReplicaStatus]) -> Vec<RevisionStatus> {
    let mut all: Vec<&&Revision> = view.revisions.values().collect();
    all.sort_by_key(|r| std::cmp::Reverse(r.number));
    let of = |name: &str| replicas.iter().filter(|r| r.revision == name).count() as u32;
    all.into_iter().take(REVISIONS).map(|r| RevisionStatus { name: r.name.clone(), replicas: of(&r.name) }).collect()
}

/// Adds what autoscaling decided, or that it decides nothing, to the status of a deployment whose objects stand.
pub fn scaled(status: &mut Status, object: &ModelDeployment, valid: &ValidatedDeployment, decision: Option<&Decision>) {
    let note = scaling::note(status, object, &valid.manifest.spec().autoscaling, decision, &now());
    set(status, object, SCALING_ACTIVE, note);
}

/// The old status as the start of the next, for this generation.
fn begin(object: &ModelDeployment) -> Status {
    let mut status = object.status.clone().unwrap_or_default();
    status.observed_generation = object.generation();
    status.selector = names::scale_selector(object.name());
    status.desired_replicas = match object.spec["suspend"].as_bool() {
        Some(true) => 0,
        _ => scaling::wanted(object),
    };
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

fn plan(valid: &ValidatedDeployment) -> PlanStatus {
    let plan = &valid.plan;
    let stage = |(index, stage): (usize, &plan::shard::Stage)| StageStatus {
        index: index as u32,
        first_layer: stage.layers.start as u32,
        last_layer: stage.layers.end.saturating_sub(1) as u32,
        ranks: stage.shards.len() as u32,
        weight_bytes: stage.shards.iter().map(|s| s.weight_bytes).max().unwrap_or(0),
        kv_bytes: stage.shards.iter().map(|s| s.kv_bytes).max().unwrap_or(0),
    };
    let fullest = |plan: &ExecutionPlan, bytes: fn(&Shard) -> u64| plan.stages.iter().flat_map(|s| &s.shards).map(bytes).max().unwrap_or(0);
    let draft = valid.draft.as_ref().map(|draft| DraftPlanStatus {
        weight_bytes: fullest(&draft.plan, |s| s.weight_bytes),
        kv_bytes: fullest(&draft.plan, |s| s.kv_bytes),
        context_tokens: draft.plan.max_context as u64,
        cost: draft.fleet.cost,
    });
    PlanStatus { stages: plan.stages.iter().enumerate().map(stage).collect(), draft, fits: plan.fits, message: plan.message.clone() }
}

fn set(status: &mut Status, object: &ModelDeployment, kind: &str, (truth, reason, message): (bool, &str, String)) {
    put(status, object, kind, if truth { "True" } else { "False" }, reason, message);
}

fn set_unknown(status: &mut Status, object: &ModelDeployment, kind: &str, reason: &str, message: String) {
    put(status, object, kind, "Unknown", reason, message);
}

/// Sets a condition; its time changes with its status alone.
fn put(status: &mut Status, object: &ModelDeployment, kind: &str, truth: &str, reason: &str, message: String) {
    debug_assert!(is_listed(kind, reason), "{kind} has no reason {reason}: it is to be listed, and reached by a test");
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

/// Writes a status, unless it stands already; the version that it makes of the deployment.
///
/// # Errors
/// When the API server refuses, or does not answer.
pub async fn update_status(client: &Client, object: &ModelDeployment, status: &Status) -> Result<Option<u64>, kube::Error> {
    if object.status.as_ref() == Some(status) {
        return Ok(None);
    }
    let body = json!({ "apiVersion": API_VERSION, "kind": plan::manifest::KIND, "metadata": { "name": object.name() }, "status": status });
    let api = Api::<ModelDeployment>::namespaced(client.clone(), object.namespace());
    let made = api.patch_status(object.name(), &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await?;
    Ok(Some(cache::version(&made.metadata)))
}

#[cfg(test)]
mod tests;
