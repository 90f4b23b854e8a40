//! One sequence in the scheduler: what is known of it, and how far it has come.

use std::{collections::VecDeque, sync::Arc};

use plan::{
    shard::BLOCK_TOKENS,
    step::{BlockId, Logprobs, Mask, Sampling, SequenceId, TokenId, Want},
};

use super::{lookup::Lookup, prefix::BlockHash, trust::Trust};
use crate::grammar::Constraint;

/// What a scheduler is asked to run. A resumed sequence brings what was emitted before.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Prompt ids, at least one.
    pub prompt: Arc<[TokenId]>,
    /// Ids emitted before (when a stream goes on after it was lost or moved).
    pub emitted: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Most tokens to emit, those in `emitted` included. 0 runs the prompt alone.
    pub max_tokens: u32,
    /// A token from this list ends the sequence.
    pub end_ids: Arc<[TokenId]>,
    /// `Some(n)`: score prompt tokens 1.. with n alternatives.
    pub score_prompt: Option<u32>,
    /// Results wanted at absolute positions (`offset`) of the prompt, ascending; each is an output event.
    pub wants: Arc<[Want]>,
    /// All logits wherever a token is drawn, as an output event before the token.
    pub logits: bool,
    /// Most ids in one step.
    pub chunk: Option<usize>,
    /// Numerics id of its adapter; empty: the bare model.
    pub adapter: Arc<str>,
    /// Separates prefix caches of different clients.
    pub salt: Vec<u8>,
    /// Offset in the prompt at which the second text of a pair begins; 0: there is one text.
    pub second: u32,
    /// What the output must match. Each draw then waits for its mask: see [`super::Scheduler::set_mask`].
    pub constraint: Option<Constraint>,
}

impl Submission {
    /// A generation of at most `max_tokens` tokens after `prompt`, with nothing special.
    pub fn generate(prompt: Arc<[TokenId]>, sampling: Sampling, max_tokens: u32, end_ids: Arc<[TokenId]>) -> Self {
        Self {
            prompt,
            emitted: Vec::new(),
            sampling,
            max_tokens,
            end_ids,
            score_prompt: None,
            wants: Arc::new([]),
            logits: false,
            chunk: None,
            adapter: Arc::default(),
            salt: Vec::new(),
            second: 0,
            constraint: None,
        }
    }

    /// An encoder's reading of `ids`, for what is wanted of them.
    pub fn encode(ids: Arc<[TokenId]>, second: u32, wants: Arc<[Want]>) -> Self {
        Self { wants, second, ..Self::generate(ids, Sampling::default(), 0, Arc::new([])) }
    }
}

/// One group's block table of a sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    /// Entry of `blocks[0]`; those before it were given back.
    pub(super) first: usize,
    /// Blocks held.
    pub(super) blocks: VecDeque<BlockId>,
    /// Entries below this were told to the workers.
    pub(super) announced: usize,
}

impl Table {
    /// One past the last entry.
    pub(super) fn end(&self) -> usize {
        self.first + self.blocks.len()
    }
}

/// Where a sequence stands in the present session.
#[derive(Clone, Debug)]
pub(super) struct Admission {
    /// Its number for the workers; a new one each time it is admitted.
    pub(super) id: SequenceId,
    /// One table per KV group.
    pub(super) tables: Vec<Table>,
    /// Positions whose input was sent, drafts too, or found in the cache.
    pub(super) sent: usize,
    /// Positions whose step was replied to, or found in the cache.
    pub(super) confirmed: usize,
    /// Whole blocks whose hash was offered to the cache.
    pub(super) hashed: usize,
    /// Whether the workers know it.
    pub(super) begun: bool,
    /// Tokens being drawn in steps not yet replied to; those that drafts may add are not counted.
    pub(super) pending: usize,
    /// Drafts in a step not yet replied to.
    pub(super) drafted: usize,
    /// The last step it was in.
    pub(super) last_step: u64,
    /// The mask that the workers were sent last.
    pub(super) mask: Option<Arc<Mask>>,
}

/// A sequence, waiting or running.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) ticket: u64,
    pub(super) submission: Submission,
    /// Every known id: prompt, then emitted.
    pub(super) ids: Vec<TokenId>,
    /// Hashes of whole known blocks, as far as they were needed.
    pub(super) hashes: Vec<BlockHash>,
    pub(super) root: BlockHash,
    /// Slot of its adapter.
    pub(super) slot: u32,
    /// Scores of prompt tokens 1.. so far; the next one is computed at position `scores.len()`.
    pub(super) scores: Vec<Logprobs>,
    /// Index of the first entry of `submission.wants` without a result.
    pub(super) next_want: usize,
    /// Whether the prompt was reported as processed.
    pub(super) prompt_reported: bool,
    /// Tokens found in the cache when it was first admitted.
    pub(super) cached: usize,
    /// Whether it was admitted before.
    pub(super) readmitted: bool,
    /// What it may say next.
    pub(super) lookup: Lookup,
    /// What the draft model's guesses of it are worth.
    pub(super) trust: Trust,
    /// The mask of the draw after so many emitted tokens.
    pub(super) mask: Option<(usize, Arc<Mask>)>,
}

impl Sequence {
    pub(super) fn new(ticket: u64, submission: Submission, slot: u32, revision: &[u8]) -> Self {
        let mut ids = Vec::with_capacity(submission.prompt.len() + submission.emitted.len() + 64);
        ids.extend_from_slice(&submission.prompt);
        ids.extend_from_slice(&submission.emitted);
        let root = BlockHash::root(revision, &submission.adapter, &submission.salt);
        Self {
            ticket,
            ids,
            hashes: Vec::new(),
            root,
            slot,
            scores: Vec::new(),
            next_want: 0,
            prompt_reported: false,
            cached: 0,
            readmitted: false,
            lookup: Lookup::default(),
            trust: Trust::default(),
            mask: None,
            submission,
        }
    }

    pub(super) fn emitted(&self) -> usize {
        self.ids.len() - self.submission.prompt.len()
    }

    /// Whether drafts may follow it: all logits at each would be many bytes for what may be refused, and what a constraint leaves open no
    /// guess knows.
    pub(super) fn may_be_drafted(&self) -> bool {
        !self.submission.logits && self.submission.constraint.is_none()
    }

    /// Whether its next draw waits for a mask.
    pub(super) fn lacks_mask(&self) -> bool {
        self.submission.constraint.is_some() && self.mask.as_ref().is_none_or(|(at, _)| *at != self.emitted())
    }

    /// Tokens that may be drawn after those known and pending.
    pub(super) fn room(&self, pending: usize, context: usize) -> usize {
        let by_count = (self.submission.max_tokens as usize).saturating_sub(self.emitted() + pending);
        by_count.min(context.saturating_sub(self.ids.len() + pending))
    }

    /// First position whose result is still wanted; the cache is not used from there on.
    pub(super) fn first_wanted(&self) -> usize {
        let score = match self.submission.score_prompt {
            Some(_) if !self.prompt_reported && self.scores.len() + 1 < self.submission.prompt.len() => self.scores.len(),
            _ => usize::MAX,
        };
        let explicit = self.submission.wants.get(self.next_want).map_or(usize::MAX, |w| w.offset as usize);
        score.min(explicit)
    }

    /// Makes sure that `hashes` covers the first `blocks` whole blocks.
    pub(super) fn hash_blocks(&mut self, blocks: usize) {
        while self.hashes.len() < blocks {
            let at = self.hashes.len();
            let before = at.checked_sub(1).map_or(self.root, |i| self.hashes[i]);
            self.hashes.push(before.next(&self.ids[at * BLOCK_TOKENS..(at + 1) * BLOCK_TOKENS]));
        }
    }
}
