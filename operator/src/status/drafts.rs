//! What is said of draft models: each beside its replica, and all of them as a condition.

use plan::fleet::FleetDraft;

use super::{
    Value, View,
    replicas::{is_running, trouble_of},
};
use crate::{
    fleet::Said,
    names, observe,
    resource::{DraftStatus, LoadPhase, ReplicaPhase, ReplicaStatus},
    rollout::{Placement, Slot},
};

/// The draft model of a replica, of which routers said `said`, and which was `before`.
pub(super) fn state(view: &View<'_>, slot: &Slot, replica: &str, said: Option<&Said>, before: Option<&DraftStatus>) -> Option<DraftStatus> {
    view.revisions.get(slot.id.revision.as_str())?.record.draft.as_ref()?;
    let said = said.and_then(|said| said.draft.as_ref());
    if said.is_some_and(|said| said.ready) {
        return Some(DraftStatus { state: LoadPhase::Ready, message: "it is asked for guesses".to_owned() });
    }
    let name = names::pod(&FleetDraft::name(replica), 0, 0);
    let pod = view.standing.pod(&name);
    let of_pod = || match observe::placement(pod.into_iter()) {
        Placement::Waiting { message, .. } => Some(message),
        Placement::Settled => trouble_of(&name, pod?),
    };
    // What became of the pod tells more than that it cannot be reached.
    if let Some(message) = of_pod().or_else(|| said.and_then(|said| said.failure.clone())) {
        return Some(DraftStatus { state: LoadPhase::Failed, message });
    }
    // The router that drives it alone says so; while another takes over, nothing is known to be worse.
    if let Some(before) = before.filter(|_| said.is_none() && pod.is_some_and(is_running)) {
        return Some(before.clone());
    }
    let how = if pod.is_some_and(is_running) { "it runs, and is not asked for guesses yet" } else { "its worker does not run yet" };
    Some(DraftStatus { state: LoadPhase::Loading, message: how.to_owned() })
}

/// That a replica answers without its draft model, where one has to.
pub(super) fn degraded(replicas: &[ReplicaStatus]) -> Option<Value> {
    replicas.iter().filter(|replica| replica.phase == ReplicaPhase::Ready).find_map(|replica| {
        let draft = replica.draft.as_ref().filter(|draft| draft.state == LoadPhase::Failed)?;
        Some((true, "DraftFailed", format!("{} answers without its draft model: {}", replica.name, draft.message)))
    })
}
