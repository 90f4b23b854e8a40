//! Drafts: a setting of routers, in force from the next step on, and no matter when a replica or a draft model goes.

use plan::{card::CardFile, fleet::FleetDraft};

use super::*;

/// Repeats itself, but for some tokens.
const REPEATING: SimulatedModel = SimulatedModel { period: 9, ..MODEL };

fn solo_of(g: &Generation) -> Vec<TokenId> {
    REPEATING.solo(&g.prompt, &g.sampling, g.max_tokens as usize, &g.end_ids)
}

fn long(seed: u64) -> Generation {
    Generation { end_ids: Arc::new([]), ..generation(seed, 20, 400) }
}

#[tokio::test(start_paused = true)]
async fn drafts_begin_and_end_in_the_middle_of_a_stream() {
    let world = world_of(REPEATING, state(&[replica("r0")]));
    assert!(world.edge.wait_ready("small").await);
    let generation = long(1);
    let mut stream = world.edge.submit("small", generation.clone()).expect("admitted");
    let mut tokens = next_tokens(&mut stream, 100).await;
    assert_eq!(world.edge.load()[0].draft_tokens_total, 0);
    world.update(|state| state.deployments[0].serving.prompt_lookup = 6);
    world.edge.inner_view_changed().await;
    tokens.extend(next_tokens(&mut stream, 100).await);
    let during = world.edge.load().remove(0);
    assert!(during.accepted_tokens_total > 20 && during.draft_tokens_total > during.accepted_tokens_total, "{during:?}");
    world.update(|state| state.deployments[0].serving.prompt_lookup = 0);
    world.edge.inner_view_changed().await;
    // What is in flight is the last.
    tokens.extend(next_tokens(&mut stream, 20).await);
    let off = world.edge.load()[0].draft_tokens_total;
    let (rest, end) = collect_rest(stream).await;
    tokens.extend(rest);
    assert_eq!((tokens, end.expect("it finished")), (solo_of(&generation), FinishReason::Length));
    let load = &world.edge.load()[0];
    assert_eq!(load.draft_tokens_total, off);
    assert_eq!(load.replicas[0].failures_total, 0, "the same session throughout");
}

#[tokio::test(start_paused = true)]
async fn a_lost_replica_loses_no_token_of_drafts() {
    let mut accepted = 0;
    for at in (2..60).step_by(3) {
        let mut state = state(&[replica("r0")]);
        state.deployments[0].serving.prompt_lookup = 8;
        let world = world_of(REPEATING, state);
        assert!(world.edge.wait_ready("small").await);
        world.connector.get("r0").expect("made").set_fault(Fault::LoseAtStep(at));
        let generations: Vec<Generation> = (0..3).map(long).collect();
        let streams: Vec<_> = generations.iter().map(|g| world.edge.submit("small", g.clone()).expect("admitted")).collect();
        for (stream, generation) in streams.into_iter().zip(&generations) {
            let (tokens, end) = collect(stream).await;
            assert_eq!(tokens, solo_of(generation), "lost at step {at}");
            assert!(end.is_ok());
        }
        let load = &world.edge.load()[0];
        assert_eq!(load.replicas[0].failures_total, 1, "lost at step {at}");
        accepted += load.accepted_tokens_total;
        world.edge.shutdown().await;
    }
    assert!(accepted > 1000, "{accepted}");
}

/// A world whose only replica has a draft model that is as good as it.
fn guessed() -> World {
    let connector = SimulatedConnector::new(REPEATING, 2, COST, Arc::new(ModelCard::default()));
    guessed_by(connector, true)
}

/// The same; `compared`: whoever made the fleet knows that its tokens are the model's.
fn guessed_by(mut connector: SimulatedConnector, compared: bool) -> World {
    let mut state = state(&[replica("r0")]);
    let draft = FleetDraft { worker: "c".to_owned(), limits: limits(), cost: 100, compared };
    state.deployments[0].replicas[0].draft = Some(draft);
    connector.draft = Some(REPEATING);
    world_by(connector, state)
}

/// Files of which a tokenizer is made that has these words.
fn words(words: &[&str]) -> Arc<ModelCard> {
    let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let json = serde_json::json!({ "model": { "type": "WordLevel", "vocab": vocab, "unk_token": words[0] } });
    Arc::new(ModelCard { files: vec![CardFile { name: "tokenizer.json".to_owned(), bytes: json.to_string().into_bytes() }] })
}

/// Tokens are read off the event loop, so time is real.
#[tokio::test]
async fn a_draft_model_whose_tokens_nobody_has_compared_is_compared_first() {
    let own = words(&["a", "b", "c"]);
    for (card, expected) in [
        (words(&["a", "b", "c"]), None),
        (words(&["a", "c", "b"]), Some(r#"its token 1 is "c", expected "b", which is the model's"#)),
        (words(&["a", "b"]), Some("its tokenizer has 2 tokens, expected the model's 3")),
        (Arc::default(), Some("the tokenizer of the draft model cannot be compared: model has no tokenizer")),
    ] {
        let cost = CostModel { step: Duration::from_micros(100), token: Duration::ZERO };
        let mut connector = SimulatedConnector::new(REPEATING, 2, cost, own.clone());
        connector.draft_card = Some(card);
        let world = guessed_by(connector, false);
        assert!(world.edge.wait_ready("small").await);
        let said = || world.edge.load()[0].replicas[0].draft.clone().expect("there is one");
        while said() == (DraftLoad { ready: false, failure: None }) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let (ready, failure) = (said().ready, said().failure.unwrap_or_default());
        assert!(ready == expected.is_none() && failure.starts_with(expected.unwrap_or_default()), "{failure}");
        let generation = long(3);
        let (tokens, end) = collect(world.edge.submit("small", generation.clone()).expect("admitted")).await;
        assert_eq!((tokens, end.expect("it finished")), (solo_of(&generation), FinishReason::Length));
        assert_eq!(world.edge.load()[0].accepted_tokens_total > 0, expected.is_none());
        assert_eq!(world.edge.load()[0].replicas[0].failures_total, 0);
        world.edge.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_draft_model_comes_and_goes_in_the_middle_of_a_stream() {
    let world = guessed();
    assert!(world.edge.wait_ready("small").await);
    let load = || world.edge.load().remove(0);
    let said = || load().replicas[0].draft.clone();
    let generation = long(1);
    let mut stream = world.edge.submit("small", generation.clone()).expect("admitted");
    let mut tokens = next_tokens(&mut stream, 80).await;
    assert!(load().accepted_tokens_total > 30, "{:?}", load());
    assert_eq!(said(), Some(DraftLoad { ready: true, failure: None }));
    let draft = world.connector.get("r0-draft").expect("made");
    draft.set_fault(Fault::Down);
    tokens.extend(next_tokens(&mut stream, 60).await);
    let without = load();
    assert_eq!(without.draft_failures_total, 1);
    assert!(said().expect("it is told").failure.is_some_and(|why| why.contains("it went down")), "{:?}", said());
    tokens.extend(next_tokens(&mut stream, 10).await);
    assert_eq!(load().draft_tokens_total, without.draft_tokens_total);
    draft.set_fault(Fault::None);
    // It is dialled again after at most two seconds, and reads what it missed.
    let opened = draft.steps();
    while draft.steps() == opened {
        tokens.extend(next_tokens(&mut stream, 1).await);
    }
    tokens.extend(next_tokens(&mut stream, 60).await);
    assert!(load().accepted_tokens_total > without.accepted_tokens_total + 20, "{:?}", load());
    assert_eq!(said(), Some(DraftLoad { ready: true, failure: None }));
    world.update(|state| state.deployments[0].replicas[0].draft = None);
    world.edge.inner_view_changed().await;
    tokens.extend(next_tokens(&mut stream, 20).await);
    let off = load().draft_tokens_total;
    assert_eq!(said(), None);
    let (rest, end) = collect_rest(stream).await;
    tokens.extend(rest);
    assert_eq!((tokens, end.expect("it finished")), (solo_of(&generation), FinishReason::Length));
    assert_eq!((load().draft_tokens_total, load().replicas[0].failures_total), (off, 0), "the same session throughout");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_deaf_draft_model() {
    let world = guessed();
    assert!(world.edge.wait_ready("small").await);
    let generation = long(2);
    let mut stream = world.edge.submit("small", generation.clone()).expect("admitted");
    let mut tokens = next_tokens(&mut stream, 80).await;
    let draft = world.connector.get("r0-draft").expect("made");
    draft.set_fault(Fault::Deaf);
    let since = tokio::time::Instant::now();
    tokens.extend(next_tokens(&mut stream, 50).await);
    assert!(since.elapsed() < Duration::from_secs(2), "it was waited for once: {:?}", since.elapsed());
    draft.set_fault(Fault::None);
    let before = world.edge.load()[0].accepted_tokens_total;
    tokens.extend(next_tokens(&mut stream, 80).await);
    assert!(world.edge.load()[0].accepted_tokens_total > before + 20, "it is heard again");
    let (rest, _) = collect_rest(stream).await;
    tokens.extend(rest);
    assert_eq!(tokens, solo_of(&generation));
    assert_eq!(world.edge.load()[0].draft_failures_total, 0);
}
