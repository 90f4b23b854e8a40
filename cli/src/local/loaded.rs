//! A model ready for steps of a command's own making: in this process, or in worker processes where a placement asks for several.

use std::sync::Arc;

use anyhow::Context;
use engine::{Engine, EngineOptions, Timings};
use kernels::{Isa, Pool, probe};
use plan::{
    planner,
    shard::{ExecutionPlan, KvDType},
};
use router::replica::Replica;

use super::{in_process::InProcess, memory, threads};
use crate::{
    args::{Global, KvChoice, Placement},
    exit::{BadInput, Outcome, bad_input},
    model::Model,
    output::{self, Unit},
};

/// Passes of the bandwidth probe; the best counts.
const PROBES: usize = 5;

/// What the steps will need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Longest sequence in tokens.
    pub(crate) context: usize,
    /// Most sequences at once.
    pub(crate) sequences: usize,
    /// Most tokens in a step.
    pub(crate) batch_tokens: usize,
}

/// A replica that takes steps.
pub(crate) struct Loaded {
    pub(crate) replica: Arc<dyn Replica>,
    pub(crate) plan: ExecutionPlan,
    /// Compute threads of all workers together.
    pub(crate) threads: usize,
    /// Instructions of the kernels.
    pub(crate) isa: Isa,
    /// The engine, where it runs in this process.
    here: Option<Arc<InProcess>>,
}

/// Plans a model onto the workers of `placement`.
///
/// # Errors
/// Bad input when no such plan exists, or it does not fit this machine's memory.
pub(crate) fn plan(model: &Model, placement: &Placement, needs: &Needs) -> Outcome<ExecutionPlan> {
    let (pipeline, tensor) = placement.parallelism();
    let spec = planner::Spec {
        pipeline,
        tensor,
        max_context: Some(needs.context),
        max_batch_sequences: needs.sequences,
        max_batch_tokens: needs.batch_tokens,
        kv_dtype: placement.kv.map(kv_dtype),
        ..planner::Spec::default()
    };
    let plan = planner::plan(&spec, &model.header, &memory::of_each(pipeline * tensor)).bad_input()?;
    if plan.fits { Ok(plan) } else { Err(bad_input!("{}: {}", model.name, plan.message)) }
}

/// The planner's word for a choice.
pub(crate) fn kv_dtype(choice: KvChoice) -> KvDType {
    match choice {
        KvChoice::F32 => KvDType::F32,
        KvChoice::F16 => KvDType::F16,
    }
}

/// The instructions that were asked for.
///
/// # Errors
/// Bad input when this CPU has none of that name.
pub(crate) fn isa(placement: &Placement) -> Outcome<Isa> {
    Isa::named(placement.isa.name()).bad_input()
}

impl Loaded {
    /// Loads `model` as `placement` says.
    pub(crate) async fn start(global: &Global, model: Model, placement: &Placement, needs: &Needs) -> Outcome<Self> {
        let plan = plan(&model, placement, needs)?;
        let isa = isa(placement)?;
        let threads = placement.threads.map_or_else(threads::available, Into::into);
        let workers = plan.stages.iter().map(|stage| stage.shards.len()).sum::<usize>();
        if workers == 1 {
            return in_process(global, model, plan, isa, threads).await;
        }
        Err(bad_input!("{workers} worker processes were asked for, expected 1: only one process is supported yet"))
    }

    /// Where the engine's time went so far, if it runs in this process.
    pub(crate) fn timings(&self) -> Option<Timings> {
        self.here.as_ref().map(|replica| replica.timings())
    }

    /// Bytes per second that this machine's memory yields to as many threads as the engines have.
    pub(crate) fn read_bandwidth(&self) -> f64 {
        probe::read_bandwidth(&Pool::new(self.threads), PROBES)
    }

    /// Ends the workers, where there are any, and waits for them.
    pub(crate) async fn close(self) {
        drop(self.replica);
        drop(self.here);
    }
}

/// Loads the whole model into an engine of this process.
pub(crate) async fn in_process(global: &Global, model: Model, plan: ExecutionPlan, isa: Isa, threads: usize) -> Outcome<Loaded> {
    let card = model.card().await?;
    let bar = output::bar(global.quiet, "Loading", plan.tensor_bytes, Unit::Bytes);
    let shown = bar.clone();
    let (engine, plan) = tokio::task::spawn_blocking(move || {
        let engine = load(&model, &plan, isa, threads, &|bytes| shown.set_position(bytes));
        engine.map(|engine| (engine, plan))
    })
    .await
    .context("loading was cut off")??;
    bar.finish_and_clear();
    let replica = Arc::new(InProcess::start(engine, card)?);
    Ok(Loaded { replica: replica.clone(), plan, threads, isa, here: Some(replica) })
}

/// Loads the only shard of a plan of one worker.
pub(crate) fn load(model: &Model, plan: &ExecutionPlan, isa: Isa, threads: usize, progress: &dyn Fn(u64)) -> Outcome<Engine> {
    let Some(shard) = plan.stages.first().and_then(|stage| stage.shards.first()) else {
        return Err(anyhow::anyhow!("the plan has no worker").into());
    };
    let options = EngineOptions { isa, threads, max_batch_tokens: plan.max_batch_tokens, max_context: plan.max_context };
    let solo = Box::new(engine::collective::Solo);
    Engine::load(&plan.config, shard, &plan.kv, options, &model.reader(), solo, progress)
        .with_context(|| format!("failed to load {}", model.name))
        .bad_input()
}
