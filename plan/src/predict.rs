//! What memory and arithmetic allow: the most tokens per second that a plan decodes on a machine.
//!
//! A stage's step takes as long as the slowest of its ranks reads what it holds, or multiplies it, whichever is longer (a roofline). Norms,
//! softmax, meetings of ranks and hops between stages count nothing, so what is measured beside this says what they and waiting cost.

use std::ops::Add;

use crate::{
    model::{ModelConfig, Role},
    shard::{ExecutionPlan, KvGeometry, Shard, TensorSlice},
};

/// What a machine can do for the workers of one replica, all of which have as many threads.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Bytes per second that all workers together read from memory.
    pub read: f64,
    /// Bytes per second that one worker reads while the others rest.
    pub read_alone: f64,
    /// Multiply-adds of 8-bit values per second, of all workers together.
    pub products: f64,
}

/// Times that 8-bit products are faster than those of floats: a vector holds four times as many.
const FLOATS: f64 = 4.0;

/// What a step of one row of `plan` takes, in thousandths of such a step of `whole`, where both are bound by reading and one memory serves
/// all of their workers; at least `least`.
pub fn thousandths(plan: &ExecutionPlan, whole: &ExecutionPlan, least: u32) -> u32 {
    let bytes = |plan: &ExecutionPlan| -> f64 {
        let costs = plan.stages.iter().flat_map(|stage| &stage.shards).map(|shard| cost(&plan.config, &plan.kv, shard, 1, 0));
        costs.map(|(layers, head)| (layers + head).bytes).sum()
    };
    ((1000.0 * bytes(plan) / bytes(whole).max(1.0)).round() as u32).max(least)
}

/// What a worker does in a part of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cost {
    /// Bytes read: weights once, and the cache of every sequence.
    bytes: f64,
    /// Multiply-adds, in those of 8-bit values.
    products: f64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, products: self.products + other.products }
    }
}

/// Most tokens per second of `sequences` sequences that decode together, with `depth` tokens in the cache of each; 0 where a machine does
/// nothing.
///
/// With as many sequences as stages, or more, each stage works on a micro-batch of its own; with fewer, stages wait for each other. The vocabulary
/// comes after all layers, at the same time on all stages that multiply its rows.
pub fn decode(plan: &ExecutionPlan, machine: &Machine, sequences: usize, depth: usize) -> f64 {
    let stages = plan.stages.len();
    let workers: usize = plan.stages.iter().map(|stage| stage.shards.len()).sum();
    let width = sequences.div_ceil(stages.max(1)).max(1);
    let batches = sequences.div_ceil(width);
    let spread = plan.stages.iter().filter(|stage| stage.shards.iter().any(|shard| !shard.product().is_empty())).count();
    // The memory is shared by those that work at the same time.
    let time = |cost: Cost, working: usize| {
        let read = machine.read_alone.min(machine.read / working as f64);
        (cost.bytes / read).max(cost.products / (machine.products / workers as f64))
    };
    let (mut longest, mut layers, mut vocabulary) = (0.0_f64, 0.0, 0.0_f64);
    for stage in &plan.stages {
        let ranks = stage.shards.len();
        let slowest = |of: fn(Cost, Cost) -> Cost, working: usize| {
            let costs = stage.shards.iter().map(|shard| cost(&plan.config, &plan.kv, shard, width, depth));
            costs.map(|(layers, head)| time(of(layers, head), working)).fold(0.0, f64::max)
        };
        longest = longest.max(slowest(|layers, head| layers + head, ranks * batches.min(stages)));
        layers += slowest(|layers, _| layers, ranks * batches.min(stages));
        vocabulary = vocabulary.max(slowest(|_, head| head, ranks * batches.max(spread).min(stages)));
    }
    // All sequences have their next token when the longest stage has had every micro-batch, or the only one has passed every stage.
    let cycle = (batches as f64 * longest).max(layers + vocabulary);
    if cycle > 0.0 { sequences as f64 / cycle } else { 0.0 }
}

/// What a worker does in a step of one token of each of `sequences` sequences, for layers and for the vocabulary.
fn cost(config: &ModelConfig, kv: &KvGeometry, shard: &Shard, sequences: usize, depth: usize) -> (Cost, Cost) {
    let output = if config.tied_embeddings { Role::Embedding } else { Role::Output };
    let of = |slice: &TensorSlice| {
        let rows = if slice.id.role == output { shard.product().len() } else { slice.rows.len() };
        let width = *slice.tensor.shape.get(1)?;
        let bytes = (rows * slice.tensor.dtype.row_bytes(width)?) as f64;
        let products = (rows * width) as f64 * if slice.tensor.dtype.block_len() == 1 { FLOATS } else { 1.0 };
        if slice.id.role == output && shard.screening {
            // One token each, of which the likeliest alone is wanted; those that are multiplied exactly are few.
            return Some(Cost { bytes: shard.screen_bytes(width) as f64, products: (rows * width * sequences) as f64 });
        }
        let (read, used) = share(config, slice.id.role, sequences);
        Some(Cost { bytes: bytes * read, products: products * used * sequences as f64 })
    };
    let sum =
        |head: bool| shard.slices.iter().filter(|slice| (slice.id.role == output) == head).filter_map(of).fold(Cost::default(), Cost::add);
    let cached = kv.groups.iter().map(|group| {
        let layers = group.layers.iter().filter(|layer| shard.layers.contains(layer)).count();
        let heads = shard.splits.kv_heads.get(shard.rank).map_or(0, ExactSizeIterator::len);
        let positions = group.window.map_or(depth, |window| depth.min(window as usize)) * sequences;
        Cost {
            bytes: (layers * heads * positions * (kv.dtype.bytes(config.head_dim) + kv.dtype.bytes(config.value_dim()))) as f64,
            products: 0.0,
        }
    });
    (cached.fold(sum(false), Cost::add), sum(true))
}

/// Which part of a tensor is read in a step, and by which part of the tokens it is multiplied.
fn share(config: &ModelConfig, role: Role, sequences: usize) -> (f64, f64) {
    match role {
        // Rows are looked up, but for the vocabulary product.
        Role::Embedding if !config.tied_embeddings => (0.0, 0.0),
        Role::Positions | Role::TokenTypes => (0.0, 0.0),
        Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_) => {
            let used = config.experts.map_or(1.0, |experts| experts.used as f64 / experts.count.max(1) as f64);
            // Some token goes to it, where tokens choose as if by chance.
            (1.0 - (1.0 - used).powi(sequences as i32), used)
        }
        _ => (1.0, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        model::Experts,
        planner::{self, Capacity, Spec, Vocabulary},
        samples::Sample,
    };

    /// Reading is what bounds it.
    const SLOW_MEMORY: Machine = Machine { read: 1e3, read_alone: 1e3, products: 1e12 };

    fn planned(sample: &Sample, pipeline: usize, tensor: usize) -> ExecutionPlan {
        let spec = Spec { pipeline, tensor, ..Spec::default() };
        planner::plan(&spec, &sample.model(), &Capacity { memory_bytes: None }).expect("a plan")
    }

    fn llama() -> Sample {
        Sample { layers: 4, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, ffn: 128, vocab: 4096, matrix: DType::Q8_0, ..Sample::llama() }
    }

    /// Bytes that a token reads: everything but norms, and the table unless it is the vocabulary matrix too.
    fn matrices(plan: &ExecutionPlan) -> f64 {
        let read = |s: &&TensorSlice| s.tensor.shape.len() == 2 && s.id.role != Role::Embedding;
        plan.stages[0].shards[0].slices.iter().filter(read).map(|s| s.len() as f64).sum()
    }

    #[test]
    fn one_process_reads_its_matrices_once_a_step_and_its_caches_once_a_sequence() {
        let plan = planned(&llama(), 1, 1);
        let bytes = matrices(&plan);
        let close = |rate: f64, expected: f64| assert!((rate / expected - 1.0).abs() < 1e-9, "{rate} for {expected}");
        close(decode(&plan, &SLOW_MEMORY, 1, 0), 1e3 / bytes);
        close(decode(&plan, &SLOW_MEMORY, 8, 0), 8e3 / bytes);
        // F16 of 4 layers, 2 heads of 16 for keys and values.
        let cache = 4.0 * 2.0 * 2.0 * 16.0 * 2.0;
        close(decode(&plan, &SLOW_MEMORY, 8, 10), 8e3 / (bytes + 80.0 * cache));
        let tied = planned(&Sample { tied: true, ..llama() }, 1, 1);
        close(decode(&tied, &SLOW_MEMORY, 1, 0), 1e3 / bytes);
        // Multiplying bounds it where memory is fast: a byte and its part of a scale is one product.
        let products = bytes / 34.0 * 32.0;
        close(decode(&plan, &Machine { read: 1e12, read_alone: 1e12, products: 1e3 }, 8, 0), 1e3 / products);
    }

    #[test]
    fn ranks_share_the_bytes_and_stages_the_time() {
        let whole = decode(&planned(&llama(), 1, 1), &SLOW_MEMORY, 8, 0);
        let ranks = decode(&planned(&llama(), 1, 2), &SLOW_MEMORY, 8, 0);
        assert!((0.9..=1.0).contains(&(ranks / whole)), "{ranks} of {whole}");
        let staged = planned(&llama(), 2, 1);
        let pipeline = decode(&staged, &SLOW_MEMORY, 8, 0);
        // Weights are read for half of the sequences at a time.
        assert!((0.3..=0.5).contains(&(pipeline / whole)), "{pipeline} of {whole}");
        // One sequence is in one stage at a time, which then has the memory to itself, if it can use it.
        let one = decode(&planned(&llama(), 1, 1), &SLOW_MEMORY, 1, 0);
        assert!((decode(&staged, &SLOW_MEMORY, 1, 0) / one - 1.0).abs() < 1e-9);
        let half = Machine { read_alone: 0.5e3, ..SLOW_MEMORY };
        assert!((decode(&staged, &half, 1, 0) / one - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_vocabulary_that_is_spread_takes_its_stages_the_time_of_a_part() {
        let tied = Sample { tied: true, vocab: 65_536, ..llama() }.model();
        let planned = |vocabulary| {
            let spec = Spec { pipeline: 2, vocabulary, ..Spec::default() };
            planner::plan(&spec, &tied, &Capacity { memory_bytes: None }).expect("a plan")
        };
        let (last, spread) = (planned(Vocabulary::Last), planned(Vocabulary::Spread));
        // Each stage reads as fast as the other, whether that works or not.
        let machine = Machine { read: 2e3, ..SLOW_MEMORY };
        let head = (65_536 * 68) as f64 / 1e3;
        let (before, after) = (1.0 / decode(&last, &machine, 1, 0), 1.0 / decode(&spread, &machine, 1, 0));
        assert!((before - after - head / 2.0).abs() < 1e-6 * head, "{before} and {after}, of which {head} is the vocabulary");
        // The longest stage had nearly all of it.
        let faster = decode(&spread, &machine, 8, 0) / decode(&last, &machine, 8, 0);
        assert!((1.9..=2.0).contains(&faster), "{faster}");
        // Where one worker reads as fast as both, one sequence gains nothing.
        let shared = Machine { read: 1e3, ..SLOW_MEMORY };
        let ratio = decode(&spread, &shared, 1, 0) / decode(&last, &shared, 1, 0);
        assert!((ratio - 1.0).abs() < 1e-9, "{ratio}");
    }

    #[test]
    fn the_time_of_a_step_beside_another_is_that_of_its_bytes() {
        let (whole, half) = (planned(&llama(), 1, 1), planned(&Sample { layers: 2, vocab: 2048, ..llama() }, 1, 1));
        assert_eq!(thousandths(&half, &whole, 50), 500);
        assert_eq!(thousandths(&half, &planned(&llama(), 2, 2), 50), 500, "the split changes no bytes");
        assert_eq!(thousandths(&whole, &whole, 50), 1000);
        assert_eq!(thousandths(&half, &whole, 700), 700);
    }

    #[test]
    fn experts_are_read_as_often_as_tokens_reach_them() {
        let plan = planned(&llama(), 1, 1);
        let config = ModelConfig { experts: Some(Experts::softmax(8, 1, 16, true)), ..plan.config.clone() };
        assert_eq!(share(&config, Role::ExpertUp(0), 1), (0.125, 0.125));
        let (read, used) = share(&config, Role::ExpertUp(0), 1000);
        assert!(read > 0.999 && used == 0.125);
        assert_eq!(share(&config, Role::Router, 1), (1.0, 1.0));
    }
}
