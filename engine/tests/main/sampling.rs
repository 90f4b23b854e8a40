//! Draws and scores: what they mean, and that they do not depend on how they were computed.

use std::collections::HashMap;

use engine::{InvalidStep, MaskSource, NoMasks, StepError};
use plan::step::{Logprobs, Mask, OutputValue, Pooled, Sampling, SequenceId, TokenId, WantKind};

use crate::{
    model::{self, Model},
    rig::{Layout, Part, Rig, prompt, token, tokens},
};

const VOCAB: usize = 2500;

/// Settings of every kind.
fn settings() -> Vec<Sampling> {
    let warm = Sampling { temperature: 0.9, seed: 5, ..Sampling::default() };
    vec![
        Sampling::default(),
        Sampling { logprobs: Some(5), ..Sampling::default() },
        Sampling { top_k: 5, logprobs: Some(9), ..warm.clone() },
        Sampling { top_k: 50, top_p: 0.8, min_p: 0.05, ..warm.clone() },
        Sampling { top_p: 0.7, ..warm.clone() },
        Sampling { top_p: 0.999, temperature: 3.0, ..warm.clone() },
        Sampling { min_p: 0.2, ..warm.clone() },
        Sampling { logprobs: Some(0), ..warm.clone() },
        Sampling { repetition_penalty: 1.4, presence_penalty: 0.5, frequency_penalty: 0.3, logprobs: Some(3), ..warm.clone() },
        Sampling { repetition_penalty: 3.0, ..Sampling::default() },
        Sampling { presence_penalty: 4.0, ..Sampling::default() },
        Sampling { logit_bias: vec![(3, 7.0), (2400, 8.0)], ..warm.clone() },
        Sampling { suppress: (0..VOCAB as u32).filter(|id| id % 10 > 0).collect(), min_tokens: 4, ..Sampling::default() },
        Sampling { top_k: 3, choice: 2, ..warm.clone() },
        Sampling { temperature: 2.5, ..warm.clone() },
        warm,
    ]
}

/// Twelve tokens of each of the settings, all sequences together.
fn generate_all(model: &Model, layout: Layout) -> Vec<Vec<OutputValue>> {
    let mut rig = Rig::new(model, Layout { sequences: 40, ..layout });
    let begin = |(i, s): (usize, &Sampling)| {
        let ids = prompt(i as u64, 5 + i, VOCAB);
        Part::new(i as u64, &ids).begin(&ids, ids.len(), s).sample()
    };
    let mut parts: Vec<Part> = settings().iter().enumerate().map(begin).collect();
    let mut values = vec![Vec::new(); parts.len()];
    for _ in 0..12 {
        let outputs = rig.run(&parts);
        assert_eq!(outputs.len(), values.len());
        for output in outputs {
            let sequence = output.sequence as usize;
            assert_eq!(output.position as usize, 5 + sequence + values[sequence].len() - 1);
            parts[sequence] = Part::new(output.sequence, &[token(&output.value)]).sample();
            values[sequence].push(output.value);
        }
    }
    values
}

#[test]
fn draws_are_the_same_on_any_plan() {
    let model = model::llama(model::mixed).build();
    let expected = generate_all(&model, Layout::default());
    for (pipeline, tensor) in [(1, 2), (1, 3), (1, 4), (2, 2)] {
        let got = generate_all(&model, Layout { pipeline, tensor, threads: 2, ..Layout::default() });
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "settings {i} with {pipeline} stages of {tensor} ranks");
        }
    }
    // Each of them also alone.
    for (i, s) in settings().iter().enumerate() {
        let mut rig = Rig::new(&model, Layout::default());
        let ids = prompt(i as u64, 5 + i, VOCAB);
        assert_eq!(rig.generate(1, &ids, s, 12), expected[i], "settings {i}");
        if s.temperature > 0.0 {
            let other = rig.generate(2, &ids, &Sampling { seed: 6, ..s.clone() }, 12);
            assert_ne!(tokens(&other), tokens(&expected[i]), "another seed, settings {i}");
        }
    }
}

#[test]
fn draws_are_the_same_where_the_vocabulary_is_spread() {
    let model = model::gpt2(model::mixed).build();
    let expected = generate_all(&model, Layout::default());
    for (pipeline, tensor) in [(2, 1), (3, 1), (2, 2), (2, 3)] {
        let got = generate_all(&model, Layout::spread(pipeline, tensor));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "settings {i} with {pipeline} stages of {tensor} ranks");
        }
    }
    assert!(generate_all(&model::Recipe { seed: 77, ..model::gpt2(model::mixed) }.build(), Layout::spread(2, 1)) != expected);
}

#[test]
fn a_resumed_sequence_continues_as_if_undisturbed() {
    let model = model::llama(model::mixed).build();
    let mut seen = 0;
    for (i, s) in settings().iter().enumerate() {
        let ids = prompt(i as u64, 20, VOCAB);
        let mut rig = Rig::new(&model, Layout::default());
        let whole = rig.generate(1, &ids, s, 16);
        for cut in [1, 3, 9] {
            let known: Vec<TokenId> = ids.iter().copied().chain(tokens(&whole[..cut])).collect();
            let resume = |rig: &mut Rig, sequence: SequenceId, prompt_len: usize| {
                // Everything known in two chunks, then on.
                rig.run(&[Part::new(sequence, &known[..8]).begin(&known, prompt_len, s)]);
                let mut values = Vec::new();
                let mut part = Part::new(sequence, &known[8..]).sample();
                while values.len() < 16 - cut {
                    let output = rig.run(&[part]).pop().expect("one output");
                    part = Part::new(sequence, &[token(&output.value)]).sample();
                    values.push(output.value);
                }
                values
            };
            rig.free(1);
            assert_eq!(resume(&mut rig, 2, ids.len()), whole[cut..], "settings {i} cut at {cut}");
            // Control: with all known ids taken for prompt, penalties and the least number of tokens count from elsewhere.
            seen += usize::from(resume(&mut rig, 3, known.len()) != whole[cut..]);
            rig.free(2);
            rig.free(3);
            rig.generate(1, &ids, s, 1);
        }
    }
    assert!(seen >= 3, "a wrong prompt length went unseen but for {seen} cases");
}

/// Log-probabilities of all tokens, in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    logits.iter().map(|&x| f64::from(x) - max - sum.ln()).collect()
}

/// Checks log-probabilities of `id` against logits.
fn check_logprobs(got: &Logprobs, id: TokenId, top: usize, logits: &[f32]) {
    let expected = log_softmax(logits);
    let close = |got: f32, id: TokenId| (f64::from(got) - expected[id as usize]).abs() < 2e-6 * expected[id as usize].abs().max(1.0);
    assert!(close(got.token, id), "{} for {id}, expected {}", got.token, expected[id as usize]);
    let mut order: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), order[..top]);
    assert!(got.top.iter().all(|&(id, p)| close(p, id)));
    // Control: a neighbour's probability is another one.
    assert!(!close(got.token, (id + 1) % logits.len() as TokenId));
}

#[test]
fn log_probabilities_are_those_of_the_raw_logits() {
    let model = model::llama(model::mixed).build();
    let ids = prompt(3, 30, VOCAB);
    let s = Sampling {
        temperature: 0.3,
        top_k: 4,
        repetition_penalty: 1.5,
        logit_bias: vec![(9, 30.0)],
        logprobs: Some(4),
        ..Sampling::default()
    };
    for tensor in [1, 3] {
        let mut rig = Rig::new(&model, Layout { tensor, ..Layout::default() });
        // All kinds at one offset, in this order.
        let part = Part::new(1, &ids)
            .begin(&ids, ids.len(), &s)
            .want(4, WantKind::Score { target: ids[5], top: 3 })
            .want(29, WantKind::Score { target: 2499, top: 0 })
            .want(29, WantKind::Logits)
            .want(29, WantKind::Pooled(Pooled::HIDDEN))
            .want(29, WantKind::Sample);
        let again = Part::new(2, &ids).want(4, WantKind::Logits);
        let values: Vec<OutputValue> = rig.run(&[part, again]).into_iter().map(|o| o.value).collect();
        let [
            OutputValue::Score(early),
            OutputValue::Score(late),
            OutputValue::Logits(last),
            OutputValue::Vector(hidden),
            OutputValue::Token { id, logprobs: Some(drawn) },
            OutputValue::Logits(fourth),
        ] = values.as_slice()
        else {
            panic!("{values:?}")
        };
        check_logprobs(early, ids[5], 3, fourth);
        check_logprobs(late, 2499, 0, last);
        check_logprobs(drawn, *id, 4, last);
        assert_eq!((*id, hidden.len()), (9, 256), "a bias of 30 decides");
    }
}

#[test]
fn greedy_takes_the_likeliest_of_what_is_left() {
    let model = model::llama(model::mixed).build();
    let ids = prompt(4, 12, VOCAB);
    let mut rig = Rig::new(&model, Layout::default());
    let mut sequence = 0;
    let mut draw = |s: &Sampling| {
        sequence += 1;
        let values = rig.run(&[Part::new(sequence, &ids).begin(&ids, ids.len(), s).want(11, WantKind::Logits).sample()]);
        let OutputValue::Logits(logits) = &values[0].value else { panic!("{values:?}") };
        (logits.clone(), token(&values[1].value))
    };
    let likeliest = |logits: &[f32]| {
        let best = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
        logits.iter().position(|&x| x == best).expect("a logit") as TokenId
    };
    let (mut logits, first) = draw(&Sampling::default());
    assert_eq!(first, likeliest(&logits));
    logits[first as usize] = f32::NEG_INFINITY;
    let second = likeliest(&logits);
    let suppress = Sampling { suppress: vec![first], min_tokens: 1, ..Sampling::default() };
    assert_eq!(draw(&suppress).1, second);
    assert_eq!(draw(&Sampling { min_tokens: 0, ..suppress }).1, first);
    assert_eq!(draw(&Sampling { logit_bias: vec![(first, -100.0)], ..Sampling::default() }).1, second);
    assert_eq!(draw(&Sampling { temperature: 1e-30, seed: 3, ..Sampling::default() }).1, first);
    assert_eq!(draw(&Sampling { temperature: 5.0, top_k: 1, ..Sampling::default() }).1, first);
    assert_eq!(draw(&Sampling { temperature: 5.0, top_p: 0.0, ..Sampling::default() }).1, first);
    assert_eq!(draw(&Sampling { temperature: 5.0, min_p: 1.0, ..Sampling::default() }).1, first);
}

/// Hands out the masks of each sequence in order.
struct Masks(HashMap<SequenceId, Vec<Mask>>);

impl MaskSource for Masks {
    fn mask(&mut self, _step: u64, sequence: SequenceId) -> Result<Mask, Box<dyn std::error::Error + Send + Sync>> {
        let left = self.0.get_mut(&sequence).filter(|m| !m.is_empty());
        left.map(|m| m.remove(0)).ok_or_else(|| "no mask left".into())
    }
}

#[test]
fn masks_restrict_each_draw() {
    let model = model::llama(model::mixed).build();
    let ids = prompt(4, 12, VOCAB);
    let masked = Sampling { masked: true, logprobs: Some(2), ..Sampling::default() };
    let warm = Sampling { temperature: 2.0, seed: 1, ..masked.clone() };
    let mut bits = vec![0; VOCAB.div_ceil(8)];
    bits[100] = 0b101;
    let list = Mask::Ids(vec![3, 1500, 2499]);
    for tensor in [1, 2] {
        let mut rig = Rig::new(&model, Layout { tensor, ..Layout::default() });
        let mut masks = Masks(HashMap::from([
            (1, vec![list.clone(), Mask::Unchanged, Mask::Bits(bits.clone())]),
            (2, vec![Mask::Bits(bits.clone()), list.clone(), Mask::Unchanged]),
            (4, vec![Mask::Ids(Vec::new())]),
        ]));
        let begin = |sequence, s: &Sampling| Part::new(sequence, &ids).begin(&ids, ids.len(), s).sample();
        let mut parts = vec![begin(1, &masked), begin(2, &warm), begin(3, &Sampling::default())];
        let allowed: [[&[TokenId]; 2]; 3] = [[&[3, 1500, 2499], &[800, 802]], [&[3, 1500, 2499]; 2], [&[800, 802], &[3, 1500, 2499]]];
        for allowed in allowed {
            let step = rig.step(&parts);
            let outputs = rig.run_step(&step, &mut masks).expect("a valid step");
            let drawn: Vec<TokenId> = outputs.iter().map(|o| token(&o.value)).collect();
            assert!(allowed[0].contains(&drawn[0]) && allowed[1].contains(&drawn[1]), "{drawn:?}");
            let OutputValue::Token { logprobs: Some(logprobs), .. } = &outputs[0].value else { panic!("{outputs:?}") };
            assert!(logprobs.top.iter().all(|t| t.1 > logprobs.token), "what is likely is not allowed");
            parts = outputs.iter().zip(&drawn).map(|(o, id)| Part::new(o.sequence, &[*id]).sample()).collect();
        }
        // New settings keep the mask in force.
        let cooler = Sampling { temperature: 0.5, ..warm.clone() };
        let mut known = ids.clone();
        known.resize(ids.len() + 2, 0);
        let mut masks_left = Masks(HashMap::from([(2, vec![Mask::Unchanged])]));
        let again = Part::new(2, &parts[1].ids).begin(&known, ids.len(), &cooler).sample();
        let step = rig.step(&[again]);
        let outputs = rig.run_step(&step, &mut masks_left).expect("a valid step");
        assert!([3, 1500, 2499].contains(&token(&outputs[0].value)));
        // A mask that allows nothing fails its sequence alone.
        let step = rig.step(&[begin(4, &masked), parts.pop().expect("sequence 3")]);
        let outputs = rig.run_step(&step, &mut masks).expect("a valid step");
        assert!(matches!(outputs[0].value, OutputValue::Failed(_)) && matches!(outputs[1].value, OutputValue::Token { .. }));
        let step = rig.step(&[begin(5, &masked)]);
        let error = rig.run_step(&step, &mut masks).expect_err("no mask");
        assert!(matches!(&error, StepError::Mask { sequence: 5, .. }) && error.reason() == "mask_missing", "{error}");
    }
}

/// What few allowed tokens leave out of the vocabulary product changes no draw: with log-probabilities, and as bits, the whole is computed.
#[test]
fn few_allowed_rows_draw_what_the_whole_product_draws() {
    let (llama, tied) = (model::llama(model::mixed).build(), model::gpt2(model::mixed).build());
    let kinds = [
        Sampling { temperature: 0.0, ..Sampling::default() },
        Sampling { temperature: 1.3, seed: 5, ..Sampling::default() },
        Sampling { temperature: 0.9, seed: 6, top_k: 3, ..Sampling::default() },
        Sampling { temperature: 1.1, seed: 7, top_p: 0.7, ..Sampling::default() },
        Sampling { temperature: 1.0, seed: 8, min_p: 0.4, logit_bias: vec![(17, 3.0), (900, -2.0)], ..Sampling::default() },
        Sampling {
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            suppress: vec![40],
            min_tokens: 2,
            ..Sampling::default()
        },
    ];
    // One, several of a tile, some of every part of the vocabulary, all of one rank.
    let sets: [Vec<TokenId>; 4] = [vec![1999], vec![16, 17, 18, 40], (0..VOCAB as TokenId).step_by(61).collect(), (1..200).collect()];
    let bits = |ids: &[TokenId]| {
        let mut bits = vec![0_u8; VOCAB.div_ceil(8)];
        ids.iter().for_each(|id| bits[*id as usize / 8] |= 1 << (id % 8));
        Mask::Bits(bits)
    };
    let run = |model: &Model, layout: Layout, few: bool, mates: bool| {
        let mut rig = Rig::new(model, layout);
        let mut masks: HashMap<SequenceId, Vec<Mask>> = HashMap::new();
        let mut parts = Vec::new();
        for (i, sampling) in (1..).zip(&kinds) {
            let ids = prompt(i, 8 + i as usize, VOCAB);
            let sampling = Sampling { masked: true, ..sampling.clone() };
            parts.push(Part::new(i, &ids).begin(&ids, ids.len(), &sampling).sample());
            masks.insert(
                i,
                (0..6).map(|at| &sets[(i as usize + at) % 4]).map(|set| if few { Mask::Ids(set.clone()) } else { bits(set) }).collect(),
            );
        }
        if mates {
            let ids = prompt(50, 9, VOCAB);
            parts.push(Part::new(50, &ids).begin(&ids, ids.len(), &Sampling { temperature: 1.0, seed: 3, ..Sampling::default() }).sample());
        }
        let mut masks = Masks(masks);
        let mut drawn = Vec::new();
        for _ in 0..6 {
            let step = rig.step(&parts);
            let outputs = rig.run_step(&step, &mut masks).expect("a valid step");
            drawn.extend(outputs.iter().filter(|o| o.sequence < 50).map(|o| (o.sequence, token(&o.value))));
            parts = outputs.iter().map(|o| Part::new(o.sequence, &[token(&o.value)]).sample()).collect();
        }
        drawn
    };
    let expected = run(&llama, Layout::default(), false, false);
    assert!(expected.iter().map(|(_, id)| id).collect::<std::collections::HashSet<_>>().len() > 12, "{expected:?}");
    for tensor in [1, 2, 3] {
        for (few, mates) in [(true, false), (true, true), (false, false)] {
            let layout = Layout { tensor, ..Layout::default() };
            assert_eq!(run(&llama, layout, few, mates), expected, "{tensor} ranks, lists: {few}, an unmasked mate: {mates}");
        }
    }
    let expected = run(&tied, Layout::default(), false, false);
    for tensor in [1, 2] {
        for (few, mates) in [(true, false), (true, true), (false, false)] {
            let got = run(&tied, Layout::spread(2, tensor), few, mates);
            assert_eq!(got, expected, "spread, {tensor} ranks, lists: {few}, an unmasked mate: {mates}");
        }
    }
}

#[test]
fn masks_cover_what_they_cover_and_the_first_one_says_something() {
    let model = model::llama(model::mixed).build();
    let masked = Sampling { masked: true, ..Sampling::default() };
    let drawn = |mask| {
        let mut rig = Rig::new(&model, Layout::default());
        let step = rig.step(&[Part::new(1, &[5]).begin(&[5], 1, &masked).sample()]);
        rig.run_step(&step, &mut Masks(HashMap::from([(1, vec![mask])])))
    };
    // One bit of few, one bit of more than there are rows, ids without a row.
    let mut long = vec![0; 400];
    (long[3], long[399]) = (1, 0xff);
    for mask in [Mask::Bits(vec![0, 0, 0, 1]), Mask::Bits(long), Mask::Ids(vec![24, 2500, 9999])] {
        assert_eq!(token(&drawn(mask).expect("a valid step")[0].value), 24);
    }
    let none = drawn(Mask::Ids(vec![2500])).expect("a valid step");
    assert!(matches!(none[0].value, OutputValue::Failed(_)), "{none:?}");
    let error = drawn(Mask::Unchanged).expect_err("unchanged from nothing");
    assert!(matches!(&error, StepError::Invalid { source, .. } if *source == InvalidStep::Mask { sequence: 1 }), "{error:?}");
    let mut rig = Rig::new(&model, Layout::default());
    let step = rig.step(&[Part::new(1, &[5]).begin(&[5], 1, &masked).sample()]);
    assert!(matches!(rig.run_step(&step, &mut NoMasks), Err(StepError::Mask { .. })));
}

#[test]
fn drafts_change_no_token() {
    let model = model::llama(model::mixed).build();
    for (i, s) in settings().iter().enumerate() {
        let ids = prompt(i as u64, 20, VOCAB);
        let mut rig = Rig::new(&model, Layout::default());
        let expected = tokens(&rig.generate(1, &ids, s, 10));
        let mut got = tokens(&rig.generate(2, &ids, s, 1));
        while got.len() < 10 {
            // Two right guesses and a wrong one (the third), as far as there are tokens left.
            let next = got.len();
            let mut input = vec![got[next - 1]];
            input.extend(expected[next..].iter().take(3).enumerate().map(|(at, &id)| if at == 2 { (id + 1) % VOCAB as u32 } else { id }));
            let part = (0..input.len()).fold(Part::new(2, &input), |part, offset| part.want(offset, WantKind::Sample));
            let drawn: Vec<TokenId> = rig.run(&[part]).iter().map(|o| token(&o.value)).collect();
            // What was drawn counts up to the first draw that refuses the draft behind it.
            let right = drawn.iter().zip(&input[1..]).take_while(|(drawn, draft)| drawn == draft).count();
            assert_eq!(right, (input.len() - 1).min(2), "settings {i}");
            got.extend(&drawn[..=right]);
            rig.rewind(2, ids.len() + got.len() - 1);
        }
        assert_eq!(got[..10], expected, "settings {i}");
    }
}
