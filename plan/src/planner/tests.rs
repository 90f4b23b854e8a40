//! Plans: what is covered, what is shared, what fits.

use std::{collections::HashMap, ops::Range};

use proptest::prelude::*;

use super::{
    Capacity, KvMemory, Origin, PlanError, Spec, Vocabulary, default_kv_dtype, kv::shard_bytes, limits, numerics, plan, worker_specs,
};
use crate::{
    dtype::DType,
    model::{ModelHeader, Role, RopeScaling, TensorId},
    samples::Sample,
    shard::{BLOCK_TOKENS, ExecutionPlan, KvDType, Shard, VOCAB_TILE},
    worker::CollectiveKind,
};

const UNKNOWN: Capacity = Capacity { memory_bytes: None };

fn spec(pipeline: usize, tensor: usize) -> Spec {
    Spec { pipeline, tensor, ..Spec::default() }
}

fn memory(bytes: u64) -> Capacity {
    Capacity { memory_bytes: Some(bytes) }
}

fn planned(spec: &Spec, model: &ModelHeader) -> ExecutionPlan {
    plan(spec, model, &UNKNOWN).unwrap_or_else(|e| panic!("{spec:?}: {e}"))
}

fn shards(plan: &ExecutionPlan) -> impl Iterator<Item = &Shard> {
    plan.stages.iter().flat_map(|s| &s.shards)
}

/// The reference model's shape.
fn gemma_270m() -> Sample {
    Sample {
        layers: 18,
        hidden: 640,
        heads: 4,
        kv_heads: 1,
        head_dim: 256,
        ffn: 2048,
        vocab: 262_144,
        context: 32_768,
        matrix: DType::Q8_0,
        ..Sample::gemma3()
    }
}

/// Whether `ranges` follow each other from 0 to `len`.
fn covers(ranges: &[Range<usize>], len: usize) -> bool {
    let mut at = 0;
    ranges.iter().all(|r| {
        let follows = r.start == at && r.end >= r.start;
        at = r.end;
        follows
    }) && at == len
}

/// What is wrong with how a plan hands out the model; nothing for a right one.
fn faults(plan: &ExecutionPlan, model: &ModelHeader) -> Vec<String> {
    let c = &model.config;
    let mut faults = Vec::new();
    let mut check = |right: bool, what: String| {
        if !right {
            faults.push(what);
        }
    };
    let layers: Vec<_> = plan.stages.iter().map(|s| s.layers.clone()).collect();
    check(covers(&layers, c.layers.len()) && layers.iter().all(|l| !l.is_empty()), format!("layers {layers:?}"));
    let mut holders: HashMap<TensorId, Vec<(usize, Range<usize>)>> = HashMap::new();
    for shard in shards(plan) {
        let s = &shard.splits;
        let block = model.tensors.iter().filter(|(id, _)| id.role == Role::Down).filter_map(|(_, t)| t.dtype.activation_block()).max();
        check(covers(&s.heads, c.heads) && s.heads.iter().all(|h| !h.is_empty()), format!("heads {:?}", s.heads));
        check(covers(&s.hidden, c.hidden), format!("hidden {:?}", s.hidden));
        check(covers(&s.ffn, c.ffn), format!("ffn {:?}", s.ffn));
        check(covers(&s.vocab, c.vocab), format!("vocab {:?}", s.vocab));
        let whole = |r: &Range<usize>, unit: usize, len: usize| r.start.is_multiple_of(unit) || r.start == len;
        check(s.ffn.iter().all(|r| whole(r, block.unwrap_or(1), c.ffn)), format!("ffn {:?} cuts blocks of {block:?}", s.ffn));
        check(s.vocab.iter().all(|r| whole(r, VOCAB_TILE, c.vocab)), format!("vocab {:?} cuts tiles", s.vocab));
        // Every KV head that a query head reads, and no other.
        let group = c.heads / c.kv_heads;
        for (q, kv) in s.heads.iter().zip(&s.kv_heads) {
            let read: Vec<usize> = q.clone().map(|h| h / group).collect();
            check(kv.clone().eq(read[0]..read[read.len() - 1] + 1), format!("heads {q:?} read {kv:?}"));
        }
        let bytes: u64 = shard.slices.iter().map(|s| s.bytes.end - s.bytes.start).sum();
        check(bytes == shard.weight_bytes, format!("{bytes} bytes of slices, {} counted", shard.weight_bytes));
        check(shard.slices.is_sorted_by_key(|s| (s.tensor.file, s.bytes.start)), "slices out of order".to_owned());
        for slice in &shard.slices {
            let tensor = &model.tensors[&slice.id];
            let row = tensor.bytes / tensor.shape[0] as u64;
            let begin = tensor.offset + slice.rows.start as u64 * row;
            check(slice.bytes == (begin..begin + slice.rows.len() as u64 * row), format!("bytes of {}", tensor.name));
            check(slice.bytes.end <= tensor.offset + tensor.bytes, format!("{} beyond its end", tensor.name));
            let layer = slice.id.layer.map(|l| l as usize);
            check(layer.is_none_or(|l| shard.layers.contains(&l)), format!("{} of another stage", tensor.name));
            holders.entry(slice.id).or_default().push((shard.stage, slice.rows.clone()));
        }
    }
    for (id, tensor) in &model.tensors {
        let held = holders.remove(id).unwrap_or_default();
        check(!held.is_empty(), format!("{} is held by no one", tensor.name));
        for stage in 0..plan.stages.len() {
            let mut rows: Vec<_> = held.iter().filter(|h| h.0 == stage).map(|h| h.1.clone()).filter(|r| !r.is_empty()).collect();
            if rows.is_empty() {
                continue;
            }
            let replicated =
                tensor.shape.len() == 1 && !matches!(id.role, Role::QBias | Role::KBias | Role::VBias | Role::DownBias | Role::OBias);
            let overlaps = replicated || matches!(id.role, Role::K | Role::V | Role::KBias | Role::VBias);
            rows.sort_by_key(|r| (r.start, r.end));
            if overlaps {
                let mut reach = 0;
                let joined = rows.iter().all(|r| {
                    let joins = r.start <= reach;
                    reach = reach.max(r.end);
                    joins
                });
                check(joined && reach == tensor.shape[0], format!("{} in stage {stage}: {rows:?}", tensor.name));
            } else if id.role == Role::Embedding && stage > 0 {
                let kept: Vec<_> = plan.stages[stage].shards.iter().map(Shard::product).filter(|rows| !rows.is_empty()).collect();
                check(rows == kept, format!("{} in stage {stage}: {rows:?}", tensor.name));
            } else {
                check(covers(&rows, tensor.shape[0]), format!("{} in stage {stage}: {rows:?}", tensor.name));
            }
        }
    }
    // Whoever holds them, every row of the vocabulary is multiplied once, in whole tiles.
    let mut products: Vec<_> = shards(plan).map(Shard::product).filter(|rows| !rows.is_empty()).collect();
    products.sort_by_key(|rows| rows.start);
    check(covers(&products, c.vocab), format!("products {products:?}"));
    check(products.iter().all(|rows| rows.start.is_multiple_of(VOCAB_TILE)), format!("products {products:?} cut tiles"));
    let held: u64 = shards(plan).map(|s| s.weight_bytes).sum();
    check(held == plan.tensor_bytes + plan.shared_bytes, format!("{held} held, {} + {}", plan.tensor_bytes, plan.shared_bytes));
    check(plan.tensor_bytes == model.tensors.values().map(|t| t.bytes).sum::<u64>(), "tensor bytes".to_owned());
    faults
}

/// Models with every relation of heads, blocks and tiles that matters.
fn models() -> Vec<Sample> {
    let llama = Sample { layers: 5, hidden: 64, heads: 8, kv_heads: 4, head_dim: 16, ffn: 200, vocab: 2500, ..Sample::llama() };
    vec![
        llama.clone(),
        Sample { tied: true, kv_heads: 8, ..llama.clone() },
        Sample { matrix: DType::Q8_0, head_dim: 12, heads: 8, kv_heads: 2, ffn: 96, ..llama.clone() },
        Sample { matrix: DType::Q4_K, hidden: 256, ffn: 768, heads: 8, kv_heads: 2, head_dim: 32, ..llama },
        Sample { layers: 8, hidden: 64, heads: 6, kv_heads: 1, head_dim: 16, ffn: 96, vocab: 3000, ..Sample::gemma3() },
    ]
}

#[test]
fn every_stage_and_rank_count_covers_the_model_exactly() {
    for sample in models() {
        let model = sample.model();
        for pipeline in 1..=sample.layers {
            for tensor in 1..=sample.heads {
                let plan = planned(&spec(pipeline, tensor), &model);
                assert_eq!(faults(&plan, &model), [""; 0], "{sample:?} at {pipeline} × {tensor}");
                assert_eq!((plan.stages.len(), plan.stages[0].shards.len()), (pipeline, tensor));
                if sample.tied && pipeline > 1 {
                    let spread = planned(&Spec { vocabulary: Vocabulary::Spread, ..spec(pipeline, tensor) }, &model);
                    assert_eq!(faults(&spread, &model), [""; 0], "{sample:?} at {pipeline} × {tensor}, spread");
                    assert!(spread.stages[0].shards.iter().any(|s| !s.product().is_empty()));
                }
            }
        }
        for (pipeline, tensor) in [(0, 1), (sample.layers + 1, 1)] {
            let error = plan(&spec(pipeline, tensor), &model, &UNKNOWN).unwrap_err();
            assert_eq!(error, PlanError::Stages { stages: pipeline, layers: sample.layers });
            assert!(error.to_string().starts_with(&format!("{pipeline} pipeline stages for {} layers", sample.layers)));
        }
        for tensor in [0, sample.heads + 1] {
            let error = plan(&spec(1, tensor), &model, &UNKNOWN).unwrap_err();
            assert_eq!(error, PlanError::Ranks { ranks: tensor, heads: sample.heads });
        }
    }
}

#[test]
fn the_check_of_plans_sees_faults() {
    let model = models()[3].model();
    let right = planned(&spec(2, 3), &model);
    let wrong = |change: &dyn Fn(&mut ExecutionPlan)| {
        let mut plan = right.clone();
        change(&mut plan);
        faults(&plan, &model)
    };
    assert_eq!(wrong(&|_| {}), [""; 0]);
    assert!(!wrong(&|p| p.stages[1].layers.start += 1).is_empty(), "a layer left out");
    assert!(!wrong(&|p| p.stages[0].shards[0].splits.ffn[0].end -= 1).is_empty(), "a cut block");
    assert!(!wrong(&|p| p.stages[0].shards[1].splits.kv_heads[1] = 0..0).is_empty(), "a KV head left out");
    assert!(!wrong(&|p| drop(p.stages[0].shards[0].slices.remove(5))).is_empty(), "a slice left out");
    assert!(!wrong(&|p| p.stages[0].shards[0].slices[5].rows.end -= 1).is_empty(), "a row left out");
    assert!(!wrong(&|p| p.shared_bytes += 1).is_empty(), "another sum");
}

#[test]
fn cut_groups_and_replicated_tensors_are_counted_as_shared() {
    // 4 heads over 2 KV heads: two ranks cut no group, three do, four share every KV head.
    let sample = Sample { layers: 1, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, ffn: 64, vocab: 1024, ..Sample::llama() };
    let model = sample.model();
    let norms = 3 * 64 * 4;
    let kv_head = 2 * 16 * 64 * 4;
    let shared = |tensor| planned(&spec(1, tensor), &model).shared_bytes;
    assert_eq!(shared(1), 0);
    assert_eq!(shared(2), norms);
    let three = planned(&spec(1, 3), &model);
    assert_eq!(three.stages[0].shards[0].splits.heads, [0..2, 2..3, 3..4]);
    assert_eq!(three.stages[0].shards[0].splits.kv_heads, [0..1, 1..2, 1..2]);
    assert_eq!(shared(3), 2 * norms + kv_head);
    assert_eq!(shared(4), 3 * norms + 2 * kv_head);
    // A tied table is on the first and the last stage, an untied one on the first alone.
    let two = Sample { layers: 2, ..sample };
    assert_eq!(planned(&spec(2, 1), &two.model()).shared_bytes, 0);
    let tied = Sample { tied: true, ..two };
    assert_eq!(planned(&spec(2, 1), &tied.model()).shared_bytes, 1024 * 64 * 4);
    assert_eq!(planned(&spec(1, 1), &tied.model()).shared_bytes, 0);
}

#[test]
fn slices_are_whole_blocks_and_tiles_even_where_ranks_are_left_empty() {
    let sample = Sample {
        matrix: DType::Q4_K,
        layers: 1,
        hidden: 256,
        heads: 8,
        kv_heads: 8,
        head_dim: 32,
        ffn: 768,
        vocab: 1500,
        ..Sample::llama()
    };
    let model = sample.model();
    let four = planned(&spec(1, 4), &model);
    let splits = &four.stages[0].shards[0].splits;
    assert_eq!(splits.ffn, [0..256, 256..512, 512..768, 768..768]);
    assert_eq!(splits.vocab, [0..1024, 1024..1500, 1500..1500, 1500..1500]);
    assert_eq!(splits.heads, [0..2, 2..4, 4..6, 6..8]);
    // A rank without rows still has an entry for the tensor, so that it knows the tensor's type.
    let empty = four.stages[0].shards[3].slices.iter().filter(|s| s.rows.is_empty()).count();
    assert_eq!(empty, 4, "gate, up, embedding, output");
    assert_eq!(four.stages[0].shards[3].slices.len(), model.tensors.len());
}

#[test]
fn layers_go_where_the_bytes_are() {
    // The table outweighs the layers: where the last stage multiplies all of it, that gets the least it may have.
    let model = gemma_270m().model();
    let two = planned(&spec(2, 1), &model);
    assert_eq!(two.stages[1].layers, 17..18);
    let given = Spec { stage_layers: Some(vec![9, 9]), ..spec(2, 1) };
    assert_eq!(planned(&given, &model).stages[1].layers, 9..18);
    let untied = models()[0].model();
    assert_eq!(planned(&spec(5, 1), &untied).stages.iter().map(|s| s.layers.len()).collect::<Vec<_>>(), [1; 5]);
    for wrong in [vec![9, 8], vec![18], vec![18, 0], vec![usize::MAX, 19], vec![6, 6, 6]] {
        let error = plan(&Spec { stage_layers: Some(wrong.clone()), ..spec(2, 1) }, &model, &UNKNOWN).unwrap_err();
        assert_eq!(error, PlanError::StageLayers { got: wrong, stages: 2, layers: 18 });
        assert!(error.to_string().contains("2 numbers of at least 1 with the sum 18"), "{error}");
    }
}

/// What each worker multiplies of the vocabulary, stage by stage and rank by rank.
fn products(plan: &ExecutionPlan) -> Vec<Range<usize>> {
    shards(plan).map(Shard::product).collect()
}

#[test]
fn a_vocabulary_is_spread_where_the_longest_stage_becomes_shorter() {
    let model = gemma_270m().model();
    let auto = |pipeline, tensor| Spec { vocabulary: Vocabulary::Auto, ..spec(pipeline, tensor) };
    let two = planned(&auto(2, 1), &model);
    assert_eq!(faults(&two, &model), [""; 0]);
    assert_eq!((two.stages[1].layers.clone(), products(&two)), (9..18, vec![0..131_072, 131_072..262_144]));
    // The first stage needs the table to look rows up, the last no more than it multiplies.
    let table = |plan: &ExecutionPlan, stage: usize| {
        let slices = &plan.stages[stage].shards[0].slices;
        slices.iter().find(|s| s.id.role == Role::Embedding).map(|s| s.rows.clone())
    };
    assert_eq!((table(&two, 0), table(&two, 1)), (Some(0..262_144), Some(131_072..262_144)));
    let alone = planned(&spec(2, 1), &model);
    assert_eq!(products(&alone), [0..0, 0..262_144]);
    assert_eq!((2 * two.shared_bytes, two.tensor_bytes), (alone.shared_bytes, alone.tensor_bytes));
    // Stages between them have layers alone.
    let four = planned(&auto(4, 1), &model);
    assert_eq!(faults(&four, &model), [""; 0]);
    assert_eq!(products(&four), [0..131_072, 0..0, 0..0, 131_072..262_144]);
    assert_eq!((four.stages[0].layers.len(), four.stages[3].layers.len()), (1, 1));
    assert_eq!(table(&four, 1), None);
    // Each rank's rows are cut.
    let ranks = planned(&auto(2, 2), &model);
    assert_eq!(products(&ranks), [0..65_536, 131_072..196_608, 65_536..131_072, 196_608..262_144]);
    // Layers as given: the last stage has fewer of them, so it takes more of the vocabulary.
    let given = planned(&Spec { stage_layers: Some(vec![12, 6]), ..auto(2, 1) }, &model);
    assert_eq!(faults(&given, &model), [""; 0]);
    let lent = given.stages[0].shards[0].product().len();
    assert!((60_000..130_000).contains(&lent), "{lent}");
    assert_eq!(products(&planned(&auto(1, 2), &model)), [0..131_072, 131_072..262_144]);
}

#[test]
fn a_vocabulary_stays_together_where_nothing_is_gained() {
    let together = |plan: &ExecutionPlan| shards(plan).all(|s| s.splits.cuts.is_empty());
    // Layers that outweigh the table are cut so that stages are even already; tables of other models are not the vocabulary; small ones cost
    // less than the way to another stage.
    let heavy = Sample { layers: 12, hidden: 2048, ffn: 8192, vocab: 32_768, ..gemma_270m() };
    let untied = Sample { tied: false, ..gemma_270m() };
    let small = Sample { vocab: 8192, ..gemma_270m() };
    let auto = Spec { vocabulary: Vocabulary::Auto, ..spec(2, 1) };
    assert!(!together(&planned(&auto, &gemma_270m().model())));
    for sample in [heavy, untied.clone(), small.clone()] {
        assert!(together(&planned(&auto, &sample.model())), "{sample:?}");
    }
    let asked = Spec { vocabulary: Vocabulary::Spread, ..spec(2, 2) };
    let spread = planned(&asked, &small.model());
    assert_eq!(products(&spread), [0..2048, 4096..6144, 2048..4096, 6144..8192]);
    // One tile is not cut: one of the stages has it.
    let least = planned(&asked, &Sample { vocab: 700, ..gemma_270m() }.model());
    assert_eq!(products(&least), [0..700, 700..700, 700..700, 700..700]);
    for (spec, sample) in [(asked.clone(), untied), (Spec { pipeline: 1, ..asked }, small)] {
        let error = plan(&spec, &sample.model(), &UNKNOWN).unwrap_err();
        assert_eq!(error, PlanError::Vocabulary { stages: spec.pipeline });
    }
}

#[test]
fn a_screened_vocabulary_takes_a_copy_where_it_is_multiplied() {
    let model = gemma_270m().model();
    for (pipeline, tensor) in [(1, 1), (2, 2)] {
        let (without, with) =
            (planned(&spec(pipeline, tensor), &model), planned(&Spec { screening: true, ..spec(pipeline, tensor) }, &model));
        for (plain, screened) in shards(&without).zip(shards(&with)) {
            // A block of 32 values is 18 bytes.
            let copy = if plain.is_last() { (plain.product().len() * 640 / 32 * 18) as u64 } else { 0 };
            assert_eq!((screened.weight_bytes, screened.screening), (plain.weight_bytes + copy, plain.is_last()));
            assert_eq!(screened.screen_bytes(640), copy);
        }
        // Nothing else depends on it; what is told to workers that have none is what it was.
        assert_eq!(with.kv, without.kv);
        let told = |plan: &ExecutionPlan| serde_json::to_string(shards(plan).next().unwrap()).unwrap();
        assert!(!told(&without).contains("screening"));
    }
    let refused = |spec: &Spec, model: &ModelHeader| plan(spec, model, &UNKNOWN).unwrap_err().to_string();
    let spread = Spec { vocabulary: Vocabulary::Spread, screening: true, ..spec(2, 1) };
    assert!(refused(&spread, &model).contains("where it is spread over stages"));
    let narrow = Sample { hidden: 40, matrix: DType::F32, ..Sample::llama() }.model();
    assert!(refused(&Spec { screening: true, ..spec(1, 1) }, &narrow).contains("by blocks of 32 values"));
}

#[test]
fn impossible_specs_are_refused_with_their_numbers() {
    let model = Sample::llama().model();
    let said = |spec: Spec| plan(&spec, &model, &UNKNOWN).unwrap_err().to_string();
    assert_eq!(
        said(Spec { max_context: Some(65), ..Spec::default() }),
        "65 tokens of context, expected at least 1 and at most the model's 64"
    );
    assert!(said(Spec { max_context: Some(0), ..Spec::default() }).starts_with("0 tokens of context"));
    assert_eq!(said(Spec { max_batch_tokens: 0, ..Spec::default() }), "maxBatchTokens is 0, expected at least 1");
    assert_eq!(said(Spec { max_batch_sequences: 0, ..Spec::default() }), "maxBatchSequences is 0, expected at least 1");
    for fraction in [0.0, -0.5, 1.5, f64::NAN] {
        assert!(said(Spec { kv_memory: KvMemory::Fraction(fraction), ..Spec::default() }).contains(&fraction.to_string()));
    }
    assert_eq!(said(Spec { max_batch_sequences: usize::MAX, ..Spec::default() }), "maxBatchSequences gives a size past 64 bits");
}

#[test]
fn kv_groups_are_one_for_each_window() {
    let model = Sample::gemma3().model();
    let kv = planned(&Spec { max_batch_tokens: 16, ..spec(3, 1) }, &model).kv;
    assert_eq!(kv.groups.iter().map(|g| g.window).collect::<Vec<_>>(), [None, Some(8)]);
    assert_eq!(kv.groups[0].layers, [5]);
    assert_eq!(kv.groups[1].layers, [0, 1, 2, 3, 4, 6]);
    let llama = planned(&spec(1, 1), &Sample::llama().model()).kv;
    assert_eq!((llama.groups.len(), llama.groups[0].layers.as_slice()), (1, &[0, 1][..]));
}

#[test]
fn kv_entries_follow_the_weights_unless_told() {
    for (matrix, expected) in [
        (DType::F32, KvDType::F32),
        (DType::F16, KvDType::F32),
        (DType::BF16, KvDType::F32),
        (DType::Q8_0, KvDType::F16),
        (DType::Q5_0, KvDType::F16),
        (DType::Q4_K, KvDType::F16),
        (DType::Q6_K, KvDType::F16),
    ] {
        let model = Sample { matrix, hidden: 256, ffn: 256, head_dim: 64, ..Sample::llama() }.model();
        assert_eq!(default_kv_dtype(&model), expected, "{matrix:?}");
        let told = Spec { kv_dtype: Some(KvDType::F32), ..spec(1, 1) };
        assert_eq!(planned(&told, &model).kv.dtype, KvDType::F32);
    }
    // A quantized table alone leaves the layers as they are.
    let mut model = Sample { hidden: 256, ffn: 256, head_dim: 64, ..Sample::llama() }.model();
    model.tensors.get_mut(&TensorId { layer: None, role: Role::Embedding }).expect("the table").dtype = DType::Q8_0;
    assert_eq!(default_kv_dtype(&model), KvDType::F32);
}

#[test]
fn kv_bytes_of_8_bits_count_their_scales() {
    let model = Sample { hidden: 256, ffn: 256, head_dim: 40, ..Sample::llama() }.model();
    let bytes = |dtype| {
        let plan = planned(&Spec { kv_dtype: Some(dtype), max_batch_tokens: 16, ..spec(1, 1) }, &model);
        plan.stages[0].shards[0].kv_bytes / plan.kv.groups.iter().map(|g| g.blocks as u64 * g.layers.len() as u64).sum::<u64>()
    };
    // Keys and values of 40 dimensions have two scales each.
    assert_eq!(bytes(KvDType::Q8) * 40, bytes(KvDType::F16) * 22);
    assert_eq!(bytes(KvDType::F32), 2 * bytes(KvDType::F16));
}

#[test]
fn kv_bytes_are_blocks_times_layers_and_heads_of_the_worker() {
    let model = Sample { layers: 4, heads: 4, kv_heads: 2, ..Sample::gemma3() }.model();
    let plan = planned(&Spec { max_batch_tokens: 16, ..spec(2, 2) }, &model);
    for shard in shards(&plan) {
        let bytes = |g: &crate::shard::KvGroup| {
            let layers = g.layers.iter().filter(|l| shard.layers.contains(l)).count();
            g.blocks * BLOCK_TOKENS * layers * 2 * 2 * 4
        };
        let expected: usize = plan.kv.groups.iter().map(bytes).sum();
        assert_eq!(shard.kv_bytes as usize, expected, "keys and values of one head of 2 in f32");
        assert_eq!(shard.kv_bytes, shard_bytes(&plan.kv, &model.config, shard));
    }
}

#[test]
fn a_full_sequence_always_has_its_blocks() {
    let model = gemma_270m().model();
    for max_context in [1, 16, 17, 100, 32_768] {
        for max_batch_tokens in [1, 16, 512] {
            let spec = Spec { max_context: Some(max_context), max_batch_tokens, kv_memory: KvMemory::Bytes(1), ..spec(1, 1) };
            let plan = planned(&spec, &model);
            assert!(!plan.fits, "one byte holds no sequence");
            let whole = max_context.div_ceil(BLOCK_TOKENS);
            assert_eq!(plan.kv.groups[0].blocks, whole);
            // The most blocks that [p - W, p + chunk) can touch, with a window of 8.
            let touched = (0..64).map(|p| (p + 8 + max_batch_tokens).div_ceil(BLOCK_TOKENS) - p / BLOCK_TOKENS).max().unwrap_or(0);
            assert!(plan.kv.groups[1].blocks >= touched.min(whole), "{max_context} {max_batch_tokens}");
        }
    }
}

#[test]
fn memory_decides_with_numbers() {
    let model = gemma_270m().model();
    let base = Spec { max_context: Some(4096), ..spec(1, 1) };
    let roomy = plan(&base, &model, &memory(8 << 30)).unwrap();
    let shard = &roomy.stages[0].shards[0];
    assert!(roomy.fits && roomy.message.starts_with("fits: stage 0 rank 0 needs "), "{}", roomy.message);
    for number in [shard.weight_bytes, shard.kv_bytes, 8 << 30] {
        assert!(roomy.message.contains(&number.to_string()), "{} without {number}", roomy.message);
    }
    assert!(shard.kv_bytes <= (8 << 30) / 4, "without a figure the cache takes at most a quarter");

    let tight = plan(&base, &model, &memory(100 << 20)).unwrap();
    assert!(!tight.fits && tight.message.starts_with("does not fit: stage 0 rank 0 needs "), "{}", tight.message);
    assert!(tight.message.contains("104857600 bytes") && tight.message.contains("one sequence of 4096 tokens"), "{}", tight.message);
    let unknown = plan(&base, &model, &UNKNOWN).unwrap();
    assert!(unknown.fits && unknown.message.contains("unknown"), "{}", unknown.message);

    // Split over more workers, the same memory is enough.
    let each = 300 << 20;
    assert!(!plan(&base, &model, &memory(each)).unwrap().fits);
    assert!(plan(&Spec { pipeline: 2, tensor: 2, ..base.clone() }, &model, &memory(each)).unwrap().fits);

    // A figure is kept to, and one that holds no sequence is said.
    for bytes in [64 << 20, 256 << 20, 1 << 30] {
        let plan = plan(&Spec { kv_memory: KvMemory::Bytes(bytes), ..base.clone() }, &model, &memory(8 << 30)).unwrap();
        assert!(plan.fits && plan.stages[0].shards[0].kv_bytes <= bytes, "{}", plan.message);
    }
    let few = plan(&Spec { kv_memory: KvMemory::Bytes(1 << 20), ..base.clone() }, &model, &memory(8 << 30)).unwrap();
    assert!(!few.fits && few.message.contains("its KV cache may take 1048576 bytes"), "{}", few.message);
    let half = plan(&Spec { kv_memory: KvMemory::Fraction(0.5), ..base }, &model, &memory(4 << 30)).unwrap();
    assert!(half.fits && half.stages[0].shards[0].kv_bytes <= 2 << 30);
    assert!(half.kv.groups[0].blocks > few.kv.groups[0].blocks);
}

#[test]
fn the_reference_model_at_two_by_two() {
    let model = gemma_270m().model();
    let plan = planned(&spec(2, 2), &model);
    assert_eq!(faults(&plan, &model), [""; 0]);
    let first = &plan.stages[0].shards[1];
    assert_eq!((first.splits.heads[1].clone(), first.splits.kv_heads[1].clone()), (2..4, 0..1));
    assert_eq!(first.splits.vocab, [0..131_072, 131_072..262_144]);
    assert_eq!(first.splits.ffn, [0..1024, 1024..2048]);
    let workers = worker_specs(&plan, &Origin { replica: "r", uri: "file:m.gguf", digest: Some("sha256:x") }, 0, CollectiveKind::Unix);
    let identity: Vec<_> = workers.iter().map(|w| (w.shard.stage, w.shard.rank, w.threads)).collect();
    assert_eq!(identity, [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)]);
    assert!(workers.iter().all(|w| w.kv == plan.kv && w.digest.as_deref() == Some("sha256:x") && w.uri == "file:m.gguf"));
    assert_eq!(limits(&plan, true).kv, plan.kv);
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<ExecutionPlan>(&json).unwrap(), plan);
}

#[test]
fn the_numerics_id_changes_with_what_changes_bits_and_nothing_else() {
    let model = Sample::llama().model();
    let with = |model: &ModelHeader, identity: &str, spec: Spec| numerics(model, identity, &planned(&spec, model));
    let plain = || Spec { kv_dtype: Some(KvDType::F32), max_context: Some(64), ..spec(1, 1) };
    let id = with(&model, "sha256:a", plain());
    assert_eq!(id, with(&model.clone(), "sha256:a", plain()));
    assert_eq!(id.len(), 32);
    let mut rope = model.clone();
    rope.config.layers[0].rope.base += 1.0;
    // Where frequencies go by the longest sequence, it is one of the numerics.
    let mut dynamic = model.clone();
    dynamic.config.layers[0].rope.scaling = RopeScaling::Dynamic { factor: 2.0, trained_context: 16.0 };
    let of = |max_context| with(&dynamic, "sha256:a", Spec { max_context: Some(max_context), ..plain() });
    assert_ne!(of(32), of(64));
    let wide = gemma_270m().model();
    assert_ne!(with(&wide, "sha256:a", plain()), with(&wide, "sha256:a", Spec { screening: true, ..plain() }));
    let mut moved = model.clone();
    for tensor in moved.tensors.values_mut() {
        tensor.offset += 32;
    }
    let mut stored = model.clone();
    stored.tensors.values_mut().for_each(|t| t.dtype = DType::BF16);
    for (other, same) in [
        (with(&model, "sha256:b", plain()), false),
        (with(&model, "sha256:a", Spec { kv_dtype: Some(KvDType::F16), ..plain() }), false),
        (with(&rope, "sha256:a", plain()), false),
        (with(&stored, "sha256:a", plain()), false),
        (with(&moved, "sha256:a", plain()), true),
        (with(&model, "sha256:a", Spec { max_context: Some(32), ..plain() }), true),
        (with(&model, "sha256:a", Spec { max_batch_tokens: 7, pipeline: 2, ..plain() }), true),
    ] {
        assert_eq!(other == id, same);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Shapes nobody thought of are covered exactly too, and what fits is within memory.
    #[test]
    fn any_shape_is_covered_exactly(
        (layers, group, kv_heads, head_dim) in (1usize..7, 1usize..5, 1usize..5, 1usize..5),
        (hidden, ffn, vocab) in (1usize..5, 1usize..9, 1usize..5000),
        matrix in prop_oneof![Just(DType::F32), Just(DType::Q8_0)],
        (pipeline, tensor, gemma, tied) in (0usize..6, 0usize..16, any::<bool>(), any::<bool>()),
        (memory_kib, batch) in (1u64..4096, 1usize..64),
    ) {
        let heads = group * kv_heads;
        let sample = Sample {
            layers, hidden: hidden * 32, heads, kv_heads, head_dim: head_dim * 32, ffn: ffn * 32, vocab, matrix,
            ..if gemma { Sample::gemma3() } else { Sample { tied, ..Sample::llama() } }
        };
        let model = sample.model();
        let spec = Spec { max_batch_tokens: batch, ..spec(pipeline % layers + 1, tensor % heads + 1) };
        let capacity = memory(memory_kib << 10);
        let plan = plan(&spec, &model, &capacity).expect("a possible plan");
        prop_assert_eq!(faults(&plan, &model), Vec::<String>::new());
        for shard in shards(&plan).filter(|_| plan.fits) {
            prop_assert!(shard.weight_bytes + shard.kv_bytes <= memory_kib << 10);
        }
        // More memory never means fewer blocks.
        let roomier = super::plan(&spec, &model, &memory(memory_kib << 11)).expect("a possible plan");
        prop_assert!(!plan.fits || roomier.fits);
        for (less, more) in plan.kv.groups.iter().zip(&roomier.kv.groups) {
            prop_assert!(less.blocks <= more.blocks);
        }
    }
}
