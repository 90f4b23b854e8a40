//! A replica without weights: it keeps, for every KV slot, which ids led there, checks every read against them, and draws
//! tokens from what it read. Steps cost virtual time by a simple model.
//!
//! A block that is shared wrongly, given away too early or not copied shows as an error at the first read, so running any
//! load through it tests the scheduler's block tables.

mod session;

use std::collections::HashMap;

use super::{AdapterAnswer, AdapterOrder};
use plan::{
    shard::{BLOCK_TOKENS, KvGeometry},
    step::{Begin, Input, Logprobs, Mask, Output, OutputValue, Sampling, SequenceId, SequenceStep, Step, TokenId, WantKind},
};
pub use session::{CostModel, Fault, Pipeline, SimulatedConnector, SimulatedReplica};

/// The tokens a simulated model draws: a function of the ids so far and the sampling settings, like a real one's. A bias of 100
/// forces a token and one of -100 bars it; every other setting changes what is drawn, by no law.
#[derive(Clone, Copy, Debug)]
pub struct SimulatedModel {
    /// Ids are below this.
    pub vocab: u32,
    /// Labels, where it is an encoder that classifies.
    pub labels: u32,
    /// Its text repeats itself after so many tokens, but for one token in sixteen; 0: it does not.
    pub period: u32,
}

impl SimulatedModel {
    /// The state before any id.
    pub const START: u64 = 0x243f_6a88_85a3_08d3;

    /// Source of an adapter that cannot be loaded.
    pub const BROKEN_ADAPTER: &str = "file:/broken";

    /// The state before any id with the adapter of this numerics id; empty: the bare model.
    pub fn start(adapter: &str) -> u64 {
        adapter.bytes().fold(Self::START, |state, byte| mix(state ^ u64::from(byte).wrapping_add(1)))
    }

    /// The state after one more id.
    pub fn advance(state: u64, id: TokenId) -> u64 {
        mix(state ^ u64::from(id).wrapping_add(1))
    }

    /// The token drawn in a state, at `position` (of the last id), after `emitted` tokens.
    pub fn draw(&self, state: u64, sampling: &Sampling, position: u32, emitted: u32) -> TokenId {
        self.draw_under(state, sampling, (position, emitted), None).unwrap_or(0)
    }

    /// The same under a mask; `None` where it allows no token.
    pub fn draw_under(&self, state: u64, sampling: &Sampling, (position, emitted): (u32, u32), mask: Option<&Mask>) -> Option<TokenId> {
        let with = |key: u64, values: &[f32]| values.iter().fold(key, |key, v| mix(key ^ u64::from(v.to_bits())));
        let mut key = 0;
        if sampling.temperature > 0.0 && sampling.top_k != 1 {
            key = mix(sampling.seed ^ mix(u64::from(sampling.choice) << 32 | u64::from(position)));
            key = with(key ^ u64::from(sampling.top_k), &[sampling.temperature, sampling.top_p, sampling.min_p]);
        }
        let penalties = [sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty];
        if penalties != [1.0, 0.0, 0.0] {
            // What is penalized depends on where the prompt ends.
            key = with(mix(key ^ u64::from(position + 1 - emitted)), &penalties);
        }
        let early = emitted < sampling.min_tokens;
        let barred = |id: TokenId| {
            mask.is_some_and(|mask| !allows(mask, id))
                || early && sampling.suppress.contains(&id)
                || sampling.logit_bias.iter().any(|(of, bias)| *of == id && *bias <= -100.0)
        };
        let forced = sampling.logit_bias.iter().find(|(id, bias)| *bias >= 100.0 && !barred(*id));
        let free = mix(state ^ key);
        let next = if self.period > 0 && free >> 60 > 0 { mix(u64::from((position + 1) % self.period)) } else { free };
        let mut id = forced.map_or_else(|| (next % u64::from(self.vocab)) as TokenId, |(id, _)| *id);
        for _ in 0..self.vocab {
            if !barred(id) {
                return Some(id);
            }
            id = (id + 1) % self.vocab;
        }
        None
    }

    /// Everything a generation alone would emit: at most `most` tokens, up to and including an end token.
    pub fn solo(&self, prompt: &[TokenId], sampling: &Sampling, most: usize, ends: &[TokenId]) -> Vec<TokenId> {
        self.solo_with("", prompt, sampling, most, ends)
    }

    /// The same with the adapter of this numerics id.
    pub fn solo_with(&self, adapter: &str, prompt: &[TokenId], sampling: &Sampling, most: usize, ends: &[TokenId]) -> Vec<TokenId> {
        let mut state = prompt.iter().fold(Self::start(adapter), |s, id| Self::advance(s, *id));
        let mut tokens = Vec::new();
        while tokens.len() < most {
            let position = (prompt.len() + tokens.len() - 1) as u32;
            let id = self.draw(state, sampling, position, tokens.len() as u32);
            tokens.push(id);
            if ends.contains(&id) {
                break;
            }
            state = Self::advance(state, id);
        }
        tokens
    }

    /// Everything a constrained generation alone would emit; `mask` gives the mask behind what was emitted.
    pub fn solo_under(
        &self,
        prompt: &[TokenId],
        sampling: &Sampling,
        most: usize,
        ends: &[TokenId],
        mut mask: impl FnMut(&[TokenId]) -> Mask,
    ) -> Vec<TokenId> {
        let mut state = prompt.iter().fold(Self::START, |s, id| Self::advance(s, *id));
        let mut tokens = Vec::new();
        while tokens.len() < most && tokens.last().is_none_or(|last| !ends.contains(last)) {
            let place = ((prompt.len() + tokens.len() - 1) as u32, tokens.len() as u32);
            let Some(id) = self.draw_under(state, sampling, place, Some(&mask(&tokens))) else { break };
            tokens.push(id);
            state = Self::advance(state, id);
        }
        tokens
    }

    fn logprobs(&self, state: u64, target: TokenId, top: u32) -> Logprobs {
        let of = |id: TokenId| -((mix(state ^ u64::from(id)) % 1000) as f32) / 100.0;
        let mut all: Vec<(TokenId, f32)> = (0..self.vocab.min(64)).map(|id| (id, of(id))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.truncate(top as usize);
        Logprobs { token: of(target), top: all }
    }

    /// Values of a vector that nothing cuts.
    pub const WIDTH: u32 = 8;

    /// The vector that a simulated encoder makes of a whole input, the second text of which begins at `second`.
    pub fn vector(&self, ids: &[TokenId], second: u32, kind: &WantKind) -> Vec<f32> {
        let state = ids.iter().fold(Self::START, |s, id| Self::advance(s, *id));
        let (pooling, width, normalize) = match kind {
            WantKind::Pooled(pooled) => (pooled.over as u64 + 1, Some(pooled.dimensions).filter(|n| *n > 0), pooled.normalize),
            _ => (0, Some(self.labels), false),
        };
        let value = |i: u32| (mix(state ^ mix(pooling << 48 | u64::from(second) << 32 | u64::from(i))) % 2001) as f32 / 1000.0 - 1.0;
        let values: Vec<f32> = (0..width.unwrap_or(Self::WIDTH)).map(value).collect();
        let length = values.iter().map(|x| x * x).sum::<f32>().sqrt();
        if normalize { values.iter().map(|x| x / length).collect() } else { values }
    }

    fn logits(&self, state: u64) -> Vec<f32> {
        (0..self.vocab).map(|id| (mix(state ^ u64::from(id)) % 4096) as f32 / 256.0).collect()
    }
}

fn allows(mask: &Mask, id: TokenId) -> bool {
    match mask {
        Mask::Unchanged => false,
        Mask::Ids(ids) => ids.binary_search(&id).is_ok(),
        Mask::Bits(bits) => bits.get(id as usize / 8).is_some_and(|byte| byte >> (id % 8) & 1 == 1),
    }
}

fn mix(x: u64) -> u64 {
    // The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a slot of a block holds: a position and the state after its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    position: u32,
    state: u64,
}

#[derive(Debug)]
struct Tracked {
    tables: Vec<Vec<Option<u32>>>,
    /// State after each id whose KV entry exists, and before the first.
    states: Vec<u64>,
    prompt_len: u32,
    sampling: Sampling,
    /// Ids of the next positions, when known from `begin`.
    begin_ids: Vec<TokenId>,
    /// Slot of its adapter.
    adapter: u32,
    drawn: HashMap<u64, TokenId>,
    /// The last mask, and the step whose draw it is for.
    mask: Option<(u64, Mask)>,
}

/// A worker's state as the steps it was sent make it, for all stages and ranks at once.
#[derive(Debug)]
pub struct SimulatedEngine {
    model: SimulatedModel,
    kv: KvGeometry,
    pools: Vec<Vec<[Option<Slot>; BLOCK_TOKENS]>>,
    sequences: HashMap<SequenceId, Tracked>,
    /// Numerics ids by slot.
    adapters: HashMap<u32, String>,
    last_step: u64,
    /// Check every slot that is read. On by default.
    pub verify: bool,
    /// Sequences may go on at an earlier position, as those of a draft model do. Off by default.
    pub goes_back: bool,
}

impl SimulatedEngine {
    /// An engine with empty pools.
    pub fn new(model: SimulatedModel, kv: KvGeometry) -> Self {
        let pools = kv.groups.iter().map(|g| vec![[None; BLOCK_TOKENS]; g.blocks]).collect();
        Self { model, kv, pools, sequences: HashMap::new(), adapters: HashMap::new(), last_step: 0, verify: true, goes_back: false }
    }

    /// Fills or empties a slot; the answer to a load.
    ///
    /// # Errors
    /// When a slot is filled that is full.
    pub fn order(&mut self, order: AdapterOrder) -> Result<Option<AdapterAnswer>, String> {
        match order {
            AdapterOrder::Load { slot, .. } if slot == 0 || self.adapters.contains_key(&slot) => Err(format!("slot {slot} is not empty")),
            AdapterOrder::Load { slot, adapter } if adapter.uri == SimulatedModel::BROKEN_ADAPTER => {
                Ok(Some(AdapterAnswer { slot, result: Err("there is none".to_owned()) }))
            }
            AdapterOrder::Load { slot, adapter } => {
                self.adapters.insert(slot, adapter.numerics);
                Ok(Some(AdapterAnswer { slot, result: Ok(()) }))
            }
            // A sequence that has ended may still be there: it is freed with the next step.
            AdapterOrder::Unload { slot } => {
                self.adapters.remove(&slot);
                Ok(None)
            }
        }
    }

    /// Sequences whose state is held.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Runs a step.
    ///
    /// # Errors
    /// When the step contradicts those before it, or a slot that is read holds anything but the sequence's own prefix.
    pub fn run(&mut self, step: &Step) -> Result<Vec<Output>, String> {
        if step.id != self.last_step + 1 {
            return Err(format!("step {} follows step {}", step.id, self.last_step));
        }
        self.last_step = step.id;
        for free in &step.frees {
            self.sequences.remove(free).ok_or_else(|| format!("step {} frees unknown sequence {free}", step.id))?;
        }
        for copy in &step.copies {
            let pool = &mut self.pools[copy.group as usize];
            pool[copy.to as usize] = pool[copy.from as usize];
        }
        for part in &step.sequences {
            self.write(part)?;
        }
        for (id, mask) in &step.masks {
            let tracked = self.sequences.get_mut(id).ok_or_else(|| format!("a mask of sequence {id}, which never began"))?;
            tracked.mask = match (mask, tracked.mask.take()) {
                (Mask::Unchanged, None) => return Err(format!("the first mask of sequence {id} is unchanged")),
                (Mask::Unchanged, Some((_, before))) => Some((step.id, before)),
                (mask, _) => Some((step.id, mask.clone())),
            };
        }
        let mut outputs = Vec::new();
        for part in &step.sequences {
            if self.verify {
                self.check_reads(part)?;
            }
            self.compute(step.id, part, &mut outputs)?;
        }
        Ok(outputs)
    }

    fn write(&mut self, part: &SequenceStep) -> Result<(), String> {
        let id = part.sequence;
        if let Some(begin) = &part.begin {
            let fresh = self.begin(begin, part.first_position, part.adapter)?;
            if self.sequences.insert(id, fresh).is_some() {
                return Err(format!("sequence {id} begins twice"));
            }
        }
        if self.kv.groups.is_empty() && !self.sequences.contains_key(&id) {
            // An encoder's sequences are whole in one step, without settings.
            let whole = Begin { ids: Vec::new(), prompt_len: 0, sampling: Sampling::default() };
            self.sequences.insert(id, self.begin(&whole, 0, part.adapter)?);
        }
        let tracked = self.sequences.get_mut(&id).ok_or_else(|| format!("sequence {id} never began"))?;
        if part.adapter != tracked.adapter || (part.adapter != 0 && !self.adapters.contains_key(&part.adapter)) {
            return Err(format!("sequence {id} of slot {} goes on with slot {}", tracked.adapter, part.adapter));
        }
        for change in &part.tables {
            let table = &mut tracked.tables[change.group as usize];
            let end = change.first as usize + change.blocks.len();
            if table.len() < end {
                table.resize(end, None);
            }
            for (i, block) in change.blocks.iter().enumerate() {
                table[change.first as usize + i] = Some(*block);
            }
        }
        let first = part.first_position as usize;
        if self.goes_back {
            tracked.states.truncate(first + 1);
        }
        if tracked.states.len() != first + 1 {
            return Err(format!("sequence {id} goes on at {first}, expected {}", tracked.states.len() - 1));
        }
        let ids = match &part.input {
            Input::Ids(ids) => ids.clone(),
            Input::Sampled { step, drafts } => {
                let drawn = tracked.drawn.remove(step).ok_or_else(|| format!("sequence {id} drew nothing in step {step}"))?;
                std::iter::once(drawn).chain(drafts.iter().copied()).collect()
            }
        };
        for (i, token) in ids.into_iter().enumerate() {
            let position = first + i;
            if tracked.begin_ids.get(position).is_some_and(|known| *known != token) {
                return Err(format!("sequence {id} began with another id at {position}"));
            }
            let state = SimulatedModel::advance(tracked.states[position], token);
            tracked.states.push(state);
            for (group, table) in tracked.tables.iter().enumerate() {
                let block = table.get(position / BLOCK_TOKENS).copied().flatten();
                let block = block.ok_or_else(|| format!("sequence {id} has no block for {position} in group {group}"))?;
                let slot = &mut self.pools[group][block as usize][position % BLOCK_TOKENS];
                *slot = Some(Slot { position: position as u32, state });
            }
        }
        Ok(())
    }

    fn begin(&self, begin: &Begin, first: u32, adapter: u32) -> Result<Tracked, String> {
        let numerics = match self.adapters.get(&adapter) {
            Some(numerics) => numerics,
            None if adapter == 0 => "",
            None => return Err(format!("a sequence names slot {adapter}, which is empty")),
        };
        let prefix = begin.ids.get(..first as usize).ok_or("a sequence begins behind its ids")?;
        let mut states = vec![SimulatedModel::start(numerics)];
        for id in prefix {
            states.push(SimulatedModel::advance(states[states.len() - 1], *id));
        }
        Ok(Tracked {
            tables: vec![Vec::new(); self.kv.groups.len()],
            states,
            prompt_len: begin.prompt_len,
            sampling: begin.sampling.clone(),
            begin_ids: begin.ids.clone(),
            adapter,
            drawn: HashMap::new(),
            mask: None,
        })
    }

    fn check_reads(&self, part: &SequenceStep) -> Result<(), String> {
        let id = part.sequence;
        let tracked = self.sequences.get(&id).ok_or_else(|| format!("sequence {id} never began"))?;
        let (first, end) = (part.first_position as usize, tracked.states.len() - 1);
        for (g, group) in self.kv.groups.iter().enumerate() {
            let from = group.window.map_or(0, |w| (first + 1).saturating_sub(w as usize));
            for position in from..end {
                let block = tracked.tables[g].get(position / BLOCK_TOKENS).copied().flatten();
                let block = block.ok_or_else(|| format!("sequence {id} reads {position} in group {g} without a block"))?;
                let slot = self.pools[g][block as usize][position % BLOCK_TOKENS];
                let expected = Slot { position: position as u32, state: tracked.states[position + 1] };
                if slot != Some(expected) {
                    return Err(format!("sequence {id} reads {slot:?} in block {block} of group {g}, expected {expected:?}"));
                }
            }
        }
        Ok(())
    }

    fn compute(&mut self, step: u64, part: &SequenceStep, outputs: &mut Vec<Output>) -> Result<(), String> {
        let id = part.sequence;
        let tracked = self.sequences.get_mut(&id).ok_or_else(|| format!("sequence {id} never began"))?;
        // Where drafts are verified: the positions that count, up to the first draw that is not the draft behind it.
        let drafting = part.wants.iter().filter(|want| want.kind == WantKind::Sample).count() > 1;
        let mut accepted = None;
        for want in &part.wants {
            let position = part.first_position + want.offset;
            let state = *tracked.states.get(position as usize + 1).ok_or_else(|| format!("sequence {id} wants behind its input"))?;
            let value = match &want.kind {
                WantKind::Sample => {
                    let emitted = position + 1 - tracked.prompt_len;
                    let mask = match &tracked.mask {
                        Some((of, mask)) if *of == step => Some(mask),
                        _ if tracked.sampling.masked => return Err(format!("sequence {id} draws in step {step} without its mask")),
                        _ => None,
                    };
                    let Some(token) = self.model.draw_under(state, &tracked.sampling, (position, emitted), mask) else {
                        outputs.push(Output { sequence: id, position, value: OutputValue::Failed("none is allowed".to_owned()) });
                        continue;
                    };
                    tracked.drawn.insert(step, token);
                    let follows = tracked.states.get(position as usize + 2) == Some(&SimulatedModel::advance(state, token));
                    if drafting && accepted.is_none() && !follows {
                        accepted = Some(position as usize + 1);
                    }
                    let logprobs = tracked.sampling.logprobs.map(|top| self.model.logprobs(state, token, top));
                    OutputValue::Token { id: token, logprobs }
                }
                WantKind::Score { target, top } => OutputValue::Score(self.model.logprobs(state, *target, *top)),
                WantKind::Logits => OutputValue::Logits(self.model.logits(state)),
                kind @ (WantKind::Pooled(_) | WantKind::Classes) => match &part.input {
                    Input::Ids(ids) => OutputValue::Vector(self.model.vector(ids, part.second, kind)),
                    Input::Sampled { .. } => return Err(format!("a vector is wanted of a token of sequence {id} that is not known")),
                },
            };
            outputs.push(Output { sequence: id, position, value });
        }
        if let Some(end) = accepted {
            // The sequence goes on there, whatever its owner makes of the draws.
            tracked.states.truncate(end + 1);
        }
        Ok(())
    }
}
