//! Bad input: the API server names field and rule, the operator a condition, an event and the next step; others are not affected.

use std::fs;

use e2e::{client, files};
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, condition, hub},
    models::{LLAMA, llama, llama_body},
};

/// A manifest for `uri` called `name`, with further fields of `spec`.
fn manifest(name: &str, uri: &str, more: &Value) -> String {
    let mut spec = json!({"model": {"uri": uri}});
    for (field, value) in more.as_object().expect("fields") {
        match value {
            Value::Object(inner) if field == "model" => spec["model"].as_object_mut().expect("a model").extend(inner.clone()),
            _ => spec[field] = value.clone(),
        }
    }
    json!({"apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": name}, "spec": spec}).to_string()
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn the_api_server_names_the_field_and_the_rule() {
    let namespace = Namespace::shared("invalid");
    let good = "hf://e2e/llama@main";
    let long = "a".repeat(46);
    // What is said names the field by its path and gives the rule in words; rules over several fields stand at their parent.
    let cases = [
        (manifest("x", "ftp://there", &json!({})), "spec.model.uri: ", "uri must begin with hf://"),
        (manifest("x", "pvc://claim", &json!({})), "spec.model.uri: ", "uri must be pvc://CLAIM/PATH"),
        (manifest("x", "pvc://claim/a/../b", &json!({})), "spec.model.uri: ", "uri must be pvc://CLAIM/PATH"),
        (
            manifest("x", "pvc://claim/a", &json!({"model": {"credentialsSecretRef": {"name": "a"}}})),
            "spec.model: ",
            "credentialsSecretRef must be absent where uri is pvc://",
        ),
        (manifest("x", "file:models/a", &json!({})), "spec.model.uri: ", "uri must be file:/PATH on a cluster, absolute"),
        (manifest("x", "file://models/a", &json!({})), "spec.model.uri: ", "uri must be file:/PATH on a cluster, absolute"),
        (manifest("x", "file:/models/../etc/a", &json!({})), "spec.model.uri: ", "absolute and without .."),
        (manifest("x", "file:/models/..", &json!({})), "spec.model.uri: ", "absolute and without .."),
        (
            manifest("x", good, &json!({"cache": {"policy": "NodeLocal", "sizeLimit": "1Gi"}})),
            "spec.cache: ",
            "sizeLimit is of policy EmptyDir",
        ),
        (manifest("x", good, &json!({"cache": {"policy": "NodeLocal", "pvcName": "a"}})), "spec.cache: ", "pvcName needs policy PVC"),
        (
            manifest("x", good, &json!({"adapters": [{"name": "a", "uri": "pvc://claim/a"}]})),
            "spec.adapters: ",
            "the uri of each adapter must begin with hf://",
        ),
        (manifest("x", good, &json!({"parallelism": {"pipeline": 0}})), "spec.parallelism.pipeline: ", "greater than or equal to 1"),
        (manifest("x", good, &json!({"parallelism": {"tensor": 65}})), "spec.parallelism.tensor: ", "less than or equal to 64"),
        (manifest("x", good, &json!({"parallelism": {"pipeline": 256, "tensor": 64}})), "spec.parallelism: ", "at most 1024"),
        (manifest("x", good, &json!({"replicas": -1})), "spec.replicas: ", "greater than or equal to 0"),
        (manifest("x", good, &json!({"model": {"digest": "sha256:beef"}})), "spec.model.digest: ", "should match '^sha256:"),
        (manifest("x", good, &json!({"engine": {"maxContextTokens": 0}})), "spec.engine.maxContextTokens: ", "greater than or equal to 1"),
        (manifest("x", good, &json!({"workers": {"nodeSelector": {"a": "b c"}}})), "spec.workers.nodeSelector.a: ", "should match"),
        (manifest("x", good, &json!({"workers": {"tolerations": [{"value": "a"}]}})), "spec.workers.tolerations[0]: ", "key must be set"),
        (manifest("x", good, &json!({"replicsa": 1})), "spec.replicsa", "unknown field"),
        (manifest(&long, good, &json!({})), "metadata.name", "at most 45"),
    ];
    let mut wrong = Vec::new();
    for (manifest, path, rule) in cases {
        let done = namespace.try_apply(&manifest);
        if done.status.success() || !done.stderr.contains(path) || !done.stderr.contains(rule) {
            wrong.push(format!("expected {path} {rule}, got {}\n{}", done.status, done.stderr));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The same fields with good values are taken.
    namespace.apply(&manifest("y", "pvc://claim.of-a-team/a/b c/", &json!({"replicas": 0})));
    namespace.apply(&manifest("x", good, &json!({"replicas": 0, "parallelism": {"pipeline": 1, "tensor": 1}})));
    namespace.apply(&manifest("z", "file:///models/..a/b c", &json!({"replicas": 0, "cache": {"policy": "NodeLocal"}})));
}

/// What is refused after the API server has taken it, beside a deployment that goes on answering.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn the_operator_says_what_is_wrong_and_what_to_do() {
    struct Case {
        name: &'static str,
        manifest: String,
        condition: &'static str,
        reason: &'static str,
        /// Words of the message, the next step among them.
        says: [&'static str; 2],
        event: &'static str,
    }
    let namespace = Namespace::shared("refused");
    llama();
    let unknown = hub("e2e/unknown");
    for file in fs::read_dir(files::fixture("llama")).expect("the fixture") {
        let file = file.expect("an entry");
        fs::copy(file.path(), unknown.join(file.file_name())).expect("a copy");
    }
    let config = fs::read_to_string(unknown.join("config.json")).expect("a config");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["architectures"] = json!(["GooseForCausalLM"]);
    config["model_type"] = json!("goose");
    fs::write(unknown.join("config.json"), config.to_string()).expect("a writable file");

    namespace.apply(&manifest("good", LLAMA, &json!({})));
    namespace.ready("good", 1);
    let http = namespace.http("skein-router");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let ask = || runtime.block_on(client::complete(&http, &llama_body("good"))).expect("an answer");
    let before = ask();

    let cases = [
        Case {
            name: "missing",
            manifest: manifest("missing", "hf://e2e/absent@main", &json!({})),
            condition: "ModelResolved",
            reason: "NotFound",
            says: ["e2e/absent", "check spec.model.uri"],
            event: "DownloadFailed",
        },
        Case {
            name: "unknown",
            manifest: manifest("unknown", "hf://e2e/unknown@main", &json!({})),
            condition: "Accepted",
            reason: "UnsupportedArchitecture",
            says: ["GooseForCausalLM", "supported architecture"],
            event: "ReconcileError",
        },
        Case {
            name: "layers",
            manifest: manifest("layers", LLAMA, &json!({"parallelism": {"pipeline": 99}})),
            condition: "Accepted",
            reason: "PlanInfeasible",
            says: ["99", "change spec.parallelism"],
            event: "PlanInfeasible",
        },
        Case {
            name: "taken",
            manifest: manifest("taken", LLAMA, &json!({"model": {"name": "good"}})),
            condition: "Accepted",
            reason: "NameTaken",
            says: ["good", "choose another in spec.model.name"],
            event: "ReconcileError",
        },
        Case {
            name: "host",
            manifest: manifest("host", "file:///models/x.gguf", &json!({})),
            condition: "Accepted",
            reason: "HostPathForbidden",
            says: ["/models/x.gguf is a path of a node", "add its folder to the chart's sources.hostPaths"],
            event: "ReconcileError",
        },
        Case {
            name: "huge",
            manifest: manifest("huge", LLAMA, &json!({"engine": {"maxBatchSequences": 60000}})),
            condition: "Scheduled",
            reason: "InsufficientCapacity",
            says: ["Insufficient memory", "node"],
            event: "InsufficientCapacity",
        },
    ];
    for case in &cases {
        namespace.apply(&case.manifest);
    }
    for Case { name, condition: kind, reason, says, event, .. } in &cases {
        let message = namespace.watch_status(name, &format!("{kind} of {name} to be {reason}"), |status| {
            let condition = condition(status, kind);
            (condition["status"] == "False" && condition["reason"] == *reason).then(|| condition["message"].to_string())
        });
        assert!(says.iter().all(|words| message.contains(words)), "{name}: {says:?} in {message}");
        let ready = &namespace.deployment(name)["status"];
        assert_eq!(
            (&condition(ready, "Ready")["status"], &condition(ready, "Ready")["reason"]),
            (&json!("False"), &json!(reason)),
            "{name}"
        );
        // An event tells the same to whoever looks with `kubectl describe`.
        namespace.watch(
            &["events", "--field-selector", &format!("involvedObject.name={name}")],
            &format!("the event {event} of {name}"),
            |seen| (seen["reason"] == *event && says.iter().any(|words| seen["message"].to_string().contains(words))).then_some(()),
        );
    }
    assert_eq!(ask(), before);
    assert_eq!(condition(&namespace.deployment("good")["status"], "Ready")["status"], "True");
}
