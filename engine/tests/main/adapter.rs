//! Adapters: the textbook's numbers, and the same bits whatever runs beside them and wherever.

use std::{io, ops::Range, sync::Arc};

use engine::{Adapter, InvalidStep, LoadShardError, NoMasks, StepError, WeightReader};
use half::{bf16, f16};
use kernels::Isa;
use plan::{
    adapter::{AdapterHeader, Pair, RowOrder},
    dtype::DType,
    model::{ModelConfig, Role, TensorId, TensorInfo},
    step::{OutputValue, TokenId},
};

use crate::{
    model::{self, Model, Noise, Recipe},
    naive,
    rig::{Layout, Part, Rig, logits, prompt},
};

/// An adapter in memory.
pub(crate) struct Lora {
    pub(crate) header: AdapterHeader,
    bytes: Vec<u8>,
}

impl WeightReader for Lora {
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        assert_eq!((file, range.end - range.start), (0, into.len() as u64));
        let bytes = self.bytes.get(range.start as usize..range.end as usize);
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn is_at_hand(&self, _: usize, range: &Range<u64>) -> bool {
        (range.start / 64).is_multiple_of(2)
    }
}

/// Every product that an adapter may change and `config` has.
fn products(config: &ModelConfig) -> Vec<TensorId> {
    let roles = |layer: usize| {
        let dense = !config.layers[layer].experts;
        let ffn = [(Role::Gate, dense && config.gated), (Role::Up, dense), (Role::Down, dense)];
        let ffn = ffn.into_iter().filter(|(_, has)| *has).map(|(role, _)| role);
        [Role::Q, Role::K, Role::V, Role::O].into_iter().chain(ffn).map(move |role| TensorId { layer: Some(layer as u32), role })
    };
    (0..config.layers.len()).flat_map(roles).collect()
}

/// An adapter of ranks around `rank` of those of `products` that `with` says.
fn lora(config: &ModelConfig, seed: u64, rank: usize, with: impl Fn(usize, TensorId) -> bool) -> Lora {
    let mut noise = Noise::new(seed);
    let mut lora = Lora { header: AdapterHeader { files: Vec::new(), pairs: Vec::new() }, bytes: Vec::new() };
    for (index, id) in products(config).into_iter().enumerate().filter(|(index, id)| with(*index, *id)) {
        let (rank, shape) = (rank + index % 3, config.shape(id.role));
        let mut tensor = |name: &str, dtype: DType, shape: [usize; 2], size: f32| {
            let offset = lora.bytes.len() as u64;
            for _ in 0..shape[0] * shape[1] {
                let value = size * noise.float();
                match dtype {
                    DType::F16 => lora.bytes.extend(f16::from_f32(value).to_le_bytes()),
                    DType::BF16 => lora.bytes.extend(bf16::from_f32(value).to_le_bytes()),
                    _ => lora.bytes.extend(value.to_le_bytes()),
                }
            }
            let bytes = lora.bytes.len() as u64 - offset;
            TensorInfo {
                name: format!("{name} of {id:?}"),
                dtype,
                stored: None,
                shape: shape.to_vec(),
                file: 0,
                offset,
                bytes,
                column_stride: None,
                turned: None,
            }
        };
        let types = [DType::F32, DType::F16, DType::BF16];
        let a = tensor("A", types[index % 3], [rank, shape[1]], 2.0 / (shape[1] as f32).sqrt());
        let b = tensor("B", types[(index + 1) % 3], [shape[0], rank], 1.0);
        lora.header.pairs.push(Pair { id, a, b, scale: 0.5, order: RowOrder::Same });
    }
    lora
}

/// Adapter 1 changes everything, adapter 2 some products of some layers.
fn two(config: &ModelConfig) -> [Lora; 2] {
    [lora(config, 5, 8, |_, _| true), lora(config, 6, 3, |index, id| index % 2 == 0 && id.layer != Some(1))]
}

fn models() -> [Recipe; 5] {
    [
        model::llama(model::mixed),
        model::llama(model::more),
        model::gemma(20, model::small),
        model::gpt2(model::mixed),
        model::mixture(model::mixed),
    ]
}

type Bits = Vec<Vec<u32>>;

/// The slot of each of nine sequences.
const SLOTS: [u32; 9] = [0, 1, 2, 1, 0, 2, 2, 0, 1];

fn ids_of(model: &Model, sequence: usize) -> Vec<TokenId> {
    prompt(20 + sequence as u64, 10 + 7 * sequence, model.header.config.vocab)
}

/// A replica with both adapters.
fn rig(model: &Model, layout: Layout, adapters: &[Lora; 2]) -> Rig {
    let mut rig = Rig::new(model, layout);
    rig.bind(1, &adapters[0]);
    rig.bind(2, &adapters[1]);
    rig
}

/// Bits of nine sequences' logits at every position, in one batch of `slots`: prompts in chunks of several sizes, decodes between them.
fn together(rig: &mut Rig, model: &Model, slots: [u32; 9]) -> Vec<Bits> {
    let chunk = [1, 1, 5, 16, 17, 3, 40, 1, 64];
    let mut found: Vec<Bits> = vec![Vec::new(); slots.len()];
    for round in 0.. {
        let mut parts = Vec::new();
        for (s, slot) in slots.into_iter().enumerate() {
            let (first, ids) = (found[s].len(), ids_of(model, s));
            if round >= s && first < ids.len() {
                parts.push(Part::new(s as u64, &ids[first..ids.len().min(first + chunk[s])]).adapter(slot).all_logits());
            }
        }
        if parts.is_empty() && round > slots.len() {
            return found;
        }
        for (sequence, position, bits) in logits(&rig.run(&parts)) {
            assert_eq!(position as usize, found[sequence as usize].len());
            found[sequence as usize].push(bits);
        }
    }
    found
}

/// Bits of the same sequences, each alone and whole, with nothing but its own adapter.
fn alone(model: &Model, adapters: &[Lora; 2]) -> Vec<Bits> {
    let one = |(s, slot): (usize, u32)| {
        let mut rig = Rig::new(model, Layout::default());
        if slot > 0 {
            rig.bind(slot, &adapters[slot as usize - 1]);
        }
        logits(&rig.run(&[Part::new(1, &ids_of(model, s)).adapter(slot).all_logits()])).into_iter().map(|(.., bits)| bits).collect()
    };
    SLOTS.into_iter().enumerate().map(one).collect()
}

#[test]
fn batch_mates_chunks_ranks_stages_threads_and_instructions_change_no_bit() {
    for recipe in models() {
        let model = recipe.build();
        let adapters = two(&model.header.config);
        let expected = alone(&model, &adapters);
        let layouts =
            [(1, 1, 1, Isa::best()), (1, 1, 3, Isa::Scalar), (1, 3, 1, Isa::best()), (2, 2, 2, Isa::best()), (3, 4, 1, Isa::best())];
        for (pipeline, tensor, threads, isa) in layouts {
            let layout = Layout { pipeline, tensor, threads, isa, ..Layout::default() };
            assert!(together(&mut rig(&model, layout, &adapters), &model, SLOTS) == expected, "{pipeline} × {tensor}, {threads} threads");
        }
        // Control: with the adapters exchanged every sequence that has one differs, the others do not.
        let exchanged = together(&mut rig(&model, Layout::default(), &adapters), &model, SLOTS.map(|slot| (3 - slot) % 3));
        for (s, slot) in SLOTS.into_iter().enumerate() {
            assert_eq!(exchanged[s] == expected[s], slot == 0, "sequence {s}");
        }
    }
}

/// The last layer goes on with the rows alone whose results are wanted.
#[test]
fn rows_that_are_wanted_alone_have_the_same_bits() {
    let model = model::llama(model::mixed).build();
    let adapters = two(&model.header.config);
    let expected = alone(&model, &adapters);
    let mut rig = rig(&model, Layout::default(), &adapters);
    let last = |s: usize| Part::new(s as u64, &ids_of(&model, s)).adapter(SLOTS[s]);
    let parts: Vec<Part> = (0..9).map(|s| last(s).want(9 + 7 * s, plan::step::WantKind::Logits)).collect();
    for (sequence, position, bits) in logits(&rig.run(&parts)) {
        assert!(bits == expected[sequence as usize][position as usize], "sequence {sequence}");
    }
}

/// A model's own weights plus `factor` times what the adapter adds, in F32.
fn merged(model: &Model, lora: &Lora, factor: f64) -> Model {
    let mut merged = Model { header: model.header.clone(), bytes: model.bytes.clone(), read: 0.into() };
    let values = |t: &TensorInfo| -> Vec<f64> {
        let bytes = &lora.bytes[t.offset as usize..(t.offset + t.bytes) as usize];
        match t.dtype {
            DType::F16 => bytes.chunks(2).map(|b| f16::from_le_bytes(b.try_into().expect("its bytes")).to_f64()).collect(),
            DType::BF16 => bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().expect("its bytes")).to_f64()).collect(),
            _ => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("its bytes")).into()).collect(),
        }
    };
    for Pair { id, a, b, scale, .. } in &lora.header.pairs {
        let (a_values, b_values) = (values(a), values(b));
        let (rank, k) = (a.shape[0], a.shape[1]);
        let weights = &merged.header.tensors[id];
        let bytes = &mut merged.bytes[weights.offset as usize..(weights.offset + weights.bytes) as usize];
        for (at, value) in bytes.chunks_exact_mut(4).enumerate() {
            let (row, column) = (at / k, at % k);
            let sum: f64 = (0..rank).map(|r| b_values[row * rank + r] * a_values[r * k + column]).sum();
            let before = f64::from(f32::from_le_bytes(value.try_into().expect("its bytes")));
            value.copy_from_slice(&((before + factor * f64::from(*scale) * sum) as f32).to_le_bytes());
        }
    }
    merged
}

#[test]
fn an_adapter_is_the_textbooks_merged_weights() {
    for recipe in [model::llama(|_, _| DType::F32), model::gpt2(|_, _| DType::F32)] {
        let model = recipe.build();
        let lora = lora(&model.header.config, 5, 8, |_, _| true);
        let ids = prompt(5, 40, model.header.config.vocab);
        let mut rig = Rig::new(&model, Layout::default());
        rig.bind(7, &lora);
        let got = rig.run(&[Part::new(1, &ids).adapter(7).all_logits()]);
        let distance = |textbook: &Model| {
            let expected = naive::logits(textbook, &ids);
            let largest = expected.iter().flatten().fold(0.0, |m: f64, x| m.max(x.abs()));
            let far = |(output, expected): (&plan::step::Output, &Vec<f64>)| {
                let OutputValue::Logits(got) = &output.value else { panic!("{output:?}") };
                got.iter().zip(expected).fold(0.0, |m: f64, (g, e)| m.max((f64::from(*g) - e).abs()))
            };
            got.iter().zip(&expected).map(far).fold(0.0, f64::max) / largest
        };
        let off = distance(&merged(&model, &lora, 1.0));
        assert!(off < 1e-5, "off by {off} of the largest logit");
        // Controls: a factor 10 % off, and no adapter.
        for wrong in [0.9, 0.0] {
            let off = distance(&merged(&model, &lora, wrong));
            assert!(off > 1e-3, "a factor of {wrong} goes unseen: off by {off}");
        }
    }
}

/// An adapter whose file has the rows of heads in another order than the model gives the bits of one that has not.
#[test]
fn rows_of_heads_are_put_in_the_models_order() {
    let model = model::llama(model::mixed).build();
    let config = &model.header.config;
    let same = lora(config, 5, 8, |_, id| matches!(id.role, Role::Q | Role::K));
    let order = RowOrder::ToAdjacent { head_dim: config.head_dim };
    let mut stored = Lora { header: same.header.clone(), bytes: same.bytes.clone() };
    for pair in &mut stored.header.pairs {
        pair.order = order;
        let row = (pair.b.bytes / pair.b.shape[0] as u64) as usize;
        for r in 0..pair.b.shape[0] {
            let (from, to) = (pair.b.offset as usize + r * row, pair.b.offset as usize + order.stored(r) * row);
            stored.bytes[to..to + row].copy_from_slice(&same.bytes[from..from + row]);
        }
    }
    let ids = prompt(5, 40, config.vocab);
    let run = |adapter: &Lora, tensor| {
        let mut rig = Rig::new(&model, Layout { tensor, ..Layout::default() });
        rig.bind(1, adapter);
        logits(&rig.run(&[Part::new(1, &ids).adapter(1).all_logits()]))
    };
    let expected = run(&same, 1);
    for ranks in [1, 3] {
        assert!(run(&stored, ranks) == expected, "{ranks} ranks");
    }
    stored.header.pairs[0].order = RowOrder::Same;
    assert!(run(&stored, 1) != expected, "a wrong order goes unseen");
}

#[test]
fn slots_and_adapters_that_do_not_fit_are_refused() {
    let model = model::llama(model::floats).build();
    let [one, two] = two(&model.header.config);
    let mut rig = Rig::new(&model, Layout { pipeline: 2, ..Layout::default() });
    rig.bind(1, &one);
    let ids = prompt(5, 4, model.header.config.vocab);
    let refused = |rig: &mut Rig, part: Part, expected: InvalidStep| {
        let step = rig.step(&[part]);
        match rig.run_step(&step, &mut NoMasks) {
            Err(StepError::Invalid { source, .. }) => assert_eq!(source, expected),
            other => panic!("{other:?}"),
        }
    };
    refused(&mut rig, Part::new(5, &ids).adapter(2), InvalidStep::Adapter { sequence: 5, adapter: 2 });
    rig.run(&[Part::new(1, &ids).adapter(1)]);
    refused(&mut rig, Part::new(1, &ids), InvalidStep::OtherAdapter { sequence: 1, adapter: 0, before: 1 });
    rig.engines.iter_mut().flatten().for_each(|engine| engine.unbind_adapter(1));
    rig.rewind(1, ids.len());
    refused(&mut rig, Part::new(1, &ids).adapter(1), InvalidStep::Adapter { sequence: 1, adapter: 1 });
    // Loaded for the other stage.
    let (config, shard) = (rig.plan.config.clone(), rig.plan.stages[0].shards[0].clone());
    let part = two.header.of(&config, &shard);
    let loaded = Arc::new(Adapter::load(&config, &shard, &part, &two).expect("a loadable adapter"));
    assert!(matches!(rig.engines[1][0].bind_adapter(3, loaded.clone()), Err(LoadShardError::Plan { .. })));
    assert!(matches!(rig.engines[0][0].bind_adapter(0, loaded), Err(LoadShardError::Plan { .. })));
    // Rows, shapes and types that the plan does not have.
    let mut rows = part.clone();
    rows.pairs[0].b.rows = 0..1;
    let mut shape = part.clone();
    shape.pairs[0].a.tensor.shape = vec![3, 7];
    let mut kind = part.clone();
    kind.pairs[0].a.tensor.dtype = DType::Q8_0;
    let mut place = part.clone();
    place.pairs[0].id.layer = Some(2);
    let mut norm = part;
    norm.pairs[0].id.role = Role::AttnNorm;
    for wrong in [rows, shape, kind, place, norm] {
        assert!(matches!(Adapter::load(&config, &shard, &wrong, &two), Err(LoadShardError::Shape { .. })));
    }
}
