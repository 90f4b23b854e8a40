//! A deployment with routers of its own.

use e2e::{client, program};
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, name},
    load::Load,
    models::{LLAMA, llama, llama_body},
};

const OWN: &str = "skein.dev/router-of=tiny";
const POOL: &str = "app.kubernetes.io/name=skein-router";

/// From the namespace's routers to its own and back, under load: every response is whole and equal. Its own know nothing of other models; those
/// of the namespace know nothing of it once they have finished; nothing is left of its own in the end.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn own_routers_take_over_and_give_back_under_load() {
    let namespace = Namespace::alone("dedicated");
    llama();
    let manifest = |name: &str| {
        let spec = json!({ "model": { "uri": LLAMA }, "recovery": { "drainSeconds": 3 } });
        json!({ "apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "metadata": { "name": name }, "spec": spec }).to_string()
    };
    namespace.apply(&manifest("tiny"));
    namespace.apply(&manifest("other"));
    namespace.ready("tiny", 1);
    namespace.ready("other", 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (base, pool) = (namespace.http("tiny"), namespace.http("skein-router"));
    let mut body = llama_body("tiny");
    body["max_tokens"] = json!(64);
    let expected = runtime.block_on(client::complete(&base, &body)).expect("an answer");
    let ask = |at: &str, model: &str| {
        runtime.block_on(client::post(&format!("{at}/v1/completions"), &llama_body(model))).expect("an answer").0.as_u16()
    };
    assert_eq!((ask(&base, "other"), ask(&pool, "tiny")), (200, 200));

    let load = Load::start(&base, 4, vec![(body, expected)]);
    load.more(8);
    let patch = |router: Value| {
        let patch = json!({ "spec": { "router": router } }).to_string();
        namespace.succeed(&["patch", "modeldeployment", "tiny", "--type=merge", "--patch", &patch]);
    };
    patch(json!({ "dedicated": true, "replicas": 2 }));
    namespace.watch_status("tiny", "its own routers to serve it", |status| (status["routers"]["dedicated"] == true).then_some(()));
    load.more(16);
    assert_eq!(namespace.pods(OWN).len(), 2);
    program::until("the namespace's routers to forget it", || (ask(&pool, "tiny") == 404).then_some(()));
    assert_eq!((ask(&pool, "other"), ask(&base, "tiny")), (200, 200));
    program::until("its service to lead to its own alone", || (ask(&base, "other") == 404).then_some(()));
    assert_eq!(namespace.pods(POOL).len(), 2, "the other model is served by those of the namespace");
    load.more(8);

    patch(json!({ "dedicated": false, "replicas": null }));
    namespace.watch_status("tiny", "the namespace's routers to serve it", |status| status["routers"].is_null().then_some(()));
    load.more(16);
    namespace.gone(OWN);
    load.stop().assert_whole("to routers of its own and back");
    assert_eq!((ask(&base, "other"), ask(&pool, "tiny")), (200, 200));
    let left = || -> Vec<String> {
        let left = namespace.get(&["deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,secrets", "--selector", OWN]);
        left["items"].as_array().expect("a list").iter().map(|o| name(o).to_owned()).collect()
    };
    program::until("nothing of its own routers", || left().is_empty().then_some(()));
    // Where nobody is served by them, the namespace runs none.
    namespace.succeed(&["delete", "modeldeployment", "other"]);
    patch(json!({ "dedicated": true }));
    namespace.gone(POOL);
    assert_eq!(ask(&base, "tiny"), 200);
    assert_eq!(left().len(), 6, "a Deployment, a Service, an account, a policy, a budget and a certificate");
    namespace.succeed(&["delete", "modeldeployment", "tiny"]);
    namespace.gone(OWN);
    program::until("nothing of a deleted deployment's routers", || left().is_empty().then_some(()));
}
