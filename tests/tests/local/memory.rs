//! What workers hold is what the plan says.

use e2e::{
    client, files, program,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// A prompt of `len` ids that has no block in common with those of other numbers.
fn prompt(number: usize, len: usize) -> Vec<usize> {
    (0..len).map(|at| 1000 + (number * 7919 + at * 31) % 200_000).collect()
}

/// Every block of the KV cache of the neediest worker is written, in steps as large as they come; at its most it holds what was planned.
#[tokio::test]
async fn workers_hold_what_the_plan_says() {
    let spec = format!(
        "{}  engine:\n    maxContextTokens: 2048\n    maxBatchSequences: 16\n    kvCache:\n      memory: 192Mi\n",
        parallelism(2, 1)
    );
    let manifest = manifest("m", &files::reference(), &spec);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("m.yaml");
    std::fs::write(&path, &manifest).expect("a writable folder");
    let plan: Value = program::json(&["plan", "-f", &path.to_string_lossy(), "--json"]);
    let message = plan["message"].as_str().expect("a message");
    let needs: u64 = message
        .split_once("stage 0 rank 0 needs ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("the neediest worker in {message:?}"));

    let server = Server::start(&manifest);
    let worker = server.workers()[0];
    let before = worker.peak_memory();
    for round in 0..2 {
        let mut requests = JoinSet::new();
        for i in 0..8 {
            let body = json!({"model": "m", "prompt": prompt(8 * round + i, 1900), "max_tokens": 8, "temperature": 0, "ignore_eos": true});
            let url = server.http.clone();
            requests.spawn(async move { client::complete(&url, &body).await });
        }
        for answer in requests.join_all().await {
            answer.expect("an answer");
        }
    }
    let peak = worker.peak_memory();
    println!("planned {needs} bytes, {before} after loading, {peak} at most");
    assert!(peak as f64 <= 1.1 * needs as f64, "{peak} bytes, planned {needs}: {message}");
    // Control: the cache was filled, so the figure means something.
    assert!(peak as f64 >= 0.85 * needs as f64 && peak > before + (64 << 20), "{peak} bytes, {before} before, planned {needs}: {message}");
}
