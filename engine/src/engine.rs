//! The engine: loads a shard, runs steps.

use std::{collections::HashMap, ops::Range, sync::Arc};

use kernels::{Isa, Pool};
use plan::{
    model::ModelConfig,
    shard::{KvGeometry, Shard},
    step::{Output, Step},
};

use crate::{
    Adapter, LoadShardError, MaskSource, Observed, Progress, StepError, Timings, WeightReader,
    backend::{Backend, Context},
    batch::Batch,
    collective::Collective,
    compute::Compute,
    cpu::Cpu,
    fit, pooling,
    ranks::Ranks,
    sampler::{Sampler, Session},
    sequences::Sequences,
    validate::{self, Limits},
};

/// How an engine computes; none of it changes a bit of what comes out.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Compute threads, the owner's included; at least 1.
    pub threads: usize,
    /// Most tokens in a step; sizes the buffers.
    pub max_batch_tokens: usize,
    /// Longest sequence in tokens.
    pub max_context: usize,
}

/// What a stage makes of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum StageOutput {
    /// For the next stage: `[tokens, hidden]` f32, the same on every rank.
    Hidden(Vec<f32>),
    /// From the last stage, in the order of the step's wants; empty on ranks other than 0.
    Outputs(Vec<Output>),
}

/// What makes results of states.
enum Head {
    /// Of a decoder's.
    Sampler(Sampler),
    /// Of an encoder's.
    Pooling,
}

/// One rank's weights, KV cache and sampler.
pub struct Engine {
    config: ModelConfig,
    kv: KvGeometry,
    options: EngineOptions,
    first: bool,
    /// On the last stage.
    head: Option<Head>,
    backend: Box<dyn Backend>,
    sequences: Sequences,
    /// Adapters by slot, from 1.
    adapters: HashMap<u32, Arc<Adapter>>,
    /// Layers and rank, which adapters are loaded for.
    place: (Range<usize>, usize),
    last_step: u64,
    progress: Arc<Progress>,
    timings: Timings,
    collective: Box<dyn Collective>,
}

impl Engine {
    /// Loads `shard` through `weights`, streaming; `loaded` is told the bytes read so far.
    ///
    /// # Errors
    /// If bytes cannot be read, or tensors, plan and model do not fit together.
    pub fn load(
        config: &ModelConfig,
        shard: &Shard,
        kv: &KvGeometry,
        options: EngineOptions,
        weights: &dyn WeightReader,
        collective: Box<dyn Collective>,
        loaded: &(dyn Fn(u64) + Sync),
    ) -> Result<Self, LoadShardError> {
        fit::check(config, shard, kv, &options, collective.as_ref())?;
        let compute = Compute { pool: Arc::new(Pool::new(options.threads)), isa: options.isa };
        let backend = Cpu::load(config, shard, kv, options, &compute, weights, loaded)?;
        let head = shard.is_last().then(|| match config.encoder {
            None => Head::Sampler(Sampler::new(compute, shard.splits.vocab.clone(), config.hidden)),
            Some(_) => Head::Pooling,
        });
        Ok(Self {
            config: config.clone(),
            kv: kv.clone(),
            options,
            first: shard.is_first(),
            head,
            backend: Box::new(backend),
            sequences: Sequences::new(kv, shard.is_last(), shard.is_last() && shard.rank == 0),
            adapters: HashMap::new(),
            place: (shard.layers.clone(), shard.rank),
            last_step: 0,
            progress: Arc::default(),
            timings: Timings::default(),
            collective,
        })
    }

    /// Runs a step. `hidden` is `[tokens, hidden]` f32 from the stage before, empty on the first stage.
    ///
    /// The first stage and the sampler (rank 0 of the last stage) need ids; elsewhere [`Input::Sampled`](plan::step::Input::Sampled) may
    /// stand unresolved.
    ///
    /// # Errors
    /// Any error ends the session: call [`Engine::reset`] before the next step.
    pub fn run(&mut self, step: &Step, hidden: &[f32], masks: &mut dyn MaskSource) -> Result<StageOutput, StepError> {
        let samples = matches!(self.head, Some(Head::Sampler(_))) && self.collective.rank() == 0;
        let limits = Limits {
            config: &self.config,
            kv: &self.kv,
            adapters: &self.adapters,
            max_batch_tokens: self.options.max_batch_tokens,
            max_context: self.options.max_context,
            last_step: self.last_step,
            hidden: hidden.len(),
            first: self.first,
            samples,
            last: self.head.is_some(),
        };
        validate::check(&limits, step, &self.sequences).map_err(|source| StepError::Invalid { step: step.id, source })?;
        self.progress.begin(step.id);
        self.last_step = step.id;
        for &copy in &step.copies {
            self.backend.copy_block(copy);
        }
        self.sequences.apply(step);
        let decides = matches!(self.head, Some(Head::Sampler(_)));
        let batch = Batch::new(step, &self.sequences.by_id, &self.adapters, self.kv.groups.len(), decides);
        let mut ranks = Ranks::new(self.collective.as_mut());
        let mut context = Context { ranks: &mut ranks, progress: &self.progress, timings: &mut self.timings };
        if batch.tokens > 0 {
            self.backend.forward(&batch, hidden, &mut context)?;
        }
        let output = match &mut self.head {
            None => StageOutput::Hidden(if batch.tokens > 0 { self.backend.rows().to_vec() } else { Vec::new() }),
            // The states are on every rank, whole.
            Some(Head::Pooling) if context.ranks.rank() > 0 => StageOutput::Outputs(Vec::new()),
            Some(Head::Pooling) => StageOutput::Outputs(pooling::run(step, &batch, self.options.isa, self.backend.as_mut())),
            Some(Head::Sampler(sampler)) => {
                let mut session = Session { step, histories: &mut self.sequences.histories, masks };
                StageOutput::Outputs(sampler.run(&mut session, &batch.wanted, self.backend.as_mut(), &mut context)?)
            }
        };
        self.timings.steps += 1;
        self.timings.tokens += batch.tokens as u64;
        self.timings.collective += ranks.spent;
        self.progress.finish(step.id);
        Ok(output)
    }

    /// Sums, from now on, the squares of what goes into each product by column: [`Engine::observed`] has them.
    ///
    /// A row of the last layer goes in only where something is wanted of it.
    ///
    /// # Errors
    /// If the stage has other ranks, which have some of the columns.
    pub fn observe(&mut self) -> Result<(), LoadShardError> {
        match self.collective.ranks() {
            1 => {
                self.backend.observe();
                Ok(())
            }
            ranks => Err(LoadShardError::Plan { what: "the ranks of an observed stage", got: ranks.to_string(), expected: "1".to_owned() }),
        }
    }

    /// The sums since [`Engine::observe`], which end here.
    pub fn observed(&mut self) -> Observed {
        self.backend.observed()
    }

    /// Joins the ranks of a new epoch.
    pub fn set_collective(&mut self, collective: Box<dyn Collective>) {
        self.collective = collective;
    }

    /// Puts an adapter into a slot: sequences of later steps may name it.
    ///
    /// # Errors
    /// If the slot is 0, which is the bare model, or the adapter was loaded for another shard.
    pub fn bind_adapter(&mut self, slot: u32, adapter: Arc<Adapter>) -> Result<(), LoadShardError> {
        let (layers, rank) = &self.place;
        let fault = |what, got: String, expected: String| LoadShardError::Plan { what, got, expected };
        if slot == 0 {
            return Err(fault("the slot of an adapter", slot.to_string(), "at least 1".to_owned()));
        }
        if !adapter.is_for(layers, *rank) {
            let expected = format!("one for layers {layers:?} and rank {rank}");
            return Err(fault("an adapter", "one that was loaded for another shard".to_owned(), expected));
        }
        self.adapters.insert(slot, adapter);
        Ok(())
    }

    /// Empties a slot. Sequences that named it cannot go on.
    pub fn unbind_adapter(&mut self, slot: u32) {
        self.adapters.remove(&slot);
    }

    /// Drops all sequences and block tables, and empties the slots of adapters; the weights stay.
    pub fn reset(&mut self) {
        self.adapters.clear();
        self.sequences.clear();
        self.last_step = 0;
        self.progress.reset();
    }

    /// Counters for heartbeats.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Time spent by phase.
    pub fn timings(&self) -> Timings {
        self.timings
    }
}
