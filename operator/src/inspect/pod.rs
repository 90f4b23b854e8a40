//! The pod that reads headers, and how far it is. Pure.

use k8s_openapi::{
    api::core::v1::{Pod, PodStatus},
    jiff::Timestamp,
};
use plan::manifest::WorkersSpec;
use serde_json::json;

use crate::{
    build::{
        Object, Settings, owned,
        place::Place,
        pod::{restricted, schedule, template},
    },
    names::{self, DEPLOYMENT},
    resource::ModelDeployment,
};

/// Names the component that it is.
const COMPONENT: &str = "inspector";
/// The account that every namespace has; the pod holds no credentials of it.
const ACCOUNT: &str = "default";
/// Seconds that a node may take over it, mounting included; the node ends it then.
const DEADLINE: i64 = 300;
/// Seconds after which a node that was to have ended it is not waited for.
const LATE: i64 = DEADLINE + 60;
/// Memory that it may use; headers are 100 MB at most.
const MEMORY: &str = "1Gi";

/// The pod for a place. Its name says all that it is: what reads another path, or runs elsewhere, is another pod.
pub(super) fn build(settings: &Settings, object: &ModelDeployment, workers: &WorkersSpec, place: &Place) -> Object {
    // Kubernetes replaces variables in arguments.
    let model = place.inside().replace('$', "$$");
    let container = json!({
        "name": COMPONENT,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["/skein"],
        "args": ["inspect", "--quiet", "--header", model],
        "resources": { "requests": { "cpu": "50m", "memory": "64Mi" }, "limits": { "memory": MEMORY } },
        "securityContext": restricted(),
        "volumeMounts": [],
    });
    let mut pod = template(ACCOUNT, 1, container);
    pod["restartPolicy"] = "Never".into();
    pod["activeDeadlineSeconds"] = DEADLINE.into();
    pod["volumes"] = json!([]);
    place.mount(&mut pod);
    schedule(&mut pod, workers);
    let name = names::inspector(object.name(), object.uid(), &pod.to_string());
    owned(("v1", "Pod"), name, labels(object), &[object.owner(true)], json!({ "spec": pod }))
}

/// Labels of the pod, and of what it said.
pub(super) fn labels(object: &ModelDeployment) -> serde_json::Value {
    let mut labels = names::labels(COMPONENT);
    labels[DEPLOYMENT] = object.name().into();
    labels
}

/// Whether a pod is one that reads headers.
pub fn is_inspector(pod: &Pod) -> bool {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get("app.kubernetes.io/component")).is_some_and(|of| of == COMPONENT)
}

/// How far a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// On its way.
    Runs(String),
    /// For something that does not come by itself.
    Waits(String),
    /// Its node should have ended it.
    Late,
    /// How it ended.
    Ended(String),
}

pub(super) fn state(pod: &Pod, now: Timestamp) -> State {
    let Some(status) = &pod.status else { return State::Runs("it was just made".to_owned()) };
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return State::Ended(ended(status));
    }
    if status.start_time.as_ref().is_some_and(|since| now.as_second() - since.0.as_second() > LATE) {
        return State::Late;
    }
    let refused = status.conditions.iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(condition) = refused {
        let why = condition.message.as_deref().unwrap_or("no node takes it");
        return State::Waits(format!("{why}; correct the claim or spec.workers"));
    }
    let waiting = status.container_statuses.iter().flatten().find_map(|c| c.state.as_ref()?.waiting.as_ref());
    let Some(waiting) = waiting else { return State::Runs(status.phase.clone().unwrap_or_default()) };
    let reason = waiting.reason.as_deref().unwrap_or_default();
    let said = [reason, waiting.message.as_deref().unwrap_or_default()];
    let said = said.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(": ");
    match reason {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            State::Waits(format!("{said}; check the operator's --image"))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => State::Waits(said),
        _ => State::Runs(said),
    }
}

/// How a pod ended, in words.
fn ended(status: &PodStatus) -> String {
    let container = status.container_statuses.iter().flatten().find_map(|c| c.state.as_ref()?.terminated.as_ref());
    let container = container.map(|t| format!("{} with exit code {}", t.reason.as_deref().unwrap_or("ended"), t.exit_code));
    let parts = [status.reason.clone(), status.message.clone(), container];
    let said = parts.into_iter().flatten().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(", ");
    if said.is_empty() { status.phase.clone().unwrap_or_default() } else { said }
}
