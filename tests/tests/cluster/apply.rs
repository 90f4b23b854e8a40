//! From apply to answers: the sample, unchanged, gives what the laptop gives.

use e2e::client;
use proto::inference::{GenerateRequest, SamplingOptions, generate_request::Prompt, inference_client::InferenceClient};

use crate::{
    answers::{Request, twenty},
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, WORKERS, condition, identity},
};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

async fn over_grpc(base: &str, request: &Request) -> String {
    let mut client = InferenceClient::connect(base.to_owned()).await.expect("a connection");
    let sampling = SamplingOptions { temperature: Some(request.temperature), seed: Some(request.seed.into()), ..Default::default() };
    let ask = GenerateRequest {
        model: SAMPLE_NAME.to_owned(),
        prompt: Some(Prompt::Text(request.prompt.clone())),
        sampling: Some(sampling),
        max_tokens: Some(request.tokens),
        ..Default::default()
    };
    let mut replies = client.generate(ask).await.expect("a stream").into_inner();
    let mut text = String::new();
    while let Some(reply) = replies.message().await.expect("a whole stream") {
        text.push_str(&reply.text);
    }
    text
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn the_sample_answers_as_this_machine_does() {
    let namespace = Namespace::shared("sample");
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    let status = &namespace.deployment(SAMPLE_NAME)["status"];
    for kind in ["Accepted", "ModelResolved", "Scheduled", "ReplicasReady", "RouterReady", "Available"] {
        assert_eq!(condition(status, kind)["status"], "True", "{kind} in {status:#}");
    }
    let workers = namespace.pods(WORKERS);
    assert_eq!(workers.len(), 4, "{workers:#?}");
    assert!(workers.iter().all(|pod| identity(pod).1 == 0), "a worker was restarted");

    let (http, grpc) = (namespace.http(SAMPLE_NAME), namespace.grpc(SAMPLE_NAME));
    runtime().block_on(async {
        for (request, expected) in twenty() {
            let body = request.body();
            assert_eq!(client::complete(&http, &body).await.expect("an answer"), *expected, "{request:?} over HTTP");
            assert_eq!(over_grpc(&grpc, request).await, *expected, "{request:?} over gRPC");
        }
        // Another seed and another prompt are seen.
        let (drawn, expected) = &twenty()[1];
        let other = Request { seed: drawn.seed + 1, ..drawn.clone() };
        assert_ne!(client::complete(&http, &other.body()).await.expect("an answer"), *expected);
        let other = Request { prompt: "The capital of Spain is".to_owned(), ..twenty()[0].0.clone() };
        assert_ne!(over_grpc(&grpc, &other).await, twenty()[0].1);
    });
}

/// The namespaces of these tests are as strict as they say.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_privileged_pod_is_refused() {
    let namespace = Namespace::shared("strict");
    let done = namespace.try_apply("{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, image: x}]}}");
    assert!(!done.status.success() && done.stderr.contains("violates PodSecurity \"restricted"), "{}", done.stderr);
}
