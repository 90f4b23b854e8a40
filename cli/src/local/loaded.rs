//! A model ready for steps of a command's own making: in this process, or in worker processes where a placement asks for several.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context;
use engine::{Engine, EngineOptions, Timings};
use kernels::{Isa, Pool, probe};
use plan::{
    adapter::{AdapterHeader, AdapterSource},
    planner,
    predict::Machine,
    shard::{ExecutionPlan, KvDType, Shard},
};
use router::replica::{Connector, Replica, WorkerTimes, WorkersConnector};

use super::{
    deployment::{self, Planned},
    fleet,
    in_process::{AdapterLoader, InProcess},
    loading, memory, threads,
    workers::{Common, Keep, Workers, draw_token},
};
use crate::{
    args::{Global, KvChoice, Placement},
    exit::{BadInput, Failure, Outcome, bad_input},
    model::{Model, source_options},
    output::{self, Unit},
};

/// Passes of each probe; the best counts.
const PASSES: usize = 3;

/// Measures what this machine yields to as many threads as a replica's engines have.
pub(crate) struct Prober {
    all: Pool,
    /// As many threads as one worker has, where there are several workers.
    one: Option<Pool>,
    memory: probe::Memory,
    isa: Isa,
}

impl Prober {
    /// What the machine yields now to steps of so many tokens.
    pub(crate) fn measure(&self, tokens: usize) -> Machine {
        let read = self.memory.read_bandwidth(&self.all, PASSES);
        Machine {
            read,
            read_alone: self.one.as_ref().map_or(read, |one| self.memory.read_bandwidth(one, PASSES)),
            products: probe::int8_peak(&self.all, self.isa.for_products(tokens, std::iter::empty()), PASSES),
        }
    }
}

/// What the steps will need.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    /// Longest sequence in tokens.
    pub(crate) context: usize,
    /// Most sequences at once.
    pub(crate) sequences: usize,
    /// Most tokens in a step.
    pub(crate) batch_tokens: usize,
    /// Adapters that are to be loaded.
    pub(crate) adapters: Vec<Arc<AdapterHeader>>,
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
    /// The worker processes, where there are several.
    workers: Option<Workers>,
}

/// How long an error of a session waits for the worker that may be its cause to be found dead: that says more.
const CAUSE: Duration = Duration::from_millis(500);

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
        vocabulary: placement.vocabulary.planned(),
        screening: placement.screening,
        adapters: needs.adapters.clone(),
        ..planner::Spec::default()
    };
    let plan = planner::plan(&spec, &model.header, &memory::of_each(pipeline * tensor, 0)).bad_input()?;
    if plan.fits { Ok(plan) } else { Err(bad_input!("{}: {}", model.name, plan.message)) }
}

/// The planner's word for a choice.
pub(crate) fn kv_dtype(choice: KvChoice) -> KvDType {
    match choice {
        KvChoice::F32 => KvDType::F32,
        KvChoice::F16 => KvDType::F16,
        KvChoice::Q8 => KvDType::Q8,
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
        let model = model.loaded_as(placement.load_in());
        let plan = plan(&model, placement, needs)?;
        let isa = isa(placement)?;
        let threads = placement.threads();
        match fleet::workers(&plan) {
            1 => in_process(global, model, plan, isa, threads).await,
            _ => Self::in_workers(global, deployment::alone(model, plan), placement, isa, threads).await,
        }
    }

    /// Starts the workers of one replica and waits until they have loaded.
    async fn in_workers(global: &Global, planned: Planned, placement: &Placement, isa: Isa, threads: usize) -> Outcome<Self> {
        let token = draw_token().context("failed to draw a token for the workers")?;
        let common = Common { global, isa, threads, collective: placement.collective, token: &token };
        let planned = [planned];
        let workers = Workers::start(&planned, &common, Keep::Once).await?;
        let fleet = workers.fleet();
        tokio::select! {
            biased;
            failure = workers.failed() => {
                workers.stop().await;
                return Err(failure);
            }
            () = loading::wait(global.quiet, &planned, &fleet, &token) => {}
        }
        let [planned] = planned;
        let state = fleet.borrow().clone();
        let member = state.deployments.first().and_then(|deployment| deployment.replicas.first()).context("the fleet has no replica")?;
        let replica = WorkersConnector::new(Some(token)).replica(member);
        // Workers may have been given more threads than were asked for: each has at least one.
        let threads = threads::share(threads, fleet::workers(&planned.plan)).iter().sum();
        Ok(Self { replica, plan: planned.plan, threads, isa, here: None, workers: Some(workers) })
    }

    /// Runs `work` on the replica; fails at once when a worker ends.
    pub(crate) async fn watch<T>(&self, work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
        let Some(workers) = &self.workers else { return work.await };
        tokio::select! {
            biased;
            failure = workers.failed() => Err(failure),
            done = work => match done {
                Err(Failure::Failed(error)) => {
                    Err(tokio::time::timeout(CAUSE, workers.failed()).await.unwrap_or(Failure::Failed(error)))
                }
                done => done,
            },
        }
    }

    /// Where the engine's time went so far, if it runs in this process.
    pub(crate) fn timings(&self) -> Option<Timings> {
        self.here.as_ref().map(|replica| replica.timings())
    }

    /// Where the time of worker processes went so far, if there are any.
    pub(crate) fn worker_times(&self) -> Vec<WorkerTimes> {
        self.replica.times()
    }

    /// Measures what this machine yields to as many threads as the engines have.
    pub(crate) fn prober(&self) -> Prober {
        let all = Pool::new(self.threads);
        let workers = fleet::workers(&self.plan);
        let one = (workers > 1).then(|| Pool::new((self.threads / workers).max(1)));
        Prober { memory: probe::Memory::new(&all), all, one, isa: self.isa }
    }

    /// Ends the workers, where there are any, and waits for them.
    pub(crate) async fn close(self) {
        drop(self.replica);
        drop(self.here);
        if let Some(workers) = self.workers {
            workers.stop().await;
        }
    }
}

/// Loads the whole model into an engine of this process.
pub(crate) async fn in_process(global: &Global, model: Model, plan: ExecutionPlan, isa: Isa, threads: usize) -> Outcome<Loaded> {
    let card = model.card().await?;
    let bar = output::bar(global.quiet, "Loading", plan.tensor_bytes, Unit::Bytes);
    let loader = adapter_loader(global, &plan)?;
    let shown = bar.clone();
    let (engine, plan) = tokio::task::spawn_blocking(move || {
        let engine = load(&model, &plan, isa, threads, &|bytes| shown.set_position(bytes));
        engine.map(|engine| (engine, plan))
    })
    .await
    .context("loading was cut off")??;
    bar.finish_and_clear();
    let replica = Arc::new(InProcess::start(engine, card, loader)?);
    Ok(Loaded { replica: replica.clone(), plan, threads, isa, here: Some(replica), workers: None })
}

/// Loads adapters for the only shard of a plan of one worker.
fn adapter_loader(global: &Global, plan: &ExecutionPlan) -> Outcome<AdapterLoader> {
    let (config, shard, options) = (plan.config.clone(), only_shard(plan)?.clone(), source_options(global)?);
    Ok(Box::new(move |adapter: &AdapterSource| {
        let loaded = worker::load_adapter(&config, &shard, adapter, options.clone());
        loaded.map_err(|error| format!("{:#}", anyhow::Error::new(error)))
    }))
}

fn only_shard(plan: &ExecutionPlan) -> Outcome<&Shard> {
    Ok(plan.stages.first().and_then(|stage| stage.shards.first()).context("the plan has no worker")?)
}

/// Loads the only shard of a plan of one worker.
pub(crate) fn load(model: &Model, plan: &ExecutionPlan, isa: Isa, threads: usize, progress: &(dyn Fn(u64) + Sync)) -> Outcome<Engine> {
    let shard = only_shard(plan)?;
    let options = EngineOptions { isa, threads, max_batch_tokens: plan.max_batch_tokens, max_context: plan.max_context };
    let solo = Box::new(engine::collective::Solo);
    Engine::load(&plan.config, shard, &plan.kv, options, &model.reader(), solo, progress)
        .with_context(|| format!("failed to load {}", model.name))
        .bad_input()
}
