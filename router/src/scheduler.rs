//! Which tokens run when and where their KV entries lie: admission, batches, block tables, prefix cache, pre-emption.
//!
//! Pure and synchronous: no clock, no I/O, no tasks. Whoever owns it calls [`Scheduler::next_step`] while it returns steps,
//! sends them in order, and hands every reply to [`Scheduler::reply`]. Workers execute steps in order, so a block given back
//! by the steps already sent can be used again in the very next one.
//!
//! # Policy
//!
//! - **Decodes come first**, each step; prompts take what is left of its token budget, in chunks. So a long prompt slows running
//!   streams by the time of one full step at most, and the budget (`maxBatchTokens`) is the knob between their pace and the
//!   prompt's. Chunks change no bits.
//! - **Micro-batches.** With one stage every decoding sequence is in every step, and the next step is sent before the tokens of
//!   the last are back. With `s` stages a step takes one s-th of them, those that waited longest first: a token's way is then
//!   `s` stages of `weights + share`, which fewer steps would not shorten and more would lengthen by another reading of the
//!   weights. One step more than there are stages is in flight, so that no stage waits for the router.
//! - **A prompt that is alone** in a pipeline goes in pieces of what is left of it, so that the stages work on it at the same time.
//! - **Prompts share.** The oldest prompt under way gets at least half of what decodes leave; the other half goes to prompts
//!   behind it, new ones first, then those that lack least. A short prompt thus passes a long one, which it slows by half at
//!   most, and since the oldest always goes on, none starves. What the others do not need is the oldest's.
//! - **Admission** is by arrival, when there are blocks for the whole prompt; a prompt whose next block another sequence is
//!   just computing waits for it. While a running sequence lacks blocks, none is admitted.
//! - **Encoders** have no KV cache: a sequence is in one step, whole, and waits for one with room for it.
//! - **Drafts** ([`Scheduler::set_prompt_lookup`]): where a sequence repeats itself, ids that are guessed to come next are verified in one
//!   step, while rows are few and no prompt has work. A sequence waits for its token then, and with one stage the others with it.
//!   Drafts take no block that another sequence lacks, and draw no token that would not have been drawn.
//! - **A draft model** ([`Scheduler::set_draft_model`]) guesses where it is trusted more than the lookup, and its steps are worth their time. A
//!   sequence waits for its guess too, but not for what the draft model has yet to read of it.
//! - **Masks** ([`Scheduler::set_mask`]): what a constrained sequence may draw follows from the token before, so it waits for that token, and then
//!   for its mask, while the others go on. It drafts nothing: what its grammar leaves open is what no other place says.
//! - **Blocks that run out** are taken from the youngest sequence. It keeps its place in the queue and goes on later from
//!   prompt and emitted ids.
//!
//! ```text
//! submit ─► waiting (by arrival) ─► running: prefill chunks ─► decode ─► finished
//!              ▲                        │ blocks ran out: the youngest goes back
//!              └────────────────────────┘
//! ```

mod batch;
mod blocks;
mod completion;
mod drafter;
mod drafts;
mod lookup;
mod prefix;
mod sequence;
mod sizes;
#[cfg(test)]
mod tests;
mod trust;
mod worth;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use plan::{
    fleet::{FleetDraft, ReplicaLimits},
    shard::BLOCK_TOKENS,
    step::{Logprobs, Mask, Output, SequenceId, Step, TokenId},
};

pub use blocks::PrefixChange;
pub use prefix::BlockHash;
pub use sequence::Submission;
pub use sizes::StepSizes;

use blocks::BlockPool;
use drafter::Drafter;
use sequence::{Admission, Sequence, Table};

use crate::edge::FinishReason;

/// Settings of a scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// What the replica can hold.
    pub limits: ReplicaLimits,
    /// Pipeline stages, at least 1; up to one step more than that is in flight.
    pub stages: usize,
    /// Goes into every block's hash: model revision and numerics.
    pub revision: Vec<u8>,
}

/// Something that happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The number it was submitted under.
    pub ticket: u64,
    /// What.
    pub kind: EventKind,
}

/// What happens to sequences. `Finished` and `Failed` are the last of theirs.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// It entered a batch for the first time.
    Started,
    /// The whole prompt was processed.
    Prompt {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
        /// Scores of prompt tokens 1.. when asked for.
        scores: Vec<Logprobs>,
    },
    /// The next token.
    Token {
        /// Its id.
        id: TokenId,
        /// Present when asked for.
        logprobs: Option<Logprobs>,
    },
    /// A result that was wanted.
    Output(Output),
    /// Done.
    Finished(FinishReason),
    /// This sequence cannot go on; the others can.
    Failed(String),
}

/// A reply that does not fit the step it answers. The session is to be ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// Replies come in the order of steps.
    #[error("reply to step {got}, expected {expected:?}")]
    Order {
        /// The step replied to.
        got: u64,
        /// The oldest step in flight.
        expected: Option<u64>,
    },
    /// Too few, too many or other results than wanted.
    #[error("step {step}: {detail}")]
    Outputs {
        /// The step.
        step: u64,
        /// What was expected and what came.
        detail: String,
    },
}

/// Counters since the scheduler was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens of sequences admitted for the first time.
    pub prompt_tokens: u64,
    /// Tokens looked up in the prefix cache, on first admission.
    pub prefix_query_tokens: u64,
    /// Tokens found there.
    pub prefix_hit_tokens: u64,
    /// Sequences sent back to the queue.
    pub preemptions: u64,
    /// Times that drafts of a sequence were verified.
    pub drafts: u64,
    /// Tokens in them.
    pub draft_tokens: u64,
    /// Those that were what was drawn.
    pub accepted_tokens: u64,
    /// Steps made, by size.
    pub sizes: StepSizes,
}

impl std::ops::Add for Counters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            prefix_query_tokens: self.prefix_query_tokens + other.prefix_query_tokens,
            prefix_hit_tokens: self.prefix_hit_tokens + other.prefix_hit_tokens,
            preemptions: self.preemptions + other.preemptions,
            drafts: self.drafts + other.drafts,
            draft_tokens: self.draft_tokens + other.draft_tokens,
            accepted_tokens: self.accepted_tokens + other.accepted_tokens,
            sizes: self.sizes + other.sizes,
        }
    }
}

/// The scheduler of one replica's session.
#[derive(Debug)]
pub struct Scheduler {
    options: SchedulerOptions,
    pools: Vec<BlockPool>,
    /// By arrival; a pre-empted sequence keeps its place.
    waiting: BTreeMap<u64, Sequence>,
    /// By arrival, so the last is the youngest.
    running: BTreeMap<u64, (Sequence, Admission)>,
    tickets: HashMap<u64, u64>,
    /// Slots of the adapters that the workers have, by numerics id.
    adapters: HashMap<String, u32>,
    arrivals: u64,
    last_sequence: SequenceId,
    last_step: u64,
    /// Ended sequences the workers do not know to be ended yet.
    frees: Vec<SequenceId>,
    in_flight: VecDeque<StepRecord>,
    /// Blocks that a running sequence is computing: another one that would share them waits rather than compute them too.
    computing: HashMap<BlockHash, SequenceId>,
    /// In the last step a running sequence found no block.
    starved: bool,
    /// Most tokens drafted for a sequence in a step; 0: none.
    prompt_lookup: usize,
    /// The draft model, while there is one.
    drafter: Option<Drafter>,
    events: Vec<Event>,
    counters: Counters,
}

/// What was sent in a step.
#[derive(Debug)]
struct StepRecord {
    id: u64,
    entries: Vec<Entry>,
    /// Slots of adapters that it names.
    slots: Vec<u32>,
}

/// One sequence's part of a step that was sent.
#[derive(Debug)]
struct Entry {
    arrival: u64,
    sequence: SequenceId,
    /// One past the last position of its input that is no draft.
    end: usize,
    /// Results before the draw, in order.
    results: Vec<Purpose>,
    /// Whether a token is drawn at the last input token, and at each draft behind it.
    draws: bool,
    /// Ids that are guessed to follow, which were run too.
    drafts: Vec<TokenId>,
    /// The draft model guessed them.
    by_model: bool,
}

/// Where a result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Score,
    Want,
    Logits,
}

impl Scheduler {
    /// A scheduler with an empty cache.
    ///
    /// # Panics
    /// If `stages` or the batch limits are 0.
    pub fn new(mut options: SchedulerOptions) -> Self {
        let limits = &mut options.limits;
        assert!(options.stages > 0 && limits.max_batch_tokens > 0 && limits.max_batch_sequences > 0);
        limits.prefix_caching &= !limits.is_encoder();
        let limits = &options.limits;
        let logged = limits.kv.groups.iter().position(|g| g.window.is_none()).unwrap_or(0);
        let pools = limits.kv.groups.iter().enumerate().map(|(i, g)| BlockPool::new(g.blocks, i == logged)).collect();
        Self {
            options,
            pools,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            tickets: HashMap::new(),
            adapters: HashMap::new(),
            arrivals: 0,
            last_sequence: 0,
            last_step: 0,
            frees: Vec::new(),
            in_flight: VecDeque::new(),
            computing: HashMap::new(),
            starved: false,
            prompt_lookup: 0,
            drafter: None,
            events: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Queues a sequence under `ticket`, a number not in use.
    ///
    /// # Errors
    /// When it can never run here: an empty prompt, one that leaves no room in the context or does not fit the KV cache.
    pub fn submit(&mut self, ticket: u64, submission: Submission) -> Result<(), String> {
        let limits = &self.options.limits;
        let known = submission.prompt.len() + submission.emitted.len();
        if submission.prompt.is_empty() {
            return Err("the prompt is empty, expected at least one token".to_owned());
        }
        if limits.is_encoder() {
            if known > limits.max_batch_tokens {
                return Err(format!(
                    "{known} tokens do not fit a step of {} tokens, in which an encoder reads all of them",
                    limits.max_batch_tokens
                ));
            }
            if submission.max_tokens > 0 || submission.score_prompt.is_some() {
                return Err("the model is an encoder, which draws and scores no tokens".to_owned());
            }
        }
        if known > limits.max_context || (known == limits.max_context && submission.max_tokens > 0) {
            return Err(format!("{known} tokens do not fit the context of {} tokens", limits.max_context));
        }
        if submission.sampling.masked != submission.constraint.is_some() {
            return Err("constrained drawing needs a grammar, and a grammar constrained drawing".to_owned());
        }
        let blocks = (known + 1).div_ceil(BLOCK_TOKENS);
        if let Some(group) = limits.kv.groups.iter().find(|g| g.window.is_none() && g.blocks < blocks) {
            return Err(format!("{known} tokens need {blocks} KV blocks, there are {}", group.blocks));
        }
        let slot = match self.adapters.get(&*submission.adapter) {
            Some(slot) => *slot,
            None if submission.adapter.is_empty() => 0,
            None => return Err(format!("its adapter {} is not loaded", submission.adapter)),
        };
        self.arrivals += 1;
        self.tickets.insert(ticket, self.arrivals);
        self.waiting.insert(self.arrivals, Sequence::new(ticket, submission, slot, &self.options.revision));
        Ok(())
    }

    /// The mask of a sequence's draw after `emitted` tokens. Until it is there, the sequence is in no step that draws, and the others go on
    /// without it. What comes for another draw, or for a sequence that is not here, is ignored.
    pub fn set_mask(&mut self, ticket: u64, emitted: usize, mask: Mask) {
        let Some(arrival) = self.tickets.get(&ticket) else { return };
        let running = self.running.get_mut(arrival).map(|(sequence, _)| sequence);
        let Some(sequence) = running.or_else(|| self.waiting.get_mut(arrival)) else { return };
        if sequence.emitted() == emitted {
            sequence.mask = Some((emitted, Arc::new(mask)));
        }
    }

    /// Ends a sequence that has no next mask, for the reason that `message` gives.
    pub fn refuse(&mut self, ticket: u64, message: String) {
        if let Some(arrival) = self.tickets.get(&ticket).copied() {
            self.fail(arrival, message);
        }
    }

    /// From now on at most `most` tokens of a sequence are drafted in a step; 0 (what it begins with): none. Drafts change no token.
    pub fn set_prompt_lookup(&mut self, most: usize) {
        self.prompt_lookup = most;
    }

    /// From now on an empty worker of a draft model is there, or none. Drafts change no token.
    pub fn set_draft_model(&mut self, draft: Option<&FleetDraft>) {
        self.drafter = draft.map(Drafter::new);
    }

    /// Whether a draft model is there.
    pub fn has_draft_model(&self) -> bool {
        self.drafter.is_some()
    }

    /// The next step to send to the draft model's worker, or `None` when nothing can run there until a reply comes, or a step is made. Called
    /// when [`Scheduler::next_step`] has no more. At most two steps are in flight.
    pub fn next_draft_step(&mut self) -> Option<Step> {
        self.drafter.as_mut()?.next_step(&self.running)
    }

    /// Takes the results of the oldest step in flight there.
    ///
    /// # Errors
    /// When the reply does not answer that step. The draft model's session is then to be ended.
    pub fn draft_reply(&mut self, step: u64, outputs: Vec<Output>) -> Result<(), ReplyError> {
        match &mut self.drafter {
            Some(drafter) => drafter.reply(step, outputs),
            None => Err(ReplyError::Order { got: step, expected: None }),
        }
    }

    /// The draft model takes too long: until it has answered, nobody waits for it.
    pub fn go_on_without_drafts(&mut self) {
        if let Some(drafter) = &mut self.drafter {
            drafter.set_late();
        }
    }

    /// The workers have an adapter in `slot`, from 1 on: sequences may name it by its numerics id.
    pub fn bind(&mut self, adapter: &str, slot: u32) {
        self.adapters.insert(adapter.to_owned(), slot);
    }

    /// No further sequence may name an adapter; those that did go on.
    pub fn unbind(&mut self, adapter: &str) {
        self.adapters.remove(adapter);
    }

    /// Whether a sequence may name an adapter.
    pub fn has_adapter(&self, adapter: &str) -> bool {
        self.adapters.contains_key(adapter)
    }

    /// Whether a sequence that is here, or a step in flight, names a slot.
    pub fn uses(&self, slot: u32) -> bool {
        let sequences = self.waiting.values().chain(self.running.values().map(|(sequence, _)| sequence));
        sequences.map(|s| s.slot).chain(self.in_flight.iter().flat_map(|step| step.slots.iter().copied())).any(|used| used == slot)
    }

    /// Drops a sequence: it is in no further step, and the workers learn it with the next one. Unknown tickets are ignored.
    pub fn cancel(&mut self, ticket: u64) {
        let Some(arrival) = self.tickets.remove(&ticket) else { return };
        self.waiting.remove(&arrival);
        self.evict(arrival);
    }

    /// Tickets of every sequence here, in order of arrival.
    pub fn tickets(&self) -> Vec<u64> {
        let mut all: Vec<(u64, u64)> = self.tickets.iter().map(|(ticket, arrival)| (*arrival, *ticket)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, ticket)| ticket).collect()
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Changes of the prefix cache since the last call (of the first full-attention group; window groups hold less).
    pub fn take_prefix_changes(&mut self) -> Vec<PrefixChange> {
        self.pools.iter_mut().flat_map(BlockPool::take_changes).collect()
    }

    /// Sequences waiting.
    pub fn queued(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences in batches.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Steps sent and not replied to.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Fraction of the fullest group's blocks that sequences hold, 0 to 1.
    pub fn kv_used(&self) -> f32 {
        self.pools.iter().map(|p| p.used() as f32 / p.total().max(1) as f32).fold(0.0, f32::max)
    }

    /// Counters so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Checks that every block is free, used or cached, that counts agree with what sequences hold, and that no block which a
    /// sequence may still write to is held by another.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.drafter.as_ref().map_or(Ok(()), Drafter::check)?;
        for (g, pool) in self.pools.iter().enumerate() {
            let mut held: HashMap<_, u32> = HashMap::new();
            for (_, admission) in self.running.values() {
                for block in &admission.tables[g].blocks {
                    *held.entry(*block).or_default() += 1;
                }
            }
            pool.check(&held).map_err(|e| format!("group {g}: {e}"))?;
            for (arrival, (_, admission)) in &self.running {
                let table = &admission.tables[g];
                let written = (admission.sent - admission.drafted) / BLOCK_TOKENS;
                for entry in table.first.max(written)..table.end() {
                    let block = table.blocks[entry - table.first];
                    if held.get(&block).copied().unwrap_or(0) != 1 {
                        return Err(format!("group {g}: sequence {arrival} may write to block {block}, which another holds"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether sequences run whole, in one step each, and nothing is kept of them.
    fn reads_whole(&self) -> bool {
        self.options.limits.is_encoder()
    }

    /// Takes a running sequence out and gives its blocks back.
    fn evict(&mut self, arrival: u64) -> Option<Sequence> {
        let (sequence, admission) = self.running.remove(&arrival)?;
        if let Some(drafter) = &mut self.drafter {
            drafter.forget(arrival);
        }
        if admission.begun {
            self.frees.push(admission.id);
        }
        for (table, pool) in admission.tables.iter().zip(&mut self.pools) {
            // From the back, so that of a cached prefix the head is evicted last.
            for block in table.blocks.iter().rev() {
                pool.release(*block);
            }
        }
        for hash in &sequence.hashes {
            self.stop_computing(*hash, admission.id);
        }
        Some(sequence)
    }

    fn stop_computing(&mut self, hash: BlockHash, by: SequenceId) {
        if self.computing.get(&hash) == Some(&by) {
            self.computing.remove(&hash);
        }
    }

    /// Sends the youngest running sequence that arrived after `than` back to the queue, unless it is in step `step`.
    fn preempt_younger(&mut self, than: u64, step: u64) -> bool {
        let younger = (Bound::Excluded(than), Bound::Unbounded);
        let found = self.running.range(younger).rev().find(|(_, (_, a))| a.last_step != step).map(|(arrival, _)| *arrival);
        let Some(arrival) = found else { return false };
        if let Some(mut sequence) = self.evict(arrival) {
            sequence.readmitted = true;
            self.counters.preemptions += 1;
            self.waiting.insert(arrival, sequence);
        }
        true
    }

    /// Ends a sequence that cannot go on.
    fn fail(&mut self, arrival: u64, message: String) {
        let sequence = self.evict(arrival).or_else(|| self.waiting.remove(&arrival));
        if let Some(sequence) = sequence {
            self.tickets.remove(&sequence.ticket);
            self.events.push(Event { ticket: sequence.ticket, kind: EventKind::Failed(message) });
        }
    }
}
