//! An autoscaler of Kubernetes' own decides: it measures the pods that the scale subresource selects, and writes the number of replicas there.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, WORKERS, component, condition},
    load::Load,
};

/// Processor of the first worker of a replica that asks for a second replica: far below what clients without a pause make it use, and far above
/// what one does that rests between requests.
const TARGET: &str = "120m";
/// How long that one rests.
const REST: Duration = Duration::from_secs(3);

fn autoscaler() -> Value {
    let cpu = json!({ "name": "cpu", "target": { "type": "AverageValue", "averageValue": TARGET } });
    json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": SAMPLE_NAME },
        "spec": {
            "scaleTargetRef": { "apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "name": SAMPLE_NAME },
            "minReplicas": 1,
            "maxReplicas": 2,
            "metrics": [{ "type": "Resource", "resource": cpu }],
            "behavior": { "scaleDown": { "stabilizationWindowSeconds": 0 } },
        },
    })
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn an_autoscaler_of_kubernetes_scales_and_no_request_fails() {
    let namespace = Namespace::alone("hpa");
    component("start", "metrics-server");
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    let external = json!({ "spec": { "autoscaling": { "mode": "External" } } }).to_string();
    namespace.succeed(&["patch", "modeldeployment", SAMPLE_NAME, "--type=merge", "--patch", &external]);
    namespace.ready(SAMPLE_NAME, 1);
    let base = namespace.http(SAMPLE_NAME);
    let light = Load::paced(&base, 1, requests(), REST);
    namespace.apply(&autoscaler().to_string());
    // Control: what the light load uses was measured, and asks for no second replica.
    namespace.watch(&["hpa", SAMPLE_NAME], "the autoscaler to have measured", |hpa| {
        let measured = condition(&hpa["status"], "ScalingActive")["status"] == "True";
        measured.then(|| assert_eq!(hpa["status"]["desiredReplicas"], 1, "{hpa:#}"))
    });
    let heavy = Load::start(&base, 4, requests());
    namespace.ready(SAMPLE_NAME, 2);
    assert_eq!(namespace.deployment(SAMPLE_NAME)["spec"]["replicas"], 2, "it is the autoscaler's number");
    heavy.more(8);
    heavy.stop().assert_whole("load that an autoscaler asks for two replicas for");
    namespace.ready(SAMPLE_NAME, 1);
    light.more(2);
    light.stop().assert_whole("1 → 2 → 1 replicas by an autoscaler of Kubernetes");
    let last = namespace.deployment(SAMPLE_NAME);
    assert_eq!(last["spec"]["replicas"], 1);
    assert_eq!(condition(&last["status"], "ScalingActive")["reason"], "ExternallyManaged");
    namespace.gone(&format!("{WORKERS},skein.dev/replica=1"));
}
