//! An encoder on the cluster: Ready when a vector came out of its last stage, and the same vectors as on this machine.

use e2e::{
    client, files,
    program::floats,
    server::{self, Server, parallelism},
};
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, WORKERS, condition},
    models::put,
    weights::manifest,
};

async fn post(base: &str, path: &str, body: &Value) -> Value {
    let (status, answer) = client::post(&format!("{base}/v1/{path}"), body).await.expect("an answer");
    assert!(status.is_success(), "{path}: {status} {answer}");
    answer
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: cargo xtask test"]
async fn an_encoder_answers_as_one_process_of_this_machine() {
    put("bert");
    let namespace = Namespace::shared("encoder");
    let spec = json!({"model": {"uri": "hf://e2e/bert@main"}, "parallelism": {"pipeline": 2, "tensor": 2}});
    namespace.apply(&manifest("encoder", &spec));
    namespace.ready("encoder", 1);
    assert_eq!(namespace.pods(WORKERS).len(), 4);
    let status = &namespace.deployment("encoder")["status"];
    assert_eq!(status["plan"]["stages"].as_array().map(Vec::len), Some(2));
    assert_eq!(condition(status, "ReplicasReady")["reason"], "AllReady");

    let here = Server::start(&server::manifest("encoder", &files::fixture("bert"), &parallelism(1, 1)));
    let texts = files::expected("bert")["texts"].as_object().expect("texts").clone();
    let fillers = (0..20).map(|i| format!("geese {i} {}", "fly on ".repeat(i % 9)));
    let inputs: Vec<String> = texts.keys().cloned().chain(fillers).collect();
    let body = json!({"model": "encoder", "input": inputs});
    let local = post(&here.http, "embeddings", &body).await["data"].clone();
    // Through the namespace's routers, and through the deployment's own address.
    for service in ["skein-router", "encoder"] {
        let http = namespace.http(service);
        let answer = post(&http, "embeddings", &body).await;
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(inputs.len()));
        assert!(answer["data"] == local, "{service}: the bits are others than those of one process");
        // Control: another text has another vector.
        assert_ne!(answer["data"][0]["embedding"], local[1]["embedding"]);
        let pair = json!({"model": "encoder", "text_1": inputs[0], "text_2": [inputs[1], inputs[0]]});
        assert_eq!(post(&http, "score", &pair).await["data"], post(&here.http, "score", &pair).await["data"]);
    }
    // Both are the reference's.
    for (index, (text, expected)) in texts.iter().enumerate() {
        let (got, expected) = (floats(&local[index], "embedding"), floats(expected, "mean_pooled_l2"));
        let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(got.len() == expected.len() && off <= 1e-4, "{text:?}: off by {off}");
    }
    let (refused, said) =
        client::post(&format!("{}/v1/completions", namespace.http("encoder")), &json!({"model": "encoder", "prompt": "a"}))
            .await
            .expect("an answer");
    assert_eq!((refused.as_u16(), &said["error"]["code"]), (400, &json!("unsupported_endpoint")), "{said}");
}
