//! The engine: loads a shard, runs steps.

use std::{collections::HashMap, ops::Range, sync::Arc};

use kernels::{Isa, Pool};
use plan::{
    model::ModelConfig,
    shard::{KvGeometry, Shard},
    step::{Output, SequenceId, Step},
};

use crate::{
    Adapter, InvalidStep, LoadShardError, MaskSource, Observed, Progress, Question, StepError, Timings, WeightReader,
    backend::{Backend, Context},
    batch::Batch,
    collective::Collective,
    compute::Compute,
    cpu::Cpu,
    fit, pooling,
    ranks::Ranks,
    sampler::{self, Sampled, Sampler, Session},
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
    /// From the last stage where the first multiplies a part of the vocabulary: what that is asked. [`Engine::multiply`] is to follow.
    Question(Arc<Question>),
}

/// What makes results of states.
enum Head {
    /// Of a decoder's.
    Sampler(Box<Sampler>),
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
    /// Rows of the vocabulary that the first stage multiplies for the last.
    lent: Range<usize>,
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
            None => Head::Sampler(Box::new(Sampler::new(compute, &shard.splits, config.hidden))),
            Some(_) => Head::Pooling,
        });
        Ok(Self {
            config: config.clone(),
            kv: kv.clone(),
            options,
            first: shard.is_first(),
            head,
            lent: if shard.is_last() { 0..0 } else { shard.product() },
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
        if let Some(sequence) = self.unfinished(step) {
            return Err(StepError::Invalid { step: step.id, source: InvalidStep::Unfinished { sequence } });
        }
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
                match sampler.run(&mut session, &batch.wanted, self.backend.as_mut(), &mut context)? {
                    Sampled::Outputs(outputs) => StageOutput::Outputs(outputs),
                    Sampled::Question(question) => StageOutput::Question(question),
                }
            }
        };
        self.timings.steps += 1;
        self.timings.tokens += batch.tokens as u64;
        self.timings.collective += ranks.spent;
        self.progress.finish(step.id);
        Ok(output)
    }

    /// On the last stage: the first sequence of `step` that is in a step which waits for the first stage's part of its draw. That one is to be
    /// finished before this one is run.
    pub fn unfinished(&self, step: &Step) -> Option<SequenceId> {
        match &self.head {
            Some(Head::Sampler(sampler)) => sampler.waits(step),
            _ => None,
        }
    }

    /// On the last stage, once for each [`StageOutput::Question`]: multiplies this rank's part of the vocabulary for the first of them. That step
    /// then waits for the parts of the first stage. Other steps may be run before either.
    ///
    /// # Errors
    /// If an exchange fails, which ends the session.
    pub fn multiply(&mut self) -> Result<(), StepError> {
        let Some(Head::Sampler(sampler)) = &mut self.head else { return Ok(()) };
        let mut ranks = Ranks::new(self.collective.as_mut());
        self.progress.begin(self.last_step);
        let mut context = Context { ranks: &mut ranks, progress: &self.progress, timings: &mut self.timings };
        sampler.multiply(self.backend.as_mut(), &mut context)?;
        self.timings.collective += ranks.spent;
        self.progress.finish(self.last_step);
        Ok(())
    }

    /// On the first stage: this rank's part of what the last one asks.
    ///
    /// # Errors
    /// If the question is not of this model.
    pub fn lend(&mut self, question: &Question) -> Result<Vec<u8>, StepError> {
        let Question { step, needs, states } = question;
        let (expected, vocab) = (needs.len() * self.config.hidden, self.config.vocab);
        let most =
            needs.iter().flat_map(|need| need.targets.iter().map(|&id| u64::from(id)).chain([need.top.saturating_sub(1) as u64])).max();
        let most = most.unwrap_or(0);
        if states.len() != expected || most >= vocab as u64 {
            let source = InvalidStep::Question { got: states.len(), most, rows: needs.len(), expected, vocab };
            return Err(StepError::Invalid { step: *step, source });
        }
        self.progress.begin(*step);
        let part = sampler::part(&self.lent, self.config.hidden, question, self.backend.as_mut(), &mut self.timings);
        self.progress.finish(*step);
        Ok(part)
    }

    /// On rank 0 of the last stage: the results of step `step`, of those that wait the first, with the first stage's parts by rank.
    ///
    /// # Errors
    /// If it is not the first that waits, or the parts are of other lengths.
    pub fn finish(&mut self, step: u64, parts: &[Vec<u8>]) -> Result<Vec<Output>, StepError> {
        match &mut self.head {
            Some(Head::Sampler(sampler)) => sampler.finish(step, parts, &mut self.sequences.histories, &mut self.timings),
            _ => Err(StepError::Invalid { step, source: InvalidStep::NotAsked }),
        }
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
        if let Some(Head::Sampler(sampler)) = &mut self.head {
            sampler.clear();
        }
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
