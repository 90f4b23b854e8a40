//! What is kept of objects: what is looked at, and no more.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, StatefulSet, StatefulSetSpec},
        core::v1::{Container, ContainerState, ContainerStatus, Pod, PodSpec, PodStatus, PodTemplateSpec},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{names::DRAINING, revision::Revision};

/// Conditions of a pod that are looked at.
const CONDITIONS: [&str; 2] = ["PodScheduled", "Ready"];
/// Labels that say the same of every object.
const EVERYWHERE: [&str; 2] = ["app.kubernetes.io/part-of", "app.kubernetes.io/managed-by"];

/// Names, labels and times; not who wrote which field, nor the version, which changes with every status.
fn metadata(of: ObjectMeta) -> ObjectMeta {
    let labels = of.labels.map(|labels| labels.into_iter().filter(|(key, _)| !EVERYWHERE.contains(&key.as_str())).collect());
    let draining = of.annotations.and_then(|mut all| Some(BTreeMap::from([all.remove_entry(DRAINING)?])));
    ObjectMeta {
        name: of.name,
        namespace: of.namespace,
        uid: of.uid,
        labels,
        annotations: draining,
        creation_timestamp: of.creation_timestamp,
        deletion_timestamp: of.deletion_timestamp,
        ..ObjectMeta::default()
    }
}

/// Where a pod runs, whether it does, and why not.
pub(super) fn pod(of: Pod) -> Pod {
    let spec = of.spec.map(|spec| PodSpec { node_name: spec.node_name, ..PodSpec::default() });
    let status = of.status.map(|status| PodStatus {
        phase: status.phase,
        pod_ip: status.pod_ip,
        conditions: status.conditions.map(|all| all.into_iter().filter(|c| CONDITIONS.contains(&c.type_.as_str())).collect()),
        container_statuses: status.container_statuses.map(|all| all.into_iter().map(container).collect()),
        ..PodStatus::default()
    });
    Pod { metadata: metadata(of.metadata), spec, status }
}

fn container(of: ContainerStatus) -> ContainerStatus {
    let state = |state: ContainerState| ContainerState { running: None, ..state };
    ContainerStatus {
        name: of.name,
        ready: of.ready,
        restart_count: of.restart_count,
        state: of.state.map(state),
        last_state: of.last_state.map(state),
        ..ContainerStatus::default()
    }
}

/// Which replica and stage a StatefulSet is of, and where its workers were told to find a router.
pub(super) fn stateful_set(of: StatefulSet) -> StatefulSet {
    let containers = of.spec.and_then(|spec| spec.template.spec).map(|spec| spec.containers).unwrap_or_default();
    let args = containers.into_iter().next().and_then(|container| container.args).unwrap_or_default();
    let announce = args.iter().position(|arg| arg == "--announce").map(|at| args.into_iter().skip(at).take(2).collect());
    let container = Container { args: announce, ..Container::default() };
    let pod = PodSpec { containers: vec![container], ..PodSpec::default() };
    let template = PodTemplateSpec { spec: Some(pod), ..PodTemplateSpec::default() };
    StatefulSet { metadata: metadata(of.metadata), spec: Some(StatefulSetSpec { template, ..StatefulSetSpec::default() }), status: None }
}

/// A revision as it is written down. Its data stays text: as a tree it would take ten times the memory.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptRevision {
    metadata: ObjectMeta,
    number: i64,
    data: Option<Box<str>>,
}

impl KeptRevision {
    /// Of the object.
    pub(crate) fn of(object: ControllerRevision) -> Self {
        let owners = object.metadata.owner_references.clone();
        Self {
            metadata: ObjectMeta { owner_references: owners, ..metadata(object.metadata) },
            number: object.revision,
            data: object.data.map(|data| data.0.to_string().into_boxed_str()),
        }
    }

    /// Whether it is of the deployment with this unique id: one that was deleted with a deployment of the same name is not the next one's.
    pub fn is_of(&self, uid: &str) -> bool {
        self.metadata.owner_references.iter().flatten().any(|owner| owner.uid == uid)
    }

    /// The revision, where this process understands it.
    pub fn read(&self) -> Option<Revision> {
        Revision::restore(&self.metadata, self.number, serde_json::from_str(self.data.as_ref()?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_wrote_what_is_not_kept_and_what_is_looked_at_is() {
        let object = json!({
            "metadata": {
                "name": "p", "namespace": "n", "uid": "u", "resourceVersion": "7", "labels": { "a": "b", "app.kubernetes.io/part-of": "skein" },
                "annotations": { "other": "x", DRAINING: "5" }, "managedFields": [{ "manager": "kubelet" }],
            },
            "spec": { "nodeName": "one", "containers": [{ "name": "worker", "image": "i", "args": ["worker", "--announce", "http://r", "--more"] }] },
            "status": {
                "phase": "Running", "podIP": "10.0.0.1", "hostIP": "10.0.0.2",
                "conditions": [{ "type": "Ready", "status": "True" }, { "type": "Initialized", "status": "True" }],
                "containerStatuses": [{ "name": "worker", "ready": false, "restartCount": 2, "image": "i", "imageID": "",
                    "state": { "waiting": { "reason": "CrashLoopBackOff" } }, "lastState": { "terminated": { "exitCode": 2, "message": "m" } } }],
            },
        });
        let kept = pod(serde_json::from_value(object.clone()).expect("a pod"));
        let (meta, status) = (&kept.metadata, kept.status.as_ref().expect("a status"));
        assert_eq!((meta.resource_version.as_ref(), meta.managed_fields.as_ref()), (None, None));
        assert_eq!(meta.labels, Some(BTreeMap::from([("a".to_owned(), "b".to_owned())])));
        assert_eq!(meta.annotations, Some(BTreeMap::from([(DRAINING.to_owned(), "5".to_owned())])));
        assert_eq!((kept.spec.as_ref().and_then(|s| s.node_name.as_deref()), status.pod_ip.as_deref()), (Some("one"), Some("10.0.0.1")));
        assert_eq!(status.conditions.as_ref().map(Vec::len), Some(1));
        let container = &status.container_statuses.as_ref().expect("a container")[0];
        assert_eq!((container.restart_count, container.image.as_str()), (2, ""));
        assert_eq!(container.last_state.as_ref().and_then(|s| s.terminated.as_ref()?.message.as_deref()), Some("m"));

        let set = json!({ "metadata": object["metadata"], "spec": { "serviceName": "s", "selector": {}, "template": { "spec": object["spec"] } } });
        let kept = stateful_set(serde_json::from_value(set).expect("a set"));
        assert_eq!(crate::observe::meeting(&[kept]).as_deref(), Some("http://r"));
    }
}
