//! What stands in the cluster for a deployment, replica by replica, as the planner of rollouts sees it. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::{apps::v1::StatefulSet, core::v1::Pod};

use crate::{
    dereference::Standing,
    names::{DRAFT, DRAINING, REPLICA, REVISION, STAGE},
    resource::ModelDeployment,
    revision::{Record, Revision, replica_name},
    rollout::{Id, Placement, Seen},
};

/// Which replica an object is of, by its labels.
pub fn id(labels: Option<&BTreeMap<String, String>>) -> Option<Id> {
    let labels = labels?;
    Some(Id { revision: labels.get(REVISION)?.clone(), number: labels.get(REPLICA)?.parse().ok()? })
}

/// Whether an object is of a draft model's worker, by its labels.
pub fn is_draft(labels: Option<&BTreeMap<String, String>>) -> bool {
    labels.and_then(|labels| labels.get(STAGE)).is_some_and(|stage| stage == DRAFT)
}

/// Whether a pod is that of a worker of this replica which it cannot answer without.
pub fn is_worker(pod: &Pod, of: &Id) -> bool {
    let labels = pod.metadata.labels.as_ref();
    id(labels).as_ref() == Some(of) && !is_draft(labels)
}

/// Where workers were told to find a router.
pub fn meeting(sets: &[StatefulSet]) -> Option<String> {
    let told = |set: &StatefulSet| {
        let args = set.spec.as_ref()?.template.spec.as_ref()?.containers.first()?.args.as_ref()?;
        let at = args.iter().position(|arg| arg == "--announce")?;
        args.get(at + 1).cloned()
    };
    sets.iter().find_map(told)
}

/// The replicas that stand. `wanted` is the record of the spec's revision.
pub fn replicas(object: &ModelDeployment, standing: &Standing, revisions: &BTreeMap<&str, &Revision>, wanted: &Record) -> Vec<Seen> {
    let mut found: BTreeMap<Id, Vec<&StatefulSet>> = BTreeMap::new();
    for set in &standing.stateful_sets {
        if let Some(id) = id(set.metadata.labels.as_ref()) {
            found.entry(id).or_default().push(set);
        }
    }
    let seen = |(id, sets): (Id, Vec<&StatefulSet>)| {
        let said = standing.load.replicas.get(&replica_name(object, &id));
        let record = revisions.get(id.revision.as_str()).map(|r| &r.record);
        let leaving = sets.iter().any(|s| s.metadata.deletion_timestamp.is_some());
        Seen {
            ready: !leaving && said.is_some_and(|s| s.ready),
            draining: sets.iter().filter_map(|s| s.metadata.annotations.as_ref()?.get(DRAINING)?.parse().ok()).min(),
            leaving,
            sequences: said.and_then(|s| s.sequences),
            placement: placement(standing.pods.iter().filter(|pod| is_worker(pod, &id))),
            covers: record.is_some_and(|record| record.covers(wanted)),
            id,
        }
    };
    found.into_iter().map(seen).collect()
}

/// What a kubelet, a scheduler, a worker or a router said, as a part of one line.
pub fn one_line(said: &str) -> String {
    said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(": ")
}

/// Whether these pods have nodes; pods that are not there yet are not refused one.
pub fn placement<'a>(pods: impl Iterator<Item = &'a Pod>) -> Placement {
    for pod in pods.filter(|p| p.metadata.deletion_timestamp.is_none()) {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        let refused = conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False");
        if let Some(condition) = refused {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let said = one_line(condition.message.as_deref().unwrap_or_default());
            return Placement::Waiting { short: said.contains("Insufficient"), message: format!("{name}: {said}") };
        }
    }
    Placement::Settled
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn what_others_say_is_one_line() {
        assert_eq!(one_line("cannot load\n  caused by: no such file\n\n"), "cannot load: caused by: no such file");
        assert_eq!(one_line("  as it is "), "as it is");
        assert_eq!(one_line(""), "");
    }
}
