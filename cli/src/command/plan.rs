//! `skein plan`: how a model is laid out over workers, and whether it fits.

use plan::shard::{ExecutionPlan, KvDType, Shard};
use serde::Serialize;

use super::plan_status;
use crate::{
    args::{Global, PlanArgs, Target},
    exit::{Outcome, bad_input},
    local::deployment,
    output,
};

/// One deployment's plan, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Planned<'a> {
    deployment: &'a str,
    model: &'a str,
    replicas: usize,
    fits: bool,
    message: &'a str,
    pipeline: usize,
    tensor: usize,
    /// Bytes of the weight files.
    file_bytes: u64,
    /// Bytes of the tensors that the forward pass uses, each counted once.
    tensor_bytes: u64,
    /// Bytes that more than one worker holds, once for each further one.
    shared_bytes: u64,
    max_context: usize,
    max_batch_sequences: usize,
    max_batch_tokens: usize,
    kv_dtype: KvDType,
    kv_groups: Vec<Group>,
    stages: Vec<Stage>,
    /// The worker beside each replica that guesses for it.
    draft: Option<Draft<'a>>,
}

/// A draft model's worker.
#[derive(Debug, Serialize)]
struct Draft<'a> {
    model: &'a str,
    weight_bytes: u64,
    kv_bytes: u64,
    max_context: usize,
    /// What a token takes it, in thousandths of the time of the model that it guesses for.
    cost: u32,
}

/// One KV group.
#[derive(Debug, Serialize)]
struct Group {
    window: Option<u32>,
    layers: usize,
    blocks: usize,
}

/// One stage.
#[derive(Debug, Serialize)]
struct Stage {
    index: usize,
    first_layer: usize,
    last_layer: usize,
    ranks: Vec<Rank>,
}

/// One worker.
#[derive(Debug, Serialize)]
struct Rank {
    rank: usize,
    weight_bytes: u64,
    kv_bytes: u64,
    heads: (usize, usize),
    kv_heads: (usize, usize),
    ffn: (usize, usize),
    vocab: (usize, usize),
    /// Rows of the vocabulary that it multiplies.
    product: (usize, usize),
}

/// Runs the command; a plan that does not fit is shown and is bad input.
pub(crate) async fn plan(global: &Global, args: PlanArgs) -> Outcome {
    if let Some(deployment) = &args.deployment {
        return plan_status::plan(deployment, &args.cluster, args.json).await;
    }
    let target = Target { model: args.model, file: args.file };
    let prepared = deployment::plans(global, &target, &[], args.draft_model.as_deref(), &args.placement, None).await?;
    for planned in &prepared {
        let mut shown = describe(&planned.name, &planned.model.name, planned.replicas, &planned.plan);
        shown.draft = planned.draft.as_ref().map(draft);
        if args.json { output::json(&shown)? } else { print(&shown)? }
    }
    match prepared.iter().find(|planned| !planned.plan.fits) {
        Some(planned) => Err(bad_input!("{}: {}", planned.name, planned.plan.message)),
        None => Ok(()),
    }
}

/// What a plan says.
fn describe<'a>(deployment: &'a str, model: &'a str, replicas: usize, plan: &'a ExecutionPlan) -> Planned<'a> {
    let stage = |(index, stage): (usize, &plan::shard::Stage)| Stage {
        index,
        first_layer: stage.layers.start,
        last_layer: stage.layers.end.saturating_sub(1),
        ranks: stage.shards.iter().map(rank).collect(),
    };
    Planned {
        deployment,
        model,
        replicas,
        fits: plan.fits,
        message: &plan.message,
        pipeline: plan.stages.len(),
        tensor: plan.stages.first().map_or(0, |stage| stage.shards.len()),
        file_bytes: plan.file_bytes,
        tensor_bytes: plan.tensor_bytes,
        shared_bytes: plan.shared_bytes,
        max_context: plan.max_context,
        max_batch_sequences: plan.max_batch_sequences,
        max_batch_tokens: plan.max_batch_tokens,
        kv_dtype: plan.kv.dtype,
        kv_groups: plan.kv.groups.iter().map(|g| Group { window: g.window, layers: g.layers.len(), blocks: g.blocks }).collect(),
        stages: plan.stages.iter().enumerate().map(stage).collect(),
        draft: None,
    }
}

/// What is planned of a draft model.
fn draft(draft: &deployment::Draft) -> Draft<'_> {
    let sum = |bytes: fn(&Shard) -> u64| draft.plan.stages.iter().flat_map(|stage| &stage.shards).map(bytes).sum();
    Draft {
        model: &draft.model.name,
        weight_bytes: sum(|shard| shard.weight_bytes),
        kv_bytes: sum(|shard| shard.kv_bytes),
        max_context: draft.plan.max_context,
        cost: draft.fleet.cost,
    }
}

/// What one worker owns.
fn rank(shard: &Shard) -> Rank {
    let own = |ranges: &[std::ops::Range<usize>]| ranges.get(shard.rank).map_or((0, 0), |range| (range.start, range.end));
    Rank {
        rank: shard.rank,
        weight_bytes: shard.weight_bytes,
        kv_bytes: shard.kv_bytes,
        heads: own(&shard.splits.heads),
        kv_heads: own(&shard.splits.kv_heads),
        ffn: own(&shard.splits.ffn),
        vocab: own(&shard.splits.vocab),
        product: (shard.product().start, shard.product().end),
    }
}

/// The plan for a person.
fn print(plan: &Planned<'_>) -> Outcome {
    let copies = if plan.replicas == 1 { "1 replica".to_owned() } else { format!("{} replicas", plan.replicas) };
    output::line(&format!("{} ({}): {copies} of {} stages × {} ranks", plan.deployment, plan.model, plan.pipeline, plan.tensor))?;
    output::line(&format!(
        "  weights {}, of which {} held more than once; context {} tokens; steps of {} sequences, {} tokens",
        output::bytes(plan.file_bytes),
        output::bytes(plan.shared_bytes),
        plan.max_context,
        plan.max_batch_sequences,
        plan.max_batch_tokens
    ))?;
    for group in &plan.kv_groups {
        let window = group.window.map_or_else(|| "full attention".to_owned(), |window| format!("window {window}"));
        output::line(&format!("  KV {:?}: {} layers, {window}, {} blocks", plan.kv_dtype, group.layers, group.blocks))?;
    }
    output::line("  stage  layers     rank  weights      KV cache     query heads  feed-forward   vocabulary     multiplied")?;
    for stage in &plan.stages {
        for rank in &stage.ranks {
            let span = |(start, end): (usize, usize)| format!("{start}–{}", end.saturating_sub(1));
            output::line(&format!(
                "  {:<5}  {:<9}  {:<4}  {:<11}  {:<11}  {:<11}  {:<13}  {:<13}  {}",
                stage.index,
                span((stage.first_layer, stage.last_layer + 1)),
                rank.rank,
                output::bytes(rank.weight_bytes),
                output::bytes(rank.kv_bytes),
                span(rank.heads),
                span(rank.ffn),
                span(rank.vocab),
                if rank.product.0 < rank.product.1 { span(rank.product) } else { "–".to_owned() }
            ))?;
        }
    }
    if let Some(draft) = &plan.draft {
        output::line(&format!(
            "  draft model {}: a worker beside each replica, weights {}, KV cache {}, context {} tokens; a token takes {:.2} of the model's time",
            draft.model,
            output::bytes(draft.weight_bytes),
            output::bytes(draft.kv_bytes),
            draft.max_context,
            f64::from(draft.cost) / 1000.0
        ))?;
    }
    output::line(&format!("  {}", plan.message))
}
