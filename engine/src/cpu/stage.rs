//! One rank of a stage on a processor: its weights, its KV cache, its buffers.

use std::ops::Range;

use kernels::{Buffer, KvCache, KvType, RopeTable, elementwise, rope};
use plan::{
    model::{ModelConfig, PoolerActivation, Rope, RopeLayout, RopeScaling},
    shard::{KvDType, KvGeometry, Shard, Splits},
    step::BlockCopy,
};

use super::{
    experts::Mixture,
    input::Inputs,
    load,
    project::LatentBuffers,
    screen::Screen,
    weights::{RopeFactors, Weights},
};
use crate::{
    EngineOptions, LoadShardError, Observed, Timings, WeightReader,
    backend::{Backend, Context},
    batch::Batch,
    collective::CollectiveError,
    compute::Compute,
    question::{Need, Row},
};

/// A layer's part of the geometry.
#[derive(Debug)]
pub(super) struct LayerPlace {
    pub(super) group: usize,
    /// Index of its cache.
    pub(super) cache: usize,
    pub(super) window: Option<u32>,
    /// Index of its rotary table, if it rotates.
    pub(super) rope: Option<usize>,
}

/// The backend for processors.
#[derive(Debug)]
pub(crate) struct Cpu {
    pub(super) config: ModelConfig,
    pub(super) splits: Splits,
    pub(super) rank: usize,
    pub(super) first_layer: usize,
    pub(super) is_first: bool,
    pub(super) is_last: bool,
    /// Rows of the vocabulary that are multiplied: the first of the matrix.
    pub(super) product: Range<usize>,
    pub(super) compute: Compute,
    pub(super) weights: Weights,
    /// What the vocabulary is screened by, where it is.
    pub(super) screen: Option<Screen>,
    pub(super) places: Vec<LayerPlace>,
    pub(super) caches: Vec<KvCache>,
    pub(super) ropes: Vec<RopeTable>,
    /// The head of this rank's cache that each of its query heads reads.
    pub(super) kv_heads: Vec<u32>,
    /// Query heads' values, by rank.
    pub(super) head_columns: Vec<Range<usize>>,
    pub(super) buffers: Buffers,
    pub(super) inputs: Inputs,
    /// Buffers of mixtures of experts.
    pub(super) mixture: Mixture,
}

/// Activations of a step. Each is used from its start, as many rows as the step has.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The residual stream, `[tokens, hidden]`.
    pub(super) x: Buffer<f32>,
    /// Its norm.
    pub(super) h: Buffer<f32>,
    pub(super) q: Buffer<f32>,
    pub(super) k: Buffer<f32>,
    pub(super) v: Buffer<f32>,
    pub(super) latent: LatentBuffers,
    pub(super) attention: Buffer<f32>,
    pub(super) gate: Buffer<f32>,
    pub(super) up: Buffer<f32>,
    /// Outputs of o and down, rank after rank.
    pub(super) gathered: Buffer<f32>,
    /// The same, token after token; empty where there is one rank.
    pub(super) block_out: Buffer<f32>,
    /// Outputs of experts, where others are shared.
    pub(super) sums: Buffer<f32>,
    /// Rows of the hidden state that are left after the last layer.
    pub(super) rows: usize,
    /// Positions of the rows that are left.
    pub(super) positions: Vec<u32>,
    pub(super) logits: Buffer<f32>,
}

impl Cpu {
    /// Loads a shard that was checked against the model and the geometry.
    pub(crate) fn load(
        config: &ModelConfig,
        shard: &Shard,
        kv: &KvGeometry,
        options: EngineOptions,
        compute: &Compute,
        reader: &dyn WeightReader,
        loaded: &(dyn Fn(u64) + Sync),
    ) -> Result<Self, LoadShardError> {
        let weights = load::load(&load::Loading { config, shard, reader, loaded, compute })?;
        let screen = if shard.screening { Screen::of(&weights, shard.product().len(), compute)? } else { None };
        let (rank, splits) = (shard.rank, shard.splits.clone());
        let (heads, kv_range) = (splits.heads[rank].clone(), splits.kv_heads[rank].clone());
        let per_kv_head = config.heads / config.kv_heads;
        let mut ropes: Vec<(Rope, RopeTable)> = Vec::new();
        let (mut places, mut caches) = (Vec::new(), Vec::new());
        for layer in shard.layers.clone() {
            if config.encoder.is_some() {
                places.push(LayerPlace { group: 0, cache: 0, window: None, rope: None });
                continue;
            }
            let Some(group) = kv.groups.iter().position(|g| g.layers.contains(&layer)) else {
                return Err(LoadShardError::Plan {
                    what: "the number of KV groups of a layer",
                    got: "0".to_owned(),
                    expected: format!("1 for layer {layer}"),
                });
            };
            let rope = &config.layers[layer].rope;
            let known = ropes.iter().position(|(r, _)| r == rope);
            let rope = (rope.dims > 0).then(|| {
                known.unwrap_or_else(|| {
                    ropes.push((rope.clone(), rope_table(rope, &weights.rope_factors, options.max_context)));
                    ropes.len() - 1
                })
            });
            places.push(LayerPlace { group, cache: caches.len(), window: kv.groups[group].window, rope });
            let dtype = match kv.dtype {
                KvDType::F32 => KvType::F32,
                KvDType::F16 => KvType::F16,
                KvDType::Q8 => KvType::Q8,
            };
            caches.push(KvCache::new(dtype, kv.groups[group].blocks, kv_range.len(), (config.head_dim, config.value_dim())));
        }
        if config.encoder.is_some() {
            // One for all layers, used anew in each: at worst every token is a sequence with a block of its own.
            caches.push(KvCache::new(KvType::F32, options.max_batch_tokens, kv_range.len(), (config.head_dim, config.value_dim())));
        }
        let shared = config.experts.map_or(0, |e| e.shared_ffn());
        Ok(Self {
            rank,
            first_layer: shard.layers.start,
            is_first: shard.is_first(),
            is_last: shard.is_last(),
            product: shard.product(),
            compute: compute.clone(),
            weights,
            screen,
            places,
            caches,
            ropes: ropes.into_iter().map(|(_, table)| table).collect(),
            kv_heads: heads.map(|head| (head / per_kv_head - kv_range.start) as u32).collect(),
            head_columns: splits.heads.iter().map(|h| h.start * config.value_dim()..h.end * config.value_dim()).collect(),
            buffers: Buffers::new(config, &splits, rank, options.max_batch_tokens),
            inputs: Inputs::new(
                options.max_batch_tokens,
                if shard.ranks > 1 { (config.heads * config.value_dim()).max(config.ffn).max(shared) } else { 0 },
            ),
            mixture: Mixture::default(),
            config: config.clone(),
            splits,
        })
    }
}

impl Buffers {
    fn new(config: &ModelConfig, splits: &Splits, rank: usize, tokens: usize) -> Self {
        let rows = |width: usize| Buffer::zeroed(tokens * width);
        let (heads, kv_heads) = (splits.heads[rank].len(), splits.kv_heads[rank].len());
        let ffn = splits.shared.get(rank).map_or(0, Range::len).max(splits.ffn[rank].len());
        let shared = config.experts.is_some_and(|e| e.shared > 0);
        let many = splits.heads.len() > 1;
        Self {
            x: rows(config.hidden),
            h: rows(config.hidden),
            q: rows(heads * config.head_dim),
            k: rows(kv_heads * config.head_dim),
            v: rows(kv_heads * config.value_dim()),
            latent: LatentBuffers::new(config.latent, tokens, kv_heads * config.unpacked_dim()),
            attention: rows(heads * config.value_dim()),
            gate: rows(ffn),
            up: rows(ffn),
            gathered: rows(config.hidden),
            block_out: rows(if many { config.hidden } else { 0 }),
            sums: rows(if shared { config.hidden } else { 0 }),
            rows: 0,
            positions: Vec::with_capacity(tokens),
            logits: Buffer::default(),
        }
    }
}

/// The table of a layer's rotation, for sequences of at most `positions` tokens.
fn rope_table(rope: &Rope, stored: &RopeFactors, positions: usize) -> RopeTable {
    let layout = match rope.layout {
        RopeLayout::Adjacent => rope::RopeLayout::Adjacent,
        RopeLayout::Halves => rope::RopeLayout::Halves,
    };
    let longer = |original: f64| positions as f64 > original;
    let mut base = rope.base;
    let scaling = match rope.scaling {
        RopeScaling::None => rope::RopeScaling::None,
        RopeScaling::Linear { factor } => rope::RopeScaling::Linear { factor },
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            rope::RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }
        }
        RopeScaling::Dynamic { factor, trained_context } => {
            base = rope::dynamic_base(base, rope.dims, factor, trained_context, positions as f64);
            rope::RopeScaling::None
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate } => {
            rope::RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate }
        }
        RopeScaling::LongRope { ref short, ref long, original_context } => {
            rope::RopeScaling::Divisors(if longer(original_context) { long.clone() } else { short.clone() })
        }
        RopeScaling::LongRopeTensors { original_context } => {
            rope::RopeScaling::Divisors(if longer(original_context) { stored.long.clone() } else { stored.short.clone() })
        }
        RopeScaling::Tensor => rope::RopeScaling::Divisors(stored.all.clone()),
    };
    RopeTable::new(layout, rope.dims, base, &scaling, positions).with_amplitude(rope.amplitude)
}

impl Backend for Cpu {
    fn copy_block(&mut self, copy: BlockCopy) {
        for place in self.places.iter().filter(|place| place.group == copy.group as usize) {
            self.caches[place.cache].copy_block(copy.from, copy.to);
        }
    }

    fn forward(&mut self, batch: &Batch<'_>, hidden: &[f32], context: &mut Context<'_, '_>) -> Result<(), CollectiveError> {
        self.run_layers(batch, hidden, context)
    }

    fn rows(&self) -> &[f32] {
        let rows = self.buffers.rows * self.config.hidden;
        if self.is_last && self.config.encoder.is_none() { &self.buffers.h[..rows] } else { &self.buffers.x[..rows] }
    }

    fn classify(&mut self, states: &[f32], rows: usize) -> Vec<f32> {
        let (Some(head), Some(kind)) = (&self.weights.classifier, self.config.encoder.and_then(|e| e.classifier)) else {
            return Vec::new();
        };
        let (mut pooled, mut labels) = (vec![0.0; rows * self.config.hidden], vec![0.0; rows * kind.labels]);
        self.inputs.multiply(&self.compute, states, rows, &[], [(&head.pooler, &mut pooled)]);
        match kind.activation {
            PoolerActivation::Tanh => elementwise::tanh(&mut pooled),
            PoolerActivation::Relu => elementwise::relu(&mut pooled),
        }
        self.inputs.multiply(&self.compute, &pooled, rows, &[], [(&head.output, &mut labels)]);
        labels
    }

    fn observe(&mut self) {
        self.inputs.observed = Some(Observed::new());
    }

    fn observed(&mut self) -> Observed {
        self.inputs.observed.take().unwrap_or_default()
    }

    fn vocabulary(&mut self, states: &[f32], needs: &[Need], timings: &mut Timings) -> Vec<Row<'_>> {
        self.vocabulary_product(states, needs, timings)
    }
}
