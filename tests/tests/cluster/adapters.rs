//! Adapters of a deployment that runs: they come, go and fail, and no pod is touched.

use e2e::{
    client, files,
    program::{ids, until},
};
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, WORKERS, condition, identity, name},
    models::{LLAMA, llama, put},
};

/// The state of an adapter in a status, and what is said of it.
fn adapter<'a>(status: &'a Value, called: &str) -> Option<(&'a str, &'a str)> {
    let found = status["adapters"].as_array()?.iter().find(|a| a["name"] == called)?;
    Some((found["state"].as_str()?, found["message"].as_str()?))
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn adapters_come_go_and_fail_while_workers_run() {
    let namespace = Namespace::shared("adapters");
    llama();
    put("llama-lora-a");
    namespace.apply(&format!(
        "{{apiVersion: skein.dev/v1alpha1, kind: ModelDeployment, metadata: {{name: tiny}}, spec: {{model: {{uri: '{LLAMA}'}}, parallelism: {{pipeline: 2}}}}}}"
    ));
    namespace.ready("tiny", 1);
    let pods = || namespace.pods(WORKERS).iter().map(|pod| (name(pod).to_owned(), identity(pod))).collect::<Vec<_>>();
    let before = pods();
    let set = |adapters: Value| {
        let patch = json!({ "spec": { "adapters": adapters } }).to_string();
        namespace.succeed(&["patch", "modeldeployment", "tiny", "--type=merge", "--patch", &patch]);
    };
    let http = namespace.http("tiny");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let post = |body: &Value| runtime.block_on(client::post(&format!("{http}/v1/completions"), body)).expect("an answer");
    let expected = files::expected("llama-lora-a");
    let (input, greedy) = (ids(&expected, "input_ids"), ids(&expected, "greedy_ids"));
    let body = |model: &str| json!({"model": model, "prompt": input, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "echo": true});
    let whole = [input.clone(), greedy].concat();
    let echo = json!({"model": "tiny", "prompt": whole, "max_tokens": 0, "echo": true});
    let text = |(status, answer): (reqwest::StatusCode, Value)| {
        assert!(status.is_success(), "{answer}");
        answer["choices"][0]["text"].as_str().expect("a text").to_owned()
    };
    let (adapted, bare) = (text(post(&echo)), text(post(&body("tiny"))));
    assert_ne!(adapted, bare);

    let (known, missing) =
        (json!({"name": "a", "uri": "hf://e2e/llama-lora-a@main"}), json!({"name": "b", "uri": "hf://e2e/nothing@main"}));
    set(json!([known, missing]));
    namespace.watch_status("tiny", "one adapter to be ready and one to fail", |status| {
        let ready = adapter(status, "a").is_some_and(|(state, _)| state == "Ready");
        let failed = adapter(status, "b").is_some_and(|(state, why)| state == "Failed" && why.contains("e2e/nothing"));
        let degraded = condition(status, "Degraded");
        (ready && failed && degraded["reason"] == "AdapterFailed" && condition(status, "Ready")["status"] == "True").then_some(())
    });
    assert_eq!(text(post(&body("tiny:a"))), adapted);
    assert_eq!(text(post(&body("tiny"))), bare);
    for reason in ["AdapterLoaded", "AdapterFailed"] {
        until(reason, || {
            let events = namespace.get(&["events", "--field-selector", &format!("reason={reason}")]);
            events["items"].as_array().is_some_and(|items| !items.is_empty()).then_some(())
        });
    }
    set(json!([]));
    let (status, answer) = until("the adapter to be unknown", || Some(post(&body("tiny:a"))).filter(|(status, _)| status.as_u16() == 404));
    assert_eq!(answer["error"]["message"], "model tiny has no adapter a; it has none", "{status}");
    namespace.watch_status("tiny", "nothing to be wrong", |status| {
        (status["adapters"].is_null() && condition(status, "Degraded")["status"] == "False").then_some(())
    });
    assert_eq!(text(post(&body("tiny"))), bare);
    assert_eq!(pods(), before, "a worker was replaced or restarted");

    let refused = namespace.kubectl(&[
        "patch",
        "modeldeployment",
        "tiny",
        "--type=merge",
        "--patch",
        r#"{"spec":{"adapters":[{"name":"A","uri":"ftp://x"}]}}"#,
    ]);
    assert!(!refused.status.success());
    for part in ["spec.adapters", "must begin with hf://"] {
        assert!(refused.stderr.contains(part), "{}", refused.stderr);
    }
}
