//! Constrained streams, over owners that make their masks, and no matter when a replica goes.

use serde_json::json;

use super::*;
use crate::grammar::{
    Constraint, GrammarSource,
    tests::{constraint, fixture, mask_behind, schema},
};

/// Its vocabulary is the fixture's.
const MODEL: SimulatedModel = SimulatedModel { vocab: 512, labels: 0, period: 0 };

fn constrained(of: &Constraint, seed: u64) -> Generation {
    let mut generation = Generation { end_ids: Arc::new([1, 4]), constraint: Some(of.clone()), ..generation(seed, 20, 120) };
    generation.sampling.masked = true;
    generation
}

fn solo(g: &Generation) -> Vec<TokenId> {
    let of = g.constraint.as_ref().expect("constrained");
    MODEL.solo_under(&g.prompt, &g.sampling, g.max_tokens as usize, &g.end_ids, |emitted| mask_behind(of, emitted))
}

fn constraints() -> [Constraint; 2] {
    let (_, grammars) = fixture();
    let list = json!({"type": "array", "minItems": 4, "maxItems": 9, "items": {"type": "number", "minimum": 0, "maximum": 90000}});
    [schema(list), GrammarSource::Regex("([a-z]{2,9} ){3,12}end".to_owned())].map(|source| constraint(&grammars, source))
}

#[tokio::test(start_paused = true)]
async fn a_lost_replica_changes_no_token_of_constrained_streams() {
    let constraints = constraints();
    let mut stopped = 0;
    for at in (2..50).step_by(4) {
        let world = world_of(MODEL, state(&[replica("r0")]));
        assert!(world.edge.wait_ready("small").await);
        world.connector.get("r0").expect("made").set_fault(Fault::LoseAtStep(at));
        let generations: Vec<Generation> = (0..4).map(|i| constrained(&constraints[i as usize % 2], i)).collect();
        let free = Generation { end_ids: Arc::new([]), ..generation(9, 20, 60) };
        let mate = world.edge.submit("small", free.clone()).expect("admitted");
        let streams: Vec<_> = generations.iter().map(|g| world.edge.submit("small", g.clone()).expect("admitted")).collect();
        for (stream, generation) in streams.into_iter().zip(&generations) {
            let (tokens, end) = collect(stream).await;
            assert_eq!(tokens, solo(generation), "lost at step {at}");
            let expected = if tokens.last().is_some_and(|id| [1, 4].contains(id)) { FinishReason::Stop } else { FinishReason::Length };
            assert_eq!(end.expect("it ends well"), expected);
            stopped += usize::from(expected == FinishReason::Stop);
        }
        let (tokens, _) = collect(mate).await;
        assert_eq!(tokens, MODEL.solo(&free.prompt, &free.sampling, 60, &[]));
        assert_eq!(world.edge.load()[0].replicas[0].failures_total, 1, "lost at step {at}");
        world.edge.shutdown().await;
    }
    assert!(stopped > 20, "{stopped} reached the end of their grammar");
}

#[tokio::test(start_paused = true)]
async fn a_grammar_that_is_not_compiled_is_compiled_by_the_owner() {
    let [of, _] = constraints();
    let bare = Constraint { grammar: None, ..of.clone() };
    let with_card = |card| {
        let connector = Arc::new(SimulatedConnector::new(MODEL, 2, COST, Arc::new(card)));
        let (fleet, receiver) = watch::channel(state(&[replica("r0")]));
        let options = EdgeOptions { connector: connector.clone(), resume: Duration::from_secs(10), deadline: None };
        World { edge: Edge::start(receiver, options), fleet, connector }
    };
    let world = with_card(crate::grammar::tests::card());
    assert!(world.edge.wait_ready("small").await);
    let stream = world.edge.submit("small", constrained(&bare, 3)).expect("admitted");
    assert_eq!(collect(stream).await.0, solo(&constrained(&of, 3)));
    // What does not match its grammar, is no grammar, or comes where there is no vocabulary, fails alone, and says why.
    let good = world.edge.submit("small", generation(1, 20, 30)).expect("admitted");
    let bad = Constraint { source: Arc::new(GrammarSource::Regex("(".to_owned())), grammar: None };
    for (world, constraint, word) in [(&world, &bad, "regex"), (&with_card(ModelCard::default()), &bare, "tokenizer")] {
        assert!(world.edge.wait_ready("small").await);
        let (tokens, end) = collect(world.edge.submit("small", constrained(constraint, 1)).expect("admitted")).await;
        let error = end.expect_err("it cannot run").to_string();
        assert!(tokens.is_empty() && error.contains(word), "{error}");
    }
    assert!(collect(good).await.1.is_ok());
    // A stream that is dropped before its first mask leaves nothing behind.
    drop(world.edge.submit("small", constrained(&of, 5)).expect("admitted"));
    let (tokens, _) = collect(world.edge.submit("small", constrained(&of, 6)).expect("admitted")).await;
    assert_eq!(tokens, solo(&constrained(&of, 6)));
    let load = &world.edge.load()[0];
    assert_eq!((load.running, load.queued), (0, 0));
}
