//! Encoders: whole sequences in one step, each as if it were alone, whatever computes them.

use engine::{InvalidStep, NoMasks, StepError};
use kernels::Isa;
use plan::{
    shard::KvDType,
    step::{Input, Output, OutputValue, Pooled, Pooling, Sampling, Step, TokenId, WantKind},
};

use crate::{
    model::{self, Model, Recipe},
    rig::{Layout, Part, Rig, bits, joined, prompt},
};

const MEAN: WantKind = WantKind::Pooled(Pooled { over: Pooling::Mean, dimensions: 0, normalize: true });
const FIRST: WantKind = WantKind::Pooled(Pooled { over: Pooling::First, dimensions: 7, normalize: false });
const TOKEN: WantKind = WantKind::Pooled(Pooled::HIDDEN);

fn recipes() -> [Recipe; 3] {
    [model::bert(model::mixed), model::bert(model::small), model::bert(model::floats)]
}

/// Texts of many lengths, the later ones pairs: ids, and where the second text begins.
fn texts(vocab: usize) -> Vec<(Vec<TokenId>, usize)> {
    let lengths = [1, 5, 16, 17, 40, 64, 65, 90];
    (0..).zip(lengths).map(|(i, len)| (prompt(50 + i, len, vocab), if i > 3 { len / 3 } else { 0 })).collect()
}

fn part(sequence: u64, (ids, second): &(Vec<TokenId>, usize)) -> Part {
    let last = ids.len() - 1;
    let part = Part { second: *second, ..Part::new(sequence, ids) };
    let part = part.want(0, FIRST).want(last, WantKind::Classes).want(last, MEAN).want(last, TOKEN);
    // Two of a kind are two results.
    part.want(last, WantKind::Classes)
}

/// The bits of each sequence's vectors.
fn vectors(outputs: &[Output]) -> Vec<(u64, u32, Vec<u32>)> {
    let of = |o: &Output| match &o.value {
        OutputValue::Vector(v) => (o.sequence, o.position, bits(v)),
        other => panic!("{other:?} in place of a vector"),
    };
    outputs.iter().map(of).collect()
}

fn together(model: &Model, layout: Layout) -> Vec<(u64, u32, Vec<u32>)> {
    let texts = texts(model.header.config.vocab);
    let parts: Vec<Part> = (0..).zip(&texts).map(|(i, text)| part(i, text)).collect();
    let mut rig = Rig::new(model, layout);
    let whole = vectors(&rig.run(&parts));
    // What a step leaves behind changes nothing.
    (0..parts.len() as u64).for_each(|s| rig.free(s));
    assert!(vectors(&rig.run(&parts)) == whole);
    whole
}

fn alone(model: &Model) -> Vec<(u64, u32, Vec<u32>)> {
    let texts = texts(model.header.config.vocab);
    (0..).zip(&texts).flat_map(|(i, text)| vectors(&Rig::new(model, Layout::default()).run(&[part(i, text)]))).collect()
}

#[test]
fn batch_mates_threads_instructions_ranks_and_stages_change_no_bit() {
    for recipe in recipes() {
        let model = recipe.build();
        let expected = alone(&model);
        let width = model.header.config.hidden;
        let lengths: Vec<usize> = expected.iter().take(5).map(|(.., v)| v.len()).collect();
        assert_eq!(lengths, [7, 3, width, width, 3]);
        for isa in Isa::available() {
            for threads in [1, 3] {
                assert!(together(&model, Layout { isa, threads, ..Layout::default() }) == expected, "{isa}, {threads} threads");
            }
        }
        for (pipeline, tensor) in [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2)] {
            let layout = Layout { pipeline, tensor, threads: 2, ..Layout::default() };
            assert!(together(&model, layout) == expected, "{pipeline} stages of {tensor} ranks");
        }
        let other = Recipe { seed: 77, ..recipe }.build();
        assert!(together(&other, Layout::default()) != expected, "other weights went unseen");
        let layout = Layout { tensor: 2, ..Layout::default() };
        let (mut rig, mut foreign) = (Rig::new(&model, layout), Rig::new(&other, layout));
        std::mem::swap(&mut rig.engines[0][1], &mut foreign.engines[0][1]);
        for (engine, collective) in rig.engines[0].iter_mut().zip(joined(2)) {
            engine.set_collective(collective);
        }
        assert!(vectors(&rig.run(&[part(0, &texts(2500)[0])])) != expected[..5], "a rank of another model went unseen");
    }
}

/// A token sees those behind it, and types and the place of the border matter.
#[test]
fn everything_of_a_sequence_reaches_every_token() {
    let model = model::bert(model::floats).build();
    let ids = prompt(9, 50, 2500);
    let run = |ids: &[TokenId], second| {
        let outputs = Rig::new(&model, Layout::default()).run(&[Part { second, ..Part::new(1, ids) }.want(0, TOKEN)]);
        vectors(&outputs)
    };
    let plain = run(&ids, 0);
    let mut other = ids.clone();
    other[49] ^= 1;
    assert!(run(&other, 0) != plain, "the last id");
    assert!(run(&ids, 20) != plain && run(&ids, 20) != run(&ids, 21), "types");
}

#[test]
fn what_is_not_of_its_kind_is_refused() {
    let encoder = model::bert(model::floats).build();
    let decoder = model::gpt2(model::floats).build();
    let ids = prompt(3, 20, 2500);
    let refused = |model: &Model, change: &dyn Fn(&mut Step)| {
        let mut rig = Rig::new(model, Layout::default());
        let mut step = rig.step(&[Part::new(1, &ids)]);
        change(&mut step);
        match rig.run_step(&step, &mut NoMasks) {
            Err(StepError::Invalid { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    };
    let want = |kind: WantKind| move |step: &mut Step| step.sequences[0].wants = vec![plan::step::Want { offset: 19, kind: kind.clone() }];
    let unsuited =
        |error: InvalidStep, got: &str| assert!(matches!(&error, InvalidStep::Unsuited { got: it, .. } if *it == got), "{error}");
    unsuited(refused(&encoder, &want(WantKind::Sample)), "tokens or logits");
    unsuited(refused(&encoder, &want(WantKind::Logits)), "tokens or logits");
    unsuited(refused(&decoder, &want(MEAN)), "a vector of its whole input");
    unsuited(refused(&decoder, &want(WantKind::Classes)), "labels");
    unsuited(refused(&decoder, &|step| step.sequences[0].second = 4), "a second text");
    unsuited(refused(&encoder, &|step| step.sequences[0].second = 20), "a second text");
    let beginning = |step: &mut Step| {
        step.sequences[0].begin = Some(Box::new(plan::step::Begin { ids: ids.clone(), prompt_len: 20, sampling: Sampling::default() }));
    };
    unsuited(refused(&encoder, &beginning), "a position, settings or a drawn token");
    let wide = WantKind::Pooled(Pooled { dimensions: 257, ..Pooled::HIDDEN });
    assert_eq!(refused(&encoder, &want(wide)), InvalidStep::Dimensions { sequence: 1, got: 257, width: 256 });

    // A second step of the same sequence is not a continuation.
    let mut rig = Rig::new(&encoder, Layout::default());
    rig.run(&[Part::new(1, &ids)]);
    let step = rig.step(&[Part::new(1, &ids)]);
    assert_eq!(step.sequences[0].first_position, 20);
    assert!(matches!(step.sequences[0].input, Input::Ids(_)));
    let Err(StepError::Invalid { source, .. }) = rig.run_step(&step, &mut NoMasks) else { panic!("it went on") };
    unsuited(source, "a position, settings or a drawn token");

    let mut headless = model::bert(model::floats);
    headless.config.encoder = headless.config.encoder.map(|e| plan::model::Encoder { token_types: e.token_types, classifier: None });
    let mut built = encoder.header.clone();
    built.config = headless.config;
    built.tensors.retain(|id, _| !format!("{:?}", id.role).starts_with("Pooler") && !format!("{:?}", id.role).starts_with("Classifier"));
    let headless = Model { header: built, bytes: encoder.bytes.clone(), read: 0.into() };
    unsuited(refused(&headless, &want(WantKind::Classes)), "labels");
}

/// The plan of an encoder has no KV cache, and refuses what would need one.
#[test]
fn plans_of_encoders_have_no_cache() {
    let model = model::bert(model::floats).build();
    let plan = crate::rig::plan(&model, Layout::default());
    assert!(plan.kv.groups.is_empty() && plan.stages[0].shards[0].kv_bytes == 0 && plan.kv.dtype == KvDType::F32);
    let capacity = plan::planner::Capacity { memory_bytes: None };
    let spec = plan::planner::Spec { max_batch_tokens: 100, ..plan::planner::Spec::default() };
    assert_eq!(plan::planner::plan(&spec, &model.header, &capacity).expect("a plan").max_context, 100);
    let longer = plan::planner::Spec { max_context: Some(101), ..spec.clone() };
    let error = plan::planner::plan(&longer, &model.header, &capacity).expect_err("a sequence is longer than a step");
    assert!(error.to_string().starts_with("sequences of 101 tokens in steps of 100"), "{error}");
    let cached = plan::planner::Spec { kv_dtype: Some(KvDType::F16), ..spec };
    assert!(plan::planner::plan(&cached, &model.header, &capacity).is_err());
}
