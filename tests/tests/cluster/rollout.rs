//! A new spec takes over under load; one that cannot run takes nothing away.

use e2e::client;
use serde_json::{Value, json};

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, SYSTEM, WORKERS, condition, identity, succeed},
    load::Load,
    models::{LLAMA, llama},
};

fn sample(name: &str) -> Namespace {
    let namespace = Namespace::alone(name);
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    namespace
}

fn patch(namespace: &Namespace, spec: &Value) {
    let patch = json!({"spec": spec}).to_string();
    namespace.succeed(&["patch", "modeldeployment", SAMPLE_NAME, "--type=merge", "--patch", &patch]);
}

/// Waits until one replica of another revision than `old` is all there is, and returns its revision.
fn rolled(namespace: &Namespace, name: &str, old: &str) -> String {
    namespace.watch_status(name, &format!("a replica of another revision than {old} alone"), |status| {
        let revision = status["currentRevision"].as_str().filter(|revision| *revision != old)?;
        let alone = ["replicas", "updatedReplicas", "readyReplicas"].iter().all(|count| status[count] == 1);
        let done = condition(status, "Progressing")["reason"] == "RolloutComplete" && condition(status, "Ready")["status"] == "True";
        (alone && done).then(|| revision.to_owned())
    })
}

/// What the deployment called `name` is rolled out as.
pub(crate) fn revision(namespace: &Namespace, name: &str) -> String {
    namespace.deployment(name)["status"]["currentRevision"].as_str().expect("a revision").to_owned()
}

/// From PP 2 × TP 2 to PP 2 and back: every response is whole and equal, also those that moved between the plans.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn another_parallelism_takes_over_under_load() {
    let namespace = sample("roll");
    let first = revision(&namespace, SAMPLE_NAME);
    let load = Load::start(&namespace.http(SAMPLE_NAME), 4, requests());
    load.more(8);
    patch(&namespace, &json!({"parallelism": {"tensor": 1}}));
    let second = rolled(&namespace, SAMPLE_NAME, &first);
    namespace.gone(&format!("{WORKERS},skein.dev/revision={first}"));
    assert_eq!(namespace.pods(WORKERS).len(), 2);
    load.more(8);
    // Applying the old spec again is going back to the old revision.
    patch(&namespace, &json!({"parallelism": {"tensor": 2}}));
    assert_eq!(rolled(&namespace, SAMPLE_NAME, &second), first);
    load.more(8);
    load.stop().assert_whole("PP 2 × TP 2 → PP 2 → PP 2 × TP 2");
    namespace.gone(&format!("{WORKERS},skein.dev/revision={second}"));
    assert_eq!(namespace.pods(WORKERS).len(), 4);
}

/// A model with another digest than its file has never comes up: the old replica serves on, the status says why, and going back is at once.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_broken_model_takes_nothing_away() {
    let namespace = sample("broken");
    let first = revision(&namespace, SAMPLE_NAME);
    let before: Vec<_> = namespace.pods(WORKERS).iter().map(identity).collect();
    let load = Load::start(&namespace.http(SAMPLE_NAME), 2, requests());
    load.more(4);
    let wrong = json!({"model": {"digest": format!("sha256:{}", "0".repeat(64))}, "rollout": {"progressDeadlineSeconds": 30}});
    patch(&namespace, &wrong);
    let why = namespace.watch_status(SAMPLE_NAME, "a stalled rollout", |status| {
        let progress = condition(status, "Progressing");
        (progress["reason"] == "ProgressDeadlineExceeded").then(|| progress["message"].to_string())
    });
    assert!(why.contains("ended with exit code 2") && why.contains(&"0".repeat(64)), "{why}");
    let status = &namespace.deployment(SAMPLE_NAME)["status"];
    assert_eq!(condition(status, "Available")["status"], "True", "{status:#}");
    load.more(8);
    // A merge patch cannot say "as before" more plainly than the manifest does.
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.watch_status(SAMPLE_NAME, "the old revision alone", |status| {
        let alone = ["replicas", "updatedReplicas", "readyReplicas"].iter().all(|count| status[count] == 1);
        (alone && status["currentRevision"] == first && condition(status, "Ready")["status"] == "True").then_some(())
    });
    load.more(4);
    load.stop().assert_whole("a broken model and back");
    namespace.gone(&format!("{WORKERS},skein.dev/revision!={first}"));
    assert_eq!(namespace.pods(WORKERS).iter().map(identity).collect::<Vec<_>>(), before);
}

/// The operator ends at each step of a rollout in turn, and the next one goes on from there.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn an_operator_that_ends_in_the_middle_loses_nothing() {
    /// Crate `operator`, module `stop`.
    const PLACES: [&str; 6] = ["revision-recorded", "sets-written", "drain-decided", "state-pushed", "before-deletion", "after-deletion"];
    let namespace = Namespace::alone("stops");
    llama();
    namespace.apply(&tiny(1));
    namespace.ready("tiny", 1);
    let http = namespace.http("tiny");
    let body = json!({"model": "tiny", "prompt": "abc", "max_tokens": 200, "temperature": 0.9, "seed": 5});
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let answer = runtime.block_on(client::complete(&http, &body)).expect("an answer");
    let load = Load::start(&http, 2, vec![(body, answer)]);
    for (round, place) in PLACES.iter().enumerate() {
        operator(&format!("SKEIN_STOP_AT={place}"));
        let before = revision(&namespace, "tiny");
        namespace.apply(&tiny(2 - round % 2));
        rolled(&namespace, "tiny", &before);
        let pods = succeed(&["--namespace", SYSTEM, "get", "pods", "--selector=app.kubernetes.io/name=skein-operator", "--output=json"]);
        let pods: Value = serde_json::from_str(&pods).expect("JSON");
        let running = pods["items"].as_array().into_iter().flatten().find(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let ended = running.map(|pod| &pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"]);
        assert_eq!(ended, Some(&json!(86)), "the operator did not come to {place}");
        load.more(2);
    }
    operator("SKEIN_STOP_AT-");
    load.stop().assert_whole("an operator that ends at each step");
    // No orphan: the pods of one replica, and the sets of one revision.
    let sets = namespace.get(&["statefulsets"]);
    assert_eq!((namespace.pods(WORKERS).len(), sets["items"].as_array().map(Vec::len)), (1, Some(1)));
}

fn tiny(pipeline: usize) -> String {
    let spec = json!({"model": {"uri": LLAMA}, "parallelism": {"pipeline": pipeline}});
    json!({"apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "tiny"}, "spec": spec}).to_string()
}

/// Changes a setting of the operator, which replaces it.
fn operator(setting: &str) {
    succeed(&["--namespace", SYSTEM, "set", "env", "deployment/skein-operator", setting]);
    succeed(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]);
}
