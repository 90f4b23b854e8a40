//! Loading: what is read, and what is refused.

use std::{
    io,
    ops::Range,
    sync::{Mutex, atomic::Ordering},
};

use engine::{Engine, EngineOptions, LoadShardError, WeightReader};
use kernels::Isa;
use plan::{
    dtype::DType,
    model::Role,
    shard::{ExecutionPlan, Shard},
};

use crate::{
    model,
    rig::{Layout, joined, plan},
};

fn options(plan: &ExecutionPlan) -> EngineOptions {
    EngineOptions { isa: Isa::best(), threads: 2, max_batch_tokens: plan.max_batch_tokens, max_context: plan.max_context }
}

fn load(plan: &ExecutionPlan, shard: &Shard, reader: &dyn WeightReader) -> Result<Engine, LoadShardError> {
    let collective = joined(shard.ranks).swap_remove(shard.rank);
    Engine::load(&plan.config, shard, &plan.kv, options(plan), reader, collective, &|_| {})
}

#[test]
fn each_rank_reads_its_bytes_once() {
    for recipe in [model::llama(model::mixed), model::gemma(20, model::small)] {
        let model = recipe.build();
        for (pipeline, tensor) in [(1, 1), (2, 1), (1, 3), (2, 2), (2, 4)] {
            let plan = plan(&model, Layout { pipeline, tensor, ..Layout::default() });
            let mut total = 0;
            for shard in plan.stages.iter().flat_map(|s| &s.shards) {
                model.read.store(0, Ordering::Relaxed);
                let told = Mutex::new(vec![0]);
                let collective = joined(tensor).swap_remove(shard.rank);
                let tell = |bytes| told.lock().expect("no panic").push(bytes);
                Engine::load(&plan.config, shard, &plan.kv, options(&plan), &model, collective, &tell).expect("a loadable shard");
                assert_eq!(model.read.load(Ordering::Relaxed), shard.weight_bytes);
                let told = told.into_inner().expect("no panic");
                assert!(told.is_sorted() && told.last() == Some(&shard.weight_bytes), "{told:?}");
                total += shard.weight_bytes;
            }
            assert_eq!(total, plan.tensor_bytes + plan.shared_bytes);
            if (pipeline, tensor) == (1, 1) {
                // A tied table is the embedding and the vocabulary matrix, and is read once.
                assert_eq!(total, plan.tensor_bytes);
            }
        }
    }
}

/// A reader that notes the ranges, and knows no bytes but zeros.
struct Zeros {
    at_hand: bool,
    ranges: Mutex<Vec<Range<u64>>>,
}

impl WeightReader for Zeros {
    fn read(&self, _file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        self.ranges.lock().expect("no panic").push(range);
        Ok(())
    }

    fn is_at_hand(&self, _: usize, _: &Range<u64>) -> bool {
        self.at_hand
    }
}

#[test]
fn large_tensors_are_read_in_bounded_pieces() {
    let mut recipe = model::gemma(20, model::small);
    recipe.config.vocab = 200_000;
    let model = recipe.build();
    let plan = plan(&model, Layout::default());
    for (at_hand, most) in [(false, 8 << 20), (true, 256 << 10)] {
        let zeros = Zeros { at_hand, ranges: Mutex::default() };
        load(&plan, &plan.stages[0].shards[0], &zeros).expect("a loadable shard");
        let mut ranges = zeros.ranges.into_inner().expect("no panic");
        let longest = ranges.iter().map(|r| r.end - r.start).max();
        assert!(longest.is_some_and(|l| l > most / 8 * 7 && l <= most), "{longest:?}");
        if at_hand {
            ranges.sort_by_key(|r| r.start);
        }
        // From elsewhere in the order of the file, and every byte once.
        assert!(ranges.windows(2).all(|w| w[0].end <= w[1].start));
        assert_eq!(ranges.iter().map(|r| r.end - r.start).sum::<u64>(), plan.tensor_bytes);
    }
}

/// What is wrong when the plan of a whole small model was changed.
fn refused(change: impl FnOnce(&mut ExecutionPlan)) -> LoadShardError {
    let model = model::gemma(20, model::small).build();
    let mut plan = plan(&model, Layout::default());
    change(&mut plan);
    match load(&plan, &plan.stages[0].shards[0], &model) {
        Ok(_) => panic!("a wrong plan was accepted"),
        Err(error) => error,
    }
}

fn slice(plan: &mut ExecutionPlan, role: Role) -> &mut plan::shard::TensorSlice {
    plan.stages[0].shards[0].slices.iter_mut().find(|s| s.id.role == role).expect("such a tensor")
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let shown = |error: &LoadShardError| format!("{error} / {}", error.reason());
    let error = refused(|p| p.stages[0].shards[0].slices.retain(|s| s.id.role != Role::QNorm));
    assert!(matches!(error, LoadShardError::Missing { role: Role::QNorm, layer: Some(0), .. }), "{}", shown(&error));
    let error = refused(|p| slice(p, Role::Down).tensor.shape = vec![160, 96]);
    assert!(matches!(&error, LoadShardError::Shape { name, .. } if name.starts_with("Down")), "{}", shown(&error));
    let error = refused(|p| slice(p, Role::Up).rows = 0..159);
    assert!(matches!(error, LoadShardError::Shape { .. }), "{}", shown(&error));
    let error = refused(|p| slice(p, Role::Up).bytes.end -= 1);
    assert!(matches!(error, LoadShardError::Shape { .. }), "{}", shown(&error));
    let error = refused(|p| slice(p, Role::AttnNorm).tensor.dtype = DType::Q8_0);
    assert!(matches!(error, LoadShardError::VectorType { dtype: DType::Q8_0, .. }), "{}", shown(&error));
    let error = refused(|p| slice(p, Role::AttnNorm).id.role = Role::OutputNorm);
    assert!(matches!(error, LoadShardError::Missing { role: Role::AttnNorm, .. }), "{}", shown(&error));
    for (change, what) in [
        ((|p| p.kv.groups[1].window = Some(21)) as fn(&mut ExecutionPlan), "window"),
        (|p| p.kv.groups[1].blocks = 0, "blocks"),
        (|p| p.kv.groups.truncate(1), "KV groups"),
        (|p| p.max_context = 5000, "longest sequence"),
        (|p| p.max_batch_tokens = 0, "tokens in a step"),
        (|p| p.config.layers[1].rope.dims = 34, "rotated values"),
        (|p| p.config.layers.truncate(3), "layers"),
        (|p| p.stages[0].shards[0].ranks = 2, "expected 2 ranges"),
        (|p| p.stages[0].shards[0].stages = 2, "last layer"),
        (|p| p.stages[0].shards[0].splits.vocab[0].end = 1499, "vocabulary"),
        (|p| p.stages[0].shards[0].splits.cuts = vec![1024], "spread over stages"),
        (|p| p.stages[0].shards[0].splits.kv_heads[0].end = 2, "key-value heads"),
        (|p| p.stages[0].shards[0].splits.ffn[0].end = 128, "feed-forward"),
    ] {
        let error = refused(change);
        assert!(matches!(&error, LoadShardError::Plan { .. }) && error.to_string().contains(what), "{what}: {}", shown(&error));
    }
}

/// The same of latent attention and its mixtures.
#[test]
fn what_does_not_fit_latent_attention_is_refused() {
    let model = model::latent(model::small).build();
    let refused = |change: &dyn Fn(&mut ExecutionPlan)| {
        let mut plan = plan(&model, Layout::default());
        change(&mut plan);
        match load(&plan, &plan.stages[0].shards[0], &model) {
            Ok(_) => panic!("a wrong plan was accepted"),
            Err(error) => error,
        }
    };
    for role in [Role::QDown, Role::QDownNorm, Role::QUp, Role::KvDown, Role::KvDownNorm, Role::KvUp, Role::RouterBias, Role::SharedDown] {
        let error = refused(&|p| p.stages[0].shards[0].slices.retain(|s| s.id.role != role));
        assert!(matches!(error, LoadShardError::Missing { role: missing, .. } if missing == role), "{error}");
    }
    type Change = fn(&mut ExecutionPlan);
    for (change, what) in [
        ((|p| p.config.latent = p.config.latent.map(|l| plan::model::Latent { rotated: 18, ..l })) as Change, "latent attention"),
        (|p| p.config.latent = p.config.latent.map(|l| plan::model::Latent { kv_rank: 0, ..l }), "latent attention"),
        (|p| p.config.kv_heads = 2, "latent attention"),
        (|p| p.config.experts.as_mut().unwrap().groups.as_mut().unwrap().count = 3, "groups of experts"),
        (|p| p.config.experts.as_mut().unwrap().groups.as_mut().unwrap().best = 0, "groups of experts"),
        (|p| p.stages[0].shards[0].splits.shared[0].end = 500, "shared experts"),
    ] {
        let error = refused(&change);
        assert!(matches!(&error, LoadShardError::Plan { .. }) && error.to_string().contains(what), "{what}: {error}");
    }
    let error = refused(&|p| p.config.latent = p.config.latent.map(|l| plan::model::Latent { value_dim: 65, ..l }));
    assert!(matches!(error, LoadShardError::Shape { .. }), "{error}");
    // Heads that are stored by columns: whole ones, of their size, held as floats.
    let apart = model::latent_apart(model::small).build();
    for change in [
        (|s| s.tensor.turned = Some(24)) as fn(&mut plan::shard::TensorSlice),
        |s| s.tensor.turned = Some(0),
        |s| s.tensor.turned = None,
        |s| s.tensor.dtype = DType::Q8_0,
        |s| s.tensor.bytes -= 1,
        |s| s.bytes.end -= 1,
        |s| s.rows.end -= 1,
    ] {
        let mut plan = plan(&apart, Layout::default());
        change(slice(&mut plan, Role::KeyUp));
        let error = load(&plan, &plan.stages[0].shards[0], &apart).err().expect("a refusal");
        assert!(matches!(&error, LoadShardError::Shape { name, .. } if name.starts_with("KeyUp")), "{error}");
    }
}

#[test]
fn a_truncated_file_is_named_with_its_place() {
    let mut model = model::gemma(20, model::small).build();
    let plan = plan(&model, Layout::default());
    model.bytes.truncate(model.bytes.len() - 2000);
    let error = load(&plan, &plan.stages[0].shards[0], &model).err().expect("an error");
    assert!(matches!(&error, LoadShardError::Read { offset, .. } if *offset > 0), "{error}");
    assert_eq!(error.reason(), "weights_unreadable");
    assert!(std::error::Error::source(&error).is_some());
}
