//! How many KV blocks each group gets, and whether everything fits.

use super::{Capacity, KvMemory, PlanError, Spec, default_kv_dtype};
use crate::{
    model::{ModelConfig, ModelHeader},
    shard::{BLOCK_TOKENS, KvDType, KvGeometry, KvGroup, Shard, Stage},
};

/// Without a figure in the spec, KV caches are sized for batches of sequences of this length …
const ORDINARY_TOKENS: usize = 2048;
/// … but take at most this part of a worker's memory.
const AUTO_PART: u64 = 4;

/// KV geometry and the verdict on memory.
pub(super) struct Sized {
    pub(super) geometry: KvGeometry,
    pub(super) fits: bool,
    pub(super) message: String,
}

/// Bytes of KV cache of one worker.
pub(super) fn shard_bytes(geometry: &KvGeometry, config: &ModelConfig, shard: &Shard) -> u64 {
    geometry
        .groups
        .iter()
        .map(|g| block_bytes(g, geometry.dtype, config, shard).saturating_mul(g.blocks as u64))
        .fold(0, u64::saturating_add)
}

/// Bytes of one block of `group` on one worker: keys and values of its layers and heads.
fn block_bytes(group: &KvGroup, dtype: KvDType, config: &ModelConfig, shard: &Shard) -> u64 {
    let layers = group.layers.iter().filter(|l| shard.layers.contains(l)).count();
    let heads = shard.splits.kv_heads.get(shard.rank).map_or(0, ExactSizeIterator::len);
    let position = dtype.bytes(config.head_dim) + dtype.bytes(config.value_dim());
    layers as u64 * heads as u64 * position as u64 * BLOCK_TOKENS as u64
}

/// Blocks of one group: at least for one sequence of full length, at most for a full batch.
struct Need {
    least: usize,
    most: usize,
}

/// Sizes every group. `working` and `adapters` hold the bytes of activations and of adapters per worker, in the order of stages and ranks.
pub(super) fn size(
    spec: &Spec,
    header: &ModelHeader,
    capacity: &Capacity,
    max_context: usize,
    stages: &[Stage],
    (working, adapters): (&[u64], &[u64]),
) -> Result<Sized, PlanError> {
    let config = &header.config;
    let dtype = spec.kv_dtype.unwrap_or_else(|| default_kv_dtype(header));
    // An encoder keeps nothing from step to step.
    let cached = config.layers.iter().filter(|_| config.encoder.is_none());
    let mut windows: Vec<Option<u32>> = cached.map(|l| l.window).collect();
    windows.sort_unstable();
    windows.dedup();
    let needs: Vec<Need> = windows.iter().map(|&w| need(spec, w, max_context)).collect::<Result<_, _>>()?;
    let groups = windows.iter().map(|&window| {
        let layers = config.layers.iter().enumerate().filter(|(_, l)| l.window == window).map(|(i, _)| i).collect();
        KvGroup { window, layers, blocks: 0 }
    });
    let mut geometry = KvGeometry { dtype, groups: groups.collect() };

    let workers: Vec<(&Shard, u64)> = stages.iter().flat_map(|s| &s.shards).zip(working.iter().copied()).collect();
    let budgets: Vec<u64> = workers.iter().map(|&(shard, working)| budget(spec, capacity, shard, working)).collect();
    let fits = |geometry: &KvGeometry| workers.iter().zip(&budgets).all(|((shard, _), &b)| shard_bytes(geometry, config, shard) <= b);
    let set = |geometry: &mut KvGeometry, cap: usize| {
        for (group, need) in geometry.groups.iter_mut().zip(&needs) {
            group.blocks = cap.clamp(need.least, need.most);
        }
    };
    // A sequence never holds more blocks of a window than of full attention, so one cap for all groups wastes none.
    let most = needs.iter().map(|n| n.most).max().unwrap_or(1);
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        set(&mut geometry, middle);
        if fits(&geometry) { low = middle } else { high = middle - 1 }
    }
    set(&mut geometry, low);
    let cache_fits = fits(&geometry);
    let cache = cache_fits.then_some(()).ok_or(&budgets);
    let (fits, message) = verdict(&geometry, capacity, (&workers, adapters), config, max_context, cache);
    Ok(Sized { geometry, fits, message })
}

/// Blocks that one group needs.
fn need(spec: &Spec, window: Option<u32>, max_context: usize) -> Result<Need, PlanError> {
    let blocks = |tokens: usize| tokens.div_ceil(BLOCK_TOKENS);
    let whole = blocks(max_context);
    let (least, each) = match window {
        None => (whole, blocks(max_context.min(ORDINARY_TOKENS))),
        // Positions [p - W, p + chunk) may begin and end inside a block.
        Some(w) => {
            let reach = (w as usize).saturating_add(spec.max_batch_tokens);
            ((blocks(reach) + 1).min(whole), (blocks(w as usize) + 1).min(whole))
        }
    };
    let explicit = spec.kv_memory != KvMemory::Auto && window.is_none();
    let each = if explicit { whole } else { each };
    let in_flight = if window.is_some() { blocks(spec.max_batch_tokens) + 1 } else { 0 };
    let most = spec.max_batch_sequences.checked_mul(each).and_then(|n| n.checked_add(in_flight)).map(|n| n.max(2 * least));
    let most = most.filter(|&n| u32::try_from(n).is_ok()).ok_or(PlanError::Overflow { field: "maxBatchSequences" })?;
    Ok(Need { least, most })
}

/// Bytes that the KV cache of a worker may take.
fn budget(spec: &Spec, capacity: &Capacity, shard: &Shard, working: u64) -> u64 {
    let free = capacity.memory_bytes.map_or(u64::MAX, |m| m.saturating_sub(shard.weight_bytes).saturating_sub(working));
    match (spec.kv_memory, capacity.memory_bytes) {
        (KvMemory::Auto, Some(memory)) => free.min(memory / AUTO_PART),
        (KvMemory::Fraction(f), Some(memory)) => free.min((memory as f64 * f) as u64),
        (KvMemory::Bytes(bytes), _) => free.min(bytes),
        (KvMemory::Auto | KvMemory::Fraction(_), None) => free,
    }
}

/// Whether the fullest worker fits, in words.
fn verdict(
    geometry: &KvGeometry,
    capacity: &Capacity,
    (workers, adapters): (&[(&Shard, u64)], &[u64]),
    config: &ModelConfig,
    max_context: usize,
    cache: Result<(), &Vec<u64>>,
) -> (bool, String) {
    let of = |index: usize| adapters.get(index).copied().unwrap_or(0);
    let total = |index: usize| {
        let (shard, working) = workers[index];
        let parts = [shard.weight_bytes, shard_bytes(geometry, config, shard), working, of(index)];
        parts.into_iter().fold(0, u64::saturating_add)
    };
    let Some(index) = (0..workers.len()).max_by_key(|&i| (total(i), std::cmp::Reverse(i))) else {
        return (false, "no workers".to_owned());
    };
    let describe = |index: usize| {
        let (shard, working) = workers[index];
        let (stage, rank, kv) = (shard.stage, shard.rank, shard_bytes(geometry, config, shard));
        let adapters = if of(index) > 0 { format!(", adapters {}", of(index)) } else { String::new() };
        format!(
            "stage {stage} rank {rank} needs {} bytes (weights {}, KV cache {kv}, activations {working}{adapters})",
            total(index),
            shard.weight_bytes
        )
    };
    match (cache, capacity.memory_bytes) {
        (Err(budgets), memory) => {
            let over = workers.iter().zip(budgets).position(|((shard, _), &b)| shard_bytes(geometry, config, shard) > b).unwrap_or(index);
            let memory = memory.map_or_else(|| "unknown memory".to_owned(), |m| format!("{m} bytes of memory"));
            let text = format!(
                "does not fit: {} of {memory}; its KV cache may take {} bytes, one sequence of {max_context} tokens needs {}",
                describe(over),
                budgets[over],
                shard_bytes(geometry, config, workers[over].0)
            );
            (false, text)
        }
        (Ok(()), Some(memory)) if total(index) > memory => {
            (false, format!("does not fit: {} of {memory} bytes of memory", describe(index)))
        }
        (Ok(()), Some(memory)) => (true, format!("fits: {} of {memory} bytes of memory", describe(index))),
        (Ok(()), None) => (true, format!("memory of the workers is unknown; {}", describe(index))),
    }
}
