//! Adapters through an edge over simulated replicas: several in one batch, coming, going and failing while streams run.

use plan::{adapter::AdapterSource, fleet::FleetAdapter};

use super::*;

fn adapter(name: &str) -> FleetAdapter {
    adapter_at(name, "file:/adapter")
}

fn adapter_at(name: &str, uri: &str) -> FleetAdapter {
    let source = AdapterSource { uri: uri.to_owned(), digest: None, numerics: format!("numerics of {name}") };
    FleetAdapter { name: name.to_owned(), source }
}

fn with(replicas: &[&str], adapters: &[FleetAdapter]) -> FleetState {
    let mut state = state(&replicas.iter().map(|name| replica(name)).collect::<Vec<_>>());
    state.deployments[0].adapters = adapters.to_vec();
    state
}

/// What `g` gives alone with an adapter; `None`: the bare model.
fn solo_with(name: Option<&str>, g: &Generation) -> Vec<TokenId> {
    let id = name.map(|name| adapter(name).source.numerics).unwrap_or_default();
    MODEL.solo_with(&id, &g.prompt, &g.sampling, g.max_tokens as usize, &g.end_ids)
}

fn named(name: Option<&str>) -> String {
    name.map_or_else(|| "tiny-model".to_owned(), |name| format!("tiny-model:{name}"))
}

fn long(seed: u64) -> Generation {
    Generation { end_ids: Arc::new([]), ..generation(seed, 40, 60) }
}

/// The same prompts with and without adapters share no block of the cache, for the simulation checks what each read holds.
#[tokio::test(start_paused = true)]
async fn sequences_of_several_adapters_run_together() {
    let world = world(with(&["r0"], &[adapter("a"), adapter("b")]));
    let cases: Vec<(Option<&str>, Generation)> =
        (0..24).map(|i| ([None, Some("a"), Some("b")][i % 3], generation(i as u64 / 6, 70, 40))).collect();
    for _ in 0..2 {
        let streams: Vec<_> = cases.iter().map(|(name, g)| world.edge.submit(&named(*name), g.clone()).expect("admitted")).collect();
        for (stream, (name, g)) in streams.into_iter().zip(&cases) {
            assert_eq!(collect(stream).await.0, solo_with(*name, g), "{name:?}");
        }
    }
    assert!(world.edge.load()[0].prefix_hit_tokens_total > 0);
    let (a, g) = (solo_with(Some("a"), &cases[1].1), &cases[1].1);
    assert!(a != solo_with(Some("b"), g) && a != solo_with(None, g), "the adapters hardly differ");
    // An alias has the adapters too.
    let stream = world.edge.submit("small:a", g.clone()).expect("admitted");
    assert_eq!(collect(stream).await.0, a);
    world.edge.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn adapters_come_and_go_while_sequences_run() {
    let world = world(with(&["r0"], &[]));
    assert!(world.edge.wait_ready("tiny-model").await);
    let mut bare = world.edge.submit("tiny-model", long(1)).expect("admitted");
    let first = next_tokens(&mut bare, 3).await;
    match world.edge.submit("tiny-model:a", long(2)) {
        Err(SubmitError::UnknownAdapter { model, adapter, known }) => {
            assert_eq!((model.as_str(), adapter.as_str(), known.len()), ("tiny-model", "a", 0));
        }
        other => panic!("{other:?}"),
    }
    world.update(|state| state.deployments[0].adapters = vec![adapter("a")]);
    world.edge.inner_view_changed().await;
    // It waits until the adapter is there, beside a stream that goes on.
    let mut of_a = world.edge.submit("tiny-model:a", long(2)).expect("admitted");
    let begun = next_tokens(&mut of_a, 5).await;
    world.update(|state| state.deployments[0].adapters = vec![adapter("b")]);
    world.edge.inner_view_changed().await;
    let text = world.edge.submit("tiny-model:a", long(3)).map(|_| ()).expect_err("it is gone").to_string();
    assert_eq!(text, "model tiny-model has no adapter a; served are tiny-model:b");
    let of_b = world.edge.submit("tiny-model:b", long(3)).expect("admitted");
    // What runs with it goes on to its end.
    assert_eq!([begun, collect_rest(of_a).await].concat(), solo_with(Some("a"), &long(2)));
    assert_eq!(collect(of_b).await.0, solo_with(Some("b"), &long(3)));
    assert_eq!([first, collect_rest(bare).await].concat(), solo_with(None, &long(1)));
    // It may come again.
    world.update(|state| state.deployments[0].adapters = vec![adapter("b"), adapter("a")]);
    world.edge.inner_view_changed().await;
    let again = world.edge.submit("tiny-model:a", long(4)).expect("admitted");
    assert_eq!(collect(again).await.0, solo_with(Some("a"), &long(4)));
    assert_eq!(world.edge.load()[0].replicas[0].failures_total, 0, "the session was never lost");
    world.edge.shutdown().await;
}

/// The tokens that are left of a stream whose prompt was reported.
async fn collect_rest(mut stream: TokenStream) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    loop {
        match stream.next().await.expect("an end") {
            StreamEvent::Token { id, .. } => tokens.push(id),
            StreamEvent::Finished(_) => return tokens,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_adapter_that_cannot_be_loaded_fails_alone() {
    let world = world(with(&["r0"], &[adapter("a"), adapter_at("c", SimulatedModel::BROKEN_ADAPTER)]));
    assert!(world.edge.wait_complete("tiny-model").await);
    let loads: Vec<_> = world.edge.load()[0].replicas[0].adapters.iter().map(|a| (a.name.clone(), a.ready, a.failure.is_some())).collect();
    assert_eq!(loads, [("a".to_owned(), true, false), ("c".to_owned(), false, true)]);
    let stream = world.edge.submit("tiny-model:c", long(1)).expect("admitted");
    match collect(stream).await.1 {
        Err(StreamError::AdapterFailed { name, why }) => assert_eq!((name.as_str(), why.as_str()), ("c", "there is none")),
        other => panic!("{other:?}"),
    }
    for name in [None, Some("a")] {
        let stream = world.edge.submit(&named(name), long(2)).expect("admitted");
        assert_eq!(collect(stream).await.0, solo_with(name, &long(2)));
    }
    world.edge.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn streams_with_adapters_survive_a_lost_replica_unless_theirs_is_gone() {
    let world = world(with(&["r0"], &[adapter("a"), adapter("b")]));
    assert!(world.edge.wait_complete("tiny-model").await);
    let mut streams = Vec::new();
    for name in [None, Some("a"), Some("b")] {
        let mut stream = world.edge.submit(&named(name), long(5)).expect("admitted");
        let first = next_tokens(&mut stream, 4).await;
        streams.push((name, stream, first));
    }
    // The adapter goes, and its stream on, until it loses its replica.
    world.update(|state| state.deployments[0].adapters = vec![adapter("a")]);
    world.edge.inner_view_changed().await;
    world.connector.get("r0").expect("made").set_fault(Fault::LoseAtStep(20));
    for (name, mut stream, first) in streams {
        if name == Some("b") {
            let error = loop {
                match stream.next().await.expect("an end") {
                    StreamEvent::Token { .. } => {}
                    StreamEvent::Failed(error) => break error,
                    other => panic!("{other:?}"),
                }
            };
            assert!(matches!(&error, StreamError::NoAdapter(name) if name == "b"), "{error}");
            assert_eq!(error.to_string(), "adapter b is not served any more");
        } else {
            assert_eq!([first, collect_rest(stream).await].concat(), solo_with(name, &long(5)), "{name:?}");
        }
    }
    world.edge.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn names_that_hold_a_colon_are_models_first() {
    let mut both = with(&["r0"], &[adapter("a")]);
    let mut other = with(&["r1"], &[]).deployments.remove(0);
    (other.name, other.model, other.aliases) = ("other".to_owned(), "tiny-model:a".to_owned(), Vec::new());
    both.deployments.push(other);
    let world = world(both);
    let stream = world.edge.submit("tiny-model:a", long(1)).expect("admitted");
    assert_eq!(collect(stream).await.0, solo_with(None, &long(1)), "a model's own name comes first");
    for unknown in ["x:a", "tiny-model:", ":a"] {
        assert!(world.edge.submit(unknown, long(1)).is_err(), "{unknown}");
    }
    world.edge.shutdown().await;
}
