//! Drafts by prompt lookup: fewer steps, and the same answers to the last bit of a log-probability.

use std::fs;

use e2e::{
    client, files,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::streams::counter;

/// A deployment's settings with drafts.
pub(crate) fn drafting(pipeline: usize, tensor: usize) -> String {
    format!("{}  engine:\n    draft:\n      promptLookup: 8\n", parallelism(pipeline, tensor))
}

/// `count` requests whose prompts say something twice and begin it a third time, drawn in several ways.
pub(crate) fn repeating(model: &str, count: usize, max_tokens: u32) -> Vec<Value> {
    let text = fs::read_to_string(files::text()).expect("the text");
    let words: Vec<&str> = text.split_whitespace().collect();
    let settings = [
        json!({"temperature": 0}),
        json!({"temperature": 0.7, "logprobs": 3}),
        json!({"temperature": 0, "frequency_penalty": 0.4, "presence_penalty": 0.2, "logprobs": 1}),
        json!({"temperature": 0.9, "top_k": 40, "repetition_penalty": 1.05, "min_tokens": 20}),
    ];
    let request = |i: usize| {
        let said = words[i * 131..][..50].join(" ");
        let prompt = format!("{said}\n{said}\n{}", words[i * 131..][..8].join(" "));
        let mut body = json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "seed": 50 + i, "ignore_eos": true});
        body.as_object_mut().expect("an object").extend(settings[i % settings.len()].as_object().expect("an object").clone());
        body
    };
    (0..count).map(request).collect()
}

/// The choice that a request is answered with.
pub(crate) async fn choice(http: &str, request: &Value) -> Value {
    let (status, answer) = client::post(&format!("{http}/v1/completions"), request).await.expect("an answer");
    assert!(status.is_success(), "{answer}");
    answer["choices"][0].clone()
}

/// Tokens drafted and accepted, steps, and tokens emitted.
pub(crate) async fn counts(http: &str) -> [f64; 4] {
    let metrics = client::get(&format!("{http}/metrics")).await.expect("metrics");
    [
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:iteration_tokens_total_count",
        "vllm:generation_tokens_total",
    ]
    .map(|name| counter(&metrics, name))
}

/// All requests at once have the answers that they have alone.
pub(crate) async fn asked_together(http: &str, requests: &[Value], expected: &[Value], what: &str) {
    let mut running = JoinSet::new();
    for (i, request) in requests.iter().cloned().enumerate() {
        let http = http.to_owned();
        running.spawn(async move { (i, choice(&http, &request).await) });
    }
    while let Some(done) = running.join_next().await {
        let (i, got) = done.expect("a task");
        assert_eq!(got, expected[i], "request {i} beside others, {what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafts_change_no_answer_and_save_steps() {
    let requests = repeating("model", 8, 64);
    let plain = Server::start(&manifest("model", &files::reference(), &parallelism(1, 1)));
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(choice(&plain.http, request).await);
    }
    assert_eq!(counts(&plain.http).await[0], 0.0, "drafts are asked for");
    drop(plain);
    for (pipeline, tensor) in [(1, 1), (2, 2)] {
        let server = Server::start(&manifest("model", &files::reference(), &drafting(pipeline, tensor)));
        for (i, request) in requests.iter().enumerate() {
            assert_eq!(choice(&server.http, request).await, expected[i], "request {i} alone, PP {pipeline} × TP {tensor}");
        }
        let [drafted, accepted, steps, tokens] = counts(&server.http).await;
        println!("PP {pipeline} × TP {tensor}: {accepted} of {drafted} drafts accepted, {steps} steps for {tokens} tokens");
        assert!(accepted > 100.0 && accepted < drafted, "some drafts are accepted and some refused");
        assert!(steps < 0.7 * tokens, "{steps} steps for {tokens} tokens");
        asked_together(&server.http, &requests, &expected, &format!("PP {pipeline} × TP {tensor}")).await;
    }
    // The comparison sees a seed that is not its own.
    let server = Server::start(&manifest("model", &files::reference(), &drafting(1, 1)));
    let mut other = requests[3].clone();
    other["seed"] = json!(7);
    assert_ne!(choice(&server.http, &other).await, expected[3]);
}
