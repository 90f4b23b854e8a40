//! Draft models: fewer steps, the same answers to the last bit of a log-probability, and streams that do not notice when one goes.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use e2e::{
    client, files, program,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::{
    drafts::{asked_together, choice, counts},
    streams::counter,
};

/// What is served, and what guesses for it.
struct Models {
    _folder: TempDir,
    /// The fixture `llama` as 32-bit floats.
    model: PathBuf,
    /// The same in 8 bits, which takes a good quarter of the time.
    own: PathBuf,
    /// Another fixture in 8 bits.
    other: PathBuf,
}

impl Models {
    fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let make = |command: &str, name: &str, to: &str, options: [&str; 2]| {
            let (from, path) = (files::fixture(name), folder.path().join(to));
            let (from, to) = (from.to_string_lossy(), path.to_string_lossy());
            let done = program::run(&[command, &*from, &*to, options[0], options[1]]);
            assert!(done.status.success(), "{}", done.stderr);
            path.clone()
        };
        let model = make("convert", "llama", "model.gguf", ["--dtype", "f32"]);
        let own = make("quantize", "llama", "own.gguf", ["--to", "q8_0"]);
        let other = make("quantize", "mistral", "other.gguf", ["--to", "q8_0"]);
        Self { _folder: folder, model, own, other }
    }

    /// A server of the model without drafts.
    fn plain(&self) -> Server {
        Server::start(&manifest("model", &self.model, &parallelism(1, 1)))
    }

    /// A server with a draft model.
    fn guessed(&self, (pipeline, tensor): (usize, usize), draft: &Path) -> Server {
        Server::start(&manifest("model", &self.model, &guessing(pipeline, tensor, draft)))
    }
}

/// A deployment's settings with a draft model.
fn guessing(pipeline: usize, tensor: usize, draft: &Path) -> String {
    format!("{}  engine:\n    draft:\n      model:\n        uri: file:{}\n", parallelism(pipeline, tensor), draft.display())
}

/// Requests of several lengths that are drawn in several ways.
fn requests(count: usize, max_tokens: u32) -> Vec<Value> {
    let settings = [
        json!({"temperature": 0}),
        json!({"temperature": 0.7, "logprobs": 3}),
        json!({"temperature": 0, "frequency_penalty": 0.4, "presence_penalty": 0.2, "logprobs": 1}),
        json!({"temperature": 0.9, "top_k": 40, "repetition_penalty": 1.05, "min_tokens": 20}),
    ];
    let request = |i: usize| {
        let prompt: Vec<usize> = (0..[5, 40, 17, 130][i % 4]).map(|at| 5 + (at * 7 + i * 31) % 490).collect();
        let mut body = json!({"model": "model", "prompt": prompt, "max_tokens": max_tokens, "seed": 50 + i, "ignore_eos": true});
        body.as_object_mut().expect("an object").extend(settings[i % settings.len()].as_object().expect("an object").clone());
        body
    };
    (0..count).map(request).collect()
}

/// What each request is answered with, one after another, without drafts.
async fn plain(models: &Models, requests: &[Value]) -> Vec<Value> {
    let server = models.plain();
    let mut answers = Vec::new();
    for request in requests {
        answers.push(choice(&server.http, request).await);
    }
    assert_eq!(counts(&server.http).await[0], 0.0, "drafts are asked for");
    answers
}

/// Asks for every request alone, then for all at once.
async fn asked(server: &Server, requests: &[Value], expected: &[Value], what: &str) {
    for (i, request) in requests.iter().enumerate() {
        assert_eq!(choice(&server.http, request).await, expected[i], "request {i} alone, {what}");
    }
    let [drafted, accepted, steps, tokens] = counts(&server.http).await;
    println!("{what}: {accepted} of {drafted} guesses accepted, {steps} steps for {tokens} tokens");
    asked_together(&server.http, requests, expected, what).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draft_model_changes_no_answer_and_saves_steps() {
    let requests = requests(8, 64);
    let models = Models::make();
    let expected = plain(&models, &requests).await;
    for (pipeline, tensor) in [(1, 1), (2, 2)] {
        let server = models.guessed((pipeline, tensor), &models.own);
        asked(&server, &requests, &expected, &format!("the model itself in 8 bits, PP {pipeline} × TP {tensor}")).await;
        let [drafted, accepted, steps, tokens] = counts(&server.http).await;
        assert!(accepted > 0.6 * drafted, "{accepted} of {drafted} accepted");
        assert!(steps < 0.7 * tokens, "{steps} steps for {tokens} tokens");

        let server = models.guessed((pipeline, tensor), &models.other);
        asked(&server, &requests, &expected, &format!("another model, PP {pipeline} × TP {tensor}")).await;
        let [drafted, accepted, _, tokens] = counts(&server.http).await;
        assert!(drafted > 0.0 && accepted < 0.5 * drafted, "{accepted} of {drafted} accepted");
        assert!(drafted < 0.5 * tokens, "it is left alone: {drafted} guesses for {tokens} tokens");
    }
    // The comparison sees a seed that is not its own.
    let server = Server::of(&[&*models.model.to_string_lossy(), "--draft-model", &*models.own.to_string_lossy()]);
    let mut request = requests[3].clone();
    assert_eq!(choice(&server.http, &request).await, expected[3], "by the flag");
    assert!(counts(&server.http).await[1] > 0.0);
    request["seed"] = json!(7);
    assert_ne!(choice(&server.http, &request).await, expected[3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_go_on_when_the_draft_model_dies_and_it_comes_back() {
    const STREAMS: usize = 6;
    let mut requests = requests(STREAMS, 300);
    for request in &mut requests {
        // Streams are compared by their texts.
        request.as_object_mut().expect("an object").remove("logprobs");
    }
    let mut expected = Vec::new();
    let models = Models::make();
    let server = models.plain();
    for request in &requests {
        expected.push(client::complete(&server.http, request).await.expect("an answer"));
    }
    drop(server);
    let server = models.guessed((2, 2), &models.own);
    program::until("the draft model", || (server.logged("draft model ready").len() == 1).then_some(()));
    let workers = server.workers();
    let (started, victim) = (Arc::new(AtomicUsize::new(0)), workers[4]);
    let mut running = JoinSet::new();
    for (i, request) in requests.iter().cloned().enumerate() {
        let (http, started) = (server.http.clone(), started.clone());
        running.spawn(async move {
            let stream = client::stream(&http, &request, |pieces| {
                if pieces == 20 && started.fetch_add(1, Ordering::SeqCst) + 1 == STREAMS {
                    victim.signal("KILL");
                }
            });
            (i, stream.await.expect("a whole stream"))
        });
    }
    while let Some(done) = running.join_next().await {
        let (i, streamed) = done.expect("a task");
        assert_eq!(streamed.text, expected[i], "stream {i}");
    }
    assert_eq!(started.load(Ordering::SeqCst), STREAMS, "the draft model was not killed");
    let metrics = client::get(&format!("{}/metrics", server.http)).await.expect("metrics");
    assert_eq!(counter(&metrics, "skein_draft_failures_total"), 1.0);
    assert_eq!(counter(&metrics, "skein_resumed_streams_total"), 0.0, "no stream was moved");
    assert_eq!(server.logged("draft model lost; sequences go on without it").len(), 1);
    program::until("the draft model", || (server.logged("draft model ready").len() == 2).then_some(()));
    assert_eq!(server.workers()[..4], workers[..4], "the others went on");
    let before = counts(&server.http).await[1];
    assert_eq!(client::complete(&server.http, &requests[0]).await.expect("an answer"), expected[0]);
    assert!(counts(&server.http).await[1] > before, "it guesses again");
}

/// A draft model that cannot guess for the model is refused with the reason, before anything is loaded; one that can is part of the plan.
#[test]
fn a_draft_model_is_planned_or_refused_by_name() {
    let path = |name: &str| files::fixture(name).to_string_lossy().into_owned();
    let models = Models::make();
    let (model, own) = (models.model.to_string_lossy(), models.own.to_string_lossy());
    let shown = program::json(&["plan", &*model, "--draft-model", &*own, "--json"]);
    let draft = &shown["draft"];
    assert!(draft["weight_bytes"].as_u64() > Some(100_000) && draft["kv_bytes"].as_u64() > Some(0), "{draft}");
    assert!((200..350).contains(&draft["cost"].as_u64().expect("a number")), "{draft}");
    assert!(program::json(&["plan", &*model, "--json"])["draft"].is_null());
    for (draft, why) in [
        ("bert", "the draft model is an encoder, which draws no tokens"),
        ("qwen3", "its token "),
        ("llama", "its guesses are never worth it"),
        ("nowhere", "nowhere"),
    ] {
        let refused = program::run(&["plan", &*model, "--draft-model", &path(draft)]);
        assert!(!refused.status.success() && refused.stderr.contains(why), "{draft}: {}", refused.stderr);
    }
    let refused = program::run(&["plan", &path("bert"), "--draft-model", &path("llama")]);
    assert!(refused.stderr.contains("the model is an encoder"), "{}", refused.stderr);
}
