//! One KV group's pool of blocks: reference counts, the prefix cache's index, and least-recently-used eviction.
//!
//! A block is in exactly one of three states: free, used (by one or more sequences), or cached (its content is known by hash
//! and no sequence uses it). Only whole blocks whose ids are known carry a hash, and a block with a hash is never written
//! again while it has it: a sequence writes only into blocks that it alone uses.

use std::collections::{BTreeMap, HashMap};

use plan::step::BlockId;

use super::prefix::BlockHash;

/// What the prefix cache learnt or forgot, for whoever routes by prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixChange {
    /// A block with this hash is cached.
    Added(BlockHash),
    /// No block has this hash any more.
    Removed(BlockHash),
}

/// The blocks of one KV group.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    index: HashMap<BlockHash, BlockId>,
    /// Cached blocks by the time they were last used.
    idle: BTreeMap<u64, BlockId>,
    clock: u64,
    used: usize,
    changes: Option<Vec<PrefixChange>>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    references: u32,
    hash: Option<BlockHash>,
    /// Key in `idle`, when cached.
    idle_since: u64,
}

impl BlockPool {
    /// A pool of `total` free blocks; `log`: remember changes of the index for [`BlockPool::take_changes`].
    pub(super) fn new(total: usize, log: bool) -> Self {
        Self {
            blocks: vec![Block::default(); total],
            free: (0..total as BlockId).rev().collect(),
            index: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            used: 0,
            changes: log.then(Vec::new),
        }
    }

    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that sequences hold.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Blocks that can be allocated: free ones and cached ones.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A block for one sequence to write to; evicts the least recently used cached block when none is free.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.idle.pop_first()?;
                self.forget(id);
                id
            }
        };
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.references == 0 && block.hash.is_none());
        block.references = 1;
        self.used += 1;
        Some(id)
    }

    /// The block with this content, if there is one.
    pub(super) fn find(&self, hash: BlockHash) -> Option<BlockId> {
        self.index.get(&hash).copied()
    }

    /// Adds a reference to a block found by its hash.
    pub(super) fn share(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if block.references == 0 {
            self.idle.remove(&block.idle_since);
            self.used += 1;
        }
        block.references += 1;
    }

    /// Drops a reference. The block stays cached when its content is known, and is free otherwise.
    pub(super) fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.references > 0);
        block.references -= 1;
        if block.references > 0 {
            return;
        }
        self.used -= 1;
        if block.hash.is_some() {
            self.clock += 1;
            block.idle_since = self.clock;
            self.idle.insert(self.clock, id);
        } else {
            self.free.push(id);
        }
    }

    /// Records the content of a used block. The first block with a content stands for it; later ones stay without a hash.
    pub(super) fn register(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.references > 0);
        if block.hash.is_some() || self.index.contains_key(&hash) {
            return;
        }
        block.hash = Some(hash);
        self.index.insert(hash, id);
        if let Some(changes) = &mut self.changes {
            changes.push(PrefixChange::Added(hash));
        }
    }

    /// Changes of the index since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<PrefixChange> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn forget(&mut self, id: BlockId) {
        if let Some(hash) = self.blocks[id as usize].hash.take() {
            self.index.remove(&hash);
            if let Some(changes) = &mut self.changes {
                changes.push(PrefixChange::Removed(hash));
            }
        }
    }

    /// Checks that free + used + cached = total, and the counts against `references`, the number of holders of each block.
    ///
    /// # Errors
    /// Says which block is wrong, and how.
    pub(super) fn check(&self, references: &HashMap<BlockId, u32>) -> Result<(), String> {
        let (free, used, cached, total) = (self.free.len(), self.used, self.idle.len(), self.blocks.len());
        if free + used + cached != total {
            return Err(format!("{free} free + {used} used + {cached} cached blocks are not {total}"));
        }
        for (id, block) in self.blocks.iter().enumerate() {
            let id = id as BlockId;
            let held = references.get(&id).copied().unwrap_or(0);
            if held != block.references {
                return Err(format!("block {id} counts {} references, {held} sequences hold it", block.references));
            }
            if block.hash.is_some_and(|h| self.index.get(&h) != Some(&id)) {
                return Err(format!("the index does not name block {id} for its hash"));
            }
            let cached = block.references == 0 && block.hash.is_some();
            if cached != (self.idle.get(&block.idle_since) == Some(&id) && block.references == 0) {
                return Err(format!("block {id} is cached in one table only"));
            }
        }
        for id in &self.free {
            let block = &self.blocks[*id as usize];
            if block.references > 0 || block.hash.is_some() {
                return Err(format!("free block {id} is in use"));
            }
        }
        let held = references.values().filter(|n| **n > 0).count();
        if held != self.used {
            return Err(format!("{} blocks count as used, {held} are held", self.used));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_blocks_are_found_again_and_evicted_oldest_first() {
        let mut pool = BlockPool::new(3, true);
        let ids: Vec<_> = (0..3).map(|_| pool.allocate().expect("three blocks")).collect();
        assert_eq!(pool.allocate(), None);
        for (i, id) in ids.iter().enumerate() {
            pool.register(*id, BlockHash(i as u128));
            pool.release(*id);
        }
        assert_eq!((pool.used(), pool.available()), (0, 3));
        let found = pool.find(BlockHash(0)).expect("still cached");
        pool.share(found);
        let next = pool.allocate().expect("an idle block");
        assert_eq!(next, ids[1], "the least recently used of those that nobody holds");
        assert_eq!(pool.find(BlockHash(1)), None);
        assert!(pool.take_changes().contains(&PrefixChange::Removed(BlockHash(1))));
        pool.check(&HashMap::from([(found, 1), (next, 1)])).expect("consistent");
        assert!(pool.check(&HashMap::from([(found, 2), (next, 1)])).is_err(), "a wrong count is seen");
    }

    #[test]
    fn the_first_block_of_a_content_stands_for_it() {
        let mut pool = BlockPool::new(2, false);
        let (a, b) = (pool.allocate().expect("free"), pool.allocate().expect("free"));
        pool.register(a, BlockHash(7));
        pool.register(b, BlockHash(7));
        assert_eq!(pool.find(BlockHash(7)), Some(a));
        pool.release(b);
        assert_eq!(pool.free, [b], "the copy is free at once");
    }
}
