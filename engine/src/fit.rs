//! Checks that a model's shape, a shard, a KV geometry and options belong together, before anything is read.

use std::ops::Range;

use plan::{
    model::{ExpertGroups, ModelConfig, RopeScaling},
    shard::{KvGeometry, Shard, Splits, VOCAB_TILE},
};

use crate::{EngineOptions, LoadShardError, collective::Collective};

/// Checks everything that later code relies on.
pub(crate) fn check(
    config: &ModelConfig,
    shard: &Shard,
    kv: &KvGeometry,
    options: &EngineOptions,
    collective: &dyn Collective,
) -> Result<(), LoadShardError> {
    options_fit(config, options)?;
    equal("the number of ranks that are joined", collective.ranks(), shard.ranks)?;
    equal("the rank that joined", collective.rank(), shard.rank)?;
    within("rank", shard.rank, 0..shard.ranks)?;
    within("stage", shard.stage, 0..shard.stages)?;
    let layers = &shard.layers;
    if layers.is_empty() || layers.end > config.layers.len() {
        return Err(wrong("the layers of the stage", format!("{layers:?}"), format!("some of 0..{}", config.layers.len())));
    }
    equal("whether the stage has the first layer", usize::from(layers.start == 0), usize::from(shard.is_first()))?;
    equal("whether the stage has the last layer", usize::from(layers.end == config.layers.len()), usize::from(shard.is_last()))?;
    shape_fits(config, layers)?;
    splits_fit(config, shard)?;
    groups_fit(config, shard, kv)
}

fn wrong(what: &'static str, got: String, expected: String) -> LoadShardError {
    LoadShardError::Plan { what, got, expected }
}

fn equal(what: &'static str, got: usize, expected: usize) -> Result<(), LoadShardError> {
    if got == expected { Ok(()) } else { Err(wrong(what, got.to_string(), expected.to_string())) }
}

fn within(what: &'static str, got: usize, range: Range<usize>) -> Result<(), LoadShardError> {
    if range.contains(&got) { Ok(()) } else { Err(wrong(what, got.to_string(), format!("one of {range:?}"))) }
}

fn options_fit(config: &ModelConfig, options: &EngineOptions) -> Result<(), LoadShardError> {
    let sizes = [("the number of threads", options.threads), ("the number of tokens in a step", options.max_batch_tokens)];
    for (what, got) in sizes {
        if got == 0 {
            return Err(wrong(what, got.to_string(), "at least 1".to_owned()));
        }
    }
    within("the longest sequence", options.max_context, 1..config.context.saturating_add(1))
}

fn shape_fits(config: &ModelConfig, layers: &Range<usize>) -> Result<(), LoadShardError> {
    let c = config;
    for (what, got) in [
        ("the hidden width", c.hidden),
        ("the number of query heads", c.heads),
        ("the number of key-value heads", c.kv_heads),
        ("the width of a head", c.head_dim),
        ("the feed-forward width", c.ffn),
        ("the size of the vocabulary", c.vocab),
    ] {
        if got == 0 {
            return Err(wrong(what, got.to_string(), "at least 1".to_owned()));
        }
    }
    if !c.heads.is_multiple_of(c.kv_heads) {
        return Err(wrong("the number of query heads", c.heads.to_string(), format!("a multiple of {}", c.kv_heads)));
    }
    if let Some(l) = c.latent {
        let fits = l.kv_rank > 0 && l.value_dim > 0 && l.q_rank != Some(0) && l.rotated < c.head_dim;
        let alone = c.kv_heads == c.heads && c.encoder.is_none() && !c.post_norms && !c.head_norms;
        if !fits || !alone || c.layers.iter().any(|layer| layer.rope.dims != l.rotated) {
            let expected = "compressed vectors, of which each head has a key and a value of its own".to_owned();
            return Err(wrong("latent attention", format!("{l:?} of heads of {}", c.head_dim), expected));
        }
    }
    if let Some(ExpertGroups { count, used, best }) = c.experts.and_then(|e| e.groups) {
        let (all, chosen) = c.experts.map_or((0, 0), |e| (e.count, e.used));
        let whole = count > 0 && all.is_multiple_of(count) && (1..=2).contains(&best) && (1..=count).contains(&used);
        if !whole || all / count < best || used * (all / count) < chosen {
            let expected = format!("groups of one size that hold the {chosen} experts of a token");
            return Err(wrong("the groups of experts", format!("{used} of {count} for {all} experts"), expected));
        }
    }
    if let Some(e) = c.experts
        && (e.count == 0 || e.ffn == 0 || !(1..=e.count).contains(&e.used))
    {
        return Err(wrong("the experts of a layer", format!("{e:?}"), "some, of which some are used".to_owned()));
    }
    equal("whether norms stand behind blocks", usize::from(c.post_norms), usize::from(c.encoder.is_some()))?;
    if c.experts.is_none() && c.layers.iter().any(|l| l.experts) {
        return Err(wrong("the experts of a layer", "none".to_owned(), "some".to_owned()));
    }
    let factors = c.layers[0].rope.dims;
    for layer in &c.layers[layers.clone()] {
        let rope = &layer.rope;
        if !rope.dims.is_multiple_of(2) || rope.dims > c.head_dim {
            return Err(wrong("the number of rotated values of a head", rope.dims.to_string(), format!("even, from 0 to {}", c.head_dim)));
        }
        if !rope.amplitude.is_finite() {
            return Err(wrong("the factor of a layer's rotation", rope.amplitude.to_string(), "a number".to_owned()));
        }
        if !rope.base.is_finite() || rope.base <= 0.0 {
            return Err(wrong("the rotary base", rope.base.to_string(), "a positive number".to_owned()));
        }
        match &rope.scaling {
            RopeScaling::Tensor | RopeScaling::LongRopeTensors { .. } => {
                equal("the number of rotated values of a layer with stored factors", rope.dims, factors)?;
            }
            RopeScaling::LongRope { short, long, .. } => {
                equal("the number of divisors for short sequences", short.len(), rope.dims / 2)?;
                equal("the number of divisors for long sequences", long.len(), rope.dims / 2)?;
            }
            RopeScaling::Dynamic { .. } if rope.dims < 4 => {
                return Err(wrong(
                    "the number of rotated values of a layer with a stretched base",
                    rope.dims.to_string(),
                    "at least 4".to_owned(),
                ));
            }
            _ => {}
        }
        if layer.window == Some(0) {
            return Err(wrong("the window of a layer", "0".to_owned(), "at least 1".to_owned()));
        }
    }
    Ok(())
}

fn splits_fit(config: &ModelConfig, shard: &Shard) -> Result<(), LoadShardError> {
    let splits = &shard.splits;
    let experts = config.experts.map(|e| ("the split of the experts", &splits.experts, e.count));
    let whole = [
        ("the split of query heads", &splits.heads, config.heads),
        ("the split of the hidden width", &splits.hidden, config.hidden),
        ("the split of the feed-forward width", &splits.ffn, config.ffn),
        ("the split of the vocabulary", &splits.vocab, config.vocab),
    ];
    let shared = config.experts.map_or(0, |e| e.shared_ffn());
    let shared = (shared > 0).then_some(("the split of the shared experts", &splits.shared, shared));
    for (what, ranges, len) in whole.into_iter().chain(experts).chain(shared) {
        let mut end = 0;
        let follow = ranges.iter().all(|r| r.start == std::mem::replace(&mut end, r.end) && r.start <= r.end);
        if !follow || end != len || ranges.len() != shard.ranks {
            return Err(wrong(what, format!("{ranges:?}"), format!("{} ranges that follow each other from 0 to {len}", shard.ranks)));
        }
    }
    if splits.vocab.iter().any(|r| !r.start.is_multiple_of(VOCAB_TILE) && !r.is_empty()) {
        return Err(wrong("the split of the vocabulary", format!("{:?}", splits.vocab), format!("whole tiles of {VOCAB_TILE}")));
    }
    cuts_fit(config, shard)?;
    let group = config.heads / config.kv_heads;
    let read = |heads: &Range<usize>| heads.start / group..heads.end.div_ceil(group);
    for (rank, heads) in splits.heads.iter().enumerate() {
        if heads.is_empty() {
            return Err(wrong("the number of query heads of a rank", "0".to_owned(), "at least 1".to_owned()));
        }
        if splits.kv_heads.get(rank) != Some(&read(heads)) {
            return Err(wrong(
                "the key-value heads of a rank",
                format!("{:?}", splits.kv_heads),
                format!("{:?} for rank {rank}", read(heads)),
            ));
        }
    }
    Ok(())
}

/// A vocabulary that is spread over stages is one that the first stage holds too.
fn cuts_fit(config: &ModelConfig, shard: &Shard) -> Result<(), LoadShardError> {
    let Splits { vocab, cuts, .. } = &shard.splits;
    if cuts.is_empty() {
        return Ok(());
    }
    let shared = shard.stages > 1 && config.tied_embeddings && config.encoder.is_none();
    equal("whether the vocabulary is spread over stages", 1, usize::from(shared))?;
    let whole = |(rows, &cut): (&Range<usize>, &usize)| {
        (rows.start..=rows.end).contains(&cut) && (cut.is_multiple_of(VOCAB_TILE) || cut == rows.end)
    };
    if cuts.len() != vocab.len() || !vocab.iter().zip(cuts).all(whole) {
        return Err(wrong("where the vocabulary is cut", format!("{cuts:?}"), format!("a row between tiles in each of {vocab:?}")));
    }
    Ok(())
}

fn groups_fit(config: &ModelConfig, shard: &Shard, kv: &KvGeometry) -> Result<(), LoadShardError> {
    if config.encoder.is_some() {
        return equal("the number of KV groups of an encoder", kv.groups.len(), 0);
    }
    for (layer, shape) in config.layers.iter().enumerate() {
        let groups: Vec<_> = kv.groups.iter().filter(|g| g.layers.contains(&layer)).collect();
        if !shard.layers.contains(&layer) {
            continue;
        }
        equal("the number of KV groups of a layer", groups.len(), 1)?;
        if groups[0].window != shape.window {
            return Err(wrong("the window of a layer's KV group", format!("{:?}", groups[0].window), format!("{:?}", shape.window)));
        }
    }
    match kv.groups.iter().find(|g| g.blocks == 0 || g.blocks >= u32::MAX as usize) {
        Some(group) => Err(wrong("the number of blocks of a KV group", group.blocks.to_string(), "from 1 to 2^32 - 2".to_owned())),
        None => Ok(()),
    }
}
