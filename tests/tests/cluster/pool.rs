//! Two routers share a namespace's replicas; when one dies, the other goes on.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, name},
    load::Load,
};

/// Selects the routers of a pool.
const ROUTERS: &str = "app.kubernetes.io/component=router";

/// The HTTP API of one router.
fn base(router: &Value) -> String {
    format!("http://{}:8080", router["status"]["podIP"].as_str().expect("an address"))
}

/// Each router in turn is killed under load, so that one of them drives the replica: what is asked of the other is answered whole and equal.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_killed_router_takes_no_other_streams_along() {
    let namespace = Namespace::alone("pool");
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    let whole = || namespace.succeed(&["rollout", "status", "deployment/skein-router", "--timeout=120s"]);
    whole();
    let first = namespace.pods(ROUTERS);
    assert_eq!(first.len(), 2, "{first:#?}");
    // Either answers for every model.
    for router in &first {
        let load = Load::start(&base(router), 1, requests());
        load.more(2);
        load.stop().assert_whole(&format!("router {}", name(router)));
    }
    let mut killed = BTreeSet::new();
    for victim in &first {
        let others = namespace.pods(ROUTERS);
        let other = others.iter().find(|pod| name(pod) != name(victim)).expect("another router");
        let load = Load::start(&base(other), 4, requests());
        load.more(4);
        namespace.succeed(&["delete", "pod", name(victim), "--grace-period=0", "--force"]);
        load.more(8);
        load.stop().assert_whole(&format!("beside the killed router {}", name(victim)));
        killed.insert(name(victim).to_owned());
        whole();
    }
    let now = namespace.pods(ROUTERS);
    assert!(now.len() == 2 && now.iter().all(|pod| !killed.contains(name(pod))), "{now:#?}");
    // Through the service all goes on as before.
    let load = Load::start(&namespace.http(SAMPLE_NAME), 2, requests());
    load.more(4);
    load.stop().assert_whole("two new routers");
}
