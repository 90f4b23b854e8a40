//! Statuses of deployments in every state.

use serde_json::{Value, json};

use super::*;
use crate::{
    fleet::{Load, Said},
    validate::{
        Until,
        tests::{object, spec, valid},
    },
};

fn reason(status: &Status, kind: &str) -> (String, String) {
    let c = status.conditions.iter().find(|c| c.kind == kind).expect("the condition");
    (c.status.clone(), c.reason.clone())
}

fn is(status: &Status, kind: &str, truth: &str, why: &str) {
    assert_eq!(reason(status, kind), (truth.to_owned(), why.to_owned()), "{kind}");
}

/// Pods of every worker, with this status.
fn pods(valid: &ValidatedDeployment, node: bool, status: &Value) -> Vec<Pod> {
    let nothing = Standing::default();
    let names = workers(valid, &nothing).into_iter().map(|(name, _)| name);
    let spec = if node { json!({ "nodeName": "one", "containers": [] }) } else { json!({ "containers": [] }) };
    let pod = |name: String| json!({ "metadata": { "name": name }, "spec": spec, "status": status });
    names.map(|name| serde_json::from_value(pod(name)).expect("a pod")).collect()
}

fn running() -> Value {
    json!({ "podIP": "10.0.0.1", "containerStatuses": [
        { "name": "worker", "ready": true, "restartCount": 0, "image": "", "imageID": "" },
    ]})
}

fn waiting(why: &str) -> Value {
    json!({ "containerStatuses": [{
        "name": "worker", "ready": false, "restartCount": 2, "image": "", "imageID": "",
        "state": { "waiting": { "reason": why, "message": "detail" } }, "lastState": { "terminated": { "exitCode": 2 } },
    }]})
}

fn standing(valid: &ValidatedDeployment, pods: Vec<Pod>, routers: usize, ready: bool) -> Standing {
    let said = Said { ready, last_failure: (!ready).then(|| "a worker loads".to_owned()) };
    Standing { pods, load: Load { routers, replicas: [(valid.replica_name(0), said)].into() }, ..Standing::default() }
}

#[test]
fn ready_is_a_token_and_not_a_pod() {
    let (object, valid) = (object(spec()), valid(spec()));
    let loading = applied(&object, &valid, &standing(&valid, pods(&valid, true, &running()), 1, false), 2);
    is(&loading, SCHEDULED, "True", "AllReplicasScheduled");
    is(&loading, REPLICAS_READY, "False", "LoadingWeights");
    is(&loading, READY, "False", "LoadingWeights");
    assert_eq!((loading.replicas, loading.ready_replicas), (1, 0));
    assert_eq!(loading.selector, "skein.dev/deployment=llama,skein.dev/stage=0,apps.kubernetes.io/pod-index=0");

    let answers = applied(&object, &valid, &standing(&valid, pods(&valid, true, &running()), 1, true), 2);
    for kind in SUMMED {
        assert_eq!(reason(&answers, kind).0, "True", "{kind}");
    }
    is(&answers, READY, "True", "Ready");
    assert_eq!((answers.ready_replicas, answers.available_replicas, answers.desired_replicas), (1, 1, 1));
    assert_eq!(answers.url.as_deref(), Some("http://llama.models"));
}

#[test]
fn what_stands_in_the_way_is_said() {
    let (object, valid) = (object(spec()), valid(spec()));
    let of = |pods: Vec<Pod>, routers| applied(&object, &valid, &standing(&valid, pods, routers, false), 2);
    is(&of(Vec::new(), 1), SCHEDULED, "False", "GangPending");
    let unscheduled = |message: &str| json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message }] });
    let full = of(pods(&valid, false, &unscheduled("0/1 nodes are available: 1 Insufficient cpu.")), 1);
    is(&full, SCHEDULED, "False", "InsufficientCapacity");
    is(&full, READY, "False", "InsufficientCapacity");
    assert!(full.conditions.iter().any(|c| c.kind == READY && c.message.contains("Insufficient cpu")));
    is(&of(pods(&valid, false, &unscheduled("no node matches")), 1), SCHEDULED, "False", "Unschedulable");
    is(&of(pods(&valid, true, &waiting("ErrImageNeverPull")), 1), REPLICAS_READY, "False", "ImagePullFailed");
    is(&of(pods(&valid, true, &waiting("CrashLoopBackOff")), 1), REPLICAS_READY, "False", "CrashLooping");
    is(&of(pods(&valid, true, &waiting("ContainerCreating")), 1), REPLICAS_READY, "False", "Starting");
    is(&of(pods(&valid, true, &running()), 0), ROUTER_READY, "False", "Deploying");
}

#[test]
fn zero_by_hand_is_not_ready() {
    let mut none = spec();
    none["replicas"] = json!(0);
    let status =
        applied(&object(none.clone()), &valid(none), &Standing { load: Load { routers: 1, ..Load::default() }, ..Standing::default() }, 0);
    is(&status, AVAILABLE, "False", "ScaledToZero");
    is(&status, READY, "False", "ScaledToZero");
}

#[test]
fn the_plan_stands_before_any_pod() {
    let status = planned(&object(spec()), &valid(spec()));
    let plan = status.plan.expect("a plan");
    assert_eq!((plan.stages.len(), plan.stages[0].ranks, plan.stages[1].first_layer), (2, 2, plan.stages[0].last_layer + 1));
    assert!(plan.stages[0].weight_bytes > 0 && status.model.expect("a model").parameters > 0);
}

#[test]
fn refusals_keep_what_runs_and_times_keep_their_start() {
    let (mut before, valid) = (object(spec()), valid(spec()));
    let mut running = applied(&before, &valid, &standing(&valid, pods(&valid, true, &running()), 1, true), 2);
    running.conditions.iter_mut().for_each(|c| c.last_transition_time = "2020-01-01T00:00:00Z".into());
    before.status = Some(running.clone());
    let same = applied(&before, &valid, &standing(&valid, pods(&valid, true, &self::running()), 1, true), 2);
    assert_eq!(same, running, "nothing new is nothing to write");

    before.metadata.generation = Some(4);
    let rejection = Rejection { condition: ACCEPTED, reason: "InvalidSpec", message: "why".into(), until: Until::Changed };
    let refused = rejected(&before, &rejection);
    assert_eq!((refused.ready_replicas, refused.observed_generation), (1, 4));
    is(&refused, ACCEPTED, "False", "InvalidSpec");
    is(&refused, READY, "False", "InvalidSpec");
    let unchanged = refused.conditions.iter().find(|c| c.kind == AVAILABLE).expect("the condition");
    assert_eq!(unchanged.last_transition_time, "2020-01-01T00:00:00Z");
}

#[test]
fn events_tell_news_once() {
    let (object, valid) = (object(spec()), valid(spec()));
    let first = planned(&object, &valid);
    let reasons = |old: Option<&Status>, new: &Status| news(old, new).into_iter().map(|e| e.reason).collect::<Vec<_>>();
    assert_eq!(reasons(None, &first), ["ModelResolved", "PlanComputed"]);
    assert!(reasons(Some(&first), &first).is_empty());
    let ready = applied(&object, &valid, &standing(&valid, pods(&valid, true, &running()), 1, true), 2);
    assert_eq!(reasons(Some(&first), &ready), ["ReplicaCreated", "ReplicaReady"]);
    let rejection = Rejection { condition: ACCEPTED, reason: "PlanInfeasible", message: "why".into(), until: Until::Changed };
    assert_eq!(reasons(Some(&first), &rejected(&object, &rejection)), ["PlanInfeasible"]);
}
