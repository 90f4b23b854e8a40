//! Steps that contradict the plan or those before them are refused whole, and a lost rank ends the session.

use std::time::Duration;

use engine::{Engine, EngineOptions, InvalidStep, NoMasks, StageOutput, StepError, collective::Threads};
use kernels::Isa;
use plan::step::{BlockCopy, Input, Sampling, Step, TableChange, Want, WantKind};

use crate::{
    model,
    rig::{Layout, Part, Rig, logits, plan, prompt},
};

fn invalid(rig: &mut Rig, step: &Step) -> InvalidStep {
    match rig.run_step(step, &mut NoMasks) {
        Err(error @ StepError::Invalid { .. }) => {
            assert_eq!(error.reason(), "invalid_step");
            let StepError::Invalid { step: id, source } = error else { unreachable!() };
            assert_eq!(id, step.id);
            source
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn contradictions_are_refused_and_change_nothing() {
    let model = model::gemma(20, model::small).build();
    let mut rig = Rig::new(&model, Layout { sequences: 3, ..Layout::default() });
    let ids = prompt(1, 60, 1500);
    let (groups, blocks) = (rig.plan.kv.groups.len(), rig.plan.kv.groups[1].blocks);
    let greedy = Sampling::default();
    let mut expected = logits(&Rig::new(&model, Layout::default()).run(&[Part::new(1, &ids).all_logits()]));
    let first = rig.step(&[Part::new(1, &ids[..40]).all_logits()]);
    let mut got = logits(&rig.run_step(&first, &mut NoMasks).expect("a valid step"));
    let good = rig.step(&[Part::new(1, &ids[40..]).all_logits()]);
    let with = |change: &dyn Fn(&mut Step)| {
        let mut step = good.clone();
        change(&mut step);
        step
    };
    let cases: Vec<(Step, InvalidStep)> = vec![
        (with(&|s| s.id = 1), InvalidStep::Order { got: 1, last: 1 }),
        (with(&|s| s.sequences[0].input = Input::Ids(vec![0; 401])), InvalidStep::Tokens { got: 401, max: 400 }),
        (with(&|s| s.sequences.push(s.sequences[0].clone())), InvalidStep::Twice { sequence: 1 }),
        (with(&|s| s.sequences[0].input = Input::Ids(Vec::new())), InvalidStep::Empty { sequence: 1 }),
        (with(&|s| s.sequences[0].sequence = 2), InvalidStep::UnknownSequence { sequence: 2, position: 40 }),
        (with(&|s| s.frees.push(1)), InvalidStep::UnknownSequence { sequence: 1, position: 40 }),
        (with(&|s| s.sequences[0].first_position = 41), InvalidStep::Position { sequence: 1, got: 41, fed: 40 }),
        (
            with(&|s| {
                s.sequences[0].first_position = 39;
                s.sequences[0].input = Input::Ids(vec![0; 362]);
            }),
            InvalidStep::Context { sequence: 1, got: 401, max: 400 },
        ),
        (
            with(&|s| s.sequences[0].input = Input::Sampled { step: 1, drafts: vec![0; 19] }),
            InvalidStep::Unresolved { sequence: 1, step: 1 },
        ),
        (with(&|s| s.sequences[0].input = Input::Ids(vec![1500; 20])), InvalidStep::Id { sequence: 1, id: 1500, vocab: 1500 }),
        (
            with(&|s| s.sequences[0].wants[3].kind = WantKind::Score { target: 1501, top: 0 }),
            InvalidStep::Id { sequence: 1, id: 1501, vocab: 1500 },
        ),
        (with(&|s| s.sequences[0].tables[0].group = 2), InvalidStep::Group { got: 2, groups }),
        (
            with(&|s| s.copies.push(BlockCopy { group: 1, from: 0, to: blocks as u32 })),
            InvalidStep::Block { group: 1, block: blocks as u32, blocks },
        ),
        (with(&|s| s.sequences[0].tables[1].blocks = vec![u32::MAX]), InvalidStep::Block { group: 1, block: u32::MAX, blocks }),
        (
            with(&|s| s.sequences[0].tables.push(TableChange { group: 0, first: 25, blocks: vec![0] })),
            InvalidStep::Entry { sequence: 1, got: 25, max: 25 },
        ),
        (with(&|s| s.sequences[0].tables.truncate(1)), InvalidStep::Hole { sequence: 1, group: 1, position: 48 }),
        (
            with(&|s| s.sequences[0].wants.push(Want { offset: 20, kind: WantKind::Logits })),
            InvalidStep::Want { sequence: 1, offset: 20, tokens: 20 },
        ),
        (
            with(&|s| s.sequences[0].wants.push(Want { offset: 3, kind: WantKind::Logits })),
            InvalidStep::Want { sequence: 1, offset: 3, tokens: 20 },
        ),
        (with(&|s| s.sequences[0].wants.push(Want { offset: 19, kind: WantKind::Sample })), InvalidStep::NoSampling { sequence: 1 }),
        (
            with(&|s| s.sequences[0].begin = Part::new(1, &[0]).begin(&[0; 39], 1, &greedy).begin.map(Box::new)),
            InvalidStep::ShortHistory { sequence: 1, position: 40, got: 39 },
        ),
        (with(&|s| s.sequences[0].adapter = 3), InvalidStep::Adapter { sequence: 1, adapter: 3 }),
    ];
    for (step, expected) in cases {
        assert_eq!(invalid(&mut rig, &step), expected);
    }
    let error = rig.engines[0][0].run(&good, &[0.0], &mut NoMasks);
    assert!(matches!(&error, Err(StepError::Invalid { source: InvalidStep::Hidden { got: 1, expected: 0 }, .. })));
    // None of them left a trace.
    got.extend(logits(&rig.run_step(&good, &mut NoMasks).expect("a valid step")));
    assert!(got == expected);
    expected[50].2[0] ^= 1;
    assert!(got != expected);
}

#[test]
fn stages_check_the_hidden_states_they_are_given() {
    let model = model::gemma(20, model::small).build();
    let mut rig = Rig::new(&model, Layout { pipeline: 2, ..Layout::default() });
    let step = rig.step(&[Part::new(1, &[1, 2, 3])]);
    let second = &mut rig.engines[1][0];
    let error = second.run(&step, &[0.0; 95], &mut NoMasks);
    assert!(matches!(&error, Err(StepError::Invalid { source: InvalidStep::Hidden { got: 95, expected: 288 }, .. })), "{error:?}");
    // A stage that neither looks ids up nor samples takes what is not resolved.
    let mut unresolved = step.clone();
    unresolved.sequences[0].input = Input::Sampled { step: 1, drafts: vec![2, 3] };
    let error = second.run(&unresolved, &[0.0; 288], &mut NoMasks);
    assert!(matches!(&error, Err(StepError::Invalid { source: InvalidStep::Unresolved { .. }, .. })), "{error:?}");
    let mut rig = Rig::new(&model, Layout { pipeline: 3, ..Layout::default() });
    assert!(matches!(rig.engines[1][0].run(&unresolved, &[0.0; 288], &mut NoMasks), Ok(StageOutput::Hidden(h)) if h.len() == 288));
}

#[test]
fn steps_without_tokens_and_resets_are_fine() {
    let model = model::llama(model::mixed).build();
    let mut rig = Rig::new(&model, Layout { pipeline: 2, tensor: 2, ..Layout::default() });
    assert!(rig.run(&[]).is_empty());
    let ids = prompt(1, 30, 2500);
    let expected = logits(&rig.run(&[Part::new(1, &ids).all_logits()]));
    let engine = &rig.engines[1][1];
    assert_eq!((engine.progress().step(), engine.progress().finished(), engine.progress().layer()), (2, 2, 3));
    let timings = engine.timings();
    assert_eq!((timings.steps, timings.tokens), (2, 30));
    assert!(!timings.qkv.is_zero() && !timings.attention.is_zero() && !timings.vocabulary.is_zero() && !timings.collective.is_zero());
    // No wants: nothing behind the last layer's keys and values runs, and the tokens are there for the next step.
    rig.run(&[Part::new(2, &ids[..20])]);
    assert!(logits(&rig.run(&[Part::new(2, &ids[20..]).all_logits()])).iter().zip(&expected[20..]).all(|(a, b)| a.2 == b.2));
    for engine in rig.engines.iter_mut().flatten() {
        engine.reset();
        assert_eq!(engine.progress().step(), 0);
    }
    let mut fresh = Rig::new(&model, Layout { pipeline: 2, tensor: 2, ..Layout::default() });
    std::mem::swap(&mut fresh.engines, &mut rig.engines);
    assert!(logits(&fresh.run(&[Part::new(1, &ids).all_logits()])) == expected);
}

#[test]
fn a_lost_rank_ends_the_step_of_the_others_and_a_new_epoch_goes_on() {
    let model = model::llama(model::mixed).build();
    let layout = Layout { tensor: 2, ..Layout::default() };
    let plan = plan(&model, layout);
    let options = EngineOptions { isa: Isa::best(), threads: 1, max_batch_tokens: 400, max_context: 400 };
    let mut group = Threads::group(2, Duration::from_secs(60));
    let other = group.pop();
    let own = Box::new(group.remove(0));
    let engine = Engine::load(&plan.config, &plan.stages[0].shards[0], &plan.kv, options, &model, own, &|_| {});
    let mut engine = engine.expect("a loadable shard");
    let mut rig = Rig::new(&model, layout);
    let step = rig.step(&[Part::new(1, &[1, 2, 3]).all_logits()]);
    let error = std::thread::scope(|scope| {
        let running = scope.spawn(|| engine.run(&step, &[], &mut NoMasks));
        drop(other);
        running.join().expect("no panic")
    });
    let error = error.expect_err("a lost rank");
    assert_eq!((error.reason(), std::error::Error::source(&error).is_some()), ("collective_failed", true), "{error}");
    let mut group = Threads::group(2, Duration::from_secs(60));
    rig.engines[0][1].set_collective(Box::new(group.pop().expect("rank 1")));
    engine.set_collective(Box::new(group.pop().expect("rank 0")));
    engine.reset();
    rig.engines[0][0] = engine;
    let outputs = rig.run_step(&step, &mut NoMasks).expect("a valid step");
    assert!(logits(&outputs) == logits(&Rig::new(&model, Layout::default()).run(&[Part::new(1, &[1, 2, 3]).all_logits()])));
}
