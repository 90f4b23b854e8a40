//! Drafts: what they save, what they leave as it is, and what they keep their hands off.

use plan::step::Input;

use super::*;

/// Runs submissions with at most `lookup` drafts; returns the events of each, and the counters.
fn run(model: SimulatedModel, limits: &ReplicaLimits, stages: usize, lookup: usize, all: &[Submission]) -> (Vec<Vec<EventKind>>, Counters) {
    let mut world = World::of(model, limits.clone(), stages);
    world.scheduler.set_prompt_lookup(lookup);
    let tickets: Vec<u64> = all.iter().map(|s| world.submit(s.clone())).collect();
    world.run();
    (tickets.iter().map(|ticket| world.events[ticket].clone()).collect(), world.scheduler.counters())
}

fn tokens(events: &[EventKind]) -> Vec<TokenId> {
    let token = |e: &EventKind| if let EventKind::Token { id, .. } = e { Some(*id) } else { None };
    events.iter().filter_map(token).collect()
}

#[test]
fn drafts_change_no_event_and_save_steps() {
    let limits = limits(&[(None, 300), (Some(40), 120)], 16, 128);
    let mut saved = 0;
    for stages in [1, 2, 3] {
        for submission in submissions() {
            let all = [submission];
            let (plain, without) = run(REPEATING, &limits, stages, 0, &all);
            let (drafted, with) = run(REPEATING, &limits, stages, 8, &all);
            assert_eq!(plain, drafted, "tokens, their log-probabilities, ends");
            for context in 80..100 {
                let short = ReplicaLimits { max_context: context, ..limits.clone() };
                let cut = run(REPEATING, &short, stages, 0, &all).0;
                assert_eq!(cut, run(REPEATING, &short, stages, 8, &all).0, "a context of {context} tokens");
            }
            assert_eq!((without.draft_tokens, without.drafts), (0, 0));
            assert!(with.drafts <= with.sizes.steps() && with.accepted_tokens <= with.draft_tokens);
            let emitted = tokens(&plain[0]).len() as u64;
            if emitted > 100 {
                saved += 1;
                assert!(with.sizes.steps() * 10 < emitted * 7, "{} steps for {emitted} tokens", with.sizes.steps());
                assert!(with.accepted_tokens < with.draft_tokens, "some are refused");
            }
        }
        // And all of them together, sharing the rows.
        let (plain, _) = run(REPEATING, &limits, stages, 0, &submissions());
        let (drafted, with) = run(REPEATING, &limits, stages, 8, &submissions());
        assert_eq!(plain, drafted);
        assert!(with.accepted_tokens > 0);
    }
    assert!(saved >= 6, "{saved} long runs");
}

#[test]
fn a_text_that_does_not_repeat_is_left_alone() {
    let limits = limits(&[(None, 300)], 8, 128);
    let all = [Submission::generate(prompt(0, 100), sampled(1), 300, Arc::new([]))];
    let (plain, without) = run(MODEL, &limits, 1, 0, &all);
    let (drafted, with) = run(MODEL, &limits, 1, 8, &all);
    assert_eq!((&plain, without.sizes), (&drafted, with.sizes), "the same steps");
    assert_eq!(with.draft_tokens, 0);
}

/// A worker that is asked to go on elsewhere than behind what was accepted says so, and so does the comparison of tokens.
#[test]
fn taking_a_refused_draft_is_seen() {
    let limits = limits(&[(None, 300)], 8, 128);
    let submission = Submission::generate(prompt(0, 30), Sampling::default(), 150, Arc::new([]));
    let mut world = World::of(REPEATING, limits, 1);
    world.scheduler.set_prompt_lookup(8);
    let ticket = world.submit(submission.clone());
    let refused = loop {
        let Some(step) = world.scheduler.next_step() else {
            assert!(world.reply(), "a draft is refused before the end");
            continue;
        };
        let mut outputs = world.engine.run(&step).expect("consistent");
        if let Input::Ids(ids) = &step.sequences[0].input
            && step.sequences[0].wants.len() > 1
        {
            // The rule is broken from outside: the first token that refuses its draft is said to be the draft.
            let draft = outputs.iter_mut().zip(&ids[1..]).find_map(|(output, draft)| match &mut output.value {
                OutputValue::Token { id, .. } if id != draft => Some((id, *draft)),
                _ => None,
            });
            if let Some((id, draft)) = draft {
                *id = draft;
                world.scheduler.reply(step.id, outputs).expect("it looks right");
                break world.scheduler.next_step().expect("it goes on");
            }
        }
        world.replies.push_back((step.id, outputs));
    };
    let error = world.engine.run(&refused).expect_err("it goes on behind what was accepted");
    assert!(error.contains("goes on at"), "{error}");
    world.settle();
    let expected = solo_of(&REPEATING, &submission);
    assert_ne!(world.tokens(ticket)[..], expected[..world.tokens(ticket).len()]);
}

#[test]
fn drafts_take_no_prompts_place_and_no_block_that_others_need() {
    // Two sequences that fill the pool to the last block.
    let submission = |seed| Submission::generate(prompt(0, 30), Sampling { seed, ..Sampling::default() }, 130, Arc::new([]));
    let all = [submission(0), Submission { salt: b"other".to_vec(), ..submission(0) }];
    let limits = ReplicaLimits { prefix_caching: false, ..limits(&[(None, 20)], 8, 64) };
    let (events, counters) = run(REPEATING, &limits, 1, 16, &all);
    assert_eq!((counters.preemptions, tokens(&events[0]).len()), (0, 130));
    assert!(counters.accepted_tokens > 50);
    // While a prompt is read, no draft is in a step.
    let mut world = World::of(REPEATING, ReplicaLimits { max_batch_tokens: 16, ..limits.clone() }, 1);
    world.scheduler.set_prompt_lookup(16);
    world.submit(submission(0));
    while world.scheduler.counters().accepted_tokens < 20 {
        while world.step().is_some() {}
        world.reply();
    }
    let second = world.submit(Submission { salt: b"other".to_vec(), ..submission(0) });
    while world.tokens(second).is_empty() {
        while let Some(step) = world.step() {
            let lengths = lengths(&step);
            assert!(!lengths.contains_key(&2) || lengths.get(&1).is_none_or(|decode| *decode == 1), "{lengths:?}");
        }
        world.reply();
    }
    world.run();
    assert_eq!(world.scheduler.counters().preemptions, 0);
}

#[test]
fn blocks_of_refused_drafts_are_given_back() {
    let mut world = World::of(REPEATING, ReplicaLimits { prefix_caching: false, ..limits(&[(None, 100)], 8, 64) }, 1);
    world.scheduler.set_prompt_lookup(16);
    let ticket = world.submit(Submission::generate(prompt(0, 30), Sampling::default(), 300, Arc::new([])));
    let mut held = 0;
    while world.scheduler.running() + world.scheduler.queued() > 0 {
        while world.step().is_some() {}
        world.reply();
        let used = world.scheduler.pools[0].used();
        if world.scheduler.running() > 0 && world.scheduler.in_flight() == 0 {
            assert!(used <= (30 + world.tokens(ticket).len()).div_ceil(16), "{used} blocks");
            held += 1;
        }
    }
    assert!(held > 20 && world.scheduler.counters().accepted_tokens < world.scheduler.counters().draft_tokens);
}
