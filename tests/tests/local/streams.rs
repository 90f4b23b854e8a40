//! Many streams at once on a split model: each is what it would be alone in one process.

use std::fs;

use e2e::{
    client, files,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// `count` requests of mixed prompt lengths, output lengths and sampling settings.
pub(crate) fn mixed(model: &str, count: usize) -> Vec<Value> {
    let text = fs::read_to_string(files::text()).expect("the text");
    let words: Vec<&str> = text.split_whitespace().collect();
    (0..count)
        .map(|i| {
            let from = i * 97;
            let prompt = words[from..from + [3, 9, 40, 130, 17, 260][i % 6]].join(" ");
            let mut body = json!({"model": model, "prompt": prompt, "max_tokens": ([24, 7, 40, 13, 31][i % 5]), "seed": 1000 + i, "ignore_eos": i % 3 == 0});
            let settings = match i % 7 {
                0 => json!({"temperature": 0}),
                1 => json!({"temperature": 1.0}),
                2 => json!({"temperature": 0.8, "top_k": 20}),
                3 => json!({"temperature": 1.2, "top_p": 0.9}),
                4 => json!({"temperature": 0.9, "min_p": 0.05, "presence_penalty": 0.6}),
                5 => json!({"temperature": 0, "frequency_penalty": 0.8, "repetition_penalty": 1.1}),
                _ => json!({"temperature": 0.7, "logit_bias": {"506": 2.5, "108": -100}, "min_tokens": 5}),
            };
            for (key, value) in settings.as_object().expect("an object") {
                body[key] = value.clone();
            }
            body
        })
        .collect()
}

/// What each request gives alone, one after another, in one process.
pub(crate) async fn alone(model: &std::path::Path, requests: &[Value]) -> Vec<String> {
    let server = Server::start(&manifest("model", model, &parallelism(1, 1)));
    let mut texts = Vec::new();
    for request in requests {
        texts.push(client::complete(&server.http, request).await.expect("an answer"));
    }
    texts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_streams_equal_their_solo_runs() {
    let requests = mixed("model", 32);
    let expected = alone(&files::reference(), &requests).await;
    let distinct: std::collections::HashSet<_> = expected.iter().collect();
    assert!(distinct.len() > 28, "the requests hardly differ");

    for (pipeline, tensor, vocabulary) in [(2, 2, "last"), (2, 1, "spread")] {
        let manifest = manifest("model", &files::reference(), &parallelism(pipeline, tensor));
        let server = Server::start_with(&manifest, &["--vocabulary", vocabulary]);
        let mut running = JoinSet::new();
        for (i, request) in requests.iter().cloned().enumerate() {
            let http = server.http.clone();
            running.spawn(async move { (i, client::stream(&http, &request, |_| {}).await) });
        }
        while let Some(done) = running.join_next().await {
            let (i, streamed) = done.expect("a task");
            assert_eq!(streamed.expect("a whole stream").text, expected[i], "stream {i} at {pipeline} × {tensor}, {vocabulary}");
        }
        // The comparison sees a seed that is not its own.
        let mut other = mixed("model", 2).remove(1);
        other["seed"] = json!(77);
        assert_ne!(client::complete(&server.http, &other).await.expect("an answer"), expected[1]);
    }
}

/// The value of a counter in Prometheus' text form, summed over its labels.
pub(crate) fn counter(metrics: &str, name: &str) -> f64 {
    let lines = metrics.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    lines.map(|line| line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()).expect("a number")).sum()
}

async fn cache_counters(http: &str) -> (f64, f64) {
    let metrics = client::get(&format!("{http}/metrics")).await.expect("metrics");
    (counter(&metrics, "vllm:prefix_cache_queries_total"), counter(&metrics, "vllm:prefix_cache_hits_total"))
}

/// Requests that share a long prefix find it in the cache, and get the tokens they would get without it.
async fn shared_prefix(model: &std::path::Path, prefix: &[u32], tails: u32) {
    let without = format!("{}  engine:\n    kvCache:\n      prefixCaching: false\n", parallelism(1, 1));
    let plain = Server::start(&manifest("model", model, &without));
    let cached = Server::start(&manifest("model", model, &parallelism(2, 1)));
    let body = |tail: u32| {
        let prompt: Vec<u32> = prefix.iter().copied().chain([10 + tail, 20 + tail]).collect();
        json!({"model": "model", "prompt": prompt, "max_tokens": 12, "temperature": 0.8, "seed": tail, "ignore_eos": true})
    };
    client::complete(&cached.http, &body(0)).await.expect("an answer");
    let (asked, hit) = cache_counters(&cached.http).await;
    for tail in 1..=tails {
        let expected = client::complete(&plain.http, &body(tail)).await.expect("an answer");
        assert_eq!(client::complete(&cached.http, &body(tail)).await.expect("an answer"), expected, "tail {tail}");
    }
    let (asked_after, hit_after) = cache_counters(&cached.http).await;
    let rate = (hit_after - hit) / (asked_after - asked);
    println!("prefix cache: hit rate {rate:.3} over {tails} requests with {} shared tokens", prefix.len());
    assert!(rate > 0.9, "hit rate {rate}");
    assert_eq!(cache_counters(&plain.http).await.1, 0.0, "hits without a cache");
}

#[tokio::test]
async fn a_shared_prefix_is_found_on_a_sliding_window_model() {
    let prefix: Vec<u32> = (0..320).map(|i| 5 + (i * 7) % 490).collect();
    shared_prefix(&files::fixture("gemma3"), &prefix, 8).await;
}

#[tokio::test]
async fn a_shared_prefix_is_found_on_the_reference_model() {
    let prefix: Vec<u32> = std::iter::once(2).chain((0..639).map(|i| 1000 + (i * 37) % 5000)).collect();
    shared_prefix(&files::reference(), &prefix, 6).await;
}
