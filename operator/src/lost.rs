//! Pods of nodes that cannot be reached. Nothing ends them there, and until they are gone no others take their place; fencing makes sure that
//! one which still runs is driven by nobody, so they are deleted by force.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::core::v1::{Node, Pod},
    jiff::Timestamp,
};

use crate::{fleet::Load, names::REPLICA_NAME};

/// Seconds that a pod may take to be gone once its grace is over.
const LATE: i64 = 5;

/// A pod, by its name and unique id.
pub type Named = (String, String);

/// Pods that may be those of a node that cannot be reached: past their grace, or not ready though nobody says so of their containers. A replica
/// that answers is left alone, whatever is said of nodes.
fn suspects<'a>(pods: &'a [Pod], load: &Load, now: Timestamp) -> impl Iterator<Item = &'a Pod> {
    let answers = |pod: &Pod| {
        let name = pod.metadata.labels.as_ref().and_then(|l| l.get(REPLICA_NAME));
        name.is_none_or(|name| load.replicas.get(name).is_some_and(|said| said.ready))
    };
    let known = load.routers > 0;
    let late = move |pod: &Pod| pod.metadata.deletion_timestamp.as_ref().is_some_and(|ends| ends.0.as_second() + LATE <= now.as_second());
    let cut_off = |pod: &Pod| {
        let Some(status) = &pod.status else { return false };
        let unready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "False");
        unready && status.container_statuses.as_ref().is_some_and(|all| !all.is_empty() && all.iter().all(|c| c.ready))
    };
    let found: Vec<&Pod> = pods.iter().filter(|p| known && !answers(p) && (late(p) || cut_off(p))).collect();
    found.into_iter()
}

/// Nodes that decide what becomes of pods.
pub fn nodes(pods: &[Pod], load: &Load, now: Timestamp) -> BTreeSet<String> {
    suspects(pods, load, now).filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect()
}

/// Pods to be deleted by force; `nodes` holds those asked for, `None` where one does not exist.
pub fn pods(pods: &[Pod], load: &Load, nodes: &BTreeMap<String, Option<Node>>, now: Timestamp) -> Vec<Named> {
    let unreachable = |node: &Option<Node>| match node {
        None => true,
        Some(node) => {
            let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
            conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "Unknown")
        }
    };
    let gone = |pod: &&Pod| pod.spec.as_ref().and_then(|s| nodes.get(s.node_name.as_ref()?)).is_some_and(unreachable);
    suspects(pods, load, now).filter(gone).filter_map(|p| Some((p.metadata.name.clone()?, p.metadata.uid.clone()?))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fleet::Said;

    fn pod(name: &str, ends: Option<&str>, ready: &str) -> Pod {
        let metadata = json!({ "name": name, "uid": name, "labels": { REPLICA_NAME: "r" }, "deletionTimestamp": ends });
        let containers = json!([{ "name": "worker", "ready": true, "restartCount": 0, "image": "", "imageID": "" }]);
        let status = json!({ "conditions": [{ "type": "Ready", "status": ready }], "containerStatuses": containers });
        serde_json::from_value(json!({ "metadata": metadata, "spec": { "nodeName": "n", "containers": [] }, "status": status }))
            .expect("a pod")
    }

    fn node(ready: &str) -> Option<Node> {
        let body: Value = json!({ "metadata": { "name": "n" }, "status": { "conditions": [{ "type": "Ready", "status": ready }] } });
        Some(serde_json::from_value(body).expect("a node"))
    }

    #[test]
    fn pods_of_nodes_that_cannot_be_reached_are_lost() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().expect("a time");
        let load = |ready| Load { routers: 1, open: 1, replicas: [("r".to_owned(), Said { ready, ..Said::default() })].into() };
        let all = [
            pod("late", Some("2026-01-01T00:00:50Z"), "True"),
            pod("ending", Some("2026-01-01T00:00:58Z"), "True"),
            pod("cut-off", None, "False"),
            pod("well", None, "True"),
        ];
        let lost = |load: &Load, node: Option<Node>| {
            let found = pods(&all, load, &BTreeMap::from([("n".to_owned(), node)]), now);
            found.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(nodes(&all, &load(false), now), BTreeSet::from(["n".to_owned()]));
        assert_eq!(lost(&load(false), node("Unknown")), ["late", "cut-off"]);
        assert_eq!(lost(&load(false), None), ["late", "cut-off"]);
        assert!(lost(&load(false), node("True")).is_empty(), "a node that answers ends its pods itself");
        assert!(lost(&load(false), node("False")).is_empty());
        assert!(lost(&load(true), node("Unknown")).is_empty(), "a replica that answers is left alone");
        assert!(nodes(&all, &Load { routers: 0, ..load(false) }, now).is_empty(), "nobody says what answers");
    }
}
