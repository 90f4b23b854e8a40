//! Turns (spec, model header, capacity) into an [`ExecutionPlan`].

mod draft;
mod kv;
mod slices;
mod split;
mod stages;
#[cfg(test)]
mod tests;

use std::{ops::Range, sync::Arc};

use sha2::{Digest, Sha256};

pub use draft::{DRAFT_COST_LIMIT, DRAFT_SEQUENCES, DraftError, check_draft, plan_draft};

use crate::{
    adapter::{AdapterHeader, AdapterShard},
    fleet::ReplicaLimits,
    model::{Format, ModelConfig, ModelHeader, Role},
    shard::{BLOCK_TOKENS, ExecutionPlan, KvDType, SCREEN, Shard, Stage},
    worker::{CollectiveKind, WorkerSpec},
};

/// Version of the engine's arithmetic: it changes whenever the same weights and ids may give other bits.
pub const ARITHMETIC_VERSION: u32 = 1;
/// Sequences in a step when the spec names no number.
pub const DEFAULT_BATCH_SEQUENCES: usize = 64;
/// Tokens in a step when the spec names no number.
pub const DEFAULT_BATCH_TOKENS: usize = 512;

/// How much memory a worker's KV cache may take.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum KvMemory {
    /// Enough for the batch at ordinary lengths, at most a quarter of the worker's memory.
    #[default]
    Auto,
    /// This many bytes on each worker.
    Bytes(u64),
    /// This fraction of each worker's memory.
    Fraction(f64),
}

/// Which stages multiply the vocabulary's rows. No bit depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vocabulary {
    /// The last one alone.
    #[default]
    Last,
    /// The last one, and the first too where it holds the table and the longest stage becomes clearly shorter.
    Auto,
    /// The first and the last.
    Spread,
}

/// The part of a deployment that a plan depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Pipeline stages.
    pub pipeline: usize,
    /// Tensor-parallel ranks of each stage.
    pub tensor: usize,
    /// Layers of each stage; `None` balances them by bytes.
    pub stage_layers: Option<Vec<usize>>,
    /// Which stages multiply the vocabulary.
    pub vocabulary: Vocabulary,
    /// Where a request asks for no more than the likeliest tokens, a copy of the vocabulary in 4 bits says which may be among them, and those alone
    /// are multiplied exactly. That the likeliest are among them is known from trials alone.
    pub screening: bool,
    /// Longest sequence in tokens; `None` takes the model's context.
    pub max_context: Option<usize>,
    /// Most sequences in a step.
    pub max_batch_sequences: usize,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Memory of the KV cache.
    pub kv_memory: KvMemory,
    /// Type of KV entries; `None` follows the weights.
    pub kv_dtype: Option<KvDType>,
    /// Most bytes of memory a worker may take, whatever it has.
    pub worker_memory: Option<u64>,
    /// Adapters that every worker has room for. They come and go without another plan, so nothing else depends on them: what they need
    /// counts in whether everything fits, and not in the size of the KV cache.
    pub adapters: Vec<Arc<AdapterHeader>>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            pipeline: 1,
            tensor: 1,
            stage_layers: None,
            vocabulary: Vocabulary::default(),
            screening: false,
            max_context: None,
            max_batch_sequences: DEFAULT_BATCH_SEQUENCES,
            max_batch_tokens: DEFAULT_BATCH_TOKENS,
            kv_memory: KvMemory::Auto,
            kv_dtype: None,
            worker_memory: None,
            adapters: Vec::new(),
        }
    }
}

/// What each worker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Memory of one worker in bytes; `None` when it is unknown, and then everything fits.
    pub memory_bytes: Option<u64>,
}

/// A deployment that no set of workers could serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PlanError {
    #[error("{stages} pipeline stages for {layers} layers, expected at most one stage per layer and at least one")]
    Stages { stages: usize, layers: usize },
    #[error("{ranks} tensor-parallel ranks for {heads} query heads, expected at most one rank per head and at least one")]
    Ranks { ranks: usize, heads: usize },
    #[error("stages hold {got:?} layers, expected {stages} numbers of at least 1 with the sum {layers}")]
    StageLayers { got: Vec<usize>, stages: usize, layers: usize },
    #[error(
        "the vocabulary is to be spread over {stages} stages, expected several, of a model whose embedding table is its vocabulary matrix"
    )]
    Vocabulary { stages: usize },
    #[error("the vocabulary cannot be screened {why}")]
    Screening { why: &'static str },
    #[error("{got} tokens of context, expected at least 1 and at most the model's {limit}")]
    Context { got: usize, limit: usize },
    #[error("sequences of {got} tokens in steps of {batch} (maxBatchTokens), expected steps that hold a whole one, as an encoder reads it")]
    EncoderContext { got: usize, batch: usize },
    #[error("a KV cache of {got:?}, expected none or F32: an encoder has no cache")]
    EncoderCache { got: KvDType },
    #[error("{field} is {got}, expected at least 1")]
    Zero { field: &'static str, got: usize },
    #[error("the weights are {got:?}, expected {expected:?}")]
    Format { got: Format, expected: Format },
    #[error("KV memory fraction is {got}, expected more than 0 and at most 1")]
    Fraction { got: String },
    #[error("{field} gives a size past 64 bits")]
    Overflow { field: &'static str },
}

impl PlanError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        "PlanInfeasible"
    }
}

/// Plans a replica.
///
/// The plan says whether it fits ([`ExecutionPlan::fits`]); memory never makes it an error.
///
/// # Errors
/// When the spec contradicts the model, whatever the memory.
pub fn plan(spec: &Spec, header: &ModelHeader, capacity: &Capacity) -> Result<ExecutionPlan, PlanError> {
    let config = &header.config;
    let layers = config.layers.len();
    if spec.pipeline == 0 || spec.pipeline > layers {
        return Err(PlanError::Stages { stages: spec.pipeline, layers });
    }
    if spec.tensor == 0 || spec.tensor > config.heads {
        return Err(PlanError::Ranks { ranks: spec.tensor, heads: config.heads });
    }
    for (field, got) in [("maxBatchSequences", spec.max_batch_sequences), ("maxBatchTokens", spec.max_batch_tokens)] {
        if got == 0 {
            return Err(PlanError::Zero { field, got });
        }
    }
    if spec.screening {
        check_screening(spec, config)?;
    }
    let longest = if config.encoder.is_some() { config.context.min(spec.max_batch_tokens) } else { config.context };
    let max_context = spec.max_context.unwrap_or(longest);
    if max_context == 0 || max_context > config.context {
        return Err(PlanError::Context { got: max_context, limit: config.context });
    }
    if config.encoder.is_some() {
        if max_context > spec.max_batch_tokens {
            return Err(PlanError::EncoderContext { got: max_context, batch: spec.max_batch_tokens });
        }
        if let Some(got) = spec.kv_dtype.filter(|&dtype| dtype != KvDType::F32) {
            return Err(PlanError::EncoderCache { got });
        }
    }
    if let KvMemory::Fraction(f) = spec.kv_memory
        && !(f > 0.0 && f <= 1.0)
    {
        return Err(PlanError::Fraction { got: f.to_string() });
    }

    let memory_bytes = capacity.memory_bytes.into_iter().chain(spec.worker_memory).min();
    let capacity = &Capacity { memory_bytes };
    let stages::Layout { ranges, lent } = stages::layout(spec, header)?;
    let mut stages: Vec<Stage> = Vec::with_capacity(ranges.len());
    for (stage, range) in ranges.iter().enumerate() {
        let splits = split::splits(header, range, spec.tensor, lent);
        let shards = (0..spec.tensor).map(|rank| {
            let slices = slices::slices(header, range, (stage, ranges.len()), rank, &splits);
            let mut shard = Shard {
                stage,
                stages: ranges.len(),
                rank,
                ranks: spec.tensor,
                layers: range.clone(),
                splits: splits.clone(),
                weight_bytes: slices.iter().map(|s| s.tensor.held_bytes(s.rows.len())).sum(),
                slices,
                kv_bytes: 0,
                screening: spec.screening && stage + 1 == ranges.len(),
            };
            shard.weight_bytes += shard.screen_bytes(config.hidden);
            shard
        });
        stages.push(Stage { layers: range.clone(), shards: shards.collect() });
    }
    let held: u64 = shards(&stages).map(|s| s.weight_bytes).sum();
    let tensor_bytes: u64 = header.tensors.values().map(|t| t.held_bytes(t.shape.first().copied().unwrap_or(0))).sum();

    let needs: Vec<u64> = shards(&stages).map(|s| working_bytes(spec, header, s)).collect();
    let adapters: Vec<u64> = shards(&stages).map(|shard| adapter_bytes(spec, header, shard)).collect();
    let sized = kv::size(spec, header, capacity, max_context, &stages, (&needs, &adapters))?;
    for shard in stages.iter_mut().flat_map(|s| &mut s.shards) {
        shard.kv_bytes = kv::shard_bytes(&sized.geometry, config, shard);
    }
    Ok(ExecutionPlan {
        config: config.clone(),
        stages,
        kv: sized.geometry,
        max_context,
        max_batch_sequences: spec.max_batch_sequences,
        max_batch_tokens: spec.max_batch_tokens,
        file_bytes: header.files.iter().map(|f| f.bytes).sum(),
        tensor_bytes,
        shared_bytes: held.saturating_sub(tensor_bytes),
        adapter_bytes: adapters.into_iter().max().unwrap_or(0),
        fits: sized.fits,
        message: sized.message,
    })
}

/// Whether the vocabulary can be screened.
fn check_screening(spec: &Spec, config: &ModelConfig) -> Result<(), PlanError> {
    let refuse = |why| Err(PlanError::Screening { why });
    if config.encoder.is_some() {
        return refuse("of an encoder, which multiplies none");
    }
    if spec.vocabulary != Vocabulary::Last {
        return refuse("where it is spread over stages; expected the last alone");
    }
    if !config.hidden.is_multiple_of(SCREEN.block_len()) {
        return refuse("by blocks of 32 values, which its rows are not whole ones of");
    }
    Ok(())
}

fn shards(stages: &[Stage]) -> impl Iterator<Item = &Shard> {
    stages.iter().flat_map(|s| &s.shards)
}

/// Bytes of activations and logits that a worker needs beside weights and KV cache.
///
/// Per token of a step: residual, norm and gathered outputs (8 × hidden), gate, up and their product (3 × ffn), query, key, value and
/// attention output of all heads, with latent attention the compressed vectors and what they are unpacked to, of each expert that it goes to
/// input, output, gate and up, and of the shared ones gate, up, their product and output, as f32; on the last stage one row of logits per
/// sequence, on the first as much of it as it multiplies. An encoder has keys and values of one layer, in blocks of which each sequence's last may be begun, and no logits.
fn working_bytes(spec: &Spec, header: &ModelHeader, shard: &Shard) -> u64 {
    let c = &header.config;
    let experts = c.experts.map_or(0, |e| e.count + e.used * 2 * (c.hidden + e.ffn) + 3 * e.shared_ffn() + e.shared.min(1) * c.hidden);
    let heads = (c.heads + c.kv_heads) * (c.head_dim + c.value_dim());
    let latent = c.latent.map_or(0, |l| l.q_rank.unwrap_or(0) + 2 * l.kv_rank + l.rotated + c.kv_heads * c.unpacked_dim());
    let width = 8 * c.hidden + 3 * c.ffn + heads + latent + experts;
    let tokens = (spec.max_batch_tokens as u64).saturating_mul(width as u64).saturating_mul(4);
    if c.encoder.is_some() {
        let held = spec.max_batch_sequences.saturating_mul(BLOCK_TOKENS).saturating_add(spec.max_batch_tokens) as u64;
        return tokens.saturating_add(held.saturating_mul(2 * 4 * (c.kv_heads * c.head_dim) as u64));
    }
    let rows = if shard.is_last() { c.vocab } else { shard.product().len() };
    let logits = (spec.max_batch_sequences as u64).saturating_mul(rows as u64).saturating_mul(4);
    tokens.saturating_add(logits)
}

/// Bytes that the adapters of a worker need: their weights, and what the largest product of theirs needs in a step.
fn adapter_bytes(spec: &Spec, header: &ModelHeader, shard: &Shard) -> u64 {
    let parts: Vec<_> = spec.adapters.iter().map(|adapter| adapter.of(&header.config, shard)).collect();
    let weights = parts.iter().map(AdapterShard::weight_bytes).fold(0, u64::saturating_add);
    let working = parts.iter().map(|part| part.working_bytes(spec.max_batch_tokens)).max().unwrap_or(0);
    weights.saturating_add(working)
}

/// The type of KV entries that goes with a model's weights: F16 when any layer matrix is quantized, else F32; F32
/// for an encoder, which keeps no entries.
pub fn default_kv_dtype(header: &ModelHeader) -> KvDType {
    if header.config.encoder.is_some() {
        return KvDType::F32;
    }
    let quantized = header.tensors.iter().any(|(id, t)| id.layer.is_some() && t.dtype.activation_block().is_some());
    if quantized { KvDType::F16 } else { KvDType::F32 }
}

/// What one worker of each shard is told, stage by stage and rank by rank.
pub fn worker_specs(plan: &ExecutionPlan, origin: &Origin<'_>, threads: usize, collective: CollectiveKind) -> Vec<WorkerSpec> {
    let spec = |shard: &Shard| WorkerSpec {
        replica: origin.replica.to_owned(),
        uri: origin.uri.to_owned(),
        digest: origin.digest.map(str::to_owned),
        config: plan.config.clone(),
        shard: shard.clone(),
        kv: plan.kv.clone(),
        max_context: plan.max_context,
        max_batch_tokens: plan.max_batch_tokens,
        threads: threads.max(1),
        collective,
    };
    shards(&plan.stages).map(spec).collect()
}

/// Where a replica's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin<'a> {
    /// Unique name of the replica.
    pub replica: &'a str,
    /// Source of the model.
    pub uri: &'a str,
    /// `sha256:<hex>` of the model's single weight file, when pinned.
    pub digest: Option<&'a str>,
}

/// What a router may send to a replica that runs `plan`.
pub fn limits(plan: &ExecutionPlan, prefix_caching: bool) -> ReplicaLimits {
    ReplicaLimits {
        kv: plan.kv.clone(),
        max_context: plan.max_context,
        max_batch_sequences: plan.max_batch_sequences,
        max_batch_tokens: plan.max_batch_tokens,
        prefix_caching,
    }
}

/// The numerics id of a replica: equal ids give equal bits for equal ids and seeds.
///
/// It covers the weights (`identity`: their digest or, when unpinned, their resolved source and revision), the shape with its rope
/// settings, the stored types, the KV entry type and [`ARITHMETIC_VERSION`]; of the plan only the longest sequence, where rotary
/// frequencies go by it, for no bit depends on anything else.
pub fn numerics(header: &ModelHeader, identity: &str, plan: &ExecutionPlan) -> String {
    let (kv, max_context) = (plan.kv.dtype, plan.max_context);
    let types: Vec<_> = header.tensors.iter().map(|(id, t)| (*id, t.dtype, t.shape.clone())).collect();
    let mut hash = Sha256::new();
    hash.update(format!("{ARITHMETIC_VERSION}\n{identity}\n{kv:?}\n{:?}\n{types:?}", header.config));
    if header.config.layers.iter().any(|l| l.rope.scaling.depends_on_length()) {
        hash.update(format!("\n{max_context} tokens"));
    }
    if shards(&plan.stages).any(|shard| shard.screening) {
        hash.update("\nscreened");
    }
    hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Splits `len` into `parts` runs of whole `unit`s (the last may be short), as even as they come, longer ones first.
fn balanced(len: usize, parts: usize, unit: usize) -> Vec<Range<usize>> {
    let units = len.div_ceil(unit);
    let (each, extra) = (units / parts, units % parts);
    let mut start = 0;
    let part = |i: usize| {
        let end = (start + (each + usize::from(i < extra)) * unit).min(len);
        let range = start..end;
        start = end;
        range
    };
    (0..parts).map(part).collect()
}

/// Whether the last stage's vocabulary product reads the embedding table.
fn output_role(header: &ModelHeader) -> Role {
    if header.config.tied_embeddings { Role::Embedding } else { Role::Output }
}
