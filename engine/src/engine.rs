//! The engine: loads a shard, runs steps.

use std::sync::Arc;

use kernels::Isa;
use plan::{
    model::ModelConfig,
    shard::{KvGeometry, Shard},
    step::{Output, Step},
};

use crate::{LoadShardError, MaskSource, Progress, StepError, Timings, WeightReader, collective::Collective};

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

/// One rank's weights, KV cache and sampler.
pub struct Engine {
    progress: Arc<Progress>,
    timings: Timings,
    collective: Box<dyn Collective>,
}

impl Engine {
    /// Loads `shard` through `weights`, streaming; `loaded` is told the bytes read so far.
    ///
    /// # Errors
    /// If bytes cannot be read, or tensors, plan and model do not fit together.
    #[expect(clippy::too_many_arguments, reason = "each is one thing the worker knows")]
    pub fn load(
        _config: &ModelConfig,
        _shard: &Shard,
        _kv: &KvGeometry,
        _options: EngineOptions,
        _weights: &dyn WeightReader,
        collective: Box<dyn Collective>,
        _loaded: &dyn Fn(u64),
    ) -> Result<Self, LoadShardError> {
        Ok(Self { progress: Arc::default(), timings: Timings::default(), collective })
    }

    /// Runs a step. `hidden` is `[tokens, hidden]` f32 from the stage before, empty on the first stage.
    ///
    /// # Errors
    /// Any error ends the session: call [`Engine::reset`] before the next step.
    pub fn run(&mut self, _step: &Step, _hidden: &[f32], _masks: &mut dyn MaskSource) -> Result<StageOutput, StepError> {
        Ok(StageOutput::Outputs(Vec::new()))
    }

    /// Joins the ranks of a new epoch.
    pub fn set_collective(&mut self, collective: Box<dyn Collective>) {
        self.collective = collective;
    }

    /// Drops all sequences and block tables; the weights stay.
    pub fn reset(&mut self) {
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
