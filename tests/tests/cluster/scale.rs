//! The number of replicas changes under load.

use e2e::{client, program};
use serde_json::{Value, json};

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, WORKERS, condition, succeed},
    load::Load,
    models::{LLAMA, llama, llama_body},
};

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn scaling_by_hand_fails_no_request() {
    let namespace = Namespace::alone("scale");
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    let load = Load::start(&namespace.http(SAMPLE_NAME), 4, requests());
    load.more(8);
    let scale = |replicas: &str| namespace.succeed(&["scale", "modeldeployment", SAMPLE_NAME, "--replicas", replicas]);
    scale("2");
    namespace.ready(SAMPLE_NAME, 2);
    assert_eq!(namespace.pods(WORKERS).len(), 8);
    // An autoscaler finds one pod of each replica by the selector of the scale subresource.
    let path = format!("/apis/skein.dev/v1alpha1/namespaces/{}/modeldeployments/{SAMPLE_NAME}/scale", namespace.name);
    let scaled: Value = serde_json::from_str(&succeed(&["get", "--raw", &path])).expect("JSON");
    assert_eq!((&scaled["spec"]["replicas"], &scaled["status"]["replicas"]), (&2.into(), &2.into()));
    let selector = scaled["status"]["selector"].as_str().expect("a selector");
    assert_eq!(namespace.pods(selector).len(), 2, "{selector}");
    load.more(16);
    scale("1");
    namespace.ready(SAMPLE_NAME, 1);
    load.more(8);
    load.stop().assert_whole("1 → 2 → 1 replicas");
    namespace.gone(&format!("{WORKERS},skein.dev/replica=1"));
    assert_eq!(namespace.pods(WORKERS).len(), 4);
}

/// The sample, Ready with one replica, whose number follows the requests in flight.
fn follows_load(name: &str, min: u32, behavior: Value) -> Namespace {
    let namespace = Namespace::alone(name);
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    let autoscaling = json!({
        "mode": "Builtin",
        "minReplicas": min,
        "maxReplicas": 2,
        "targets": [{ "type": "InflightPerReplica", "value": "2" }],
        "behavior": behavior,
    });
    let patch = json!({ "spec": { "autoscaling": autoscaling } }).to_string();
    namespace.succeed(&["patch", "modeldeployment", SAMPLE_NAME, "--type=merge", "--patch", &patch]);
    namespace
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn the_load_decides_and_no_request_fails() {
    let namespace = follows_load("autoscale", 1, json!({ "scaleDownStabilizationSeconds": 10 }));
    let base = namespace.http(SAMPLE_NAME);
    let light = Load::start(&base, 1, requests());
    light.more(2);
    // Control: one request in flight asks for no second replica.
    namespace.watch_status(SAMPLE_NAME, "the load to be measured", |status| {
        let scaling = condition(status, "ScalingActive");
        (scaling["reason"] == "ValidMetrics").then(|| assert_eq!(status["desiredReplicas"], 1, "{scaling}"))
    });
    let heavy = Load::start(&base, 4, requests());
    namespace.ready(SAMPLE_NAME, 2);
    heavy.more(8);
    heavy.stop().assert_whole("load that asks for two replicas");
    namespace.ready(SAMPLE_NAME, 1);
    light.more(4);
    light.stop().assert_whole("1 → 2 → 1 replicas by load");
    namespace.gone(&format!("{WORKERS},skein.dev/replica=1"));
    // What a person wrote stays what it was.
    assert_eq!(namespace.deployment(SAMPLE_NAME)["spec"]["replicas"], 1);
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_request_wakes_what_sleeps() {
    let namespace = follows_load("sleep", 0, json!({ "idleSecondsToZero": 5, "scaleDownStabilizationSeconds": 5 }));
    namespace.watch_status(SAMPLE_NAME, "no replicas", |status| {
        let asleep = status["replicas"] == 0 && condition(status, "ScalingActive")["reason"] == "AtZero";
        // A request would be answered, so it is Ready.
        asleep.then(|| assert_eq!(condition(status, "Ready")["status"], "True", "{status}"))
    });
    namespace.gone(WORKERS);
    // All of these wait for the same first replica.
    let load = Load::start(&namespace.http(SAMPLE_NAME), 3, requests());
    load.more(6);
    load.stop().assert_whole("0 → 1 replicas by held requests");
    namespace.watch_status(SAMPLE_NAME, "no replicas again", |status| (status["replicas"] == 0).then_some(()));
}

/// A model that has no replicas because none are wanted says so at once, whichever way that came about.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_model_that_is_to_have_no_replicas_says_so() {
    let namespace = Namespace::shared("stopped");
    llama();
    let tiny = "{apiVersion: skein.dev/v1alpha1, kind: ModelDeployment, metadata: {name: tiny}, spec: {model: {uri: 'MODEL'}, recovery: {drainSeconds: 2}}}";
    namespace.apply(&tiny.replace("MODEL", LLAMA));
    namespace.ready("tiny", 1);
    let base = namespace.http("tiny");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let ask = || runtime.block_on(client::post(&format!("{base}/v1/completions"), &llama_body("tiny"))).expect("an answer");
    assert_eq!(ask().0, 200);
    for (patch, code, words) in [
        (json!({ "suspend": true }), "model_suspended", "is suspended"),
        (json!({ "suspend": false, "replicas": 0 }), "model_scaled_to_zero", "is scaled to zero"),
    ] {
        let patch = json!({ "spec": patch }).to_string();
        namespace.succeed(&["patch", "modeldeployment", "tiny", "--type=merge", "--patch", &patch]);
        let refused = program::until("a refusal that says why", || {
            let (status, answer) = ask();
            (status == 503 && answer["error"]["code"] == code).then_some(answer)
        });
        assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains(words)), "{refused}");
        namespace.gone(WORKERS);
    }
    namespace.succeed(&["scale", "modeldeployment", "tiny", "--replicas", "1"]);
    namespace.ready("tiny", 1);
    assert_eq!(ask().0, 200);
    // Nothing was said twice, and no pod lacks what the cluster gives it.
    let events = namespace.get(&["events"]);
    let events = events["items"].as_array().expect("a list");
    let of = |reason: &str| events.iter().filter(|e| e["reason"] == reason).count();
    assert_eq!((of("MissingClusterDNS"), of("PlanComputed"), of("ModelResolved")), (0, 1, 1), "{events:#?}");
}
