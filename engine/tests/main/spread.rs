//! Steps whose logits wait for the first stage's part of the vocabulary, while others run.

use std::sync::Arc;

use engine::{InvalidStep, LoadShardError, NoMasks, Question, StageOutput, StepError};
use plan::step::{Output, Sampling, Step, TokenId, WantKind};

use crate::{
    model::{self, Model},
    rig::{Layout, Part, Rig, prompt, token},
};

const VOCAB: usize = 2500;

fn tied() -> Model {
    model::gpt2(model::mixed).build()
}

/// Runs the layers of a step on two stages, and the last one's part of the vocabulary.
fn ask(rig: &mut Rig, step: &Step) -> Arc<Question> {
    let question = run_layers(rig, step);
    rig.engines[1][0].multiply().expect("no other ranks");
    question
}

fn run_layers(rig: &mut Rig, step: &Step) -> Arc<Question> {
    let StageOutput::Hidden(hidden) = rig.engines[0][0].run(step, &[], &mut NoMasks).expect("a valid step") else { panic!("no states") };
    let output = rig.engines[1][0].run(step, &hidden, &mut NoMasks).expect("a valid step");
    let StageOutput::Question(question) = output else { panic!("{output:?} in place of a question") };
    question
}

/// A prompt with scores, and a draw.
fn begin(sequence: u64, sampling: &Sampling) -> Part {
    let ids = prompt(sequence, 40, VOCAB);
    let scored = Part::new(sequence, &ids).begin(&ids, ids.len(), sampling).want(7, WantKind::Score { target: 2400, top: 3 });
    scored.want(8, WantKind::Score { target: 3, top: 0 }).sample()
}

fn refused<T: std::fmt::Debug>(result: Result<T, StepError>) -> InvalidStep {
    match result.expect_err("it is refused") {
        StepError::Invalid { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn steps_run_while_others_wait_and_change_no_bit() {
    let model = tied();
    let settings = [
        Sampling { logprobs: Some(4), ..Sampling::default() },
        Sampling { temperature: 1.1, seed: 7, top_k: 20, ..Sampling::default() },
        Sampling { temperature: 0.8, seed: 8, repetition_penalty: 1.3, ..Sampling::default() },
        Sampling { temperature: 1.0, seed: 9, ..Sampling::default() },
    ];
    let mut alone = Rig::new(&model, Layout::default());
    let mut expected: Vec<Vec<Output>> = Vec::new();
    let next = |outputs: &[Output]| Part::new(outputs[0].sequence, &[token(&outputs[outputs.len() - 1].value)]).sample();
    for (sequence, s) in (1..).zip(&settings) {
        let first = alone.run(&[begin(sequence, s)]);
        let second = alone.run(&[next(&first)]);
        expected.extend([first, second]);
    }
    // All four prompts are asked before the first is answered, and a step without draws runs between.
    let mut rig = Rig::new(&model, Layout::spread(2, 1));
    let mut asked = Vec::new();
    for (sequence, s) in (1..).zip(&settings) {
        let step = rig.step(&[begin(sequence, s)]);
        asked.push(run_layers(&mut rig, &step));
    }
    assert_eq!(refused(rig.finish(&asked[0])), InvalidStep::NotAsked, "the last stage's part is missing");
    asked.iter().for_each(|_| rig.engines[1][0].multiply().expect("no other ranks"));
    let silent = rig.step(&[Part::new(9, &[1, 2, 3])]);
    assert!(rig.run_step(&silent, &mut NoMasks).expect("a valid step").is_empty());
    let (mut got, mut seconds) = (Vec::new(), Vec::new());
    for question in asked {
        let first = rig.finish(&question).expect("its parts");
        let step = rig.step(&[next(&first)]);
        assert_eq!(rig.engines[1][0].unfinished(&step), None, "its draws are finished");
        seconds.push(ask(&mut rig, &step));
        got.push(first);
    }
    assert_eq!(refused(rig.finish(&seconds[1])), InvalidStep::NotAsked, "another waits before it");
    for (second, at) in seconds.iter().zip((1..).step_by(2)) {
        got.insert(at, rig.finish(second).expect("its parts"));
    }
    assert_eq!(got, expected);
    // Control: an answer to another question is another result.
    let mut other = Rig::new(&model, Layout::spread(2, 1));
    let step = other.step(&[begin(1, &settings[0])]);
    let mut question = (*ask(&mut other, &step)).clone();
    question.states.iter_mut().for_each(|value| *value *= 3.0);
    assert!(other.finish(&question).expect("parts of the right length") != expected[0]);
}

#[test]
fn a_sequence_goes_on_only_when_its_draw_is_finished() {
    let mut rig = Rig::new(&tied(), Layout::spread(2, 1));
    let step = rig.step(&[begin(1, &Sampling::default())]);
    let question = ask(&mut rig, &step);
    let run = |rig: &mut Rig, step: &Step| rig.engines[1][0].run(step, &vec![0.0; step.tokens() * 256], &mut NoMasks);
    // Neither its next token nor its end may come before, under another number or none.
    let next = Step { id: 7, ..rig.step(&[Part::new(1, &[5]).sample()]) };
    assert_eq!(rig.engines[1][0].unfinished(&next), Some(1));
    assert_eq!(refused(run(&mut rig, &next)), InvalidStep::Unfinished { sequence: 1 });
    let free = Step { id: 8, frees: vec![1], ..Step::default() };
    assert_eq!(refused(run(&mut rig, &free)), InvalidStep::Unfinished { sequence: 1 });
    assert_eq!(rig.finish(&question).expect("its parts").len(), 3);
    assert!(matches!(run(&mut rig, &free), Ok(StageOutput::Outputs(none)) if none.is_empty()));
    // Scores alone hold nothing up.
    let ids: Vec<TokenId> = prompt(3, 30, VOCAB);
    let scored = |from: usize| {
        (from..from + 10).fold(Part::new(2, &ids[from..from + 10]), |part, at| part.want(at - from, WantKind::Score { target: 1, top: 2 }))
    };
    rig.steps = 20;
    for from in [0, 10, 20] {
        let step = rig.step(&[scored(from)]);
        assert_eq!(rig.engines[1][0].unfinished(&step), None);
        ask(&mut rig, &step);
    }
    // A new session knows nothing of them.
    rig.engines.iter_mut().flatten().for_each(engine::Engine::reset);
    assert_eq!(refused(rig.engines[1][0].finish(21, &[Vec::new()])), InvalidStep::NotAsked);
}

#[test]
fn parts_and_questions_that_cannot_be_are_refused() {
    let mut rig = Rig::new(&tied(), Layout::spread(2, 1));
    let step = rig.step(&[begin(1, &Sampling::default())]);
    let question = ask(&mut rig, &step);
    let part = rig.engines[0][0].lend(&question).expect("a question of this model");
    let finish = |rig: &mut Rig, step: u64, parts: &[Vec<u8>]| refused(rig.engines[1][0].finish(step, parts));
    assert_eq!(finish(&mut rig, step.id + 1, std::slice::from_ref(&part)), InvalidStep::NotAsked);
    let lent = Rig::new(&tied(), Layout::spread(2, 1)).plan.stages[0].shards[0].product();
    assert_eq!(part.len(), engine::part_bytes(&question.needs, &lent));
    let short = part[..part.len() - 1].to_vec();
    let said = finish(&mut rig, step.id, &[short]);
    assert_eq!(said, InvalidStep::Parts { got: vec![part.len() - 1], expected: vec![part.len()] });
    let lend = |rig: &mut Rig, change: &dyn Fn(&mut Question)| {
        let mut question = (*question).clone();
        change(&mut question);
        refused(rig.engines[0][0].lend(&question))
    };
    let changes: [&dyn Fn(&mut Question); 3] =
        [&|q| q.states.truncate(5), &|q| q.needs[0].targets[0] = VOCAB as TokenId, &|q| q.needs[1].top = VOCAB + 1];
    for change in changes {
        assert!(matches!(lend(&mut rig, change), InvalidStep::Question { rows: 3, .. }));
    }
}

#[test]
fn cuts_that_are_not_between_tiles_are_refused() {
    let model = tied();
    let plan = crate::rig::plan(&model, Layout::spread(2, 1));
    let options = engine::EngineOptions { isa: kernels::Isa::best(), threads: 1, max_batch_tokens: 400, max_context: 400 };
    for cuts in [vec![1000], vec![3000], vec![1024, 1024]] {
        let mut shard = plan.stages[1].shards[0].clone();
        shard.splits.cuts = cuts;
        let collective = crate::rig::joined(1).remove(0);
        let error = engine::Engine::load(&plan.config, &shard, &plan.kv, options, &model, collective, &|_| {}).err().expect("a refusal");
        assert!(matches!(&error, LoadShardError::Plan { what: "where the vocabulary is cut", .. }), "{error}");
    }
}
