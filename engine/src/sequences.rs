//! What a rank keeps of each sequence between steps: block tables, how far it was fed, and what the sampler needs.

use std::collections::HashMap;

use plan::{
    shard::{BLOCK_TOKENS, KvGeometry},
    step::{Begin, BlockId, Input, SequenceId, SequenceStep, Step, TokenId},
};

use crate::sampler::History;

/// A table entry without a block.
pub(crate) const HOLE: BlockId = BlockId::MAX;

/// One sequence.
#[derive(Debug, Default)]
pub(crate) struct Sequence {
    /// One block table per KV group: entry `i` is the block of positions `16 i ..`, or [`HOLE`].
    pub(crate) tables: Vec<Vec<BlockId>>,
    /// Positions whose KV entries exist (or were found in a cache), from 0.
    pub(crate) fed: usize,
    /// Slot of its adapter; 0: none.
    pub(crate) adapter: u32,
}

/// All sequences of a session.
#[derive(Debug)]
pub(crate) struct Sequences {
    pub(crate) by_id: HashMap<SequenceId, Sequence>,
    /// Sampling settings and ids, on the last stage once they came.
    pub(crate) histories: HashMap<SequenceId, History>,
    groups: usize,
    /// Whether this is the last stage, which keeps settings.
    last: bool,
    /// Whether this rank samples, and so keeps ids.
    samples: bool,
}

impl Sequences {
    /// No sequences.
    pub(crate) fn new(kv: &KvGeometry, last: bool, samples: bool) -> Self {
        Self { by_id: HashMap::new(), histories: HashMap::new(), groups: kv.groups.len(), last, samples }
    }

    /// Drops all sequences.
    pub(crate) fn clear(&mut self) {
        self.by_id.clear();
        self.histories.clear();
    }

    /// Applies a valid step: drops what it frees, sets tables, takes settings and ids.
    pub(crate) fn apply(&mut self, step: &Step) {
        for freed in &step.frees {
            self.by_id.remove(freed);
            self.histories.remove(freed);
        }
        for part in &step.sequences {
            let sequence = self.by_id.entry(part.sequence).or_default();
            sequence.tables.resize(self.groups, Vec::new());
            sequence.set_tables(part);
            let first = part.first_position as usize;
            sequence.fed = first + part.input.len();
            sequence.adapter = part.adapter;
            if self.last
                && let Some(begin) = &part.begin
            {
                let before = self.histories.remove(&part.sequence);
                self.histories.insert(part.sequence, self.begin(begin, before));
            }
            if self.samples
                && let (Some(history), Input::Ids(ids)) = (self.histories.get_mut(&part.sequence), &part.input)
            {
                history.feed(first, ids);
            }
        }
    }

    /// New settings and ids; the mask of the last draw stays in force.
    fn begin(&self, begin: &Begin, before: Option<History>) -> History {
        let ids: &[TokenId] = if self.samples { &begin.ids } else { &[] };
        let history = History::new(ids, begin.prompt_len as usize, begin.sampling.clone());
        match before {
            Some(before) => history.with_mask_of(before),
            None => history,
        }
    }
}

impl Sequence {
    fn set_tables(&mut self, part: &SequenceStep) {
        for change in &part.tables {
            let table = &mut self.tables[change.group as usize];
            let first = change.first as usize;
            let end = first + change.blocks.len();
            if table.len() < end {
                table.resize(end, HOLE);
            }
            table[first..end].copy_from_slice(&change.blocks);
        }
    }
}

/// Table entries that hold the positions a sequence reads and writes when its next positions are `first .. first + tokens`.
pub(crate) fn entries_needed(window: Option<u32>, first: usize, tokens: usize) -> std::ops::Range<usize> {
    let from = window.map_or(0, |w| (first + 1).saturating_sub(w as usize));
    from / BLOCK_TOKENS..(first + tokens).div_ceil(BLOCK_TOKENS)
}
