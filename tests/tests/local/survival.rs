//! Workers that die in the middle of streams: every stream finishes as if nothing had happened.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use e2e::{
    client::{self, Streamed},
    files, program,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    drafts,
    streams::{alone, mixed},
};

const STREAMS: usize = 8;

/// Requests that are long enough to be cut in the middle.
fn requests() -> Vec<Value> {
    let mut requests = mixed("model", STREAMS);
    for request in &mut requests {
        request["max_tokens"] = 48.into();
        request["ignore_eos"] = true.into();
    }
    requests
}

/// Runs all streams; kills the worker at `victim` when each of them has given some tokens. The streams, in order.
async fn with_loss(server: &Server, requests: &[Value], victim: usize) -> Vec<Streamed> {
    let started = Arc::new(AtomicUsize::new(0));
    let workers = server.workers();
    let mut running = JoinSet::new();
    for (i, request) in requests.iter().cloned().enumerate() {
        let (http, started, victim) = (server.http.clone(), started.clone(), workers[victim]);
        running.spawn(async move {
            let stream = client::stream(&http, &request, |pieces| {
                if pieces == 6 && started.fetch_add(1, Ordering::SeqCst) + 1 == STREAMS {
                    victim.signal("KILL");
                }
            });
            (i, stream.await)
        });
    }
    let mut streams: Vec<(usize, Streamed)> = Vec::new();
    while let Some(done) = running.join_next().await {
        let (i, streamed) = done.expect("a task");
        streams.push((i, streamed.unwrap_or_else(|e| panic!("stream {i}: {e:#}"))));
    }
    assert_eq!(started.load(Ordering::SeqCst), STREAMS, "no worker was killed");
    streams.sort_by_key(|s| s.0);
    streams.into_iter().map(|s| s.1).collect()
}

fn assert_same(streams: &[Streamed], expected: &[String], victim: usize) {
    for (i, (streamed, expected)) in streams.iter().zip(expected).enumerate() {
        assert_eq!(&streamed.text, expected, "stream {i} after the loss of worker {victim}");
        assert_eq!(streamed.finish, "length");
    }
}

fn longest_gap(streams: &[Streamed]) -> Duration {
    streams.iter().map(|s| s.gap).max().unwrap_or_default()
}

/// Each of the four workers of the only replica is killed once; the replica re-forms and the streams go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_survive_the_loss_of_any_worker() {
    let requests = requests();
    let expected = alone(&files::reference(), &requests).await;
    let server = Server::start(&manifest("model", &files::reference(), &parallelism(2, 2)));
    for victim in 0..4 {
        let before = server.workers();
        let streams = with_loss(&server, &requests, victim).await;
        assert_same(&streams, &expected, victim);
        println!("one replica, worker {victim} killed: longest gap {:?}", longest_gap(&streams));
        program::until("all workers", || Some(server.workers()).filter(|now| now.len() == 4 && *now != before));
    }
}

/// Streams with drafts in flight, too: what was drafted and not answered is drawn again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_with_drafts_survive_the_loss_of_a_worker() {
    let requests = drafts::repeating("model", STREAMS, 64);
    let expected = alone(&files::reference(), &requests).await;
    let manifest = manifest("model", &files::reference(), &drafts::drafting(2, 2));
    let server = Server::start_with(&manifest, &["--vocabulary", "spread"]);
    for victim in [0, 3] {
        let before = server.workers();
        let streams = with_loss(&server, &requests, victim).await;
        assert_same(&streams, &expected, victim);
        program::until("all workers", || Some(server.workers()).filter(|now| now.len() == 4 && *now != before));
    }
    let [drafted, accepted, ..] = drafts::counts(&server.http).await;
    assert!(accepted > 0.0 && accepted < drafted, "{accepted} of {drafted}");
}

/// Streams whose masks follow from what they emitted: they go on where their grammar stood.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn constrained_streams_survive_the_loss_of_a_worker() {
    let mut requests = requests();
    for (i, request) in requests.iter_mut().enumerate() {
        let request = request.as_object_mut().expect("an object");
        for name in ["ignore_eos", "min_tokens"] {
            request.remove(name);
        }
        let numbers = json!({"type": "array", "minItems": 100, "items": {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}});
        let (name, value) = if i % 2 == 0 { ("guided_json", numbers) } else { ("guided_regex", json!("([a-z]{2,8} ){200}")) };
        request.insert(name.to_owned(), value);
    }
    let expected = alone(&files::reference(), &requests).await;
    for (i, text) in expected.iter().enumerate() {
        let begins = if i % 2 == 0 { text.starts_with('[') } else { text.bytes().all(|b| b.is_ascii_lowercase() || b == b' ') };
        assert!(begins, "{text:?}");
    }
    let manifest = manifest("model", &files::reference(), &parallelism(2, 2));
    let server = Server::start_with(&manifest, &["--vocabulary", "spread"]);
    for victim in [0, 3] {
        let before = server.workers();
        let streams = with_loss(&server, &requests, victim).await;
        assert_same(&streams, &expected, victim);
        program::until("all workers", || Some(server.workers()).filter(|now| now.len() == 4 && *now != before));
    }
}

/// With a second replica the streams move there; the gap that clients see is printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_move_to_a_second_replica() {
    let requests = requests();
    let expected = alone(&files::reference(), &requests).await;
    let spec = format!("  replicas: 2\n{}", parallelism(2, 1));
    let server = Server::start(&manifest("model", &files::reference(), &spec));
    let streams = with_loss(&server, &requests, 0).await;
    assert_same(&streams, &expected, 0);
    println!("two replicas, one worker killed: longest gap {:?}", longest_gap(&streams));
    assert!(longest_gap(&streams) < Duration::from_secs(10));
}
