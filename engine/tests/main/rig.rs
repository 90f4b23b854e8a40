//! Engines of all stages and ranks of a plan, and steps for them.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use engine::{
    Adapter, Engine, EngineOptions, MaskSource, NoMasks, Question, StageOutput, StepError,
    collective::{Collective, Solo, Threads},
};
use kernels::Isa;
use plan::{
    planner::{self, Vocabulary},
    shard::{BLOCK_TOKENS, ExecutionPlan, KvDType},
    step::{
        Begin, BlockId, Input, Mask, Output, OutputValue, Sampling, SequenceId, SequenceStep, Step, TableChange, TokenId, Want, WantKind,
    },
};

use crate::{
    adapter::Lora,
    model::{Model, Noise},
};

/// How a model is spread and computed.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) pipeline: usize,
    pub(crate) tensor: usize,
    pub(crate) threads: usize,
    pub(crate) isa: Isa,
    pub(crate) kv: KvDType,
    pub(crate) sequences: usize,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) screening: bool,
}

impl Layout {
    /// With the vocabulary spread over the first and the last stage.
    pub(crate) fn spread(pipeline: usize, tensor: usize) -> Self {
        Self { pipeline, tensor, threads: 2, vocabulary: Vocabulary::Spread, ..Self::default() }
    }
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            pipeline: 1,
            tensor: 1,
            threads: 1,
            isa: Isa::best(),
            kv: KvDType::F32,
            sequences: 12,
            vocabulary: Vocabulary::Auto,
            screening: false,
        }
    }
}

/// One sequence's part of a step to be.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) sequence: SequenceId,
    pub(crate) ids: Vec<TokenId>,
    pub(crate) wants: Vec<Want>,
    pub(crate) begin: Option<Begin>,
    /// Slot of its adapter.
    pub(crate) adapter: u32,
    /// Where the second text begins.
    pub(crate) second: usize,
}

impl Part {
    pub(crate) fn new(sequence: SequenceId, ids: &[TokenId]) -> Self {
        Self { sequence, ids: ids.to_vec(), wants: Vec::new(), begin: None, adapter: 0, second: 0 }
    }

    pub(crate) fn adapter(self, adapter: u32) -> Self {
        Self { adapter, ..self }
    }

    pub(crate) fn want(mut self, offset: usize, kind: WantKind) -> Self {
        self.wants.push(Want { offset: offset as u32, kind });
        self
    }

    /// All logits at every position.
    pub(crate) fn all_logits(self) -> Self {
        (0..self.ids.len()).fold(self, |part, offset| part.want(offset, WantKind::Logits))
    }

    /// A draw at the last position.
    pub(crate) fn sample(self) -> Self {
        let last = self.ids.len() - 1;
        self.want(last, WantKind::Sample)
    }

    pub(crate) fn begin(mut self, ids: &[TokenId], prompt_len: usize, sampling: &Sampling) -> Self {
        self.begin = Some(Begin { ids: ids.to_vec(), prompt_len: prompt_len as u32, sampling: sampling.clone() });
        self
    }
}

/// Where a sequence stands.
#[derive(Default)]
struct Place {
    fed: usize,
    blocks: Vec<Vec<BlockId>>,
}

/// All engines of a replica.
pub(crate) struct Rig {
    pub(crate) plan: ExecutionPlan,
    /// `[stage][rank]`.
    pub(crate) engines: Vec<Vec<Engine>>,
    pub(crate) steps: u64,
    pub(crate) frees: Vec<SequenceId>,
    places: HashMap<SequenceId, Place>,
    free: Vec<Vec<BlockId>>,
}

pub(crate) fn plan(model: &Model, layout: Layout) -> ExecutionPlan {
    let spec = planner::Spec {
        pipeline: layout.pipeline,
        tensor: layout.tensor,
        max_context: Some(400),
        max_batch_sequences: layout.sequences,
        max_batch_tokens: 400,
        kv_dtype: Some(layout.kv),
        vocabulary: layout.vocabulary,
        screening: layout.screening,
        ..planner::Spec::default()
    };
    planner::plan(&spec, &model.header, &planner::Capacity { memory_bytes: None }).expect("a plan")
}

/// The collectives of a stage's ranks.
pub(crate) fn joined(ranks: usize) -> Vec<Box<dyn Collective>> {
    if ranks == 1 {
        return vec![Box::new(Solo)];
    }
    Threads::group(ranks, Duration::from_secs(60)).into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect()
}

/// What was asked of a source of masks, for the ranks that ask later.
type Given<'a> = (&'a mut (dyn MaskSource + Send), HashMap<(u64, SequenceId), Result<Mask, String>>);

/// Gives every rank of a stage the same masks.
struct EachRank<'a, 'b>(&'a Mutex<Given<'b>>);

impl MaskSource for EachRank<'_, '_> {
    fn mask(&mut self, step: u64, sequence: SequenceId) -> Result<Mask, Box<dyn Error + Send + Sync>> {
        let mut given = self.0.lock().expect("no panic");
        let (source, known) = &mut *given;
        let mask = known.entry((step, sequence)).or_insert_with(|| source.mask(step, sequence).map_err(|e| e.to_string()));
        mask.clone().map_err(Into::into)
    }
}

impl Rig {
    pub(crate) fn new(model: &Model, layout: Layout) -> Self {
        let plan = plan(model, layout);
        let options = EngineOptions {
            isa: layout.isa,
            threads: layout.threads,
            max_batch_tokens: plan.max_batch_tokens,
            max_context: plan.max_context,
        };
        let engines = plan.stages.iter().map(|stage| {
            let load = |(shard, collective)| {
                Engine::load(&plan.config, shard, &plan.kv, options, model, collective, &|_| {}).expect("a loadable shard")
            };
            stage.shards.iter().zip(joined(layout.tensor)).map(load).collect()
        });
        // Blocks in an order of no meaning.
        let mut noise = Noise::new(99);
        let mut shuffled = |blocks: usize| {
            let mut free: Vec<BlockId> = (0..blocks as BlockId).collect();
            (1..blocks).for_each(|i| free.swap(i, noise.below(i + 1)));
            free
        };
        let free = plan.kv.groups.iter().map(|g| shuffled(g.blocks)).collect();
        Self { engines: engines.collect(), steps: 0, frees: Vec::new(), places: HashMap::new(), free, plan }
    }

    /// Loads an adapter on every engine, and puts it into a slot.
    pub(crate) fn bind(&mut self, slot: u32, adapter: &Lora) {
        for (stage, engines) in self.plan.stages.iter().zip(&mut self.engines) {
            for (shard, engine) in stage.shards.iter().zip(engines) {
                let part = adapter.header.of(&self.plan.config, shard);
                let loaded = Adapter::load(&self.plan.config, shard, &part, adapter).expect("a loadable adapter");
                assert_eq!(loaded.bytes(), part.weight_bytes());
                engine.bind_adapter(slot, Arc::new(loaded)).expect("an adapter for this shard");
            }
        }
    }

    /// The step of some parts, each at its sequence's next position, with new blocks as needed.
    pub(crate) fn step(&mut self, parts: &[Part]) -> Step {
        self.steps += 1;
        let mut step = Step { id: self.steps, frees: std::mem::take(&mut self.frees), ..Step::default() };
        for part in parts {
            let groups = self.plan.kv.groups.len();
            let place = self.places.entry(part.sequence).or_insert_with(|| Place { fed: 0, blocks: vec![Vec::new(); groups] });
            let end = place.fed + part.ids.len();
            let mut tables = Vec::new();
            for (group, (blocks, free)) in place.blocks.iter_mut().zip(&mut self.free).enumerate() {
                let first = blocks.len();
                while blocks.len() < end.div_ceil(BLOCK_TOKENS) {
                    blocks.push(free.pop().expect("a free block"));
                }
                if blocks.len() > first {
                    tables.push(TableChange { group: group as u32, first: first as u32, blocks: blocks[first..].to_vec() });
                }
            }
            step.sequences.push(SequenceStep {
                sequence: part.sequence,
                first_position: place.fed as u32,
                input: Input::Ids(part.ids.clone()),
                tables,
                wants: part.wants.clone(),
                begin: part.begin.clone().map(Box::new),
                adapter: part.adapter,
                second: part.second as u32,
            });
            place.fed = end;
        }
        step
    }

    /// Runs a step of parts.
    pub(crate) fn run(&mut self, parts: &[Part]) -> Vec<Output> {
        let step = self.step(parts);
        self.run_step(&step, &mut NoMasks).expect("a valid step")
    }

    /// Runs a step through all stages and ranks.
    pub(crate) fn run_step(&mut self, step: &Step, masks: &mut (dyn MaskSource + Send)) -> Result<Vec<Output>, StepError> {
        let mut hidden = Vec::new();
        let last = self.engines.len() - 1;
        let masks = Mutex::new((masks, HashMap::new()));
        for (stage, ranks) in self.engines.iter_mut().enumerate() {
            let mut results: Vec<Result<StageOutput, StepError>> = thread::scope(|scope| {
                let hidden = &hidden;
                let mut started = Vec::new();
                for engine in ranks.iter_mut() {
                    let mut masks = EachRank(&masks);
                    started.push(scope.spawn(move || {
                        let output = match stage == last {
                            true => engine.run(step, hidden, &mut masks),
                            false => engine.run(step, hidden, &mut NoMasks),
                        }?;
                        engine.multiply().map(|()| output)
                    }));
                }
                started.into_iter().map(|thread| thread.join().expect("no panic")).collect()
            });
            let rest = results.split_off(1);
            match results.remove(0)? {
                StageOutput::Outputs(outputs) => {
                    for other in rest {
                        assert_eq!(other?, StageOutput::Outputs(Vec::new()));
                    }
                    return Ok(outputs);
                }
                StageOutput::Question(question) => {
                    for other in rest {
                        assert_eq!(other?, StageOutput::Question(question.clone()));
                    }
                    return self.finish(&question);
                }
                StageOutput::Hidden(states) => {
                    for other in rest {
                        let StageOutput::Hidden(other) = other? else { panic!("ranks of different stages") };
                        assert!(bits(&other) == bits(&states), "ranks have different hidden states");
                    }
                    hidden = states;
                }
            }
        }
        panic!("no last stage")
    }

    /// The results of a step whose logits the first stage is asked for.
    pub(crate) fn finish(&mut self, question: &Question) -> Result<Vec<Output>, StepError> {
        let parts = self.engines[0].iter_mut().map(|engine| engine.lend(question)).collect::<Result<Vec<_>, _>>()?;
        let last = self.engines.len() - 1;
        self.engines[last][0].finish(question.step, &parts)
    }

    /// Drops a sequence with the next step; its blocks are used again.
    pub(crate) fn free(&mut self, sequence: SequenceId) {
        self.frees.push(sequence);
        let place = self.places.remove(&sequence).expect("a known sequence");
        for (free, blocks) in self.free.iter_mut().zip(place.blocks) {
            free.extend(blocks);
        }
    }

    /// Sets a sequence's next position, as after drafts that were refused.
    pub(crate) fn rewind(&mut self, sequence: SequenceId, position: usize) {
        self.places.get_mut(&sequence).expect("a known sequence").fed = position;
    }

    /// Draws `count` tokens after `prompt` for a new sequence.
    pub(crate) fn generate(&mut self, sequence: SequenceId, prompt: &[TokenId], sampling: &Sampling, count: usize) -> Vec<OutputValue> {
        let mut part = Part::new(sequence, prompt).begin(prompt, prompt.len(), sampling).sample();
        let mut values = Vec::new();
        while values.len() < count {
            let output = self.run(&[part]).pop().expect("one output");
            part = Part::new(sequence, &[token(&output.value)]).sample();
            values.push(output.value);
        }
        values
    }
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The token of a draw.
pub(crate) fn token(value: &OutputValue) -> TokenId {
    match value {
        OutputValue::Token { id, .. } => *id,
        other => panic!("{other:?} in place of a token"),
    }
}

pub(crate) fn tokens(values: &[OutputValue]) -> Vec<TokenId> {
    values.iter().map(token).collect()
}

/// The bits of each output's logits, by position.
pub(crate) fn logits(outputs: &[Output]) -> Vec<(SequenceId, u32, Vec<u32>)> {
    let of = |o: &Output| match &o.value {
        OutputValue::Logits(logits) => (o.sequence, o.position, bits(logits)),
        other => panic!("{other:?} in place of logits"),
    };
    outputs.iter().map(of).collect()
}

/// Ids of a prompt.
pub(crate) fn prompt(seed: u64, len: usize, vocab: usize) -> Vec<TokenId> {
    let mut noise = Noise::new(seed);
    (0..len).map(|_| noise.below(vocab) as TokenId).collect()
}
