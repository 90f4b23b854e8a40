//! The number of replicas changes under load.

use serde_json::Value;

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, WORKERS, succeed},
    load::Load,
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
