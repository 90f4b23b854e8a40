//! Constrained sequences: their masks come when they come, and change nothing else.

use std::collections::HashMap;

use super::*;
use crate::{
    grammar::{
        Constraint, GrammarSource, Grammars,
        tests::{constraint, fixture, mask_behind, schema},
    },
    replica::simulated::SimulatedModel,
};
use serde_json::json;

/// Its vocabulary is the fixture's.
const MODEL: SimulatedModel = SimulatedModel { vocab: 512, labels: 0, period: 7 };
const ENDS: [TokenId; 2] = [1, 4];

fn sources() -> Vec<GrammarSource> {
    vec![
        schema(json!({
            "type": "object", "required": ["a", "b"], "additionalProperties": false,
            "properties": {"a": {"enum": ["one", "two", "three"]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 5}},
        })),
        GrammarSource::Regex("(yes|no|perhaps)( and (yes|no)){0,3}".to_owned()),
        schema(json!({"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "string", "maxLength": 6}})),
    ]
}

fn constrained(of: &Constraint, seed: u64, len: usize) -> Submission {
    let sampling = Sampling { masked: true, logprobs: seed.is_multiple_of(2).then_some(1), ..sampled(seed) };
    let plain = Submission::generate(prompt(seed as u32, len), sampling, 80, Arc::new(ENDS));
    Submission { constraint: Some(of.clone()), ..plain }
}

fn free(seed: u64, len: usize) -> Submission {
    Submission::generate(prompt(seed as u32, len), sampled(seed), 80, Arc::new(ENDS))
}

fn expected(submission: &Submission) -> Vec<TokenId> {
    let Submission { prompt, sampling, max_tokens, end_ids, constraint, .. } = submission;
    match constraint {
        Some(of) => MODEL.solo_under(prompt, sampling, *max_tokens as usize, end_ids, |emitted| mask_behind(of, emitted)),
        None => MODEL.solo(prompt, sampling, *max_tokens as usize, end_ids),
    }
}

/// Runs submissions, each mask coming `late` turns after it could; returns each one's events.
fn run(limits: &ReplicaLimits, stages: usize, late: usize, lookup: usize, all: &[Submission]) -> (Vec<Vec<EventKind>>, Counters) {
    let mut world = World::of(MODEL, limits.clone(), stages);
    world.scheduler.set_prompt_lookup(lookup);
    let mut tickets = HashMap::new();
    let mut order = Vec::new();
    for submission in all {
        let ticket = world.submit(submission.clone());
        tickets.insert(ticket, (submission.clone(), None::<(usize, usize)>));
        order.push(ticket);
    }
    for turn in 0..100_000 {
        for (ticket, (submission, asked)) in &mut tickets {
            let Some(of) = &submission.constraint else { continue };
            let emitted = world.tokens(*ticket);
            let (at, since) = asked.filter(|(at, _)| *at == emitted.len()).unwrap_or((emitted.len(), turn));
            if turn == since + late && !emitted.last().is_some_and(|id| ENDS.contains(id)) {
                world.scheduler.set_mask(*ticket, at, mask_behind(of, &emitted));
            }
            *asked = Some((at, since));
        }
        if turn % 3 > 0 || world.step().is_none() {
            world.reply();
        }
        if world.scheduler.queued() + world.scheduler.running() == 0 {
            return (order.iter().map(|ticket| world.events[ticket].clone()).collect(), world.scheduler.counters());
        }
    }
    panic!("the scheduler makes no progress");
}

fn tokens(events: &[EventKind]) -> Vec<TokenId> {
    events.iter().filter_map(|e| if let EventKind::Token { id, .. } = e { Some(*id) } else { None }).collect()
}

fn submissions(grammars: &Grammars) -> Vec<Submission> {
    let constraints: Vec<Constraint> = sources().into_iter().map(|source| constraint(grammars, source)).collect();
    (0..9).map(|i| if i % 3 == 2 { free(i, 30) } else { constrained(&constraints[i as usize / 2 % 3], i, 20 + 7 * i as usize) }).collect()
}

#[test]
fn constrained_sequences_emit_what_they_would_alone_whatever_is_beside_them() {
    let (tokenizer, grammars) = fixture();
    let all = submissions(&grammars);
    let solo: Vec<Vec<TokenId>> = all.iter().map(expected).collect();
    for (one, expected) in all.iter().zip(&solo).filter(|(one, _)| one.constraint.is_some()) {
        let unconstrained = Submission { constraint: None, sampling: Sampling { masked: false, ..one.sampling.clone() }, ..one.clone() };
        assert_ne!(&solo_of(&MODEL, &unconstrained), expected, "the grammar changes what is drawn");
        let ids = expected.strip_suffix(&ENDS[..1]).or(expected.strip_suffix(&ENDS[1..])).unwrap_or(expected);
        one.constraint.as_ref().and_then(|of| of.grammar.as_ref()).expect("compiled").matcher(ids).expect("it matches");
        assert!(!crate::decode::text(&tokenizer, ids, false).is_empty());
    }
    let roomy = limits(&[(None, 300), (Some(40), 120)], 16, 64);
    // Too few blocks for all of them: some are sent back, and go on with the masks that they had.
    let narrow = limits(&[(None, 14)], 16, 64);
    let mut preempted = 0;
    for stages in [1, 2, 3] {
        for late in [0, 1, 5] {
            for (limits, lookup) in [(&roomy, 0), (&roomy, 8), (&narrow, 0)] {
                let (events, counters) = run(limits, stages, late, lookup, &all);
                for (i, (events, expected)) in events.iter().zip(&solo).enumerate() {
                    assert_eq!(&tokens(events), expected, "sequence {i}, {stages} stages, masks {late} late");
                    let last = expected.last().expect("some");
                    let end = if ENDS.contains(last) { FinishReason::Stop } else { FinishReason::Length };
                    assert_eq!(events.last(), Some(&EventKind::Finished(end)));
                }
                preempted += counters.preemptions;
            }
        }
    }
    assert!(preempted > 0, "no sequence was sent back");
}

#[test]
fn who_waits_for_a_mask_holds_up_nobody() {
    let (_, grammars) = fixture();
    let of = constraint(&grammars, sources().remove(0));
    let mut world = World::of(MODEL, limits(&[(None, 300)], 8, 64), 1);
    let never = world.submit(constrained(&of, 1, 20));
    world.scheduler.set_mask(never, 0, mask_behind(&of, &[]));
    let free = world.submit(Submission { end_ids: Arc::new([]), ..free(2, 20) });
    for _ in 0..400 {
        while world.step().is_some() {}
        world.reply();
    }
    assert_eq!(world.tokens(never).len(), 1, "its second mask did not come");
    assert_eq!(world.tokens(free).len(), 80);
    assert_eq!(world.scheduler.running(), 1, "it is not given up");
    // Masks of other draws, and of sequences that are not here, are ignored.
    let emitted = world.tokens(never);
    for (ticket, at) in [(never, 0), (never, 2), (free, 80), (99, 1)] {
        world.scheduler.set_mask(ticket, at, mask_behind(&of, &emitted));
        assert!(world.step().is_none());
    }
    world.scheduler.set_mask(never, 1, mask_behind(&of, &emitted));
    assert!(world.step().is_some());
    world.scheduler.refuse(never, "why".to_owned());
    world.run();
    assert_eq!(world.events[&never].last(), Some(&EventKind::Failed("why".to_owned())));
    assert!(world.scheduler.check().is_ok());
}

#[test]
fn equal_masks_are_sent_once_and_a_grammar_goes_with_masked_drawing() {
    let (_, grammars) = fixture();
    let of = constraint(&grammars, GrammarSource::Regex("[ -~]{60,70}".to_owned()));
    let mut world = World::of(MODEL, limits(&[(None, 300)], 8, 64), 1);
    let submission = constrained(&of, 1, 20);
    let ticket = world.submit(submission.clone());
    let (mut whole, mut unchanged) = (0, 0);
    while world.scheduler.running() + world.scheduler.queued() > 0 {
        let emitted = world.tokens(ticket);
        world.scheduler.set_mask(ticket, emitted.len(), mask_behind(&of, &emitted));
        if let Some(step) = world.step() {
            assert_eq!(step.masks.len(), 1);
            *(if step.masks[0].1 == Mask::Unchanged { &mut unchanged } else { &mut whole }) += 1;
        }
        world.reply();
    }
    assert_eq!(world.tokens(ticket), expected(&submission));
    assert!(unchanged > whole, "{unchanged} unchanged, {whole} whole");
    for wrong in [
        Submission { constraint: None, ..submission.clone() },
        Submission { sampling: Sampling { masked: false, ..submission.sampling.clone() }, ..submission },
    ] {
        assert!(world.scheduler.submit(7, wrong).expect_err("refused").contains("grammar"));
    }
}
