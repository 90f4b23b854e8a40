//! Vocabularies that are screened: the likeliest tokens by a copy in 4 bits, and all else as it is without.

use engine::{Engine, Timings};
use plan::{
    dtype::DType,
    model::{Role, TensorId},
    planner::Vocabulary,
    step::{Output, OutputValue, Sampling, TokenId, WantKind},
};

use crate::{
    model::{self, Model, Noise},
    rig::{Layout, Part, Rig, prompt, token, tokens},
};

const VOCAB: usize = 2500;

fn layout((pipeline, tensor): (usize, usize), screening: bool) -> Layout {
    Layout { pipeline, tensor, threads: 2, vocabulary: Vocabulary::Last, screening, ..Layout::default() }
}

/// What the workers that multiply the vocabulary say.
fn timings(rig: &Rig) -> Vec<Timings> {
    rig.engines.last().expect("a stage").iter().map(Engine::timings).collect()
}

fn models() -> [Model; 2] {
    [model::gpt2(model::mixed).build(), model::gpt2(model::floats).build()]
}

/// Settings for which the likeliest tokens are enough.
fn few() -> [Sampling; 3] {
    [
        Sampling::default(),
        Sampling { temperature: 1.4, top_k: 20, seed: 3, ..Sampling::default() },
        Sampling { temperature: 0.9, top_k: 40, top_p: 0.9, seed: 4, ..Sampling::default() },
    ]
}

#[test]
fn draws_of_the_likeliest_are_those_of_the_whole_vocabulary() {
    for model in models() {
        let mut whole = Rig::new(&model, layout((1, 1), false));
        let expected: Vec<Vec<TokenId>> = (1..)
            .zip(few())
            .map(|(sequence, sampling)| tokens(&whole.generate(sequence, &prompt(sequence, 20, VOCAB), &sampling, 60)))
            .collect();
        assert!(timings(&whole).iter().all(|t| t.screened == 0));
        for parallelism in [(1, 1), (2, 1), (1, 2)] {
            let mut rig = Rig::new(&model, layout(parallelism, true));
            for ((sequence, sampling), expected) in (1..).zip(few()).zip(&expected) {
                let got = tokens(&rig.generate(sequence, &prompt(sequence, 20, VOCAB), &sampling, 60));
                assert_eq!(got, *expected, "{sampling:?} on {parallelism:?}");
            }
            assert!(timings(&rig).iter().all(|t| t.screened == 180), "{:?}", timings(&rig));
            // Together with others, as many as are screened and more.
            for together in [2, 3, 6] {
                let mut next: Vec<Part> = (0..together)
                    .map(|i| {
                        let (sequence, ids) = (100 * together + i, prompt(1, 20, VOCAB));
                        Part::new(sequence, &ids).begin(&ids, ids.len(), &Sampling::default()).sample()
                    })
                    .collect();
                for expected in &expected[0][..10] {
                    let outputs = rig.run(&next);
                    assert!(outputs.iter().all(|output| token(&output.value) == *expected), "{together} together on {parallelism:?}");
                    next = outputs.iter().map(|o| Part::new(o.sequence, &[token(&o.value)]).sample()).collect();
                }
            }
            assert!(timings(&rig).iter().all(|t| t.screened == 200), "six at once are not screened: {:?}", timings(&rig));
        }
    }
}

#[test]
fn what_asks_for_more_has_the_bits_it_has_without() {
    let wants: [fn(Part) -> Part; 3] =
        [|part| part.want(19, WantKind::Logits), |part| part.want(19, WantKind::Score { target: 7, top: 3 }), Part::sample];
    let settings = [
        Sampling { logprobs: Some(3), ..Sampling::default() },
        Sampling { temperature: 1.0, seed: 5, ..Sampling::default() },
        Sampling { temperature: 0.7, top_p: 0.8, seed: 6, ..Sampling::default() },
        Sampling { repetition_penalty: 1.2, ..Sampling::default() },
        Sampling { temperature: 1.0, top_k: 41, seed: 7, ..Sampling::default() },
    ];
    for model in models() {
        let run = |screening: bool| {
            let mut rig = Rig::new(&model, layout((1, 1), screening));
            let mut outputs: Vec<Output> = Vec::new();
            for (sequence, sampling) in (1..).zip(&settings) {
                let ids = prompt(sequence, 20, VOCAB);
                for (i, want) in (0..).zip(wants) {
                    outputs.extend(rig.run(&[want(Part::new(10 * sequence + i, &ids).begin(&ids, ids.len(), sampling))]));
                }
            }
            (outputs, timings(&rig)[0].screened)
        };
        let ((whole, _), (screened, products)) = (run(false), run(true));
        assert_eq!((whole == screened, products), (true, 0));
    }
}

/// Rows that only more bits than four tell apart.
fn alike() -> Model {
    let mut model = model::gpt2(model::floats).build();
    let table = &model.header.tensors[&TensorId { layer: None, role: Role::Embedding }];
    assert_eq!((table.dtype, table.shape[0]), (DType::F32, VOCAB));
    let (start, row) = (table.offset as usize, 4 * table.shape[1]);
    let first = model.bytes[start..start + row].to_vec();
    let mut noise = Noise::new(8);
    for bytes in model.bytes[start..start + VOCAB * row].chunks_exact_mut(row) {
        for (bytes, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(first.as_chunks::<4>().0) {
            *bytes = (f32::from_le_bytes(*value) * (1.0 + 1e-3 * noise.float())).to_le_bytes();
        }
    }
    model
}

/// The control of the tests above, and of the comparison that runs beside requests.
#[test]
fn a_vocabulary_that_four_bits_do_not_tell_apart_is_seen() {
    let model = alike();
    let generate = |screening: bool, count: usize| {
        let mut rig = Rig::new(&model, layout((1, 1), screening));
        let drawn: Vec<OutputValue> = rig.generate(1, &prompt(1, 20, VOCAB), &Sampling::default(), count);
        (tokens(&drawn), timings(&rig)[0])
    };
    let ((whole, _), (screened, said)) = (generate(false, 30), generate(true, 260));
    assert_ne!(whole, screened[..30]);
    assert_eq!((said.screened, said.screens_checked, said.screens_missed), (260, 1, 1));
    // The product that was compared was whole.
    let other = model::gpt2(model::mixed).build();
    let mut rig = Rig::new(&other, layout((1, 1), true));
    rig.generate(1, &prompt(1, 20, VOCAB), &Sampling::default(), 256);
    assert_eq!((timings(&rig)[0].screens_checked, timings(&rig)[0].screens_missed), (1, 0));
}
