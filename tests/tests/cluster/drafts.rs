//! A draft model on the cluster: a pod beside each replica that guesses, changes no answer, and is missed by nobody.

use std::{fs, path::PathBuf};

use e2e::{
    client, files, program,
    server::{self, Server, parallelism},
};
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, WORKERS, condition, hub, identity, name},
    load::Load,
    rollout::revision,
    weights::{ask, manifest, seen},
};

const DRAFTS: &str = "skein.dev/stage=draft";

/// Puts a fixture into the mirror as one file; its path.
fn put(to: &str, command: &str, fixture: &str, options: [&str; 2]) -> PathBuf {
    let (place, partial) = (hub("e2e/guess").join(to), hub("e2e/guess").join(format!(".{to}")));
    let (from, path) = (files::fixture(fixture), partial.to_string_lossy().into_owned());
    let done = program::run(&[command, &*from.to_string_lossy(), &path, options[0], options[1]]);
    assert!(done.status.success(), "{}", done.stderr);
    fs::rename(&partial, &place).expect("a place in the mirror");
    place
}

/// A deployment of the model, for which `draft` guesses.
fn guessed(draft: Option<&str>) -> String {
    let model = |file: &str| json!({"uri": format!("hf://e2e/guess@main/{file}")});
    let mut spec = json!({"model": model("model.gguf"), "parallelism": {"pipeline": 2, "tensor": 2}});
    if let Some(draft) = draft {
        spec["engine"] = json!({"draft": {"model": model(draft)}});
    }
    manifest("guess", &spec)
}

/// Requests that are drawn in several ways.
fn requests() -> Vec<Value> {
    let request = |i: usize| {
        let prompt: Vec<usize> = (0..[5, 40, 17][i % 3]).map(|at| 5 + (at * 7 + i * 31) % 490).collect();
        let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.7 };
        json!({"model": "guess", "prompt": prompt, "max_tokens": 48, "temperature": temperature, "seed": 50 + i, "ignore_eos": true})
    };
    (0..6).map(request).collect()
}

/// Guesses that came true, as far as the router that answers has driven the replica: the pool has two, so several are asked.
fn accepted(http: &str) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let count = |metrics: String| -> f64 {
        let lines = metrics.lines().filter(|line| line.starts_with("vllm:spec_decode_num_accepted_tokens_total"));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    };
    let asked = (0..8).map(|_| runtime.block_on(client::get(&format!("{http}/metrics"))).map_or(0.0, count));
    asked.fold(0.0, f64::max)
}

/// State and message of the draft model of the only replica that stays.
fn draft(status: &Value) -> Option<(&str, &str)> {
    let mut replicas = status["replicaStates"].as_array()?.iter().filter(|replica| replica["phase"] != "Draining");
    let draft = replicas.next().map(|replica| &replica["draft"]).filter(|_| replicas.next().is_none())?;
    Some((draft["state"].as_str()?, draft["message"].as_str()?))
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_draft_model_guesses_beside_its_replica_and_is_missed_by_nobody() {
    let model = put("model.gguf", "convert", "llama", ["--dtype", "f32"]);
    put("own.gguf", "quantize", "llama", ["--to", "q8_0"]);
    put("other.gguf", "quantize", "qwen3", ["--to", "q8_0"]);
    let here = Server::start(&server::manifest("guess", &model, &parallelism(1, 1)));
    let expected: Vec<(Value, String)> = requests().into_iter().map(|body| (body.clone(), ask(&here.http, &body))).collect();
    drop(here);

    let namespace = Namespace::shared("guess");
    namespace.apply(&guessed(Some("own.gguf")));
    namespace.ready("guess", 1);
    let is_ready = |status: &Value| draft(status).filter(|(state, _)| *state == "Ready").map(|_| ());
    namespace.watch_status("guess", "the draft model", is_ready);
    seen(&namespace, "guess", "DraftReady");
    let status = &namespace.deployment("guess")["status"];
    let cost = status["plan"]["draft"]["cost"].as_u64().expect("its worker is planned");
    assert!((200..350).contains(&cost), "{status}");
    assert_eq!(
        (condition(status, "Degraded")["reason"].as_str(), status["replicaStates"][0]["workers"].as_u64()),
        (Some("AsExpected"), Some(4))
    );
    let drafts = namespace.running(DRAFTS);
    let all = namespace.pods(WORKERS);
    assert_eq!((all.len(), drafts.len()), (5, 1));

    let http = namespace.http("guess");
    let load = Load::start(&http, 2, expected.clone());
    load.more(expected.len());
    let before = program::until("guesses that come true", || Some(accepted(&http)).filter(|accepted| *accepted > 0.0));
    // Its pod goes in the midst of streams, and comes back elsewhere.
    namespace.succeed(&["delete", "pod", name(&drafts[0]), "--grace-period=0", "--force"]);
    namespace.watch(&["pods", "--selector", DRAFTS], "a pod in its place", |pod| {
        let anew = pod["metadata"]["uid"] != drafts[0]["metadata"]["uid"];
        (anew && pod["status"]["containerStatuses"][0]["ready"] == true).then_some(())
    });
    load.more(expected.len());
    program::until("more guesses that come true", || (accepted(&http) > before).then_some(()));
    namespace.watch_status("guess", "the draft model", is_ready);
    let others = |pods: &[Value]| -> Vec<_> {
        pods.iter()
            .filter(|pod| pod["metadata"]["labels"]["skein.dev/stage"] != "draft")
            .map(|pod| (name(pod).to_owned(), identity(pod)))
            .collect()
    };
    assert_eq!(others(&namespace.pods(WORKERS)), others(&all), "a worker of the replica was replaced or restarted");

    // One whose tokens are others is rolled out as the spec says, said to be of no use, and never asked.
    namespace.apply(&guessed(Some("other.gguf")));
    let why = namespace.watch_status("guess", "the other draft model to be refused", |status| {
        let (state, message) = draft(status)?;
        let degraded = condition(status, "Degraded");
        let said =
            degraded["reason"] == "DraftFailed" && degraded["message"].as_str()?.contains("answers without its draft model: its token ");
        (state == "Failed" && said && condition(status, "Progressing")["reason"] == "RolloutComplete").then(|| message.to_owned())
    });
    assert!(why.starts_with("its token ") && why.ends_with("which is the model's"), "{why}");
    seen(&namespace, "guess", "DraftFailed");
    namespace.ready("guess", 1);
    load.more(expected.len());

    // One as slow as the model is refused; what runs goes on.
    namespace.apply(&guessed(Some("model.gguf")));
    namespace.watch_status("guess", "a refusal", |status| {
        let accepted = condition(status, "Accepted");
        let why = accepted["message"].as_str()?;
        (accepted["reason"] == "PlanInfeasible" && why.contains("spec.engine.draft.model: ") && why.contains("never worth it"))
            .then_some(())
    });
    load.more(expected.len());

    // Without one there is a pod less.
    namespace.apply(&guessed(None));
    namespace.gone(DRAFTS);
    namespace.ready("guess", 1);
    load.more(expected.len());
    load.stop().assert_whole("draft models");
    namespace.gone(&format!("{WORKERS},skein.dev/revision!={}", revision(&namespace, "guess")));
    assert_eq!(namespace.running(WORKERS).len(), 4);
}
