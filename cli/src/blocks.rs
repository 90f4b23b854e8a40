//! KV blocks for commands that make their own steps: a fixed set for each sequence, reused in a ring where a window allows it.

use plan::{
    shard::{BLOCK_TOKENS, KvGeometry},
    step::TableChange,
};

/// Blocks of a fixed number of sequences, each of at most a fixed length.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    /// Blocks of one sequence in each KV group.
    per_sequence: Vec<usize>,
}

/// The KV cache is too small for what was asked.
#[derive(Debug, thiserror::Error)]
#[error("KV group {group} has {got} blocks of {BLOCK_TOKENS} tokens, {sequences} sequences of {length} tokens need {need}")]
pub(crate) struct TooFewBlocks {
    group: usize,
    got: usize,
    need: usize,
    sequences: usize,
    length: usize,
}

impl Blocks {
    /// Blocks for `sequences` sequences of up to `length` tokens that grow by at most `chunk` tokens in a step.
    pub(crate) fn new(kv: &KvGeometry, sequences: usize, length: usize, chunk: usize) -> Result<Self, TooFewBlocks> {
        let mut per_sequence = Vec::with_capacity(kv.groups.len());
        for (group, pool) in kv.groups.iter().enumerate() {
            let whole = length.div_ceil(BLOCK_TOKENS);
            let each = match pool.window {
                // What a chunk writes and what its first token still sees, wherever they lie relative to block borders.
                Some(window) => whole.min((window as usize + chunk).div_ceil(BLOCK_TOKENS) + 1),
                None => whole,
            };
            let need = each * sequences;
            if need > pool.blocks {
                return Err(TooFewBlocks { group, got: pool.blocks, need, sequences, length });
            }
            per_sequence.push(each);
        }
        Ok(Self { per_sequence })
    }

    /// The table changes that the positions `first .. first + tokens` of the sequence in place `slot` (from 0) need.
    pub(crate) fn changes(&self, slot: usize, first: usize, tokens: usize) -> Vec<TableChange> {
        let entries = first.div_ceil(BLOCK_TOKENS)..(first + tokens).div_ceil(BLOCK_TOKENS);
        if entries.is_empty() {
            return Vec::new();
        }
        self.per_sequence
            .iter()
            .enumerate()
            .map(|(group, &each)| TableChange {
                group: group as u32,
                first: entries.start as u32,
                blocks: entries.clone().map(|entry| (slot * each + entry % each) as u32).collect(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plan::shard::{KvDType, KvGroup};

    fn geometry(window: Option<u32>, blocks: usize) -> KvGeometry {
        KvGeometry { dtype: KvDType::F32, groups: vec![KvGroup { window, layers: vec![0], blocks }] }
    }

    #[test]
    fn a_block_is_added_where_its_first_position_is_written() {
        let blocks = Blocks::new(&geometry(None, 6), 2, 48, 48).unwrap();
        assert_eq!(blocks.changes(1, 0, 17)[0].blocks, [3, 4]);
        assert!(blocks.changes(1, 17, 15).is_empty());
        let next = blocks.changes(1, 32, 1);
        assert_eq!((next[0].first, next[0].blocks.as_slice()), (2, [5].as_slice()));
    }

    #[test]
    fn too_small_a_cache_is_refused() {
        assert!(Blocks::new(&geometry(None, 6), 2, 49, 1).is_err());
    }

    #[test]
    fn no_live_position_of_a_window_loses_its_block() {
        for (window, chunk) in [(8, 1), (8, 7), (512, 64), (16, 16), (17, 33)] {
            let length = 2000;
            let blocks = Blocks::new(&geometry(Some(window as u32), 200), 1, length, chunk).unwrap();
            let mut table = vec![u32::MAX; length.div_ceil(BLOCK_TOKENS)];
            let mut held = std::collections::HashMap::new();
            let mut first = 0;
            while first < length {
                let tokens = chunk.min(length - first);
                for change in blocks.changes(0, first, tokens) {
                    for (entry, block) in (change.first as usize..).zip(change.blocks) {
                        table[entry] = block;
                        held.insert(block, entry);
                    }
                }
                for position in (first + 1).saturating_sub(window)..first + tokens {
                    let entry = position / BLOCK_TOKENS;
                    assert_eq!(held[&table[entry]], entry, "window {window} chunk {chunk} position {position}");
                }
                first += tokens;
            }
        }
    }
}
