//! Drafts: a setting of routers, in force from the next step on, and no matter when a replica or a draft model goes.

use plan::fleet::FleetDraft;

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
    let mut state = state(&[replica("r0")]);
    let draft = FleetDraft { worker: "c".to_owned(), limits: limits(), cost: 100 };
    state.deployments[0].replicas[0].draft = Some(draft);
    let mut connector = SimulatedConnector::new(REPEATING, 2, COST, Arc::new(ModelCard::default()));
    connector.draft = Some(REPEATING);
    world_by(connector, state)
}

#[tokio::test(start_paused = true)]
async fn a_draft_model_comes_and_goes_in_the_middle_of_a_stream() {
    let world = guessed();
    assert!(world.edge.wait_ready("small").await);
    let load = || world.edge.load().remove(0);
    let generation = long(1);
    let mut stream = world.edge.submit("small", generation.clone()).expect("admitted");
    let mut tokens = next_tokens(&mut stream, 80).await;
    assert!(load().accepted_tokens_total > 30, "{:?}", load());
    let draft = world.connector.get("r0-draft").expect("made");
    draft.set_fault(Fault::Down);
    tokens.extend(next_tokens(&mut stream, 60).await);
    let without = load();
    assert_eq!(without.draft_failures_total, 1);
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
    world.update(|state| state.deployments[0].replicas[0].draft = None);
    world.edge.inner_view_changed().await;
    tokens.extend(next_tokens(&mut stream, 20).await);
    let off = load().draft_tokens_total;
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
