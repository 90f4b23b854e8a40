//! Whatever the chunks, batch mates, threads, instructions, ranks and stages: the same bits.

use std::sync::atomic::AtomicU64;

use kernels::{Isa, WeightType, convert_rows};
use plan::{dtype::DType, shard::KvDType, step::TokenId};

use crate::{
    model::{self, Model, Recipe},
    rig::{Layout, Part, Rig, joined, logits, prompt},
};

type Bits = Vec<Vec<u32>>;

/// Bits of the logits at every position of `ids`, fed in chunks.
fn chunked(model: &Model, layout: Layout, ids: &[TokenId], chunk: usize) -> Bits {
    let mut rig = Rig::new(model, layout);
    ids.chunks(chunk).flat_map(|ids| logits(&rig.run(&[Part::new(1, ids).all_logits()]))).map(|(.., bits)| bits).collect()
}

fn models() -> [Recipe; 8] {
    [
        model::llama(model::mixed),
        model::llama(model::more),
        model::gemma(20, model::small),
        model::gpt2(model::mixed),
        model::mixture(model::mixed),
        model::latent(model::mixed),
        model::latent_keys(model::small),
        model::latent_apart(model::small),
    ]
}

#[test]
fn any_chunks_give_the_same_bits() {
    for recipe in models() {
        let model = recipe.build();
        for kv in [KvDType::F32, KvDType::F16, KvDType::Q8] {
            let layout = Layout { kv, ..Layout::default() };
            let mut ids = prompt(1, 150, model.header.config.vocab);
            let whole = chunked(&model, layout, &ids, ids.len());
            for chunk in [1, 7, 64] {
                assert!(chunked(&model, layout, &ids, chunk) == whole, "chunks of {chunk}, {kv:?}");
            }
            // Control: another id shows from its position on, not before.
            ids[100] ^= 1;
            let other = chunked(&model, layout, &ids, 7);
            assert!(other[..100] == whole[..100] && other[100..].iter().zip(&whole[100..]).all(|(a, b)| a != b), "{kv:?}");
        }
    }
}

/// Bits of nine sequences' logits at every position, run together: prompts in chunks of several sizes, decodes between them.
fn mixed_batch(model: &Model, layout: Layout) -> Vec<Bits> {
    let vocab = model.header.config.vocab;
    let ids: Vec<Vec<TokenId>> = (0..9).map(|s| prompt(20 + s as u64, 10 + 7 * s, vocab)).collect();
    let chunk = [1, 1, 5, 16, 17, 3, 40, 1, 64];
    let mut rig = Rig::new(model, layout);
    let mut found: Vec<Bits> = vec![Vec::new(); ids.len()];
    for round in 0.. {
        let mut parts = Vec::new();
        for (s, ids) in ids.iter().enumerate() {
            let first = found[s].len();
            // Sequences join one after the other.
            if round >= s && first < ids.len() {
                parts.push(Part::new(s as u64, &ids[first..ids.len().min(first + chunk[s])]).all_logits());
            }
        }
        if parts.is_empty() && round > ids.len() {
            return found;
        }
        for (sequence, position, bits) in logits(&rig.run(&parts)) {
            assert_eq!(position as usize, found[sequence as usize].len());
            found[sequence as usize].push(bits);
        }
    }
    found
}

/// Bits of the same sequences, each alone and whole.
fn alone(model: &Model) -> Vec<Bits> {
    let vocab = model.header.config.vocab;
    (0..9).map(|s| chunked(model, Layout::default(), &prompt(20 + s as u64, 10 + 7 * s, vocab), 400)).collect()
}

#[test]
fn batch_mates_threads_and_instructions_change_no_bit() {
    for recipe in models() {
        let model = recipe.build();
        let expected = alone(&model);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let layout = Layout { isa, threads, ..Layout::default() };
                assert!(mixed_batch(&model, layout) == expected, "{isa}, {threads} threads");
            }
        }
        let other = Recipe { seed: 77, ..recipe };
        assert!(mixed_batch(&other.build(), Layout::default()) != expected);
    }
}

#[test]
fn ranks_and_stages_change_no_bit() {
    for recipe in models() {
        let model = recipe.build();
        let expected = alone(&model);
        for (pipeline, tensor) in [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (2, 2), (3, 4)] {
            let layout = Layout { pipeline, tensor, threads: 2, ..Layout::default() };
            assert!(mixed_batch(&model, layout) == expected, "{pipeline} stages of {tensor} ranks");
        }
        if recipe.config.tied_embeddings {
            for (pipeline, tensor) in [(2, 1), (3, 1), (2, 2), (2, 3), (3, 4)] {
                let layout = Layout::spread(pipeline, tensor);
                let plan = crate::rig::plan(&model, layout);
                let products = |stage: usize| plan.stages[stage].shards.iter().map(|s| s.product().len()).sum::<usize>();
                assert!(products(0) > 0, "the first stage multiplies some of the vocabulary");
                assert!(pipeline > 2 || products(1) > 0, "the last one too, {pipeline} stages of {tensor} ranks");
                assert!(mixed_batch(&model, layout) == expected, "{pipeline} stages of {tensor} ranks with the vocabulary spread");
            }
        }
        // Control: one rank with another model's weights. (Ranks that route differently notice at the exchange.)
        if recipe.config.experts.is_some() {
            continue;
        }
        let layout = Layout { tensor: 2, ..Layout::default() };
        let other = Recipe { seed: 77, ..recipe }.build();
        let (mut rig, mut foreign) = (Rig::new(&model, layout), Rig::new(&other, layout));
        std::mem::swap(&mut rig.engines[0][1], &mut foreign.engines[0][1]);
        for (engine, collective) in rig.engines[0].iter_mut().zip(joined(2)) {
            engine.set_collective(collective);
        }
        let ids = prompt(28, 66, model.header.config.vocab);
        let got = logits(&rig.run(&[Part::new(1, &ids).all_logits()]));
        assert!(got.iter().zip(&expected[8]).all(|((.., got), expected)| got != expected));
    }
}

/// The borders of ranks fall into activation blocks of o, so that its input is gathered as floats, and on them, so that it is quantized.
#[test]
fn both_ways_of_gathering_are_taken() {
    let model = model::llama(model::mixed).build();
    let borders = |tensor: usize| -> Vec<usize> {
        let plan = crate::rig::plan(&model, Layout { tensor, ..Layout::default() });
        plan.stages[0].shards[0].splits.heads.iter().map(|h| h.end * 64).collect()
    };
    assert_eq!(borders(2), [128, 256]);
    let blocks: Vec<_> = (0..3).map(|l| (model::mixed(Some(l), plan::model::Role::O)).activation_block()).collect();
    assert_eq!(blocks, [Some(256), Some(32), None]);
    let ffn = &crate::rig::plan(&model, Layout { tensor: 3, ..Layout::default() }).stages[0].shards[0].splits.ffn;
    assert!(ffn[2].is_empty(), "a rank without rows of the feed-forward block: {ffn:?}");
}

/// Weights converted as they are loaded: every rank converts rows of its own, and the bits are those of weights that were converted before.
#[test]
fn conversion_at_load_does_not_depend_on_the_split() {
    let pool = kernels::Pool::new(1);
    for (recipe, types) in [
        (model::llama(model::floats), [DType::Q8_0, DType::Q4_K, DType::Q6_K]),
        (model::gemma(20, model::floats), [DType::Q4_0, DType::Q5_1, DType::Q4_K]),
    ] {
        let floats = recipe.build();
        for to in types {
            let loaded = Model { header: floats.header.loaded_as(to), bytes: floats.bytes.clone(), read: AtomicU64::new(0) };
            let expected = alone(&loaded);
            assert!(expected != alone(&floats), "{to:?} shows");
            for (pipeline, tensor) in [(1, 3), (2, 2)] {
                let layout = Layout { pipeline, tensor, threads: 2, ..Layout::default() };
                assert!(mixed_batch(&loaded, layout) == expected, "{to:?}: {pipeline} stages of {tensor} ranks");
            }
            // A file that holds what the rows are converted to.
            let mut before = Model { header: loaded.header.clone(), bytes: floats.bytes.clone(), read: AtomicU64::new(0) };
            for tensor in before.header.tensors.values_mut() {
                let Some(stored) = tensor.stored.take() else { continue };
                let name = |dtype: DType| WeightType::ALL.into_iter().find(|t| t.to_string() == format!("{dtype:?}")).expect("a type");
                let rows = &floats.bytes[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
                let made = convert_rows(&pool, (name(stored), name(tensor.dtype)), tensor.shape[1], rows, None).expect("finite weights");
                (tensor.offset, tensor.bytes) = (before.bytes.len() as u64, made.len() as u64);
                before.bytes.extend(made);
            }
            assert!(alone(&before) == expected, "{to:?}: converted before");
        }
    }
}

/// Heads stored by columns in blocks are what their floats are, by columns or by rows.
#[test]
fn heads_by_columns_are_their_values() {
    let model = model::latent_apart(model::small).build();
    let expected = alone(&model);
    let mut plain = Model { header: model.header.clone(), bytes: model.bytes.clone(), read: AtomicU64::new(0) };
    let mut turned = 0;
    for tensor in plain.header.tensors.values_mut() {
        let (Some(rows), Some(stored)) = (tensor.turned, tensor.stored.take()) else { continue };
        let kind = WeightType::ALL.into_iter().find(|t| t.to_string() == format!("{stored:?}")).expect("a type");
        let bytes = &model.bytes[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
        let values: Vec<u8> = kernels::dequantize_rows(kind, rows, bytes).iter().flat_map(|v| v.to_le_bytes()).collect();
        (tensor.offset, tensor.bytes) = (plain.bytes.len() as u64, values.len() as u64);
        plain.bytes.extend(values);
        turned += 1;
    }
    assert_eq!(turned, 3, "blocks of several types");
    assert!(alone(&plain) == expected);
    // Control: another value shows.
    let at = plain.bytes.len() - 4;
    plain.bytes[at..].copy_from_slice(&1.0_f32.to_le_bytes());
    assert!(alone(&plain) != expected);
}
