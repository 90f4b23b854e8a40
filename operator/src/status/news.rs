//! What is worth an event between two statuses.

use kube::runtime::events::{Event, EventType};

use super::{ACCEPTED, DEGRADED, MODEL_RESOLVED, PROGRESSING, REPLICAS_READY, ROUTER_READY, SCHEDULED, WEIGHTS_READY, replicas::fetched};
use crate::{
    resource::{CacheStatus, Condition, LoadPhase, ReplicaPhase, ReplicaStatus, Status},
    scaling::SCALING_ACTIVE,
};

/// Longest note that the API server takes.
const NOTE: usize = 1000;

fn event(type_: EventType, reason: &str, note: &str) -> Event {
    let note = Some(note.chars().take(NOTE).collect());
    Event { type_, reason: reason.to_owned(), note, action: "Reconcile".to_owned(), secondary: None }
}

/// The events: type, reason, note.
pub fn news(old: Option<&Status>, new: &Status) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for condition in &new.conditions {
        let before = old.and_then(|o| o.conditions.iter().find(|c| c.kind == condition.kind));
        if before.is_none_or(|b| (&b.status, &b.reason) != (&condition.status, &condition.reason)) {
            events.extend(of_condition(before, condition).map(|(type_, reason)| event(type_, reason, &condition.message)));
        }
    }
    events.extend(of_cache(old.and_then(|o| o.cache.as_ref()), new.cache.as_ref()));
    let moved = |revision: &Option<String>| revision.is_some() && *revision != new.update_revision;
    if let Some(plan) = &new.plan
        && old.is_none_or(|o| o.update_revision != new.update_revision)
    {
        events.push(event(EventType::Normal, "PlanComputed", &plan.message));
        if old.is_some_and(|o| moved(&o.update_revision)) {
            let note = format!("revision {} takes over", new.update_revision.as_deref().unwrap_or_default());
            events.push(event(EventType::Normal, "RolloutStarted", &note));
        }
    }
    if let Some(old) = old.filter(|o| o.update_revision.is_some() && o.desired_replicas != new.desired_replicas) {
        let reason = match (old.desired_replicas, new.desired_replicas) {
            (0, _) if new.autoscaling.is_some() => "ActivatedFromZero",
            (before, after) if after > before => "ScaledUp",
            _ => "ScaledDown",
        };
        let why = new.autoscaling.as_ref().and_then(|a| a.last_reason.as_deref()).map(|why| format!(": {why}")).unwrap_or_default();
        let note = format!("from {} to {} replicas{why}", old.desired_replicas, new.desired_replicas);
        events.push(event(EventType::Normal, reason, &note));
    }
    for replica in &new.replica_states {
        let before = old.and_then(|o| o.replica_states.iter().find(|r| r.name == replica.name));
        events.extend(of_replica(before, replica));
    }
    for adapter in &new.adapters {
        let before = old.and_then(|o| o.adapters.iter().find(|a| a.name == adapter.name)).map(|a| a.state);
        let note = format!("{}: {}", adapter.name, adapter.message);
        match adapter.state {
            state if before == Some(state) => {}
            LoadPhase::Ready => events.push(event(EventType::Normal, "AdapterLoaded", &note)),
            LoadPhase::Failed => events.push(event(EventType::Warning, "AdapterFailed", &note)),
            LoadPhase::Loading => {}
        }
    }
    events
}

/// What a condition's new value is called as an event, if it is one.
fn of_condition(before: Option<&Condition>, condition: &Condition) -> Option<(EventType, &'static str)> {
    let warning = |reason| Some((EventType::Warning, reason));
    match (condition.kind.as_str(), condition.status.as_str(), condition.reason.as_str()) {
        (MODEL_RESOLVED, "True", _) => Some((EventType::Normal, "ModelResolved")),
        (ACCEPTED, "False", "PlanInfeasible") => warning("PlanInfeasible"),
        (ACCEPTED, "False", _) | (ROUTER_READY, "False", "PortConflict") => warning("ReconcileError"),
        (MODEL_RESOLVED, "False", "DigestMismatch") | (WEIGHTS_READY, "False", "VerificationFailed") => warning("DigestMismatch"),
        (MODEL_RESOLVED, "False", _) | (WEIGHTS_READY, "False", "DownloadFailed" | "InsufficientDisk") => warning("DownloadFailed"),
        (SCHEDULED, "False", "InsufficientCapacity" | "Unschedulable") => warning("InsufficientCapacity"),
        (REPLICAS_READY, "False", "CrashLooping" | "ImagePullFailed") => warning("StageFailed"),
        (PROGRESSING, "False", _) => warning("RolloutStalled"),
        (PROGRESSING, "True", "RolloutComplete") if before.is_some() => Some((EventType::Normal, "RolloutCompleted")),
        (DEGRADED, "True", "ReplicaUnavailable") => warning("ReplicaRestarted"),
        // At the start there is no router yet, which is no news.
        (SCALING_ACTIVE, "False", "MetricsStale") if before.is_some_and(|b| b.status == "True") => warning("MetricsStale"),
        _ => None,
    }
}

/// That fetching begins, or is done.
fn of_cache(before: Option<&CacheStatus>, now: Option<&CacheStatus>) -> Option<Event> {
    let is_done = |cache: &CacheStatus| cache.bytes_downloaded == cache.bytes_total;
    let reason = match (before.map(is_done), now.map(is_done)?) {
        (None | Some(true), false) => "DownloadStarted",
        (None | Some(false), true) => "DownloadCompleted",
        (Some(false), false) | (Some(true), true) => return None,
    };
    Some(event(EventType::Normal, reason, &now.map(fetched).unwrap_or_default()))
}

fn of_replica(before: Option<&ReplicaStatus>, replica: &ReplicaStatus) -> Vec<Event> {
    let name = &replica.name;
    let counts = format!("{} of {} workers of {name} run", replica.ready_workers, replica.workers);
    let created = before.is_none().then(|| event(EventType::Normal, "ReplicaCreated", &format!("{name} with {} workers", replica.workers)));
    let moved = match (before.map(|b| b.phase), replica.phase) {
        (Some(ReplicaPhase::Recovering), ReplicaPhase::Ready) => {
            Some(event(EventType::Normal, "StageRecovered", &format!("{name} answers again")))
        }
        (Some(ReplicaPhase::Ready), ReplicaPhase::Ready) => None,
        (_, ReplicaPhase::Ready) => {
            Some(event(EventType::Normal, "ReplicaReady", &format!("a token came out of the last stage of {name}")))
        }
        (Some(ReplicaPhase::Ready), ReplicaPhase::Recovering) => Some(event(EventType::Warning, "StageFailed", &counts)),
        _ => None,
    };
    let draft = replica.draft.as_ref().and_then(|draft| {
        let note = || format!("the draft model of {name}: {}", draft.message);
        match draft.state {
            state if before.and_then(|b| b.draft.as_ref()).is_some_and(|before| before.state == state) => None,
            LoadPhase::Ready => Some(event(EventType::Normal, "DraftReady", &note())),
            LoadPhase::Failed => Some(event(EventType::Warning, "DraftFailed", &note())),
            LoadPhase::Loading => None,
        }
    });
    created.into_iter().chain(moved).chain(draft).collect()
}
