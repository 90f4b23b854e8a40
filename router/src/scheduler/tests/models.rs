//! Draft models: what they save, and that nothing depends on them.

use plan::planner::DRAFT_COST_LIMIT;

use super::*;
use crate::scheduler::drafts::repays;

/// Says the same in every other period.
const SOMETIMES: SimulatedModel = SimulatedModel { period: 24, ..MODEL };
/// Says something else nearly always.
const HARDLY: SimulatedModel = SimulatedModel { vocab: 96, labels: 0, period: 0 };

fn draft(groups: &[(Option<u32>, usize)]) -> FleetDraft {
    FleetDraft {
        worker: String::new(),
        limits: ReplicaLimits { prefix_caching: false, ..limits(groups, 16, 256) },
        cost: 100,
        compared: true,
    }
}

/// Runs submissions with a draft model; returns the events of each, and the counters.
fn run(
    limits: &ReplicaLimits,
    stages: usize,
    with: Option<(SimulatedModel, &FleetDraft)>,
    all: &[Submission],
) -> (Vec<Vec<EventKind>>, Counters) {
    let mut world = World::of(REPEATING, limits.clone(), stages);
    if let Some((model, draft)) = with {
        world.draft_with(model, draft);
    }
    let tickets: Vec<u64> = all.iter().map(|s| world.submit(s.clone())).collect();
    world.run();
    (tickets.iter().map(|ticket| world.events[ticket].clone()).collect(), world.scheduler.counters())
}

fn emitted(events: &[EventKind]) -> u64 {
    events.iter().filter(|e| matches!(e, EventKind::Token { .. })).count() as u64
}

#[test]
fn a_draft_model_changes_no_event_and_saves_steps_as_far_as_it_is_right() {
    let limits = limits(&[(None, 300), (Some(40), 120)], 16, 128);
    let draft = draft(&[(None, 300), (Some(24), 60)]);
    let (mut long, mut sometimes_saved) = (0, 0);
    for stages in [1, 2, 3] {
        for submission in submissions() {
            let all = [submission];
            let (plain, without) = run(&limits, stages, None, &all);
            let count = emitted(&plain[0]);
            let of = |model| {
                let (drafted, with) = run(&limits, stages, Some((model, &draft)), &all);
                assert_eq!(plain, drafted, "tokens, their log-probabilities, ends");
                with
            };
            let (always, sometimes, hardly) = (of(REPEATING), of(SOMETIMES), of(HARDLY));
            if count > 100 {
                long += 1;
                assert!(always.sizes.steps() * 2 < count, "{} steps for {count} tokens", always.sizes.steps());
                let refused = always.draft_tokens - always.accepted_tokens;
                assert!(refused < 8, "the same odds, seeds and positions; {refused} behind the end");
                assert!(sometimes.accepted_tokens > 0 && sometimes.accepted_tokens < sometimes.draft_tokens);
                sometimes_saved += usize::from(sometimes.sizes.steps() < without.sizes.steps());
                assert!(hardly.draft_tokens < 40, "it is left alone: {} drafts", hardly.draft_tokens);
                assert!(hardly.sizes.steps() <= without.sizes.steps());
            }
        }
        // And all of them together, sharing the rows.
        let (plain, without) = run(&limits, stages, None, &submissions());
        let (drafted, with) = run(&limits, stages, Some((REPEATING, &draft)), &submissions());
        assert_eq!(plain, drafted);
        assert!(with.accepted_tokens > 0 && with.sizes.steps() < without.sizes.steps());
    }
    assert!(long >= 6 && sometimes_saved * 2 > long, "{sometimes_saved} of {long} long runs");
}

#[test]
fn a_draft_model_that_costs_too_much_is_not_asked() {
    // Whoever lays a draft model out goes by this limit.
    let is_worth_a_try = |cost: u32| repays(trust::START, cost as f32 / 1000.0);
    assert!(is_worth_a_try(50) && is_worth_a_try(DRAFT_COST_LIMIT - 1) && !is_worth_a_try(DRAFT_COST_LIMIT));
    let limits = limits(&[(None, 300)], 16, 128);
    let dear = FleetDraft { cost: 1000, ..draft(&[(None, 300)]) };
    let mut world = World::of(REPEATING, limits, 1);
    world.draft_with(REPEATING, &dear);
    world.submit(Submission::generate(prompt(0, 30), Sampling::default(), 100, Arc::new([])));
    loop {
        while world.step().is_some() {}
        assert_eq!(world.draft_step(), None);
        if !world.reply() {
            break;
        }
    }
    assert_eq!(world.scheduler.counters().draft_tokens, 0);
}

#[test]
fn a_lost_or_late_draft_model_holds_nobody_up() {
    let submission = || Submission::generate(prompt(0, 30), sampled(1), 200, Arc::new([]));
    let draft = draft(&[(None, 100)]);
    let mut world = World::of(REPEATING, limits(&[(None, 300)], 16, 128), 1);
    world.draft_with(REPEATING, &draft);
    let ticket = world.submit(submission());
    // Until it is waited for.
    let waited_for = |world: &mut World| {
        loop {
            while world.step().is_some() {}
            let asked = world.draft_step().is_some();
            if asked && world.replies.is_empty() {
                return;
            }
            if !world.draft_reply() {
                assert!(world.reply(), "it is asked before the end");
            }
        }
    };
    let go_on = |world: &mut World| {
        for _ in 0..10 {
            assert!(world.reply());
            while world.step().is_some() {}
        }
    };
    waited_for(&mut world);
    assert!(world.step().is_none(), "the sequence waits for its guess");
    world.scheduler.go_on_without_drafts();
    assert!(world.step().is_some(), "and does not any more");
    go_on(&mut world);
    // It answers after all, and is asked again.
    let before = world.scheduler.counters().accepted_tokens;
    while world.scheduler.counters().accepted_tokens < before + 8 {
        while world.step().is_some() {}
        while world.draft_step().is_some() {}
        if !world.draft_reply() {
            assert!(world.reply());
        }
    }
    waited_for(&mut world);
    world.lose_drafter();
    assert!(world.step().is_some(), "the sequence goes on by itself");
    go_on(&mut world);
    // Another one reads everything anew.
    world.draft_with(REPEATING, &draft);
    let before = world.scheduler.counters().accepted_tokens;
    world.run();
    assert!(world.scheduler.counters().accepted_tokens > before + 20);
    assert_eq!(world.tokens(ticket), solo_of(&REPEATING, &submission()));
}

#[test]
fn what_was_asked_before_the_sequence_went_on_is_not_drawn() {
    let mut world = World::of(REPEATING, limits(&[(None, 300)], 16, 128), 1);
    world.draft_with(REPEATING, &draft(&[(None, 100)]));
    let submission = |seed| Submission::generate(prompt(seed, 30), sampled(seed.into()), 100, Arc::new([]));
    // All wait for their guesses.
    let run_dry = |world: &mut World| {
        while world.step().is_some() || world.reply() {}
    };
    let mut tickets = vec![world.submit(submission(0))];
    run_dry(&mut world);
    assert_eq!(world.draft_step().expect("its guess is drawn").sequences[0].wants.len(), 1);
    tickets.push(world.submit(submission(1)));
    run_dry(&mut world);
    world.scheduler.go_on_without_drafts();
    for _ in 0..10 {
        assert!(world.step().is_some() && world.reply());
    }
    assert!(world.draft_reply());
    let step = world.draft_step().expect("the ids of the other one are read");
    assert!(step.sequences.iter().all(|part| part.wants.is_empty()), "{step:?}");
    world.run();
    assert!(world.scheduler.counters().accepted_tokens > 40);
    for (seed, ticket) in (0..).zip(tickets) {
        assert_eq!(world.tokens(ticket), solo_of(&REPEATING, &submission(seed)));
    }
}

#[test]
fn where_its_blocks_or_its_context_end_sequences_go_on_without_it() {
    let limits = limits(&[(None, 300)], 16, 128);
    let all: Vec<Submission> = (0..3)
        .map(|seed| Submission {
            salt: vec![seed as u8],
            ..Submission::generate(prompt(seed, 40), sampled(seed.into()), 150, Arc::new([]))
        })
        .collect();
    let (plain, _) = run(&limits, 1, None, &all);
    let wide = run(&limits, 1, Some((REPEATING, &draft(&[(None, 300)]))), &all).1;
    // Blocks for two of the three at their full length.
    let narrow = draft(&[(None, 24)]);
    let (drafted, with) = run(&limits, 1, Some((REPEATING, &narrow)), &all);
    assert_eq!(plain, drafted);
    assert!(with.accepted_tokens > 0 && with.accepted_tokens < wide.accepted_tokens, "{with:?}");
    assert_eq!(with.preemptions, 0);
    let mut short = draft(&[(None, 300)]);
    short.limits.max_context = 80;
    let one = &all[..1];
    let (drafted, with) = run(&limits, 1, Some((REPEATING, &short)), one);
    assert_eq!(plain[..1], drafted);
    let within = with.accepted_tokens;
    assert!((10..=40).contains(&within), "{within} tokens up to a context of 80");
}

#[test]
fn a_long_prompt_is_read_beside_and_then_guessed_for() {
    let mut world = World::of(REPEATING, limits(&[(None, 300)], 16, 120), 1);
    world.draft_with(REPEATING, &draft(&[(None, 60)]));
    let ticket = world.submit(Submission::generate(prompt(0, 300), sampled(1), 100, Arc::new([])));
    while world.step().is_some() {}
    assert_eq!(world.draft_step(), None, "while the prompt is read, nothing is");
    world.reply();
    while world.step().is_some() {}
    while world.tokens(ticket).is_empty() {
        world.reply();
    }
    assert!(world.step().is_some(), "the sequence does not wait");
    let step = world.draft_step().expect("its ids are read");
    assert_eq!((step.tokens(), step.sequences[0].wants.len()), (128, 0));
    world.run();
    assert!(world.scheduler.counters().accepted_tokens > 40);
    assert_eq!(world.tokens(ticket).len(), 100);
}

/// A rule that takes a refused guess is seen by the worker that verifies, and by the comparison of tokens.
#[test]
fn taking_a_refused_guess_is_seen() {
    let submission = Submission::generate(prompt(0, 30), Sampling::default(), 150, Arc::new([]));
    let mut world = World::of(REPEATING, limits(&[(None, 300)], 16, 128), 1);
    world.draft_with(SOMETIMES, &draft(&[(None, 100)]));
    let ticket = world.submit(submission.clone());
    let refused = loop {
        let Some(step) = world.scheduler.next_step() else {
            while world.draft_step().is_some() {}
            if !world.draft_reply() {
                assert!(world.reply(), "a guess is refused before the end");
            }
            continue;
        };
        let mut outputs = world.engine.run(&step).expect("consistent");
        if let plan::step::Input::Ids(ids) = &step.sequences[0].input
            && step.sequences[0].wants.len() > 1
        {
            let guess = outputs.iter_mut().zip(&ids[1..]).find_map(|(output, guess)| match &mut output.value {
                OutputValue::Token { id, .. } if id != guess => Some((id, *guess)),
                _ => None,
            });
            if let Some((id, guess)) = guess {
                *id = guess;
                world.scheduler.reply(step.id, outputs).expect("it looks right");
                world.lose_drafter();
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
