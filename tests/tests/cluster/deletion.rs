//! What a namespace holds after its deployments are deleted: nothing.

use std::collections::BTreeSet;

use e2e::client;

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, succeed},
    models::{LLAMA, llama, llama_body},
};

/// Names of all objects of the namespace, of every kind that can be listed, but those that tell or are there in any namespace.
pub(crate) fn objects(namespace: &Namespace) -> BTreeSet<String> {
    let kinds = succeed(&["api-resources", "--namespaced", "--verbs=list", "--output=name"]);
    let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
    let names = namespace.succeed(&["get", &kinds.join(","), "--output=name"]);
    names.lines().filter(|name| !matches!(*name, "configmap/kube-root-ca.crt" | "serviceaccount/default")).map(str::to_owned).collect()
}

/// Two models answer at one endpoint; when one is deleted the other goes on; when both are, nothing is left.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn two_models_share_an_endpoint_and_leave_nothing() {
    let namespace = Namespace::shared("two");
    assert_eq!(objects(&namespace), BTreeSet::new());
    llama();
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    let tiny = "{apiVersion: skein.dev/v1alpha1, kind: ModelDeployment, metadata: {name: tiny}, spec: {model: {uri: 'MODEL'}, parallelism: {pipeline: 2}}}";
    namespace.apply(&tiny.replace("MODEL", LLAMA));
    namespace.ready(SAMPLE_NAME, 1);
    namespace.ready("tiny", 1);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let complete = |base: &str, body: &serde_json::Value| runtime.block_on(client::complete(base, body));
    let (body, expected) = &requests()[0];
    let tiny = llama_body("tiny");
    let first = complete(&namespace.http("tiny"), &tiny).expect("an answer");
    // Every service of the namespace leads to the pool, which knows every model by its name.
    for service in ["skein-router", "tiny", SAMPLE_NAME] {
        let base = namespace.http(service);
        assert_eq!(complete(&base, body).expect("an answer"), *expected, "at {service}");
        assert_eq!(complete(&base, &tiny).expect("an answer"), first, "at {service}");
        let models = runtime.block_on(client::get(&format!("{base}/v1/models"))).expect("a list");
        assert!(models.contains("\"tiny\"") && models.contains(SAMPLE_NAME), "{models}");
    }
    let pool = namespace.http("skein-router");

    namespace.succeed(&["delete", "modeldeployment", "tiny"]);
    namespace.gone("skein.dev/deployment=tiny");
    assert_eq!(complete(&pool, body).expect("an answer"), *expected);
    e2e::program::until("the deleted model to be unknown", || complete(&pool, &tiny).is_err().then_some(()));

    assert!(objects(&namespace).iter().any(|name| name.contains("skein-router")));
    namespace.succeed(&["delete", "modeldeployment", SAMPLE_NAME]);
    e2e::program::until("an empty namespace", || objects(&namespace).is_empty().then_some(()));
}
