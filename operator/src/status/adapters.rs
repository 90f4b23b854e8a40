//! What is said of adapters: each for itself, and all of them as a condition.

use super::{Value, View};
use crate::{
    fleet::Presence,
    resource::{AdapterStatus, LoadPhase, ReplicaPhase, ReplicaStatus},
};

/// Every adapter of the spec.
pub(super) fn states(view: &View<'_>, replicas: &[ReplicaStatus]) -> Vec<AdapterStatus> {
    let answering: Vec<&str> = replicas.iter().filter(|r| r.phase == ReplicaPhase::Ready).map(|r| r.name.as_str()).collect();
    let state = |(name, source): &(String, Result<_, String>)| {
        let (state, message) = match source {
            Err(why) => (LoadPhase::Failed, why.clone()),
            Ok(plan::adapter::AdapterSource { numerics, .. }) => presence(view, &answering, numerics),
        };
        AdapterStatus { name: name.clone(), state, message }
    };
    view.valid.adapters.iter().map(state).collect()
}

/// How an adapter is doing on the replicas that answer.
fn presence(view: &View<'_>, answering: &[&str], numerics: &str) -> (LoadPhase, String) {
    let said = |replica: &&str| view.standing.load.replicas.get(*replica).and_then(|said| said.adapters.get(numerics));
    let failed = answering.iter().find_map(|replica| match said(replica) {
        Some(Presence { ready: false, failure: Some(why) }) => Some(format!("{replica}: {why}")),
        _ => None,
    });
    if let Some(message) = failed {
        return (LoadPhase::Failed, message);
    }
    let ready = answering.iter().filter(|replica| said(replica).is_some_and(|p| p.ready)).count();
    let message = format!("{ready} of {} replicas that answer have it", answering.len());
    let state = if ready > 0 && ready == answering.len() { LoadPhase::Ready } else { LoadPhase::Loading };
    (state, message)
}

/// That an adapter cannot be used, where one cannot.
pub(super) fn degraded(adapters: &[AdapterStatus]) -> Option<Value> {
    let failed = adapters.iter().find(|a| a.state == LoadPhase::Failed)?;
    Some((true, "AdapterFailed", format!("adapter {}: {}", failed.name, failed.message)))
}
